"""What a configuration stands for, built: network, views, optimizer and step."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jemjax.augment import ViewRecipe
from jemjax.data import Crop, Source, batches
from jemjax.data.pipeline import Batches
from jemjax.errors import UserError
from jemjax.methods import Optimization
from jemjax.runtime import quick_compilation
from jemjax.training.config.options import PretrainConfig
from jemjax.training.config.parts import make_network, make_recipe
from jemjax.training.step.branch import Images
from jemjax.training.step.optimizers import make_optimizer
from jemjax.training.step.sharding import (
    batch_sharding,
    make_mesh,
    shaped,
    state_sharding,
    to_devices,
)
from jemjax.training.step.state import TrainState, init_state
from jemjax.training.step.update import Step, make_train_step


class Setup(NamedTuple):
    """What a configuration stands for, built."""

    config: PretrainConfig
    mesh: Mesh
    network: nn.Module
    recipe: ViewRecipe
    optimizer: optax.GradientTransformation
    schedule: Callable[[ArrayLike], jax.Array]
    step: Step
    image_shape: tuple[int, int, int]
    crops: tuple[Crop, ...]
    """what the loader makes of images of several sizes; else it gives the images"""
    steps_per_epoch: float

    def init(self) -> TrainState:
        """The state before the first step, on the devices."""
        state, _ = self.shapes()
        init = jax.jit(
            self._init,
            out_shardings=jax.tree.map(lambda x: x.sharding, state),
            compiler_options=quick_compilation(),
        )
        return init(jax.random.key(self.config.seed))

    def _init(self, key: jax.Array) -> TrainState:
        size = self.config.image_size
        view = jnp.zeros((2, size, size, self.image_shape[2]), jnp.float32)
        return init_state(key, self.config.method, self.network, self.optimizer, view)

    def shapes(self) -> tuple[TrainState, Any]:
        """What a step is given: shapes, dtypes and shardings; nothing is computed."""

        def images(height, width):
            return jax.ShapeDtypeStruct(
                (self.config.batch_size, height, width, self.image_shape[2]),
                jnp.uint8,
                sharding=batch_sharding(self.mesh),
            )

        crops = tuple(images(crop.size, crop.size) for crop in self.crops)
        state = jax.eval_shape(self._init, jax.random.key(0))
        state = shaped(state, state_sharding(state, self.mesh))
        return state, crops or images(*self.image_shape[:2])

    def collapsed_loss(self) -> float | None:
        """The loss where all images have the same embedding, if it is known."""
        size, batch_size = self.config.image_size, self.config.batch_size
        assert size and batch_size
        view = jax.ShapeDtypeStruct((2, size, size, self.image_shape[2]), jnp.float32)
        outputs, _ = jax.eval_shape(
            functools.partial(self.network.init_with_output, train=True),
            jax.random.key(0),
            view,
        )
        return self.config.method.collapsed_loss(batch_size, outputs.embedding.shape[1])

    def batches(self, source: Source, step: int = 0) -> Batches:
        """This host's part of the batches of the steps after `step`, without end."""
        assert self.config.batch_size
        return batches(
            source,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            step=step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.config.workers,
            crops=self.crops,
            timeout=self.config.load_timeout,
        )

    def images(self, batch: dict[str, Any]) -> Images:
        """What a step is given of a loader's batch, on the devices."""
        return to_devices(batch["views" if self.crops else "image"], self.mesh)

    def check(self) -> None:
        """Traces a step, in which what makes no sense is refused with the reason."""
        try:
            jax.eval_shape(self.step, *self.shapes())
        except ValueError as error:  # argument, got, expected
            raise UserError(f"{self.config.method.name}: {error}") from error


def crops_of(recipe: ViewRecipe, source: Source) -> tuple[Crop, ...]:
    """What the loader makes of images of several sizes; else it gives the images."""
    return tuple(
        Crop(view.size, view.crop_scale, view.crop_ratio, view.interpolation)
        for view in recipe.views
        if source.sizes_differ
    )


def build(config: PretrainConfig, source: Source, mesh: Mesh | None = None) -> Setup:
    """Builds network, views and optimizer of a resolved configuration."""
    assert config.batch_size and config.steps
    try:
        mesh = mesh or make_mesh(fsdp=config.fsdp)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    method = config.method
    try:
        network = make_network(config)
        recipe = make_recipe(config)
        steps_per_epoch = len(source) / config.batch_size
        options = dataclasses.asdict(config.optimizer)
        options["clip_norm"] = options["clip_norm"] or None
        optimizer, schedule = make_optimizer(
            Optimization(**options),
            batch_size=config.batch_size,
            total_steps=config.steps,
            steps_per_epoch=steps_per_epoch,
            constant_rate=method.constant_rate,
            frozen=method.frozen,
            frozen_for={
                name: round(epochs * steps_per_epoch)
                for name, epochs in method.frozen_epochs().items()
            },
        )
        step = make_train_step(
            method,
            network,
            recipe,
            optimizer,
            mesh,
            steps_per_epoch=steps_per_epoch,
            total_steps=config.steps,
            accumulate=config.accumulate,
            max_skipped=config.max_skipped,
        )
    except ValueError as error:  # argument, got, expected
        raise UserError(f"{method.name}: {error}") from error
    return Setup(
        config,
        mesh,
        network,
        recipe,
        optimizer,
        schedule,
        step,
        source.image_shape,
        crops_of(recipe, source),
        steps_per_epoch,
    )


def rebuild(config: PretrainConfig, source: Source) -> Setup:
    """Builds a saved run, sharded as it was as far as the devices here allow it."""
    fsdp = math.gcd(config.fsdp, jax.device_count())
    return build(dataclasses.replace(config, fsdp=fsdp), source)
