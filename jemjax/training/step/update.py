"""One step: images, views, embeddings, loss, update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh

from jemjax.augment import ViewRecipe
from jemjax.evaluation import normalized_std
from jemjax.methods import Method, Progress
from jemjax.targets import moving_average
from jemjax.training.step.branch import Images
from jemjax.training.step.loss import make_loss
from jemjax.training.step.sharding import replicated, state_sharding
from jemjax.training.step.state import (
    Skipped,
    TrainState,
    all_finite,
    without_predictor,
)

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
    max_skipped: int = 5,
) -> Step:
    """The compiled step of a method.

    A step of which the loss, the norm of the gradient, a batch statistic or what the
    loss remembers is not finite changes nothing of the state but `step` and `skipped`.
    After `max_skipped` of them in a row no step does, until the run is stopped.

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
        mesh: of `sharding.make_mesh`; images are sharded over its devices.
        steps_per_epoch: steps in which all images are seen once.
        total_steps: steps of the run.
        accumulate: the number of parts; the batch is a multiple of it and the devices.
        max_skipped: at least 1.

    Returns:
        (state, (N, H, W, C) uint8 images) -> (state after the step, scalars to log).
        The state given is donated: its buffers are those of the one returned. In place
        of the images may be a tuple of the views' crops, (N, size, size, C) uint8.

    References:
        Gao, Zhang, Han, Callan, 2021 (arXiv:2101.06983), for the order of `accumulate`.
    """
    loss_of = make_loss(
        method,
        network,
        recipe,
        mesh,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        accumulate=accumulate,
    )

    def train_step(state: TrainState, images: Images):
        progress = Progress(state.step, steps_per_epoch, total_steps)
        (loss, (terms, outputs, statistics)), gradients = jax.value_and_grad(
            loss_of, has_aux=True
        )(state.params, state, images)
        online, target = outputs
        gradient_norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = method.constrain(optax.apply_updates(state.params, updates))
        metrics = {
            "loss": loss,
            **terms,
            "embedding_std": normalized_std(online[0].embedding),
            "gradient_norm": gradient_norm,
        }
        target_params = state.target_params
        batch_stats, target_batch_stats = statistics
        if method.target == "momentum":
            metrics["target_momentum"] = momentum = method.momentum(progress)
            target_params = moving_average(
                target_params, without_predictor(params), momentum
            )
            if method.average_statistics:
                target_batch_stats = moving_average(
                    state.target_batch_stats, without_predictor(batch_stats), momentum
                )
        loss_state = method.remember(state.loss_state, progress, online, target)
        # Not of the parameters after the update, which would have to be kept beside
        # those before it: of these numbers they are made, before anything is clipped.
        taken = all_finite((loss, gradient_norm, statistics, loss_state))
        taken &= state.skipped.in_a_row < max_skipped
        updated = state.replace(
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            target_params=target_params,
            target_batch_stats=target_batch_stats,
            loss_state=loss_state,
        )
        state = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), updated, state
        )
        step, skipped = state.step + 1, state.skipped
        state = state.replace(
            step=step,
            skipped=Skipped(
                steps=skipped.steps + ~taken,
                in_a_row=jnp.where(taken, 0, skipped.in_a_row + 1),
                latest=jnp.where(taken, skipped.latest, step),
            ),
        )
        metrics = jax.tree.map(lambda x: x.astype(jnp.float32), metrics)
        # Said, or the compiler would shard a queue, and the next step be another.
        return (
            lax.with_sharding_constraint(state, state_sharding(state, mesh)),
            lax.with_sharding_constraint(metrics, replicated(mesh)),
        )

    return jax.jit(train_step, donate_argnums=0)
