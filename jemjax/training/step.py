"""One step: images, views, embeddings, loss, update."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jemjax.augment import ViewRecipe, finish_views, make_views
from jemjax.augment.inputs import example_keys
from jemjax.augment.masking import make_masks, num_kept_patches
from jemjax.evaluation import normalized_std
from jemjax.methods import Clock, Method
from jemjax.models import Outputs
from jemjax.targets import moving_average
from jemjax.training.mesh import (
    BATCH_AXES,
    batch_sharding,
    batch_spec,
    replicated,
    state_sharding,
)
from jemjax.training.state import TrainState, without_predictor

# One array of images, or for each view an array of crops that the loader made.
Images = jax.Array | tuple[jax.Array, ...]
Step = Callable[[TrainState, Images], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    method: Method,
    network: nn.Module,
    recipe: ViewRecipe,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    steps_per_epoch: float,
    total_steps: int,
    accumulate: int = 1,
) -> Step:
    """The compiled step of a method.

    With `accumulate` the network sees a batch in as many parts, one after the other, of
    which no activations are kept: only the embeddings, of which the loss is that of the
    whole batch. Its gradient with respect to them is then pulled back through each
    part, which is embedded once more. Loss and gradient are those of the whole batch,
    but where the network has BatchNorm, of which each part is a batch of its own.

    Args:
        method: gives the loss, the other branch, and what is remembered.
        network: maps (N, H, W, C) views to `Outputs`.
        recipe: the views and their masks.
        optimizer: of the parameters.
        mesh: of `jemjax.training.mesh.make_mesh`; images are sharded over its devices.
        steps_per_epoch: steps in which all images are seen once.
        total_steps: steps of the run.
        accumulate: the number of parts; the batch is a multiple of it and the devices.

    Returns:
        (state, (N, H, W, C) uint8 images) -> (state after the step, scalars to log).
        The state given is donated: its buffers are those of the one returned. In place
        of the images may be a tuple of the views' crops, (N, size, size, C) uint8.

    References:
        Gao, Zhang, Han, Callan, 2021 (arXiv:2101.06983), for the order of `accumulate`.
    """
    branches = Branches(method, network, recipe)

    def embed(params, state: TrainState, images, keys):
        """The outputs of both branches for the whole batch, and the statistics."""

        def embed_part(statistics, part):
            images, keys = part
            views, masks, drop_keys = branches.see(keys, images)
            return branches.embed(
                params, state.target_params, statistics, views, masks, drop_keys
            )

        statistics = Statistics(state.batch_stats, state.target_batch_stats)
        if accumulate == 1:
            return embed_part(statistics, (images, keys))
        statistics, outputs = lax.scan(
            jax.checkpoint(embed_part, prevent_cse=False),
            statistics,
            _split((images, keys), accumulate, mesh),
        )
        return statistics, _join(outputs, mesh)

    # Over the devices' shards the loss says itself what is sent between them; the
    # network before it is partitioned by the compiler.
    def loss_of_batch(online, target, memory):
        def loss(online, target, memory):
            return method.loss(online, target, memory, axis_name=BATCH_AXES)

        specs = {
            name: batch_spec(method.recall_axes[name])
            if name in method.recall_axes
            else P()
            for name in memory
        }
        return jax.shard_map(
            loss,
            mesh=mesh,
            in_specs=(batch_spec(), batch_spec(), specs),
            out_specs=P(),
        )(online, target, memory)

    def train_step(state: TrainState, images: Images):
        clock = Clock(state.step, steps_per_epoch, total_steps)
        count = len(jax.tree.leaves(images)[0])
        keys = keys_of_step(state.key, state.step, count)

        def loss_of_params(params):
            statistics, (online, target) = embed(params, state, images, keys)

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
            return loss, (terms, lax.stop_gradient((online, target)), statistics)

        (loss, (terms, outputs, statistics)), gradients = jax.value_and_grad(
            loss_of_params, has_aux=True
        )(state.params)
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
        batch_stats, target_batch_stats = statistics
        if method.target == "momentum":
            metrics["target_momentum"] = momentum = method.momentum(clock)
            target_params = moving_average(
                target_params, without_predictor(params), momentum
            )
            if method.average_statistics:
                target_batch_stats = moving_average(
                    state.target_batch_stats, without_predictor(batch_stats), momentum
                )
        state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            target_params=target_params,
            target_batch_stats=target_batch_stats,
            loss_state=method.remember(state.loss_state, clock, online, target),
        )
        metrics = jax.tree.map(lambda x: x.astype(jnp.float32), metrics)
        # Said, or the compiler would shard a queue, and the next step be another.
        return (
            lax.with_sharding_constraint(state, state_sharding(state, mesh)),
            lax.with_sharding_constraint(metrics, replicated(mesh)),
        )

    return jax.jit(train_step, donate_argnums=0)


def keys_of_step(key: jax.Array, step: ArrayLike, count: int) -> jax.Array:
    """A key for each of the first rows of a step's global batch.

    Args:
        key: of the run's steps, `TrainState.key`.
        step: how many steps have gone before.
        count: the number of rows; more of them change nothing in the first ones.

    Returns:
        (count,) keys.
    """
    return example_keys(jax.random.fold_in(key, step), count)


def _split(tree: Any, parts: int, mesh: Mesh) -> Any:
    """(N, ...) -> (parts, N / parts, ...): rows k, k + parts, ... are part k.

    So no row changes its device, and parts are the same on any number of devices.
    """

    def split(x):
        x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
        return lax.with_sharding_constraint(x, batch_sharding(mesh, axis=1))

    return jax.tree.map(split, tree)


def _join(tree: Any, mesh: Mesh) -> Any:
    """(parts, N / parts, ...) -> (N, ...), the inverse of `_split`."""

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        x = x.reshape(-1, *x.shape[2:])
        return lax.with_sharding_constraint(x, batch_sharding(mesh))

    return jax.tree.map(join, tree)


class Statistics(NamedTuple):
    """The running statistics of BatchNorm, of both branches."""

    online: Any
    target: Any


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

    def see(
        self, keys: jax.Array, images: Images
    ) -> tuple[
        tuple[jax.Array, ...], dict[int, tuple[jax.Array, int | None]], jax.Array
    ]:
        """What a step makes of images: views, masks, and keys to drop paths by.

        Args:
            keys: (N,), of `keys_of_step`.
            images: (N, H, W, C) uint8, or for each view (N, size, size, C) crops.
        """
        view_keys, mask_keys, drop_keys = jax.vmap(
            lambda key: jax.random.split(key, 3), out_axes=1
        )(keys)
        if isinstance(images, tuple):
            views = finish_views(view_keys, images, self.recipe)
        else:
            views = make_views(view_keys, images, self.recipe)
        return views, self.masks(mask_keys), drop_keys

    def masks(self, keys: jax.Array) -> dict[int, tuple[jax.Array, int | None]]:
        """For each online view its mask, and how many patches are left."""
        if self.recipe.mask is None:
            return {}
        masks = {}
        for number in self.online_views:
            side = self.network.backbone.grid(self.recipe.views[number].size)
            mask = make_masks(_fold_in(keys, number), len(keys), side, self.recipe.mask)
            num_kept, ratio = None, self.recipe.mask.ratio
            if self.recipe.mask.kind == "drop":
                assert not isinstance(ratio, tuple)
                num_kept = num_kept_patches(side * side, ratio)
            masks[number] = mask, num_kept
        return masks

    def embed(
        self,
        params: Any,
        target_params: Any,
        statistics: Statistics,
        views: Sequence[jax.Array],
        masks: dict[int, tuple[jax.Array, int | None]],
        drop_keys: jax.Array,
    ) -> tuple[Statistics, tuple[tuple[Outputs, ...], tuple[Outputs, ...]]]:
        """The statistics after these views, and what each branch makes of its own.

        Args:
            params: of the online branch.
            target_params: of a moving average.
            statistics: before these views.
            views: (N, size, size, C) each.
            masks: of the online branch's views.
            drop_keys: (N,), by which the online branch drops paths.
        """
        variables = {"params": params, "batch_stats": statistics.online}
        seen = self.online_views
        if not self.separate:  # one forward pass, of whatever either branch needs
            seen = tuple(sorted({*self.online_views, *self.target_views}))
        outputs, batch_stats = self._forward(
            variables, views, seen, masks, drop_keys=drop_keys
        )
        online = tuple(outputs[number] for number in self.online_views)
        if not self.separate:
            target = tuple(outputs[number] for number in self.target_views)
            return Statistics(batch_stats, statistics.target), (online, target)
        momentum = self.method.target == "momentum"
        if momentum:
            variables = {"params": target_params, "batch_stats": statistics.target}
        else:
            variables = {"params": params, "batch_stats": batch_stats}
        outputs, updated = self._forward(
            variables, views, self.target_views, {}, predict=False
        )
        if momentum:
            statistics = Statistics(batch_stats, updated)
        else:
            statistics = Statistics({**batch_stats, **updated}, statistics.target)
        target = tuple(outputs[number] for number in self.target_views)
        return statistics, (online, target)

    def _forward(
        self, variables, views, numbers, masks, *, predict=True, drop_keys=None
    ):
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
            if drop_keys is not None:
                of_views = [_fold_in(drop_keys, number) for number in group]
                keywords["drop_keys"] = _interleave(of_views)
            return apply(images, **keywords)

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


def _fold_in(keys: jax.Array, number: int) -> jax.Array:
    """(N,) keys -> (N,) keys."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


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
