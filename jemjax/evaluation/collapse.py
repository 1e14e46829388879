"""Figures that show collapse, without labels.

Type 1, complete: every image has the same embedding (`normalized_std` near 0).
Type 2, informational: embeddings fill few dimensions (`effective_rank`, `rankme`, and
a steep `alpha_req`). `name_collapse` says which of them there is.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jemjax.evaluation.inputs import (
    Scalar,
    Whole,
    check_count,
    check_embeddings,
    check_known,
    check_number,
    is_known,
    on_host,
    whole,
)

# Type 1: below this share of the ideal 1 / sqrt(D). Two embeddings then have a cosine
# of 1 - 0.05^2 = 0.9975 on average. It is no higher because features that are all
# positive have much in common: cosines of 0.99 (a share of 0.1) in random networks.
COMPLETE = 0.05
# Type 2: below this effective rank, which says that nearly all differ along one line.
# Untrained networks of photographs have 2.4 to 3.1, since photographs differ mostly in
# brightness and tint; what training leaves below that it has taken away. The figure
# grows little with D, so it is no share of D,
INFORMATIONAL = 2.0
# but for the narrowest: no further than an eighth of the way from 1 to D.
INFORMATIONAL_SHARE = 1 / 8


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


def _center(h: jax.Array) -> jax.Array:
    """Subtracts the mean row and brings the largest magnitude to 1."""
    # Quarters, so that differences of finite numbers are finite. Subtracting a row
    # before the mean makes a constant column exactly zero.
    h = 0.25 * h
    h = h - h[:1]
    return _divide_by_largest(h - jnp.mean(h, axis=0, keepdims=True))


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
        embeddings: (N, D); the cost is that of min(N, D) eigenvalues, and of D where
            `jax.export` leaves N open.

    Returns:
        A scalar from 1 to min(N, D).

    Raises:
        ValueError: if `embeddings` is not a floating-point matrix.

    References:
        Roy, Vetterli, 2007, The effective rank (EUSIPCO).
    """
    h = _center(whole(check_embeddings("embeddings", embeddings)))  # (N, D)
    # Both products have the same eigenvalues, but for zeros.
    smaller = h.T if is_known(h.shape[0]) and h.shape[0] < h.shape[1] else h
    product = jnp.matmul(smaller.T, smaller, precision=lax.Precision.HIGHEST)
    eigenvalues = jnp.maximum(jnp.linalg.eigvalsh(product), 0.0)  # (min(N, D),)
    total = jnp.sum(eigenvalues)
    q = eigenvalues / jnp.where(total > 0, total, 1.0)
    # Not of zeros: there the logarithm's derivative is infinite.
    log_q = jnp.log(jnp.where(q == 0, 1.0, q))
    return jnp.exp(-jnp.sum(q * log_q))


def rankme(embeddings: ArrayLike, *, eps: Scalar = 1e-7) -> jax.Array:
    """RankMe: exponential of the entropy of the normalized singular values.

    exp(-sum_i p_i log p_i),  p = s / sum(s) + eps,  s the singular values

    The embeddings are not centered. Embeddings that are all zero have the entropy of
    p = eps.

    Args:
        embeddings: (N, D); published with N = 25,600. N has to be known: it decides
            how many singular values there are.
        eps: added after normalizing, > 0; 1e-7 as published. A scalar array, traced or
            not, is not checked.

    Returns:
        A scalar, from about 1 to min(N, D).

    Raises:
        ValueError: if `embeddings` is not a floating-point matrix, or for `eps` <= 0.

    References:
        Garrido, Balestriero, Najman, LeCun, 2023, RankMe (arXiv:2210.02885).
    """
    h = check_embeddings("embeddings", embeddings)
    check_known("embeddings", h)
    return _rankme(h, check_number("eps", eps, h.dtype, open_low=True))


@jax.jit
def _rankme(h, eps):
    h = _divide_by_largest(whole(h))
    # Not the roots of eigenvalues: those lose half the digits of small values.
    singular_values = jnp.linalg.svd(h, compute_uv=False)  # (min(N, D),)
    total = jnp.sum(singular_values)
    p = singular_values / jnp.where(total > 0, total, 1.0) + eps
    return jnp.exp(-jnp.sum(p * jnp.log(p)))


@jax.jit
def alpha_req(embeddings: ArrayLike) -> jax.Array:
    """alpha-ReQ: how fast the eigenvalues of the covariance decay, as a power law.

    lambda_i ~ i^-alpha:  alpha = -slope of the least-squares line through the points
    (log i, log lambda_i),  i = 1, 2, ... in descending order

    Every eigenvalue that is not numerically zero counts alike: those of which the root
    is above max(N, D) eps times the largest root, with eps that of the dtype. Where
    fewer than two are left, as in complete collapse, there is no line: 0 is returned,
    which `effective_rank` (then 1) tells from a flat spectrum. Published figures leave
    out a chosen number of the first and the last eigenvalues.

    Args:
        embeddings: (N, D); the fit sees min(N, D) eigenvalues at most. N has to be
            known.

    Returns:
        A scalar >= 0: 0 for a flat spectrum, near 1 for good features as published,
        more the fewer dimensions carry the variance.

    Raises:
        ValueError: if `embeddings` is not a floating-point matrix.

    References:
        Agrawal, Mondal, Ghosh, Richards, 2022, alpha-ReQ (arXiv:2202.05808).
    """
    h = check_embeddings("embeddings", embeddings)
    check_known("embeddings", h)
    h = _center(whole(h))  # (N, D)
    # Not the roots of eigenvalues: those lose half the digits of small values.
    roots = jnp.linalg.svd(h, compute_uv=False)  # (min(N, D),), descending
    smallest = max(h.shape) * jnp.finfo(h.dtype).eps * roots[0]
    # Not `roots > smallest`, which would drop NaN.
    counts = jnp.where(roots <= smallest, 0.0, 1.0).astype(h.dtype)
    total = jnp.sum(counts)
    log_index = jnp.log(jnp.arange(1, len(roots) + 1, dtype=h.dtype))
    log_value = 2 * jnp.log(jnp.where(counts > 0, roots, 1.0))
    x = log_index - jnp.sum(counts * log_index) / jnp.maximum(total, 1.0)
    squares = jnp.sum(counts * x * x)
    # x sums to zero, so the mean of the logarithms need not be subtracted.
    slope = jnp.sum(counts * x * log_value) / jnp.where(total < 2, 1.0, squares)
    return jnp.where(total < 2, 0.0, -slope)


def name_collapse(
    *, normalized_std: Scalar, effective_rank: Scalar, dimension: Whole
) -> list[str]:
    """Says in words which collapse the figures of embeddings show.

    type 1: normalized_std < 0.05 / sqrt(D), every image has nearly the same embedding
    type 2: effective_rank < min(2, 1 + (D - 1) / 8), the embeddings differ, but fill
        few dimensions

    Type 2 is not named beside type 1, from which it follows. As a mean over dimensions
    the first figure is that small, too, if less than one in 400 of them vary at all.

    Args:
        normalized_std: what `normalized_std` gives for the embeddings.
        effective_rank: what `effective_rank` gives for them.
        dimension: D >= 1, their width.

    Returns:
        No sentence, or one; one too where a figure is not finite.

    Raises:
        ValueError: for `dimension` < 1.
    """
    dimension = check_count("dimension", dimension)
    normalized_std = float(on_host("normalized_std", normalized_std))
    effective_rank = float(on_host("effective_rank", effective_rank))
    if not (math.isfinite(normalized_std) and math.isfinite(effective_rank)):
        return [
            f"the embeddings are not finite (normalized std {normalized_std:g},"
            f" effective rank {effective_rank:g})"
        ]
    ideal = 1 / math.sqrt(dimension)
    if normalized_std < COMPLETE * ideal:
        return [
            "type 1: every image has nearly the same embedding (normalized std"
            f" {normalized_std:.4f}, ideal {ideal:.4f})"
        ]
    if effective_rank < min(INFORMATIONAL, 1 + INFORMATIONAL_SHARE * (dimension - 1)):
        return [
            "type 2: the embeddings fill few dimensions (effective rank"
            f" {effective_rank:.1f} of {dimension})"
        ]
    return []
