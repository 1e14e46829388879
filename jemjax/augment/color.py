"""What happens to the colors of a view, in torchvision's arithmetic or another's."""

import functools
import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jemjax._kernels.fusion import materialize
from jemjax.augment.inputs import (
    Array,
    Scalar,
    at_least_float32,
    check_number,
    example_keys,
    is_number,
    per_example,
    rows_as,
    sharding_of_rows,
    to_floats,
    uniforms,
)

# In which the published codes differ:
#
#                torchvision                simclr                   byol
# brightness     factor x                   factor x                 x + amount
# contrast       about the mean gray        about each channel's     as simclr
#                                           mean
# saturation     a blend with gray          times the saturation     as simclr
#                                           of HSV
Arithmetic = Literal["torchvision", "simclr", "byol"]

LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue, in ITU-R BT.601


def adjust_brightness(
    images: Array,
    factor: Scalar,
    *,
    arithmetic: Arithmetic = "torchvision",
) -> jax.Array:
    """Mixes each image with black: clip(f x, 0, 1); BYOL's form: clip(x + f, 0, 1).

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        factor: scalar or (N,), >= 0; 1 changes nothing. BYOL's: in [-1, 1]; 0 changes
            nothing.
        arithmetic: whose: "torchvision" and "simclr" are the same, or "byol".

    Returns:
        (N, H, W, C) float32 in [0, 1].

    Raises:
        ValueError: for wrong shapes, or a factor out of range.
    """
    return _adjust("brightness", images, factor, arithmetic)


def adjust_contrast(
    images: Array,
    factor: Scalar,
    *,
    arithmetic: Arithmetic = "torchvision",
) -> jax.Array:
    """Mixes each image with its mean gray: clip(f x + (1 - f) mean(gray), 0, 1).

    SimCLR's and BYOL's mix each channel with its own mean.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        factor: scalar or (N,), >= 0; 1 changes nothing.
        arithmetic: whose: "torchvision", "simclr" or "byol".

    Returns:
        (N, H, W, C) float32 in [0, 1].

    Raises:
        ValueError: for wrong shapes, or a factor below 0.
    """
    return _adjust("contrast", images, factor, arithmetic)


def adjust_saturation(
    images: Array,
    factor: Scalar,
    *,
    arithmetic: Arithmetic = "torchvision",
) -> jax.Array:
    """Mixes each pixel with its gray: clip(f x + (1 - f) gray, 0, 1).

    SimCLR's and BYOL's multiply the saturation of HSV: min(f S, 1), at the same hue and
    value.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        factor: scalar or (N,), >= 0; 1 changes nothing.
        arithmetic: whose: "torchvision", "simclr" or "byol".

    Returns:
        (N, H, W, C) float32 in [0, 1]; one-channel images as they are.

    Raises:
        ValueError: for wrong shapes, or a factor below 0.
    """
    return _adjust("saturation", images, factor, arithmetic)


def adjust_hue(images: Array, factor: Scalar) -> jax.Array:
    """Turns the hue of each pixel in HSV: h -> (h + factor) mod 1.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        factor: scalar or (N,), in full turns, in [-0.5, 0.5]; 0 changes nothing.

    Returns:
        (N, H, W, C) float32 in [0, 1]; one-channel images as they are.

    Raises:
        ValueError: for wrong shapes, or a factor out of range.
    """
    images = to_floats(images)
    factor = per_example("factor", factor, images.shape[0], -0.5, 0.5)
    if images.shape[3] == 1:
        return images
    return _turn_hue(images, factor)


def to_grayscale(images: Array) -> jax.Array:
    """Gives every channel the gray 0.2989 R + 0.587 G + 0.114 B.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.

    Returns:
        (N, H, W, C) float32; one-channel images as they are.

    Raises:
        ValueError: for wrong shapes.
    """
    return _remove_color(to_floats(images))


def solarize(images: Array, threshold: Scalar = 0.5) -> jax.Array:
    """Inverts bright values: 1 - x where x >= threshold.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        threshold: scalar or (N,), in [0, 1].

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: for wrong shapes, or a threshold out of range.
    """
    return _solarize(to_floats(images), threshold)


def normalize(images: Array, mean: Any, std: Any) -> jax.Array:
    """Centers and scales each channel: (x - mean) / std.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        mean: a number, or one for each channel. Three numbers are averaged for
            one-channel images, so that a recipe for color images serves them too.
        std: > 0, as `mean`.

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: for wrong shapes, or a std that is not positive.
    """
    return normalize_floats(to_floats(images), mean, std)


def denormalize(images: Array, mean: Any, std: Any) -> jax.Array:
    """The inverse of `normalize`: x std + mean.

    Args:
        images: (N, H, W, C) float, C = 1 or 3.
        mean: as given to `normalize`.
        std: as given to `normalize`.

    Returns:
        (N, H, W, C).

    Raises:
        ValueError: for another number of channels.
    """
    images = jnp.asarray(images)
    images = images.astype(at_least_float32(images.dtype))
    mean = _of_channels("mean", mean, images)
    return images * _of_channels("std", std, images) + mean


def normalize_floats(images: jax.Array, mean: Any, std: Any) -> jax.Array:
    """`normalize` of (N, H, W, C) float32."""
    if not np.all(np.asarray(std) > 0):
        raise ValueError(f"std: got {std}, expected numbers > 0")
    mean = _of_channels("mean", mean, images)
    return (images - mean) / _of_channels("std", std, images)


def color_jitter(
    key: Array,
    images: Array,
    *,
    brightness: Scalar,
    contrast: Scalar,
    saturation: Scalar,
    hue: Scalar,
    probability: Scalar,
    arithmetic: Arithmetic = "torchvision",
) -> jax.Array:
    """Changes brightness, contrast, saturation and hue by random amounts and order.

    For each image, with the given probability, the four adjustments with a factor
    uniform in [max(0, 1 - strength), 1 + strength], for hue and BYOL's brightness in
    [-strength, strength], in one of all their orders, the result clipped to [0, 1]
    after each (torchvision's ColorJitter; Howard, 2013, arXiv:1312.5402).

    Args:
        key: one key, folded with each row's index, or N keys; inside `shard_map` give
            N keys, as in `make_views`.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        brightness: strength, >= 0; 0 leaves this adjustment out.
        contrast: strength, >= 0.
        saturation: strength, >= 0; unused for one-channel images.
        hue: strength in full turns, in [0, 0.5]; unused for one-channel images.
        probability: of changing an image at all, in [0, 1].
        arithmetic: whose: "torchvision", "simclr" or "byol".

    Returns:
        (N, H, W, C) float32 in [0, 1].

    Raises:
        ValueError: for wrong shapes, or numbers out of range.
    """
    images = to_floats(images)
    jitter = random_jitter(
        uniforms(example_keys(key, images.shape[0], images), JITTER_DRAWS),
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        probability=probability,
        arithmetic=arithmetic,
    )
    return apply_jitter(images, jitter, arithmetic)


# Uniform numbers for a jitter: whether, turn, order, place, and three factors.
JITTER_DRAWS = 7


class Jitter(NamedTuple):
    """What is drawn for each image: B <= 3 blends, in some order, and a turn of hue."""

    factors: dict[str, jax.Array]
    """(N,) by the name of the blend; 1, of BYOL's brightness 0, changes nothing"""
    order: jax.Array
    """(N, B) which of `factors` comes first, second, third"""
    turns: jax.Array | None
    """(N,) full turns of hue, 0 changes nothing; None without hue"""
    place: jax.Array
    """(N,) how many of the blends come before hue"""


def random_jitter(
    draws: jax.Array,
    *,
    brightness: Scalar,
    contrast: Scalar,
    saturation: Scalar,
    hue: Scalar,
    probability: Scalar,
    arithmetic: Arithmetic = "torchvision",
) -> Jitter:
    """What (JITTER_DRAWS, N) uniform numbers are; arguments as of `color_jitter`.

    A uniform order of all four is a uniform order of the three blends and a uniform
    place for hue among them.
    """
    strengths = {
        "brightness": check_number("brightness", brightness, 0),
        "contrast": check_number("contrast", contrast, 0),
        "saturation": check_number("saturation", saturation, 0),
    }
    hue = check_number("hue", hue, 0, 0.5)
    probability = check_number("probability", probability, 0, 1)
    chance, for_turn, for_order, for_place, *for_factors = draws  # (N,) each
    applied = chance < probability

    factors = {}
    for draw, (name, strength) in zip(for_factors, strengths.items(), strict=True):
        if not _is_zero(strength):
            low, neutral, high = jnp.maximum(1 - strength, 0.0), 1.0, 1 + strength
            if _is_shift(name, arithmetic):
                low, neutral, high = -strength, 0.0, strength
            factors[name] = jnp.where(applied, low + (high - low) * draw, neutral)
    turns = None
    if not _is_zero(hue):
        turns = jnp.where(applied, hue * (2 * for_turn - 1), 0.0)
    orders = np.array(list(itertools.permutations(range(len(factors)))), np.int32)
    row = (len(orders) * for_order).astype(jnp.int32)
    order = jnp.asarray(orders).at[row].get(out_sharding=sharding_of_rows(row))
    place = jnp.floor((len(factors) + 1) * for_place)
    return Jitter(factors, order, turns, place)


def apply_jitter(
    images: jax.Array, jitter: Jitter, arithmetic: Arithmetic = "torchvision"
) -> jax.Array:
    """Does to each image what was drawn for it.

    Args:
        images: (N, H, W, C) float32 in [0, 1].
        jitter: of N examples; saturation and hue are nothing to one channel.
        arithmetic: that of `random_jitter`.

    Returns:
        (N, H, W, C) float32 in [0, 1].
    """

    # Which blend a slot of the order holds differs between the images of a batch, so
    # each slot computes one blend with the factor and the pivot of its own image.
    def blend_slot(images, slot, enabled):
        images = materialize(images)
        chosen = _Blend(1.0, 0.0, 0.0)
        blends = _blends(images, jitter.factors, arithmetic)
        for number, blend in enumerate(blends):
            taken = (jitter.order[:, slot] == number) & enabled
            taken = taken.reshape(-1, 1, 1, 1)
            chosen = _Blend(
                *(jnp.where(taken, *pair) for pair in zip(blend, chosen, strict=True))
            )
        return _clip(chosen.of(images))

    def turn(images, turns):
        images = materialize(images)
        turns = turns.reshape(-1, 1, 1, 1)
        return jnp.where(turns == 0, images, _turn_hue(images, turns))

    return _in_order(images, jitter, blend_slot, turn if images.shape[3] > 1 else None)


def _in_order(state, jitter: Jitter, blend_slot, turn):
    """Applies the blends of all slots, and the turn of hue at its place among them.

    Hue, the costly one, is computed once, between two passes over the slots: the first
    does the slots before it, the second those after it.
    """
    slots = range(jitter.order.shape[1])
    if jitter.turns is None or turn is None:
        for slot in slots:
            state = blend_slot(state, slot, True)
        return state
    for slot in slots:
        state = blend_slot(state, slot, slot < jitter.place)
    state = turn(state, jitter.turns)
    for slot in slots:
        state = blend_slot(state, slot, slot >= jitter.place)
    return state


def fused_color(
    images: jax.Array, jitter: Jitter | None, grayed: jax.Array | None
) -> jax.Array:
    """Jitter and grayscale as one matrix and one offset an image: M x + o.

    The adjustments in their order, each of which is linear in a pixel's channels when
    nothing is clipped between them; contrast's pivot follows the mean along. Hue is
    turned about the gray axis, which is HSV's turn for thirds of it. What is clipped is
    the result, and that only by the caller.

    Args:
        images: (N, H, W, C) float32.
        jitter: of N examples, in torchvision's arithmetic.
        grayed: (N,) bool, which images lose their color.

    Returns:
        (N, H, W, C) float32, not clipped.
    """
    mean = _mean(images)
    channels = mean.shape[1]
    luma = jnp.array(LUMA if channels == 3 else (1.0,), jnp.float32)
    to_gray = jnp.broadcast_to(luma, (1, channels, channels))
    # The last column is the offset: (N, C, C + 1).
    mixture = jnp.eye(channels, channels + 1, dtype=jnp.float32)
    mixture = jnp.broadcast_to(mixture, (mean.shape[0], *mixture.shape))
    mixture = rows_as(images, mixture)
    if jitter is not None:
        mixture = _jitter_mixture(mixture, jitter, mean, to_gray)
    if grayed is not None:
        gray = _times(to_gray, mixture)
        mixture = jnp.where(grayed[:, None, None], gray, mixture)
    mixture = mixture[:, None, None]  # (N, 1, 1, C, C + 1)
    mixed = mixture[..., channels]
    for channel in range(channels):
        mixed = mixed + mixture[..., channel] * images[..., channel : channel + 1]
    return mixed


def _jitter_mixture(
    mixture: jax.Array, jitter: Jitter, mean: jax.Array, to_gray: jax.Array
) -> jax.Array:
    """What `jitter` makes of a pixel: (N, C, C + 1), matrix and offset, to the same."""
    channels = mean.shape[1]
    identity = jnp.eye(channels, dtype=jnp.float32)[None]

    def blend_slot(mixture, slot, enabled):
        matrix, offset = mixture[..., :channels], mixture[..., channels:]
        mean_now = _times(matrix, mean[..., None]) + offset  # (N, C, 1)
        # Of a pixel's channels, and a constant: (N, C, C), (N, C, 1).
        pivots = {
            "brightness": (0.0, 0.0),
            "contrast": (0.0, _times(to_gray, mean_now)),
            "saturation": (to_gray, 0.0),
        }
        factor, of_pixel, constant = 1.0, 0.0, 0.0
        for number, (name, amount) in enumerate(jitter.factors.items()):
            taken = ((jitter.order[:, slot] == number) & enabled)[:, None, None]
            factor = jnp.where(taken, amount[:, None, None], factor)
            of_pixel = jnp.where(taken, pivots[name][0], of_pixel)
            constant = jnp.where(taken, pivots[name][1], constant)
        mixture = _times(factor * identity + (1 - factor) * of_pixel, mixture)
        shift = jnp.broadcast_to((1 - factor) * constant, offset.shape)
        return mixture + jnp.concatenate([jnp.zeros_like(matrix), shift], axis=2)

    def turn(mixture, turns):
        return _times(_rotation(turns), mixture)

    return _in_order(mixture, jitter, blend_slot, turn if channels > 1 else None)


def _times(matrices: jax.Array, others: jax.Array) -> jax.Array:
    """Products of matrices so small that sums, which are fused, are faster."""
    terms = (
        matrices[..., :, i, None] * others[..., None, i, :]
        for i in range(matrices.shape[-1])
    )
    return functools.reduce(jnp.add, terms)


def _rotation(turns: jax.Array) -> jax.Array:
    """About the axis of the grays, by Rodrigues' formula: (N,) -> (N, 3, 3)."""
    angle = (2 * math.pi * turns)[:, None, None]
    mean = np.full((1, 3, 3), 1 / 3, np.float32)
    # Of red to green to blue.
    across = np.array([[[0, -1, 1], [1, 0, -1], [-1, 1, 0]]], np.float32)
    across = across / math.sqrt(3)
    rest = np.eye(3, dtype=np.float32)[None] - mean
    return jnp.cos(angle) * rest + mean + jnp.sin(angle) * across.astype(np.float32)


def random_grayscale(key: Array, images: Array, *, probability: Scalar) -> jax.Array:
    """Removes the color of each image with the given probability.

    Args:
        key: one key, folded with each row's index, or N keys; inside `shard_map` give
            N keys, as in `make_views`.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        probability: in [0, 1].

    Returns:
        (N, H, W, C) float32; one-channel images as they are.

    Raises:
        ValueError: for wrong shapes, or a probability out of range.
    """
    images = to_floats(images)
    probability = check_number("probability", probability, 0, 1)
    (chance,) = uniforms(example_keys(key, images.shape[0], images), 1)
    return gray_where(images, chance < probability)


def gray_where(images: jax.Array, grayed: jax.Array) -> jax.Array:
    """Removes the color of (N, H, W, C) where `grayed` (N,)."""
    return jnp.where(grayed.reshape(-1, 1, 1, 1), _remove_color(images), images)


def random_solarize(
    key: Array,
    images: Array,
    *,
    probability: Scalar,
    threshold: Scalar = 0.5,
) -> jax.Array:
    """Inverts the bright values of each image with the given probability.

    Args:
        key: one key, folded with each row's index, or N keys; inside `shard_map` give
            N keys, as in `make_views`.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        probability: in [0, 1].
        threshold: values from here on are inverted, in [0, 1].

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: for wrong shapes, or numbers out of range.
    """
    images = to_floats(images)
    (chance,) = uniforms(example_keys(key, images.shape[0], images), 1)
    return solarize_by_draws(chance, images, probability, threshold)


def solarize_by_draws(
    chance: jax.Array, images: jax.Array, probability: Scalar, threshold: Scalar
) -> jax.Array:
    """`random_solarize` of (N, H, W, C) float32 by (N,) uniform numbers."""
    probability = check_number("probability", probability, 0, 1)
    inverted = _solarize(images, threshold)
    return jnp.where((chance < probability).reshape(-1, 1, 1, 1), inverted, images)


def _adjust(
    name: str, images: Array, factor: Scalar, arithmetic: Arithmetic
) -> jax.Array:
    check_arithmetic("arithmetic", arithmetic)
    images = to_floats(images)
    limits = (-1, 1) if _is_shift(name, arithmetic) else (0, math.inf)
    factor = per_example("factor", factor, images.shape[0], *limits)
    (blend,) = _blends(images, {name: factor}, arithmetic)
    # One channel has no saturation: the blend with it is a change of nothing.
    return _clip(blend.of(images))


def check_arithmetic(name: str, arithmetic: Arithmetic) -> None:
    """Refuses an arithmetic that is not known."""
    known = ("torchvision", "simclr", "byol")
    if arithmetic not in known:
        raise ValueError(f"{name}: got {arithmetic!r}, expected one of {known}")


def _is_shift(name: str, arithmetic: Arithmetic) -> bool:
    return name == "brightness" and arithmetic == "byol"


class _Blend(NamedTuple):
    """factor x + (1 - factor) pivot + shift, each of any shape that broadcasts."""

    factor: Any
    pivot: Any
    shift: Any

    def of(self, images: jax.Array) -> jax.Array:
        return self.factor * images + (1 - self.factor) * self.pivot + self.shift


def _blends(
    images: jax.Array, factors: dict[str, jax.Array], arithmetic: Arithmetic
) -> list[_Blend]:
    """What brightness, contrast and saturation do: blends, with different pivots.

    Factor 1 leaves an image as it is, to the bit.
    """
    gray = _gray(images)  # (N, H, W, 1)
    own = arithmetic != "torchvision"
    blends = []
    for name, factor in factors.items():
        factor = factor.reshape(-1, 1, 1, 1)
        if _is_shift(name, arithmetic):
            blends.append(_Blend(1.0, 0.0, factor))
        elif name == "brightness":
            blends.append(_Blend(factor, 0.0, 0.0))
        elif name == "contrast":
            mean = _mean(images if own else gray)[:, None, None]
            blends.append(_Blend(factor, mean, 0.0))
        elif images.shape[3] == 1:
            blends.append(_Blend(1.0, 0.0, 0.0))
        elif own:
            # At the same hue a saturation f S, at most 1, is a blend with the value.
            value, chroma = _value_and_chroma(*_channels(images))
            most = value / jnp.where(chroma == 0, 1.0, chroma)
            blends.append(
                _Blend(
                    jnp.where(factor == 1, 1.0, jnp.minimum(factor, most)), value, 0.0
                )
            )
        else:
            blends.append(_Blend(factor, gray, 0.0))
    return blends


def _clip(images: jax.Array) -> jax.Array:
    return jnp.clip(images, 0, 1)


def _mean(images: jax.Array) -> jax.Array:
    """Of each channel: (N, H, W, C) -> (N, C)."""
    # In two steps, of which the first adds long runs of numbers.
    return jnp.mean(jnp.mean(images, axis=1), axis=1)


def _channels(images: jax.Array) -> list[jax.Array]:
    """(N, H, W, C) -> C times (N, H, W, 1)."""
    return jnp.split(images, images.shape[3], axis=3)


def _value_and_chroma(
    red: jax.Array, green: jax.Array, blue: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The largest channel, and by how much it is larger than the smallest."""
    value = jnp.maximum(jnp.maximum(red, green), blue)
    return value, value - jnp.minimum(jnp.minimum(red, green), blue)


def _gray(images: jax.Array) -> jax.Array:
    """(N, H, W, C) -> (N, H, W, 1)."""
    if images.shape[3] == 1:
        return images
    red, green, blue = _channels(images)
    return materialize(LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)


def _remove_color(images: jax.Array) -> jax.Array:
    return jnp.broadcast_to(_gray(images), images.shape)


def _solarize(images: jax.Array, threshold: Scalar) -> jax.Array:
    threshold = per_example("threshold", threshold, images.shape[0], 0, 1)
    return jnp.where(images >= threshold, 1 - images, images)


def _turn_hue(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Hue + turns in HSV, without saturation and value, which stay as they are.

    With the hue h in sixths of a turn, the channels are
    largest - (largest - smallest) clip(min(k, 4 - k), 0, 1), k = (offset + h) mod 6,
    with the offset 5 for red, 3 for green and 1 for blue.
    """
    red, green, blue = _channels(images)
    largest, chroma = _value_and_chroma(red, green, blue)
    sector = jnp.where(
        largest == red,
        green - blue,
        jnp.where(largest == green, blue - red, red - green),
    )
    offset = jnp.where(largest == red, 0.0, jnp.where(largest == green, 2.0, 4.0))
    hue = offset + sector / jnp.where(chroma == 0, 1.0, chroma) + 6 * turns

    largest, chroma, hue = materialize((largest, chroma, hue))
    k = hue + jnp.array([[[[5, 3, 1]]]], jnp.float32)  # (N, H, W, 3)
    k = k - 6 * jnp.floor(k / 6)
    within = jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
    return largest - chroma * within


def _of_channels(name: str, values: Any, images: jax.Array) -> np.ndarray:
    """(1, 1, 1, 1) or (1, 1, 1, C), of the dtype of the images (N, H, W, C)."""
    channels = images.shape[-1]
    values = np.asarray(values, np.float32)
    if values.shape == (3,) and channels == 1:
        values = values.mean()
    if values.shape not in ((), (channels,)):
        raise ValueError(
            f"{name}: got {values.tolist()}, expected a number, or one for each of"
            f" {channels} channels"
        )
    shape = (1,) * (images.ndim - 1) + (-1,)
    return values.astype(images.dtype).reshape(shape)


def _is_zero(value: Any) -> bool:
    return is_number(value) and value == 0
