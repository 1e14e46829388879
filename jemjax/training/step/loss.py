"""The loss of a step, as a function of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jemjax.augment import ViewRecipe
from jemjax.augment.inputs import example_keys
from jemjax.methods import Method, Progress
from jemjax.training.step.branch import Branches, Images, Statistics
from jemjax.training.step.chunks import join_batch, split_batch
from jemjax.training.step.sharding import BATCH_AXES, batch_spec
from jemjax.training.step.state import TrainState

# Called with the name of what is computed on the way to the loss, and a pytree.
Watch = Callable[[str, Any], None]


def make_loss(
    method: Method,
    network: nn.Module,
    recipe: ViewRecipe,
    mesh: Mesh,
    *,
    steps_per_epoch: float,
    total_steps: int,
    accumulate: int = 1,
    watch: Watch | None = None,
) -> Callable[..., Any]:
    """The loss of a step, as a function of the parameters.

    Args:
        method: as for `make_train_step`, and so are others.
        network: maps (N, H, W, C) views to `Outputs`.
        recipe: the views and their masks.
        mesh: of `sharding.make_mesh`.
        steps_per_epoch: steps in which all images are seen once.
        total_steps: steps of the run.
        accumulate: the number of parts.
        watch: told of views, embeddings and terms; parts are then written out one by
            one, so that all of it is of one trace.

    Returns:
        (params, state, images) -> (loss, (terms, both branches' outputs, statistics)).
    """
    branches = Branches(method, network, recipe)
    tell: Watch = watch or (lambda name, tree: None)

    def embed(params, state: TrainState, images, keys):
        """The outputs of both branches for the whole batch, and the statistics."""

        def embed_part(statistics, part):
            images, keys = part
            views, masks, drop_keys = branches.see(keys, images)
            for number, seen in enumerate(views):
                tell(f"view {number}", seen)
            return branches.embed(
                params, state.target_params, statistics, views, masks, drop_keys
            )

        statistics = Statistics(state.batch_stats, state.target_batch_stats)
        if accumulate == 1:
            return embed_part(statistics, (images, keys))
        parts = split_batch((images, keys), accumulate, mesh)
        if watch:
            made = []
            for number in range(accumulate):
                part = jax.tree.map(lambda x, number=number: x[number], parts)
                statistics, outputs = embed_part(statistics, part)
                made.append(outputs)
            outputs = jax.tree.map(lambda *arrays: jnp.stack(arrays), *made)
        else:
            statistics, outputs = lax.scan(
                jax.checkpoint(embed_part, prevent_cse=False), statistics, parts
            )
        return statistics, join_batch(outputs, mesh)

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

    def loss_of(params, state: TrainState, images: Images):
        progress = Progress(state.step, steps_per_epoch, total_steps)
        count = len(jax.tree.leaves(images)[0])
        keys = keys_of_step(state.key, state.step, count)
        statistics, (online, target) = embed(params, state, images, keys)

        # What is remembered is of the target branch.
        def scores(embeddings) -> Any:
            averaged = method.target == "momentum"
            of_branch = state.target_params if averaged else params
            return network.apply({"params": of_branch}, embeddings, method="scores")

        memory = lax.stop_gradient(method.recall(state.loss_state, progress, scores))
        for name, remembered in memory.items():
            tell(f"the loss's memory, {name}", remembered)
        compared = None
        if not branches.are_one:
            compared = tuple(outputs.target for outputs in target)
            if method.stop_gradient:
                compared = lax.stop_gradient(compared)
        loss, terms = loss_of_batch(
            tuple(outputs.prediction for outputs in online), compared, memory
        )
        for name, term in terms.items():
            tell(f"term {name} of the loss", term)
        tell("loss", loss)
        return loss, (terms, lax.stop_gradient((online, target)), statistics)

    return loss_of


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
