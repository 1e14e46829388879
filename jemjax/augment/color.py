"""What happens to the colors of a view, in torchvision's arithmetic."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jemjax.augment.inputs import (
    check_images,
    check_number,
    example_keys,
    happens,
    is_number,
    materialize,
    per_example,
    uniforms,
)

LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue, in ITU-R BT.601


def adjust_brightness(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Mixes each image with black: clip(factor x, 0, 1).

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        factor: scalar or (N,), >= 0; 1 changes nothing.

    Returns:
        (N, H, W, C) float32 in [0, 1].

    Raises:
        ValueError: for wrong shapes, or a factor below 0.
    """
    images = check_images(images)
    factor = per_example("factor", factor, images, 0)
    return jnp.clip(factor * images, 0, 1)


def adjust_contrast(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Mixes each image with its mean gray: clip(f x + (1 - f) mean(gray), 0, 1).

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        factor: scalar or (N,), >= 0; 1 changes nothing.

    Returns:
        (N, H, W, C) float32 in [0, 1].

    Raises:
        ValueError: for wrong shapes, or a factor below 0.
    """
    images = check_images(images)
    factor = per_example("factor", factor, images, 0)
    mean = jnp.mean(_gray(images), axis=(1, 2, 3), keepdims=True)  # (N, 1, 1, 1)
    return _blend(images, mean, factor)


def adjust_saturation(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Mixes each pixel with its gray: clip(f x + (1 - f) gray, 0, 1).

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        factor: scalar or (N,), >= 0; 1 changes nothing.

    Returns:
        (N, H, W, C) float32 in [0, 1]; one-channel images as they are.

    Raises:
        ValueError: for wrong shapes, or a factor below 0.
    """
    images = check_images(images)
    factor = per_example("factor", factor, images, 0)
    if images.shape[-1] == 1:
        return images
    return _blend(images, _gray(images), factor)


def adjust_hue(images: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Turns the hue of each pixel in HSV: h -> (h + factor) mod 1.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        factor: scalar or (N,), in full turns, in [-0.5, 0.5]; 0 changes nothing.

    Returns:
        (N, H, W, C) float32 in [0, 1]; one-channel images as they are.

    Raises:
        ValueError: for wrong shapes, or a factor out of range.
    """
    images = check_images(images)
    factor = per_example("factor", factor, images, -0.5, 0.5)
    if images.shape[-1] == 1:
        return images
    return _turn_hue(images, factor)


def to_grayscale(images: jax.Array) -> jax.Array:
    """Gives every channel the gray 0.2989 R + 0.587 G + 0.114 B.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.

    Returns:
        (N, H, W, C) float32; one-channel images as they are.

    Raises:
        ValueError: for wrong shapes.
    """
    images = check_images(images)
    return jnp.broadcast_to(_gray(images), images.shape)


def solarize(images: jax.Array, threshold: jax.Array | float = 0.5) -> jax.Array:
    """Inverts bright values: 1 - x where x >= threshold.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        threshold: scalar or (N,), in [0, 1].

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: for wrong shapes, or a threshold out of range.
    """
    images = check_images(images)
    threshold = per_example("threshold", threshold, images, 0, 1)
    return jnp.where(images >= threshold, 1 - images, images)


def normalize(images: jax.Array, mean: Any, std: Any) -> jax.Array:
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
    images = check_images(images)
    channels = images.shape[-1]
    if not np.all(np.asarray(std) > 0):
        raise ValueError(f"std: got {std}, expected numbers > 0")
    mean = _of_channels("mean", mean, channels)
    return (images - mean) / _of_channels("std", std, channels)


def color_jitter(
    key: jax.Array,
    images: jax.Array,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    probability: float,
) -> jax.Array:
    """Changes brightness, contrast, saturation and hue by random amounts and order.

    For each image, with the given probability, the four adjustments with a factor
    uniform in [max(0, 1 - strength), 1 + strength], for hue in [-hue, hue], in one of
    all their orders, the result clipped to [0, 1] after each (torchvision's
    ColorJitter; Howard, 2013, arXiv:1312.5402).

    Args:
        key: one key, folded with each row's index, or N keys.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        brightness: strength, >= 0; 0 leaves this adjustment out.
        contrast: strength, >= 0.
        saturation: strength, >= 0; unused for one-channel images.
        hue: strength in full turns, in [0, 0.5]; unused for one-channel images.
        probability: of changing an image at all, in [0, 1].

    Returns:
        (N, H, W, C) float32 in [0, 1].

    Raises:
        ValueError: for wrong shapes, or numbers out of range.
    """
    images = check_images(images)
    saturation = check_number("saturation", saturation, 0)
    hue = check_number("hue", hue, 0, 0.5)
    if images.shape[-1] == 1:
        saturation = hue = 0.0
    jitter = random_jitter(
        key,
        len(images),
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        probability=probability,
    )
    return apply_jitter(images, jitter)


class Jitter(NamedTuple):
    """What is drawn for each image: B <= 3 blends, in some order, and a turn of hue."""

    factors: dict[str, jax.Array]
    """(N,) by the name of the blend; 1 changes nothing"""
    order: jax.Array
    """(N, B) which of `factors` comes first, second, third"""
    turns: jax.Array | None
    """(N,) full turns of hue, 0 changes nothing; None without hue"""
    place: jax.Array
    """(N,) how many of the blends come before hue"""


def random_jitter(
    key: jax.Array,
    count: int,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    probability: float,
) -> Jitter:
    """The draws of `color_jitter` for `count` examples; arguments and errors as there.

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
    draws = uniforms(example_keys(key, count), 4 + len(strengths))
    chance, for_turn, for_order, for_place, *for_factors = draws  # (N,) each
    applied = chance < probability

    factors = {}
    for draw, (name, strength) in zip(for_factors, strengths.items(), strict=True):
        if not _is_zero(strength):
            low, high = jnp.maximum(1 - strength, 0.0), 1 + strength
            factors[name] = jnp.where(applied, low + (high - low) * draw, 1.0)
    turns = None
    if not _is_zero(hue):
        turns = jnp.where(applied, hue * (2 * for_turn - 1), 0.0)
    orders = np.array(list(itertools.permutations(range(len(factors)))), np.int32)
    order = jnp.asarray(orders)[(len(orders) * for_order).astype(jnp.int32)]
    place = jnp.floor((len(factors) + 1) * for_place)
    return Jitter(factors, order, turns, place)


def apply_jitter(images: jax.Array, jitter: Jitter) -> jax.Array:
    """Does to each image what was drawn for it.

    Args:
        images: (N, H, W, C) float32 in [0, 1].
        jitter: of N examples.

    Returns:
        (N, H, W, C) float32 in [0, 1].
    """

    # Which blend a slot of the order holds differs between the images of a batch, so
    # each slot computes one blend with the factor and the pivot of its own image.
    # Hue, the costly one, is computed once, between two passes over the slots: the
    # first blends the slots before it, the second those after it.
    def blend_slots(images, enabled):
        for slot, chosen in enumerate(jitter.order.T):
            images = _blend_chosen(images, jitter.factors, chosen, enabled(slot))
        return images

    if jitter.turns is None:
        return blend_slots(images, lambda slot: True)
    images = blend_slots(images, lambda slot: slot < jitter.place)
    images = materialize(images)
    turns = jitter.turns.reshape(-1, 1, 1, 1)
    images = jnp.where(turns == 0, images, _turn_hue(images, turns))
    return blend_slots(images, lambda slot: slot >= jitter.place)


def random_grayscale(
    key: jax.Array, images: jax.Array, *, probability: float
) -> jax.Array:
    """Removes the color of each image with the given probability.

    Args:
        key: one key, folded with each row's index, or N keys.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        probability: in [0, 1].

    Returns:
        (N, H, W, C) float32; one-channel images as they are.

    Raises:
        ValueError: for wrong shapes, or a probability out of range.
    """
    images = check_images(images)
    probability = check_number("probability", probability, 0, 1)
    (chance,) = uniforms(example_keys(key, len(images)), 1)
    return jnp.where(happens(chance, probability), to_grayscale(images), images)


def random_solarize(
    key: jax.Array,
    images: jax.Array,
    *,
    probability: float,
    threshold: float = 0.5,
) -> jax.Array:
    """Inverts the bright values of each image with the given probability.

    Args:
        key: one key, folded with each row's index, or N keys.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        probability: in [0, 1].
        threshold: values from here on are inverted, in [0, 1].

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: for wrong shapes, or numbers out of range.
    """
    images = check_images(images)
    probability = check_number("probability", probability, 0, 1)
    (chance,) = uniforms(example_keys(key, len(images)), 1)
    inverted = solarize(images, threshold)
    return jnp.where(happens(chance, probability), inverted, images)


def _gray(images: jax.Array) -> jax.Array:
    """(N, H, W, C) -> (N, H, W, 1)."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = images[..., :1], images[..., 1:2], images[..., 2:]
    return materialize(LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)


def _blend(images: jax.Array, pivot: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(factor * images + (1 - factor) * pivot, 0, 1)


def _blend_chosen(
    images: jax.Array,
    factors: dict[str, jax.Array],
    chosen: jax.Array,
    enabled: jax.Array | bool,
) -> jax.Array:
    """Applies to each image its chosen blend of `factors`, where that is enabled.

    Brightness, contrast and saturation are the same blend: with black, with the mean
    gray and with the gray of each pixel. Factor 1 leaves an image as it is, to the bit.
    """
    images = materialize(images)
    gray = _gray(images)  # (N, H, W, 1)
    pivots = {
        "brightness": 0.0,
        "contrast": jnp.mean(gray, axis=(1, 2, 3), keepdims=True),
        "saturation": gray,
    }
    factor, pivot = jnp.ones(chosen.shape, jnp.float32), jnp.float32(0)
    for number, name in enumerate(factors):
        is_chosen = chosen == number  # (N,)
        factor = jnp.where(is_chosen & enabled, factors[name], factor)
        pivot = jnp.where(is_chosen.reshape(-1, 1, 1, 1), pivots[name], pivot)
    return _blend(images, pivot, factor.reshape(-1, 1, 1, 1))


def _turn_hue(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Hue + turns in HSV, without saturation and value, which stay as they are.

    With the hue h in sixths of a turn, the channels are
    largest - (largest - smallest) clip(min(k, 4 - k), 0, 1), k = (offset + h) mod 6,
    with the offset 5 for red, 3 for green and 1 for blue.
    """
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]  # (N, H, W)
    largest = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = largest - jnp.minimum(jnp.minimum(red, green), blue)
    sector = jnp.where(
        largest == red,
        green - blue,
        jnp.where(largest == green, blue - red, red - green),
    )
    offset = jnp.where(largest == red, 0.0, jnp.where(largest == green, 2.0, 4.0))
    hue = offset + sector / jnp.where(chroma == 0, 1.0, chroma) + 6 * turns[..., 0]

    k = hue[..., None] + jnp.array([5, 3, 1], jnp.float32)  # (N, H, W, 3)
    k = k - 6 * jnp.floor(k / 6)
    within = jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
    return largest[..., None] - chroma[..., None] * within


def _of_channels(name: str, values: Any, channels: int) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if values.shape == (3,) and channels == 1:
        return values.mean()
    if values.shape not in ((), (channels,)):
        raise ValueError(
            f"{name}: got {values.tolist()}, expected a number, or one for each of"
            f" {channels} channels"
        )
    return values


def _is_zero(value: Any) -> bool:
    return is_number(value) and value == 0
