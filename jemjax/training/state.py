"""Everything that a step reads and writes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct


class TrainState(struct.PyTreeNode):
    """The state of a run: arrays only, so what is saved is what is needed.

    Moving averages, centers and queues are float32. A method that has none of them
    leaves their fields empty.
    """

    step: jax.Array
    key: jax.Array
    """typed key; a step's randomness is it, folded with `step`"""
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    target_params: Any = struct.field(default_factory=dict)
    target_batch_stats: Any = struct.field(default_factory=dict)
    loss_state: Any = struct.field(default_factory=dict)


def init_state(
    key: jax.Array,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    view: jax.Array,
) -> TrainState:
    """The state before the first step.

    Args:
        key: typed key from which parameters and all later draws follow.
        network: maps (N, H, W, C) views to embeddings.
        optimizer: of the parameters.
        view: (N, H, W, C) zeros, for the shapes.

    Returns:
        A `TrainState` at step 0.
    """
    init_key, key = jax.random.split(key)
    variables = network.init(init_key, view, train=True)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )
