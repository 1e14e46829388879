"""One step: images, views, embeddings, loss, update."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jemjax.augment import ViewRecipe, make_views
from jemjax.evaluation import normalized_std
from jemjax.methods import Method
from jemjax.training.state import TrainState

Step = Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    method: Method,
    network: nn.Module,
    recipe: ViewRecipe,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Step:
    """The compiled step of a method.

    Args:
        method: gives the loss.
        network: maps (N, H, W, C) views to (features, embeddings).
        recipe: the views.
        optimizer: of the parameters.
        mesh: with an axis `data`, over which images are sharded.

    Returns:
        (state, (N, H, W, C) uint8 images) -> (state after the step, scalars to log).
        The state given is donated: its buffers are those of the one returned.
    """
    # Over the devices' shards the loss says itself what is sent between them; the
    # network before it is partitioned by the compiler.
    loss_of_batch = jax.shard_map(
        functools.partial(method.loss, axis_name="data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )

    def train_step(state: TrainState, images: jax.Array):
        views = make_views(jax.random.fold_in(state.key, state.step), images, recipe)

        def loss_of_params(params):
            batch_stats, embeddings = state.batch_stats, []
            for view in views:  # each with its own batch statistics, as published
                (_, embedding), updates = network.apply(
                    {"params": params, "batch_stats": batch_stats},
                    view,
                    train=True,
                    mutable=["batch_stats"],
                )
                batch_stats = updates["batch_stats"]
                embeddings.append(embedding)  # (N, D)
            loss, terms = loss_of_batch(tuple(embeddings))
            return loss, (terms, batch_stats, embeddings[0])

        (loss, (terms, batch_stats, embedding)), gradients = jax.value_and_grad(
            loss_of_params, has_aux=True
        )(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            **terms,
            "embedding_std": normalized_std(embedding),
            "gradient_norm": optax.tree.norm(gradients),
        }
        return (
            state.replace(
                step=state.step + 1,
                params=optax.apply_updates(state.params, updates),
                batch_stats=batch_stats,
                opt_state=opt_state,
            ),
            jax.tree.map(lambda x: x.astype(jnp.float32), metrics),
        )

    return jax.jit(train_step, donate_argnums=0)
