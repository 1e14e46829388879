"""The guarded primitives: finite, with finite gradients, where naive forms are not."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jemjax.losses.collectives import AxisName, batch_mean, pmax


def center(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Subtracts the mean over the global batch: (N, ...) -> (N, ...).

    A constant column becomes exactly zero, and no information is lost where the mean
    is large beside the spread: the columns are first shifted by one of their own
    values, which is exact where it matters, and only then averaged.

    Args:
        x: (N, ...) rows of this shard, float32 or float64.
        axis_name: the axis over which the batch is sharded.

    Returns:
        (N, ...) centered rows; infinite, never NaN, where a difference overflows.
    """
    shifted = x - pmax(jnp.max(x, axis=0, keepdims=True), axis_name)
    mean = batch_mean(shifted, axis_name)  # (...)
    # Where finite numbers differ by more than the dtype's range, a difference is minus
    # infinity, and so is the mean: without it, there is no NaN.
    # Compared with the lowest number: a constant of infinity fails under
    # jax_debug_infs.
    lowest = float(jnp.finfo(x.dtype).min)
    overflown = (mean < lowest) & (jnp.min(x, axis=0) >= lowest)
    return shifted - jnp.where(overflown, 0.0, mean)[None]


def std(variance: jax.Array, eps: ArrayLike) -> jax.Array:
    """Standard deviation of which the gradient is finite at zero: sqrt(variance + eps).

    Args:
        variance: any shape, >= 0.
        eps: > 0, inside the root, where it bounds the derivative by 1 / (2 sqrt(eps)).

    Returns:
        The shape of `variance`.
    """
    return jnp.sqrt(variance + eps)


def standardize(x: jax.Array, eps: Any, axis_name: AxisName) -> jax.Array:
    """Zero mean and unit (biased) variance over the first axis: (N, ...) -> (N, ...).

    (x - mean) / sqrt(variance + eps), as batch normalization without scale and offset.

    Args:
        x: (N, ...) rows of this shard, float32 or float64, up to 1e37 in magnitude.
        eps: > 0, inside the root: a constant column becomes zero.
        axis_name: the axis over which the batch is sharded.

    Returns:
        (N, ...), with entries up to sqrt(N_global) in magnitude.
    """
    centered = center(x, axis_name)
    # Large columns are divided by their largest entry, so that squares do not overflow.
    # The result does not depend on this scale, so it is a constant.
    scale = jnp.maximum(pmax(jnp.max(jnp.abs(centered), axis=0), axis_name), 1.0)
    scaled = centered / scale[None]
    variance = batch_mean(jnp.square(scaled), axis_name)
    return scaled / std(variance, eps / scale / scale)[None]


def normalize_rows(x: jax.Array, given: Any) -> jax.Array:
    """Rows of unit length: (..., D) -> (..., D), x / max(|x|, floor).

    The floor is 1e-6, and 1e-3 for float16, whose largest number bounds the gradient.
    Shorter rows stay shorter than 1, and rows of zeros stay zeros, with a gradient of
    at most 1 / floor.

    Args:
        x: (..., D) rows, float32 or float64, up to their largest number.
        given: the dtype in which the caller was given `x`.

    Returns:
        The shape of `x`.
    """
    floor = 1e-3 if given == jnp.float16 else 1e-6
    # Divided by its largest entry, so that squares neither overflow nor all underflow,
    # a row has a length of at least 1, but for rows of which that entry is below the
    # floor. The result does not depend on this scale, so it is a constant.
    largest = jnp.max(jnp.abs(lax.stop_gradient(x)), axis=-1, keepdims=True)
    scaled = x / jnp.maximum(largest, floor)
    squares = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)  # (..., 1)
    # Not jnp.maximum, which halves the gradient of one-hot rows: their length is 1.
    return scaled / jnp.sqrt(jnp.where(squares < 1.0, 1.0, squares))


def nonnegative(x: jax.Array) -> jax.Array:
    """Zero where rounding made a sum of squares negative; the gradient is untouched."""
    return jnp.where(x < 0, x - lax.stop_gradient(x), x)


def weighted_sum(*pairs: tuple[Any, jax.Array]) -> jax.Array:
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
