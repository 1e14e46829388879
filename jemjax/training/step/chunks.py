"""A batch in parts, which the network sees one after the other."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jemjax.training.step.sharding import batch_sharding


def split_batch(tree: Any, parts: int, mesh: Mesh) -> Any:
    """(N, ...) -> (parts, N / parts, ...): rows k, k + parts, ... are part k.

    So no row changes its device, and parts are the same on any number of devices.
    """

    def split(x):
        x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
        return lax.with_sharding_constraint(x, batch_sharding(mesh, axis=1))

    return jax.tree.map(split, tree)


def join_batch(tree: Any, mesh: Mesh) -> Any:
    """(parts, N / parts, ...) -> (N, ...), the inverse of `split_batch`."""

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        x = x.reshape(-1, *x.shape[2:])
        return lax.with_sharding_constraint(x, batch_sharding(mesh))

    return jax.tree.map(join, tree)
