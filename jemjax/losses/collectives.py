"""Sums over the global batch, wherever its rows live.

Every loss is written once, for the rows it is given. With ``axis_name`` those rows are
one shard of the global batch, and the functions here reach the others; without, they
are the whole batch and nothing is sent. Two rules make the gradients right in every
context (`jit`, `shard_map`, `vmap`, `pmap`): a loss ends in a sum over the shards, so
it is the same scalar on each of them; and nothing that is sent is left out of the
differentiation, but for shifts and scales that cancel in the loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh, reshard

AxisName = str | tuple[str, ...] | None


def axis_size(axis_name: AxisName) -> int:
    """The number of shards of the batch, a Python int."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def batch_size(x: jax.Array, axis_name: AxisName) -> int:
    """The number of rows of the global batch, a Python int (see `is_known`)."""
    return x.shape[0] * axis_size(axis_name)


def is_known(size: Any) -> bool:
    """Whether a size is a number; `jax.export` may leave it open, as a symbol."""
    return isinstance(size, int)


def as_number(size: Any, dtype: Any) -> float | jax.Array:
    """A size to compute with: a Python float, or a scalar where it is left open."""
    return float(size) if is_known(size) else jnp.asarray(size, dtype)


def is_local(x: jax.Array, axis_name: AxisName) -> bool:
    """Whether an array may be cut into blocks without sending anything.

    With an axis name it is a shard. Without, it is on one device unless it is on a
    mesh, or used under one: there the partitioner may have sharded it, out of sight.
    """
    if axis_name is not None:
        return True
    return not any(
        axis_type != AxisType.Manual and size > 1
        for mesh in (jax.typeof(x).sharding.mesh, get_abstract_mesh())
        for axis_type, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    )


def psum(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The sum over the shards."""
    return x if axis_name is None else lax.psum(x, axis_name)


def pmax(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The maximum over the shards. It is a constant to the differentiation."""
    x = lax.stop_gradient(x)
    return x if axis_name is None else lax.pmax(x, axis_name)


def batch_sum(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The sum over the rows of the global batch: (N, ...) -> (...)."""
    return psum(jnp.sum(x, axis=0), axis_name)


def batch_mean(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The mean over the rows of the global batch: (N, ...) -> (...)."""
    # Divided before the sum, which then overflows only where the mean does.
    count = as_number(batch_size(x, axis_name), x.dtype)
    return batch_sum(x * (1.0 / count), axis_name)


def first_row(x: jax.Array, axis_name: AxisName) -> jax.Array | int:
    """The index, in the global batch, of this shard's first row."""
    return 0 if axis_name is None else lax.axis_index(axis_name) * x.shape[0]


def gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The rows of the global batch, whole on every shard: (N, D) -> (N_global, D)."""
    if axis_name is not None:
        return lax.all_gather(x, axis_name, tiled=True)
    return reshard(x, PartitionSpec(None, None)) if _explicit(x) else x


def _matmul(subscripts, a, b, out_sharding=None):
    # HIGHEST: by default a TPU multiplies float32 in bfloat16, an Ampere GPU in TF32.
    return jnp.einsum(
        subscripts,
        a,
        b,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=a.dtype,
        out_sharding=out_sharding,
    )


def _explicit(x: jax.Array) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def row_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b.T` of what this shard has: (N, D), (M, D) -> (N, M)."""
    return _matmul("nd,md->nm", a, b)


def row_gram(x: jax.Array) -> jax.Array:
    """`x @ x.T`: (N, D) -> (N, N). It is symmetric: a quarter is not computed."""
    half = x.shape[0] // 2
    upper = row_products(x[:half], x)  # (N / 2, N)
    lower = row_products(x[half:], x[half:])
    lower = jnp.concatenate([upper[:, half:].T, lower], axis=1)
    return jnp.concatenate([upper, lower])


def feature_gram(a: jax.Array, b: jax.Array, axis_name: AxisName) -> jax.Array:
    """`a.T @ b` summed over the global batch: (N, D), (N, E) -> (D, E).

    It sends D E numbers.
    """
    # On an Explicit mesh a contraction over a sharded batch has to be told its result.
    out_sharding = PartitionSpec(None, None) if _explicit(a) else None
    return psum(_matmul("nd,ne->de", a, b, out_sharding), axis_name)


def rows_for_features(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """A part of the features of all rows: (N, D) -> (N_global, ceil(D / shards)).

    Columns of zeros are added where D is no multiple of the shards.
    """
    missing = -x.shape[1] % axis_size(axis_name)
    x = jnp.pad(x, ((0, 0), (0, missing)))
    return lax.all_to_all(x, axis_name, split_axis=1, concat_axis=0, tiled=True)


def features_for_rows(x: jax.Array, features: int, axis_name: AxisName) -> jax.Array:
    """The inverse: (N_global, ceil(D / shards)) -> (N, D), D = `features`."""
    x = lax.all_to_all(x, axis_name, split_axis=0, concat_axis=1, tiled=True)
    return x[:, :features]
