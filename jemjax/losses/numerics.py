"""The guarded primitives: finite, with finite gradients, where naive forms are not."""

import jax
import jax.numpy as jnp
from jax import lax

from jemjax.losses.collectives import AxisName, batch_size, batch_sum, pmax


def center(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Subtracts the mean over the global batch: (N, D) -> (N, D).

    A constant column becomes exactly zero, and no information is lost where the mean
    is large beside the spread: the columns are first shifted by one of their own
    values, which is exact where it matters, and only then averaged.

    Args:
        x: (N, D) rows of this shard, float32 or float64.
        axis_name: the axis over which the batch is sharded.

    Returns:
        (N, D) centered rows; infinite, never NaN, where a difference overflows.
    """
    # In quarters, differences of any two finite numbers, and their mean, are finite.
    quarter = 0.25 * x
    shift = pmax(jnp.max(quarter, axis=0), axis_name)  # (D,)
    shifted = quarter - shift
    mean = batch_sum(shifted * (1.0 / batch_size(x, axis_name)), axis_name)
    return 4.0 * (shifted - mean)


def std(variance: jax.Array, eps: jax.Array | float) -> jax.Array:
    """Standard deviation of which the gradient is finite at zero: sqrt(variance + eps).

    Args:
        variance: any shape, >= 0.
        eps: > 0, inside the root, where it bounds the derivative by 1 / (2 sqrt(eps)).

    Returns:
        The shape of `variance`.
    """
    return jnp.sqrt(variance + eps)


def standardize(x: jax.Array, eps: jax.Array | float, axis_name: AxisName) -> jax.Array:
    """Zero mean and unit (biased) variance over the global batch: (N, D) -> (N, D).

    (x - mean) / sqrt(variance + eps), as batch normalization without scale and offset.

    Args:
        x: (N, D) rows of this shard, float32 or float64, up to 1e37 in magnitude.
        eps: > 0, inside the root: a constant column becomes zero.
        axis_name: the axis over which the batch is sharded.

    Returns:
        (N, D), with entries up to sqrt(N_global) in magnitude.
    """
    centered = center(x, axis_name)
    # Large columns are divided by their largest entry, so that squares do not overflow.
    # The result does not depend on this scale, so it is a constant.
    scale = jnp.maximum(pmax(jnp.max(jnp.abs(centered), axis=0), axis_name), 1.0)
    scaled = centered / scale
    variance = batch_sum(
        jnp.square(scaled) * (1.0 / batch_size(x, axis_name)), axis_name
    )
    return scaled / std(variance, eps / scale / scale)


def nonnegative(x: jax.Array) -> jax.Array:
    """Zero where rounding made a sum of squares negative; the gradient is untouched."""
    return jnp.where(x < 0, x - lax.stop_gradient(x), x)


def weighted_sum(*pairs: tuple[jax.Array | float, jax.Array]) -> jax.Array:
    """The sum of weight * term, in which a weight of 0 removes even an infinite term.

    Args:
        *pairs: weights (Python numbers or traced scalars) and scalar terms.

    Returns:
        A scalar of the terms' dtype.
    """
    total = jnp.zeros((), pairs[0][1].dtype)
    for weight, term in pairs:
        if isinstance(weight, jax.Array):
            product = jnp.asarray(weight, term.dtype) * term
            total = total + jnp.where(weight == 0, jnp.zeros_like(term), product)
        elif weight != 0:
            total = total + weight * term
    return total
