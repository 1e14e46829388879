"""Tiny runs of a method, for tests of the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax.methods import METHODS
from jemjax.models import ResNet, ViT
from jemjax.models.resnet import BasicBlock
from jemjax.runtime import quick_compilation
from jemjax.training.step.optimizers import make_optimizer
from jemjax.training.step.sharding import make_mesh, shaped, state_sharding, to_devices
from jemjax.training.step.state import init_state
from jemjax.training.step.update import make_train_step

BATCH, SIZE = 16, 8
STEPS_PER_EPOCH, TOTAL_STEPS = 4.0, 24

# What makes a method tiny: heads, clusters and queues.
TINY = {
    "vicreg": {"projector": (24, 48)},  # wider than the batch: features are exchanged
    "barlow-twins": {"projector": (24, 48)},
    "swav": {
        "projector": (16, 12),
        "num_prototypes": 10,
        "queue_length": 32,
        "queue_start": 1,
    },
    "byol": {"projector": (16, 12), "predictor": (16,)},
    # With a narrower one a unit dies, and its normalization scales rounding up.
    "simsiam": {"projector": (32, 32, 24), "predictor": (16,)},
    "dino": {"projector": (16, 16, 12), "num_prototypes": 20},
    "data2vec": {"top_layers": 2},
    "simclr": {"projector": (16, 16, 12)},
    "moco": {"projector": (16, 12), "queue_length": 32},
    "moco-v3": {"projector": (16, 12), "predictor": (16,)},
}


# One method of each kind: one branch, assigned clusters, distilled outputs, patches, a
# queue. The others keep the same promises, and are asked about by hand (-m slow).
KINDS = ("vicreg", "swav", "dino", "data2vec", "moco")


def every_method(*left_out, names=TINY):
    """Parametrizes by `name`: one method of each kind, and by hand all others."""
    return pytest.mark.parametrize(
        "name",
        [
            name if name in KINDS else pytest.param(name, marks=pytest.mark.slow)
            for name in names
            if name not in left_out
        ],
    )


def tiny_method(name, **swaps):
    method = METHODS[name](**{**TINY[name], **swaps})
    return method.resolve(SIZE, BATCH, 100)


def tiny_backbone(kind="resnet", *, pooling="class", dtype=jnp.float32):
    if kind == "resnet":
        return ResNet((1, 1), BasicBlock, width=4, stem="small", dtype=dtype)
    return ViT(
        patch_size=2,
        image_size=SIZE,
        width=12,
        depth=2,
        num_heads=2,
        pooling=pooling,
        dtype=dtype,
    )


class Setup:
    """A step and its first state on some devices; `network`, `recipe` and `method`."""

    def __init__(
        self,
        method,
        devices=1,
        backbone=None,
        recipe=None,
        dtype=jnp.float32,
        fsdp=1,
        accumulate=1,
    ):
        if backbone is None:
            kind = "vit" if method.name == "data2vec" else "resnet"
            backbone = tiny_backbone(kind, pooling=method.pooling, dtype=dtype)
        self.method, self.mesh = method, make_mesh(devices, fsdp=fsdp)
        self.network = method.network(backbone)
        self.recipe = recipe or method.views(SIZE)
        optimization = method.defaults(224).optimization  # the published one
        self.optimizer, self.schedule = make_optimizer(
            optimization,
            batch_size=BATCH,
            total_steps=TOTAL_STEPS,
            steps_per_epoch=STEPS_PER_EPOCH,
            constant_rate=method.constant_rate,
            frozen=method.frozen,
            frozen_for={
                name: round(epochs * STEPS_PER_EPOCH)
                for name, epochs in method.frozen_epochs().items()
            },
        )
        self.step = make_train_step(
            method,
            self.network,
            self.recipe,
            self.optimizer,
            self.mesh,
            steps_per_epoch=STEPS_PER_EPOCH,
            total_steps=TOTAL_STEPS,
            accumulate=accumulate,
        )

    def _init(self, key):
        view = jnp.zeros((2, SIZE, SIZE, 3))
        return init_state(key, self.method, self.network, self.optimizer, view)

    def init(self):
        compiled = jax.jit(
            self._init,
            out_shardings=jax.tree.map(lambda x: x.sharding, self.state_shapes()),
            compiler_options=quick_compilation(),
        )
        return compiled(jax.random.key(0))

    def state_shapes(self):
        state = jax.eval_shape(self._init, jax.random.key(0))
        return shaped(state, state_sharding(state, self.mesh))

    def images(self, step):
        rng = np.random.default_rng(step)
        images = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
        return to_devices(images, self.mesh)

    def lower(self):
        return self.step.lower(self.state_shapes(), self.images(0))

    @functools.cached_property
    def compiled(self):
        """The step as one program: it cannot be compiled for a second time."""
        return self.lower().compile(compiler_options=quick_compilation())

    def steps(self, state, numbers):
        """The state after some steps, and the metrics of each."""
        metrics = []
        for number in numbers:
            state, of_step = self.compiled(state, self.images(number))
            metrics.append(jax.device_get(of_step))
        return state, metrics

    def run(self, count):
        """The losses of some steps, and the state after them."""
        state, metrics = self.steps(self.init(), range(count))
        losses = np.array([float(of_step["loss"]) for of_step in metrics])
        return losses, jax.device_get(state.replace(key=None))

    def shapes(self):
        """The step's trace: shapes of the state and metrics after it, nothing run."""
        return jax.eval_shape(self.step, self.state_shapes(), self.images(0))


@functools.cache
def setup_of(name, devices=1, fsdp=1, accumulate=1, **swaps):
    """One for each method and swap, so that it is compiled once."""
    return Setup(tiny_method(name, **swaps), devices, fsdp=fsdp, accumulate=accumulate)


# Headless on a transformer, of which branches are dropped: nothing has BatchNorm.
HEADLESS = {"projector": "none", "predictor": "none"}


def setup_without_batch_norm(name, devices=1, accumulate=1):
    """As `setup_of`, but each example is embedded by itself."""
    method = METHODS[name](**{**TINY[name], **({} if name == "data2vec" else HEADLESS)})
    method = method.resolve(SIZE, BATCH, 100)
    backbone = tiny_backbone("vit", pooling=method.pooling).clone(drop_path=0.5)
    return Setup(method, devices, backbone, accumulate=accumulate)
