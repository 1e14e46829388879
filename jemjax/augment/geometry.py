"""Where the pixels of a view come from: boxes, resizing and mirroring."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jemjax._kernels.taps import Taps, mix
from jemjax.augment.inputs import (
    Array,
    Range,
    Scalar,
    Size,
    Whole,
    check_number,
    check_range,
    check_size,
    example_keys,
    rows_as,
    to_floats,
    uniforms,
)

Method = Literal["bilinear", "bicubic"]

TRIES = 10  # boxes that are drawn before the centered one is taken
# Uniform numbers for a box: area and aspect of each try, and the place.
BOX_DRAWS = 2 * TRIES + 2


def random_resized_crop(
    key: Array,
    images: Array,
    size: Size,
    *,
    scale: Range,
    ratio: Range = (3 / 4, 4 / 3),
    method: Method = "bicubic",
) -> jax.Array:
    """A random part of each image, resized with antialiasing.

    clip(crop_and_resize(images, random_boxes(...), size), 0, 1), the clipping because
    bicubic weights overshoot at edges.

    Szegedy et al., 2014, Going deeper with convolutions (arXiv:1409.4842).

    Args:
        key: one key, folded with each row's index, or N keys; inside `shard_map` give
            N keys, as in `make_views`.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        size: height and width of the result in pixels, one number if they are equal.
        scale: smallest and largest area of a box as a share of the image, in (0, 1].
        ratio: smallest and largest width / height of a box.
        method: "bilinear" or "bicubic".

    Returns:
        (N, height, width, C) float32 in [0, 1].

    Raises:
        ValueError: for wrong shapes, or numbers out of range.
    """
    images = to_floats(images)
    check_method("method", method)
    count, height, width, _ = images.shape
    keys = example_keys(key, count, images)
    boxes = random_boxes(keys, count, (height, width), scale=scale, ratio=ratio)
    crop = crop_boxes(images, boxes, check_size("size", size), method)
    return jnp.clip(crop, 0, 1)


def random_boxes(
    key: Array,
    count: Whole,
    image_size: tuple[Whole, Whole],
    *,
    scale: Range,
    ratio: Range = (3 / 4, 4 / 3),
) -> jax.Array:
    """The boxes of random resized crops, distributed as torchvision's.

    area = H W uniform(scale), aspect = exp(uniform(log ratio)), rounded to whole
    pixels: width = sqrt(area aspect), height = sqrt(area / aspect). The first of ten
    draws that fits into the image is placed uniformly; if none fits, the largest
    centered box with an allowed aspect is taken.

    Args:
        key: one key, folded with each row's index, or N keys; inside `shard_map` give
            N keys, as in `make_views`.
        count: N, the number of boxes.
        image_size: (H, W) in pixels.
        scale: smallest and largest area as a share of the image, in (0, 1].
        ratio: smallest and largest width / height.

    Returns:
        (N, 4) int32: top, left, height, width in pixels.

    Raises:
        ValueError: for numbers out of range.
    """
    height, width = check_size("image_size", image_size)
    draws = uniforms(example_keys(key, count), BOX_DRAWS)
    return boxes_of(draws, (height, width), scale=scale, ratio=ratio)


def boxes_of(
    draws: jax.Array,
    image_size: tuple[int, int],
    *,
    scale: Range,
    ratio: Range,
) -> jax.Array:
    """`random_boxes` of (BOX_DRAWS, N) uniform numbers."""
    height, width = image_size
    smallest, largest = check_range("scale", scale, high=1.0)
    narrowest, widest = check_range("ratio", ratio)
    for_area, for_aspect = draws[:TRIES], draws[TRIES : 2 * TRIES]  # (10, N)
    for_top, for_left = draws[-2:]  # (N,)

    area = height * width * _between(for_area, smallest, largest)
    aspect = jnp.exp(_between(for_aspect, math.log(narrowest), math.log(widest)))
    widths = jnp.round(jnp.sqrt(area * aspect))
    heights = jnp.round(jnp.sqrt(area / aspect))
    fits = (0 < widths) & (widths <= width) & (0 < heights) & (heights <= height)

    box_height, box_width = _fallback_box(height, width, narrowest, widest)
    box_height = jnp.full_like(for_top, box_height)  # (N,)
    box_width = jnp.full_like(for_left, box_width)
    for attempt in reversed(range(TRIES)):  # the first that fits is written last
        box_height = jnp.where(fits[attempt], heights[attempt], box_height)
        box_width = jnp.where(fits[attempt], widths[attempt], box_width)

    placed = jnp.any(fits, axis=0)
    spare_height, spare_width = height - box_height, width - box_width
    # Rounding may bring a draw just below 1 to spare + 1, one too many.
    top = jnp.minimum(jnp.floor(for_top * (spare_height + 1)), spare_height)
    left = jnp.minimum(jnp.floor(for_left * (spare_width + 1)), spare_width)
    top = jnp.where(placed, top, jnp.floor(spare_height / 2))
    left = jnp.where(placed, left, jnp.floor(spare_width / 2))
    boxes = jnp.stack([top, left, box_height, box_width], axis=1)  # (N, 4)
    return boxes.astype(jnp.int32)


def crop_and_resize(
    images: Array,
    boxes: Array,
    size: Size,
    *,
    method: Method = "bicubic",
    antialias: bool = True,
) -> jax.Array:
    """Cuts a box out of each image and resizes it: rows @ image @ columns'.

    Most of the two matrices is zeros: on CPUs, and of images above 64 pixels, only what
    has a weight is read and multiplied.

    With antialiasing an output pixel is the mean of the box's pixels under the kernel,
    stretched to the box's scale where it shrinks (Pillow's, and torch's antialiased,
    arithmetic; bicubic a = -0.5). Without, it interpolates the nearest 2 or 4 pixels
    in each direction, the border repeated (torch's; bicubic a = -0.75). Bicubic
    results may leave [0, 1].

    Keys, 1981, Cubic convolution interpolation for digital image processing.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        boxes: (N, 4) top, left, height, width in whole pixels, inside the image.
        size: height and width of the result in pixels, one number if they are equal.
        method: "bilinear" or "bicubic".
        antialias: whether the kernel is stretched where a box shrinks.

    Returns:
        (N, height, width, C) float32.

    Raises:
        ValueError: for wrong shapes, sizes or an unknown method.
    """
    images = to_floats(images)
    out_size = check_size("size", size)
    check_method("method", method)
    count = images.shape[0]
    if getattr(boxes, "shape", None) != (count, 4):
        raise ValueError(
            f"boxes: got {getattr(boxes, 'shape', boxes)!r}, expected shape"
            f" ({count}, 4), one box for each image"
        )
    boxes = rows_as(images, jnp.asarray(boxes))
    return crop_boxes(images, boxes, out_size, method, antialias=antialias)


def crop_boxes(
    images: jax.Array,
    boxes: jax.Array,
    size: tuple[int, int],
    method: Method,
    *,
    antialias: bool = True,
    mirrored: jax.Array | None = None,
) -> jax.Array:
    """`crop_and_resize`, and the crop mirrored left to right where that is asked for.

    Args:
        images: (N, H, W, C) float32.
        boxes: (N, 4) top, left, height, width in whole pixels.
        size: height and width of the result.
        method: "bilinear" or "bicubic".
        antialias: whether the kernel is stretched where a box shrinks.
        mirrored: (N,) bool.

    Returns:
        (N, height, width, C) float32.
    """
    _, height, width, _ = images.shape
    weigh = _antialiased if antialias else _interpolating
    top, left, box_height, box_width = jnp.asarray(boxes).astype(jnp.float32).T  # (N,)
    rows = weigh(top, box_height, height, size[0], method)
    columns = weigh(left, box_width, width, size[1], method)
    if mirrored is not None:
        turned = mirrored[:, None, None]
        columns = Taps(*(jnp.where(turned, x[:, ::-1], x) for x in columns))
    return mix(images, rows, columns)


def resize(images: jax.Array, size: int, method: Method) -> jax.Array:
    """The whole image at another size, with antialiasing.

    Args:
        images: (N, H, W, C) float32.
        size: height and width of the result in pixels.
        method: "bilinear" or "bicubic".

    Returns:
        (N, size, size, C) float32: the images themselves if they have this size.
    """
    count, height, width, _ = images.shape
    if (height, width) == (size, size):
        return images
    boxes = jnp.tile(jnp.array([[0, 0, height, width]]), (count, 1))  # (N, 4)
    return crop_boxes(images, rows_as(images, boxes), (size, size), method)


def random_flip(key: Array, images: Array, *, probability: Scalar = 0.5) -> jax.Array:
    """Mirrors each image left to right with the given probability.

    Args:
        key: one key, folded with each row's index, or N keys; inside `shard_map` give
            N keys, as in `make_views`.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        probability: of mirroring, in [0, 1].

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: for wrong shapes, or a probability out of range.
    """
    images = to_floats(images)
    probability = check_number("probability", probability, 0, 1)
    (chance,) = uniforms(example_keys(key, images.shape[0], images), 1)
    return mirror_where(images, chance < probability)


def mirror_where(images: jax.Array, mirrored: jax.Array | None) -> jax.Array:
    """Mirrors (N, H, W, C) left to right where `mirrored` (N,), if any."""
    if mirrored is None:
        return images
    return jnp.where(mirrored.reshape(-1, 1, 1, 1), images[:, :, ::-1], images)


def check_method(name: str, method: Method) -> None:
    """Refuses a method of resizing that is not known."""
    if method not in ("bilinear", "bicubic"):
        raise ValueError(f"{name}: got {method!r}, expected 'bilinear' or 'bicubic'")


def _between(uniform: jax.Array, low: float, high: float) -> jax.Array:
    return low + (high - low) * uniform


def _fallback_box(
    height: int, width: int, narrowest: float, widest: float
) -> tuple[int, int]:
    """Height and width of the largest box with an aspect in [narrowest, widest]."""
    if width / height < narrowest:
        return max(1, round(width / narrowest)), width
    if width / height > widest:
        return height, max(1, round(height * widest))
    return height, width


def _antialiased(
    start: jax.Array, extent: jax.Array, pixels: int, out: int, method: Method
) -> Taps:
    """The taps under a kernel as wide as an output pixel, of boxes inside the image."""
    if method == "bilinear" and pixels <= out:
        # No box shrinks. The triangle that the border cuts is one pixel, whole again.
        return _interpolating(start, extent, pixels, out, method)
    start, extent = start[:, None, None], extent[:, None, None]
    step = extent / out
    centers = start + (_numbers(out, axis=1) + 0.5) * step  # (N, out, 1)
    radius = {"bilinear": 1, "bicubic": 2}[method]
    first = jnp.ceil(centers - 0.5 - radius * jnp.maximum(step, 1.0))
    sources = first + _numbers(math.ceil(2 * radius * max(pixels / out, 1.0)), axis=2)
    positions = sources + 0.5
    inside = (start < positions) & (positions < start + extent)
    kernel = _kernel((positions - centers) / jnp.maximum(step, 1.0), method, a=-0.5)
    weights = jnp.where(inside, kernel, 0.0)
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return Taps(jnp.clip(sources, 0, pixels - 1).astype(jnp.int32), weights)


def _interpolating(
    start: jax.Array, extent: jax.Array, pixels: int, out: int, method: Method
) -> Taps:
    """The nearest 2 or 4 pixels as taps, the border of the box repeated."""
    start, extent = start[:, None, None], extent[:, None, None]
    centers = (_numbers(out, axis=1) + 0.5) * (extent / out) - 0.5  # in the box
    taps = _numbers(2, axis=2) if method == "bilinear" else _numbers(4, axis=2) - 1
    neighbors = jnp.floor(centers) + taps  # (N, out, T)
    weights = _kernel(neighbors - centers, method, a=-0.75)
    sources = start + jnp.clip(neighbors, 0, extent - 1)
    return Taps(sources.astype(jnp.int32), weights)


def _numbers(count: Whole, axis: int) -> jax.Array:
    """0, 1, ... along an axis of (N, out, T): the others have one entry."""
    shape = [count if number == axis else 1 for number in range(3)]
    return jnp.arange(count, dtype=jnp.float32).reshape(shape)


def _kernel(distance: jax.Array, method: Method, a: float = 0.0) -> jax.Array:
    """A triangle, or Keys' cubic with slope `a` at distance 1."""
    d = jnp.abs(distance)
    if method == "bilinear":
        return jnp.maximum(1 - d, 0.0)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return jnp.where(d < 1, near, jnp.where(d < 2, far, 0.0))
