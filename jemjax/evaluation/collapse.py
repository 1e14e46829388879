"""Figures that show collapse, without labels.

Complete collapse: every image has the same embedding (`normalized_std` near 0).
Dimensional collapse: embeddings fill few dimensions (`effective_rank`, `rankme`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


def check_embeddings(name: str, embeddings: ArrayLike) -> jax.Array:
    """Checks that embeddings are real and (N, D), and brings them to float32.

    Args:
        name: of the argument, for the message.
        embeddings: what was given.

    Returns:
        (N, D) float32, or float64 where it was given.

    Raises:
        ValueError: for another rank, no rows, no columns, or another kind of dtype.
    """
    array = jnp.asarray(embeddings)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name}: got shape {array.shape}, expected (N, D) with N, D >= 1"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name}: got dtype {array.dtype}, expected a floating-point dtype"
        )
    return array.astype(jnp.promote_types(jnp.float32, array.dtype))


def normalize_rows(x: jax.Array) -> jax.Array:
    """Rows of unit length, and zeros for a row of zeros: (N, D) -> (N, D).

    Args:
        x: (N, D) float32 or float64, of any finite magnitude.

    Returns:
        (N, D).
    """
    x = _divide_by_largest(x, axis=1)
    # The largest entry is now 1, so only rows of zeros have no squared length.
    squared = jnp.sum(jnp.square(x), axis=1, keepdims=True)
    # Not `norm`, of which the gradient at zero is NaN.
    return x / jnp.sqrt(jnp.where(squared == 0, 1.0, squared))


def _divide_by_largest(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Brings the largest magnitude to 1, so that squares neither overflow nor vanish.

    What is smaller than the normal floating-point numbers stays as it is. The divisor
    is a constant to gradients, as nothing here depends on the scale.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    return x / jnp.where(largest < jnp.finfo(x.dtype).tiny, 1.0, largest)


@jax.jit
def normalized_std(embeddings: ArrayLike) -> jax.Array:
    """Mean over dimensions of the standard deviation of L2-normalized embeddings.

    mean_d sqrt(mean_n (z_nd - mean_n z_nd)^2),  z = h / ||h||

    It is 1 / sqrt(D) when the embeddings spread evenly over the sphere, and 0 when all
    are the same. Its gradient is finite, also there, and 0 for what has no spread.

    Args:
        embeddings: (N, D).

    Returns:
        A scalar in [0, 1 / sqrt(D)].

    Raises:
        ValueError: if `embeddings` is not a floating-point matrix.

    References:
        Chen, He, 2021, SimSiam (arXiv:2011.10566).
    """
    z = normalize_rows(check_embeddings("embeddings", embeddings))  # (N, D)
    variance = jnp.var(z, axis=0)  # (D,)
    spread = variance != 0
    # Two selections: the gradient of the root at zero is infinite, and 0 * inf is NaN.
    return jnp.mean(jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0))


@jax.jit
def effective_rank(embeddings: ArrayLike) -> jax.Array:
    """Exponential of the entropy of the covariance's normalized eigenvalues.

    exp(-sum_i q_i log q_i),  q = eigenvalues / their sum,  0 log 0 = 0

    It is r for a covariance with r equal eigenvalues and zeros else. It does not
    depend on the scale and the mean of the embeddings. A constant embedding has no
    covariance: its effective rank is 1, the smallest there is.

    Args:
        embeddings: (N, D); the cost is that of min(N, D) eigenvalues.

    Returns:
        A scalar from 1 to min(N, D).

    Raises:
        ValueError: if `embeddings` is not a floating-point matrix.

    References:
        Roy, Vetterli, 2007, The effective rank (EUSIPCO).
    """
    h = check_embeddings("embeddings", embeddings)
    # Quarters, so that differences of finite numbers are finite. Subtracting a row
    # before the mean makes a constant column exactly zero.
    h = 0.25 * h
    h = h - h[0]
    h = _divide_by_largest(h - jnp.mean(h, axis=0))  # (N, D)
    # Both products have the same eigenvalues, but for zeros.
    smaller = h.T if h.shape[0] < h.shape[1] else h
    product = jnp.matmul(smaller.T, smaller, precision=lax.Precision.HIGHEST)
    eigenvalues = jnp.maximum(jnp.linalg.eigvalsh(product), 0.0)  # (min(N, D),)
    total = jnp.sum(eigenvalues)
    q = eigenvalues / jnp.where(total > 0, total, 1.0)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(q, q)))


@functools.partial(jax.jit, static_argnames="eps")
def rankme(embeddings: ArrayLike, *, eps: float = 1e-7) -> jax.Array:
    """RankMe: exponential of the entropy of the normalized singular values.

    exp(-sum_i p_i log p_i),  p = s / sum(s) + eps,  s the singular values

    The embeddings are not centered. Embeddings that are all zero have the entropy of
    p = eps.

    Args:
        embeddings: (N, D); published with N = 25,600.
        eps: added after normalizing, > 0; 1e-7 as published.

    Returns:
        A scalar, from about 1 to min(N, D).

    Raises:
        ValueError: if `embeddings` is not a floating-point matrix, or for `eps` <= 0.

    References:
        Garrido, Balestriero, Najman, LeCun, 2023, RankMe (arXiv:2210.02885).
    """
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps: got {eps}, expected a finite number > 0")
    h = _divide_by_largest(check_embeddings("embeddings", embeddings))
    # Not the roots of eigenvalues: those lose half the digits of small values.
    singular_values = jnp.linalg.svd(h, compute_uv=False)  # (min(N, D),)
    total = jnp.sum(singular_values)
    p = singular_values / jnp.where(total > 0, total, 1.0) + eps
    return jnp.exp(-jnp.sum(p * jnp.log(p)))
