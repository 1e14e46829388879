"""Everything that a step reads and writes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from jemjax.methods import Method


class Skipped(NamedTuple):
    """Steps that changed nothing, since their loss or gradient was not finite."""

    steps: Any = 0
    """how many, int32"""
    in_a_row: Any = 0
    """how many just now, int32"""
    latest: Any = 0
    """the number of the latest, counted from 1, int32"""


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
    skipped: Skipped = Skipped()

    def measured(self, method: Method) -> dict[str, Any]:
        """The variables of the branch whose features are the method's result."""
        if method.measured == "target" and method.target == "momentum":
            return {
                "params": self.target_params,
                "batch_stats": self.target_batch_stats,
            }
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    key: jax.Array,
    method: Method,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    view: jax.Array,
) -> TrainState:
    """The state before the first step.

    Args:
        key: typed key from which parameters and all later draws follow.
        method: says what the target is, and what the loss remembers.
        network: maps (N, H, W, C) views to `Outputs`.
        optimizer: of the parameters.
        view: (N, H, W, C) zeros, for the shapes.

    Returns:
        A `TrainState` at step 0.
    """
    init_key, key = keys_of_run(key)
    outputs, variables = network.init_with_output(init_key, view, train=True)
    params = method.constrain(variables["params"])
    batch_stats = variables.get("batch_stats", {})
    target_params, target_batch_stats = {}, {}
    if method.target == "momentum":
        other = variables
        if method.own_target_init:
            other = network.init(jax.random.fold_in(init_key, 1), view, train=True)
        target_params = jax.tree.map(
            lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)),
            method.constrain(without_predictor(other["params"])),
        )
        # A copy: a step frees the buffers that it is given, each once.
        target_params = jax.tree.map(jnp.copy, target_params)
        target_batch_stats = jax.tree.map(
            jnp.copy, without_predictor(other.get("batch_stats", {}))
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        target_params=target_params,
        target_batch_stats=target_batch_stats,
        loss_state=method.init_loss_state(jax.random.fold_in(init_key, 2), outputs),
        skipped=Skipped(*[jnp.zeros((), jnp.int32) for _ in Skipped._fields]),
    )


def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point number of a pytree is finite, a scalar."""
    finite = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.all(jnp.array(finite, bool))


def keys_of_run(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of a run's key, that of the parameters and that of the steps."""
    init_key, key = jax.random.split(key)
    return init_key, key


def without_predictor(tree: Any) -> Any:
    """What the target branch has: all modules but the predictor."""
    return {name: module for name, module in tree.items() if name != "predictor"}
