"""One step: images, views, embeddings, loss, update."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jemjax.augment import ViewRecipe, make_views
from jemjax.augment.masking import make_masks, num_kept_patches
from jemjax.evaluation import normalized_std
from jemjax.methods import Clock, Method
from jemjax.models import Outputs
from jemjax.targets import moving_average
from jemjax.training.mesh import replicated
from jemjax.training.state import TrainState, without_predictor

Step = Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    method: Method,
    network: nn.Module,
    recipe: ViewRecipe,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    steps_per_epoch: float,
    total_steps: int,
) -> Step:
    """The compiled step of a method.

    Args:
        method: gives the loss, the other branch, and what is remembered.
        network: maps (N, H, W, C) views to `Outputs`.
        recipe: the views and their masks.
        optimizer: of the parameters.
        mesh: with an axis `data`, over which images are sharded.
        steps_per_epoch: steps in which all images are seen once.
        total_steps: steps of the run.

    Returns:
        (state, (N, H, W, C) uint8 images) -> (state after the step, scalars to log).
        The state given is donated: its buffers are those of the one returned.
    """
    branches = Branches(method, network, recipe)

    # Over the devices' shards the loss says itself what is sent between them; the
    # network before it is partitioned by the compiler.
    def loss_of_batch(online, target, memory):
        def loss(online, target, memory):
            return method.loss(online, target, memory, axis_name="data")

        specs = {name: method.recall_specs.get(name, P()) for name in memory}
        return jax.shard_map(
            loss, mesh=mesh, in_specs=(P("data"), P("data"), specs), out_specs=P()
        )(online, target, memory)

    def train_step(state: TrainState, images: jax.Array):
        clock = Clock(state.step, steps_per_epoch, total_steps)
        view_key, mask_key, drop_key = jax.random.split(
            jax.random.fold_in(state.key, state.step), 3
        )
        views = make_views(view_key, images, recipe)
        masks = branches.masks(mask_key, images)

        def loss_of_params(params):
            online, target, batch_stats, target_batch_stats = branches.embed(
                params, state, views, masks, drop_key
            )

            # What is remembered is of the target branch.
            def scores(embeddings) -> Any:
                averaged = method.target == "momentum"
                of_branch = state.target_params if averaged else params
                return network.apply({"params": of_branch}, embeddings, method="scores")

            memory = lax.stop_gradient(method.recall(state.loss_state, clock, scores))
            compared = None
            if not branches.are_one:
                compared = tuple(outputs.target for outputs in target)
                if method.stop_gradient:
                    compared = lax.stop_gradient(compared)
            loss, terms = loss_of_batch(
                tuple(outputs.prediction for outputs in online), compared, memory
            )
            outputs = lax.stop_gradient((online, target))
            return loss, (terms, outputs, batch_stats, target_batch_stats)

        (loss, (terms, outputs, batch_stats, target_batch_stats)), gradients = (
            jax.value_and_grad(loss_of_params, has_aux=True)(state.params)
        )
        online, target = outputs
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = method.constrain(optax.apply_updates(state.params, updates))
        metrics = {
            "loss": loss,
            **terms,
            "embedding_std": normalized_std(online[0].embedding),
            "gradient_norm": optax.tree.norm(gradients),
        }
        target_params = state.target_params
        if method.target == "momentum":
            metrics["target_momentum"] = momentum = method.momentum(clock)
            target_params = moving_average(
                target_params, without_predictor(params), momentum
            )
            if method.average_statistics:
                target_batch_stats = moving_average(
                    state.target_batch_stats, without_predictor(batch_stats), momentum
                )
        return (
            state.replace(
                step=state.step + 1,
                params=params,
                batch_stats=batch_stats,
                opt_state=opt_state,
                target_params=target_params,
                target_batch_stats=target_batch_stats,
                loss_state=method.remember(state.loss_state, clock, online, target),
            ),
            jax.tree.map(lambda x: x.astype(jnp.float32), metrics),
        )

    # Said, or the compiler would shard a queue, and compile again for the next step.
    return jax.jit(train_step, donate_argnums=0, out_shardings=replicated(mesh))


class Branches:
    """The two branches of a method: which views each sees, and with which weights.

    They are one and the same where weights are shared with gradients, there is no
    predictor, and nothing is masked. A moving average has a forward pass of its own;
    so has a masked run, in which the target sees the views whole.
    """

    def __init__(self, method: Method, network: nn.Module, recipe: ViewRecipe):
        self.method, self.recipe = method, recipe
        self.network: Any = network
        count = len(recipe.views)
        self.online_views = method.online_views or tuple(range(count))
        self.target_views = method.target_views or tuple(range(recipe.num_global))
        self.separate = method.target == "momentum" or recipe.mask is not None
        self.are_one = (
            not self.separate
            and method.target == "shared"
            and getattr(network, "predictor", None) is None
            and self.online_views == self.target_views
        )

    def masks(
        self, key: jax.Array, images: jax.Array
    ) -> dict[int, tuple[jax.Array, int | None]]:
        """For each online view its mask, and how many patches are left."""
        if self.recipe.mask is None:
            return {}
        masks = {}
        for number in self.online_views:
            side = self.network.backbone.grid(self.recipe.views[number].size)
            mask = make_masks(
                jax.random.fold_in(key, number), len(images), side, self.recipe.mask
            )
            num_kept = None
            if self.recipe.mask.kind == "drop":
                num_kept = num_kept_patches(side * side, self.recipe.mask.ratio)
            masks[number] = mask, num_kept
        return masks

    def embed(
        self,
        params: Any,
        state: TrainState,
        views: Sequence[jax.Array],
        masks: dict[int, tuple[jax.Array, int | None]],
        drop_key: jax.Array,
    ) -> tuple[tuple[Outputs, ...], tuple[Outputs, ...], Any, Any]:
        """The outputs of both branches, and their batch statistics after them."""
        variables = {"params": params, "batch_stats": state.batch_stats}
        seen = self.online_views
        if not self.separate:  # one forward pass, of whatever either branch needs
            seen = tuple(sorted({*self.online_views, *self.target_views}))
        outputs, batch_stats = self._forward(
            variables, views, seen, masks, rngs={"drop_path": drop_key}
        )
        online = tuple(outputs[number] for number in self.online_views)
        target_batch_stats = state.target_batch_stats
        if not self.separate:
            target = tuple(outputs[number] for number in self.target_views)
            return online, target, batch_stats, target_batch_stats
        momentum = self.method.target == "momentum"
        if momentum:
            variables = {
                "params": state.target_params,
                "batch_stats": state.target_batch_stats,
            }
        else:
            variables = {"params": params, "batch_stats": batch_stats}
        outputs, updated = self._forward(
            variables, views, self.target_views, {}, predict=False
        )
        if momentum:
            target_batch_stats = updated
        else:
            batch_stats = {**batch_stats, **updated}
        target = tuple(outputs[number] for number in self.target_views)
        return online, target, batch_stats, target_batch_stats

    def _forward(self, variables, views, numbers, masks, *, predict=True, rngs=None):
        """Outputs by the view's number, and the batch statistics after all of them."""

        def apply(*arguments, **keywords):
            nonlocal variables
            made, updates = self.network.apply(
                variables, *arguments, train=True, mutable=["batch_stats"], **keywords
            )
            updated = updates.get("batch_stats", {})
            batch_stats = {
                name: updated.get(name, old)
                for name, old in variables["batch_stats"].items()
            }
            variables = {**variables, "batch_stats": batch_stats}
            return made

        def view(group, **keywords):
            # Side by side for each example, so that no example changes its device.
            images = _interleave([views[number] for number in group])
            if masks:
                keywords["mask"] = _interleave([masks[number][0] for number in group])
                keywords["num_kept"] = masks[group[0]][1]
            return apply(images, rngs=rngs and _of_view(rngs, group[0]), **keywords)

        outputs: dict[int, Outputs] = {}
        if not self.method.views_together:  # each with its own batch statistics
            for number in numbers:
                outputs[number] = view([number], predict=predict)
            return outputs, variables["batch_stats"]
        # Views of one size pass the backbone as one batch, and all of them the heads.
        groups: dict[int, list[int]] = {}
        for number in numbers:
            groups.setdefault(self.recipe.views[number].size, []).append(number)
        features: dict[int, jax.Array] = {}
        for group in groups.values():
            features |= _apart(group, view(group, method="embed"))
        together = _interleave([features[number] for number in numbers])
        made = apply(together, predict=predict, method="heads")
        return _apart(numbers, made), variables["batch_stats"]


def _of_view(rngs: dict[str, jax.Array], number: int) -> dict[str, jax.Array]:
    return {name: jax.random.fold_in(key, number) for name, key in rngs.items()}


def _interleave(arrays: list[jax.Array]) -> jax.Array:
    """V arrays (N, ...) -> (N V, ...), the views of an example side by side."""
    if len(arrays) == 1:
        return arrays[0]
    stacked = jnp.stack(arrays, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _apart(numbers: Sequence[int], interleaved: Any) -> dict[int, Any]:
    """The views of interleaved arrays, by number: (N V, ...) -> V of (N, ...)."""
    count = len(numbers)
    return {
        number: jax.tree.map(
            lambda x, place=place: x.reshape(-1, count, *x.shape[1:])[:, place],
            interleaved,
        )
        for place, number in enumerate(numbers)
    }
