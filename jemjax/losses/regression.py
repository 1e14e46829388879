"""Losses that regress the target branch's embeddings: BYOL, SimSiam and data2vec.

Constant embeddings minimize all of them. What keeps the methods from collapsing is
around the loss: a predictor, a target without gradient, a moving average.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jemjax.losses import numerics
from jemjax.losses.checks import (
    check_arrays,
    check_embeddings,
    check_flag,
    check_number,
)
from jemjax.losses.collectives import (
    AxisName,
    as_number,
    batch_mean,
    batch_size,
    psum,
)

Scalar = ArrayLike  # a number, or a traced scalar
Normalization = Literal["layer", "instance"] | None

# Added to the variance by both official codes of data2vec.
_NORMALIZATION_EPS = 1e-5


def byol(
    prediction: ArrayLike,
    target: ArrayLike,
    *,
    stop_gradient: bool = True,
    axis_name: AxisName = None,
) -> jax.Array:
    """BYOL: the squared distance of a prediction and its target on the unit sphere.

    1/N sum_n ||p_n / |p_n| - t_n / |t_n|||^2 = 1/N sum_n (2 - 2 cos(p_n, t_n))

    One direction. BYOL's code adds the two directions, without 1/2, so its loss is in
    [0, 8]. Identical embeddings of all images have the value 0.
    Rows of zeros, and those shorter than 1e-6 (1e-3 for float16), stay shorter than 1:
    as in the official code, a distance with one row of zeros is 1, not 2.

    Args:
        prediction: (N, D) predictor's outputs for one view.
        target: (N, D) target network's projections of the other view.
        stop_gradient: whether the target is a constant.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar in [0, 4], float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes or dtypes, and an empty batch.

    References:
        Grill et al., 2020, BYOL (arXiv:2006.07733), equation 2.
    """
    p, t = _unit_rows(prediction, target, stop_gradient, axis_name)
    return batch_mean(jnp.sum(jnp.square(p - t), axis=1), axis_name)


def negative_cosine(
    prediction: ArrayLike,
    target: ArrayLike,
    *,
    stop_gradient: bool = True,
    axis_name: AxisName = None,
) -> jax.Array:
    """SimSiam: the negative cosine of a prediction and its target.

    -1/N sum_n cos(p_n, t_n)

    One direction. SimSiam's loss is the average of the two directions, in [-1, 1].
    Identical embeddings of all images have the value -1.
    Rows of zeros, and those shorter than 1e-6 (1e-3 for float16), stay shorter than 1:
    the cosine with a row of zeros is 0.

    Args:
        prediction: (N, D) predictor's outputs for one view.
        target: (N, D) projections of the other view.
        stop_gradient: whether the target is a constant. Without, SimSiam collapses.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar in [-1, 1], float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes or dtypes, and an empty batch.

    References:
        Chen, He, 2020, Exploring Simple Siamese Representation Learning
        (arXiv:2011.10566), equation 1.
    """
    p, t = _unit_rows(prediction, target, stop_gradient, axis_name)
    return batch_mean(-jnp.sum(p * t, axis=1), axis_name)


def data2vec_target(
    layers: ArrayLike,
    *,
    layer_normalization: Normalization = "layer",
    final_normalization: Normalization = "layer",
    stop_gradient: bool = True,
) -> jax.Array:
    """data2vec's targets: the mean of the teacher's last blocks, normalized.

    final_normalization(1/L sum_l layer_normalization(layers_l))

    Both subtract the mean and divide by sqrt(Var + 1e-5), with the biased variance and
    without parameters: "layer" over the D features of a token, "instance" over the T
    tokens of a feature. Published: "layer" and "layer" for images, "instance" and None
    for speech.

    Args:
        layers: (L, N, T, D) outputs of the teacher's last L blocks, for the unmasked
            image.
        layer_normalization: "layer", "instance" or None, of each block's output.
        final_normalization: "layer", "instance" or None, of their mean.
        stop_gradient: whether the targets are constants.

    Returns:
        (N, T, D), float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes, dtypes or normalizations.

    References:
        Baevski et al., 2022, data2vec (arXiv:2202.03555), section 3.3.
    """
    (layers,) = check_arrays(None, min_batch=1, layers=(layers, "LNTD"))
    if check_flag("stop_gradient", stop_gradient):
        layers = lax.stop_gradient(layers)
    layers = _normalize("layer_normalization", layer_normalization, layers)
    # Divided before the sum, which then overflows only where the mean does.
    mean = jnp.sum(layers * (1.0 / layers.shape[0]), axis=0)  # (N, T, D)
    return _normalize("final_normalization", final_normalization, mean)


def smooth_l1(
    prediction: ArrayLike,
    target: ArrayLike,
    *,
    beta: Scalar = 2.0,
    mask: ArrayLike | None = None,
    stop_gradient: bool = True,
    axis_name: AxisName = None,
) -> jax.Array:
    """data2vec: the smooth L1 distance of the masked tokens' predictions and targets.

    The mean, over the masked tokens of the batch and over D, of
    d^2 / (2 beta) where |d| < beta, else |d| - beta / 2,  d = prediction - target

    beta=0 is the squared error d^2. Without a masked token the loss is 0. fairseq's
    data2vec is this times sqrt(D) and the number of masked tokens, by which its trainer
    then divides. Identical embeddings of all images have the value 0.

    Args:
        prediction: (N, T, D) student's predictions for all tokens.
        target: (N, T, D) as from `data2vec_target`.
        beta: >= 0, where the quadratic becomes linear; > 0 if it is traced.
        mask: (N, T) bool, True for the tokens that count; None for all. What the others
            hold is ignored, even where it is not finite.
        stop_gradient: whether the target is a constant.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar >= 0, float32 (float64 for float64 input); +inf beyond its range.

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and an empty batch.

    References:
        Baevski et al., 2022, data2vec (arXiv:2202.03555), equation 2.
    """
    prediction, target = check_arrays(
        axis_name, min_batch=1, prediction=(prediction, "NTD"), target=(target, "NTD")
    )
    beta = check_number("beta", beta, dtype=prediction.dtype)
    if check_flag("stop_gradient", stop_gradient):
        target = lax.stop_gradient(target)
    difference = prediction - target
    if mask is None:
        tokens = batch_size(difference, axis_name) * difference.shape[1]
        tokens = as_number(tokens, difference.dtype)
    else:
        mask = _check_mask(mask, difference.shape[:2])
        difference = jnp.where(mask[..., None], difference, 0.0)
        tokens = psum(jnp.sum(mask.astype(difference.dtype)), axis_name)
    weight = 1.0 / (jnp.maximum(tokens, 1.0) * difference.shape[2])
    return psum(jnp.sum(_huber(difference, beta, weight)), axis_name)


def _unit_rows(prediction, target, stop_gradient, axis_name):
    p, t = check_embeddings(axis_name, 1, prediction=prediction, target=target)
    if check_flag("stop_gradient", stop_gradient):
        t = lax.stop_gradient(t)
    return (
        numerics.normalize_rows(p, jnp.result_type(prediction)),
        numerics.normalize_rows(t, jnp.result_type(target)),
    )


def _check_mask(mask, expected):
    if not hasattr(mask, "shape") or not hasattr(mask, "dtype"):
        raise ValueError(
            f"mask: got {type(mask).__name__}, expected a bool array of shape"
            f" {expected}"
        )
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask: got dtype {mask.dtype}, expected bool")
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected {expected}, with N and T as"
            " in prediction"
        )
    return jnp.asarray(mask)


def _normalize(name, normalization, x):
    """Of x (..., T, D)."""
    if normalization is None:
        return x
    if normalization not in ("layer", "instance"):
        raise ValueError(
            f'{name}: got {normalization!r}, expected "layer", "instance" or None'
        )
    axis = -1 if normalization == "layer" else -2
    rows = jnp.moveaxis(x, axis, 0)
    return jnp.moveaxis(numerics.standardize(rows, _NORMALIZATION_EPS, None), 0, axis)


def _huber(difference, beta, weight):
    """Smooth L1 of each entry, times `weight`."""
    if not isinstance(beta, jax.Array) and beta == 0:
        # Divided before the square: it overflows only where the result does.
        return jnp.square(difference * jnp.sqrt(weight))
    # One expression for both pieces, so that no square of a large difference arises:
    # its derivative is the slope on either side.
    slope = jnp.clip(difference / beta, -1.0, 1.0)
    return slope * (difference - 0.5 * beta * slope) * weight
