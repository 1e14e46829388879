"""Gaussian blur, as a sum of shifted images in each direction."""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from jemjax.augment.inputs import (
    Array,
    Range,
    Scalar,
    Whole,
    check_number,
    check_range,
    example_keys,
    is_whole,
    materialize,
    per_example,
    to_floats,
    uniforms,
)

Padding = Literal["reflect", "zero"]

BLUR_DRAWS = 2  # uniform numbers for a blur: whether, and sigma
# What a CPU blurs at a time: 1.3 MB, a part of which stays in its second-level cache.
NUMBERS_BLURRED_AT_ONCE = 320_000


def gaussian_blur(
    images: Array,
    sigma: Scalar,
    *,
    kernel_size: Whole | None = None,
    padding: Padding = "reflect",
) -> jax.Array:
    """Blurs each image: weights exp(-d^2 / (2 sigma^2)), normalized, in each direction.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        sigma: standard deviation in pixels, scalar or (N,), > 0.
        kernel_size: pixels under the kernel, odd; a tenth of the smaller side unless
            given, at least 3: 23 at 224 pixels, as published.
        padding: what is beyond the border: "reflect" the image without its edge pixel
            repeated (torchvision), or "zero".

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: for wrong shapes, a sigma or kernel size out of range.
    """
    images = to_floats(images)
    sigmas = per_example("sigma", sigma, images.shape[0], 0, open_low=True)
    smaller_side = min(images.shape[1:3])
    radius = kernel_radius("kernel_size", kernel_size, smaller_side)
    if padding not in ("reflect", "zero"):
        raise ValueError(f"padding: got {padding!r}, expected 'reflect' or 'zero'")
    return _blur(images, sigmas[..., 0], radius, padding)


def random_gaussian_blur(
    key: Array,
    images: Array,
    *,
    sigma: Range = (0.1, 2.0),
    probability: Scalar,
    kernel_size: Whole | None = None,
    padding: Padding = "reflect",
) -> jax.Array:
    """Blurs each image with the given probability, by a sigma drawn uniformly.

    Chen et al., 2020, SimCLR (arXiv:2002.05709).

    Args:
        key: one key, folded with each row's index, or N keys; inside `shard_map` give
            N keys, as in `make_views`.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        sigma: smallest and largest standard deviation in pixels, > 0.
        probability: in [0, 1].
        kernel_size: as of `gaussian_blur`.
        padding: as of `gaussian_blur`.

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: for wrong shapes, or numbers out of range.
    """
    images = to_floats(images)
    return blur_by_draws(
        uniforms(example_keys(key, images.shape[0], images), BLUR_DRAWS),
        images,
        sigma=sigma,
        probability=probability,
        kernel_size=kernel_size,
        padding=padding,
    )


def blur_by_draws(
    draws: jax.Array,
    images: jax.Array,
    *,
    sigma: Range,
    probability: Scalar,
    kernel_size: Whole | None,
    padding: Padding,
) -> jax.Array:
    """`random_gaussian_blur` of (N, H, W, C) float32 by (BLUR_DRAWS, N) numbers."""
    smallest, largest = check_range("sigma", sigma)
    probability = check_number("probability", probability, 0, 1)
    chance, amount = draws
    sigmas = (smallest + (largest - smallest) * amount)[:, None, None]
    smaller_side = min(images.shape[1:3])
    radius = kernel_radius("kernel_size", kernel_size, smaller_side)
    # A loop over images that lie on several devices would send them around, and is
    # refused where a mesh is Explicit, even of one device. `jax.export` may leave open
    # how many images there are.
    explicit = AxisType.Explicit in jax.typeof(images).sharding.mesh.axis_types
    known = is_whole(images.shape[0])
    in_turns = jax.device_count() == 1 and not explicit and known
    return _blur_where(
        materialize(images),
        sigmas,
        chance < probability,
        radius=radius,
        padding=padding,
        at_once=_images_at_once(images.shape) if in_turns else None,
    )


def kernel_radius(name: str, kernel_size: Whole | None, smaller_side: int) -> int:
    """How far a kernel reaches to either side, of images of this size; None: a tenth.

    Raises:
        ValueError: for an even size, or one that mirrors more than the image.
    """
    if kernel_size is None:
        return min(max(1, smaller_side // 20), smaller_side - 1)
    if not is_whole(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{name}: got {kernel_size!r}, expected an odd integer >= 1")
    if kernel_size // 2 >= smaller_side:
        raise ValueError(
            f"{name}: got {kernel_size}, expected at most {2 * smaller_side - 1} for a"
            f" side of {smaller_side} pixels"
        )
    return int(kernel_size) // 2


def _images_at_once(shape: tuple[int, ...]) -> int:
    """How many images a turn blurs: as many turns have to do all of them exactly."""
    count, *sides = shape
    most = min(count, max(1, NUMBERS_BLURRED_AT_ONCE // math.prod(sides)))
    return max(n for n in range(1, most + 1) if count % n == 0)


# Compiled by itself, or each call outside of `jit` would compile the loop anew.
@partial(jax.jit, static_argnames=("radius", "padding", "at_once"))
def _blur_where(
    images: jax.Array,
    sigmas: jax.Array,
    chosen: jax.Array,
    *,
    radius: int,
    padding: Padding,
    at_once: int | None,
) -> jax.Array:
    """Blurs the chosen images, (N,) bool; on CPUs so many `at_once`, and no others."""

    def blur_all(images, sigmas, chosen):
        blurred = _blur(images, sigmas, radius, padding)
        return jnp.where(chosen.reshape(-1, 1, 1, 1), blurred, images)

    if at_once is None:
        return blur_all(images, sigmas, chosen)

    @jax.custom_jvp
    def blur_in_turns(images, sigmas, chosen):
        order = jnp.argsort(~chosen)

        def blur_some(turn, images):
            rows = lax.dynamic_slice_in_dim(order, turn * at_once, at_once)
            some = materialize(images[rows])
            blurred = blur_all(some, sigmas[rows], chosen[rows])
            return images.at[rows].set(blurred, unique_indices=True)

        turns = (jnp.sum(chosen) + at_once - 1) // at_once
        # Inside `shard_map` the images vary between shards from the first turn on.
        images = jnp.where(chosen.reshape(-1, 1, 1, 1), images, images)
        return lax.fori_loop(0, turns, blur_some, images)

    # A loop of so many turns as are needed has no derivative in reverse.
    blur_in_turns.defjvp(partial(jax.jvp, blur_all))
    return lax.platform_dependent(
        images, sigmas, chosen, cpu=blur_in_turns, default=blur_all
    )


def _blur(
    images: jax.Array, sigma: jax.Array, radius: int, padding: Padding
) -> jax.Array:
    """Blurs rows and columns: images (N, H, W, C), sigma (N or 1, 1, 1)."""
    distances = jnp.arange(radius + 1, dtype=jnp.float32).reshape(1, 1, -1)
    weights = jnp.exp(-0.5 * jnp.square(distances / sigma))  # (N or 1, 1, radius + 1)
    weights /= 2 * jnp.sum(weights, axis=-1, keepdims=True) - 1  # the center's is 1
    for axis in (1, 2):
        images = _blur_axis(images, weights[..., None], radius, padding, axis)
    return images


def _blur_axis(
    images: jax.Array, weights: jax.Array, radius: int, padding: Padding, axis: int
) -> jax.Array:
    """The sum of the images that are shifted along an axis: weights by distance."""
    count, _, _, channels = images.shape
    side = images.shape[axis]
    # By slices, since XLA on CPUs writes what `jnp.pad` mirrors several times.
    before = lax.slice_in_dim(images, 1, radius + 1, axis=axis)
    after = lax.slice_in_dim(images, side - radius - 1, side - 1, axis=axis)
    before, after = jnp.flip(before, axis), jnp.flip(after, axis)
    if padding == "zero":
        before, after = jnp.zeros_like(before), jnp.zeros_like(after)
    # Columns and channels are one axis, a long run of numbers: (N, H, W C).
    parts = [
        x.reshape(count, x.shape[1], x.shape[2] * channels)
        for x in (before, images, after)
    ]
    padded = materialize(jnp.concatenate(parts, axis))
    step = 1 if axis == 1 else channels

    def shifted(by):
        start = (radius + by) * step
        return lax.slice_in_dim(padded, start, start + side * step, axis=axis)

    blurred = weights[:, :, 0] * shifted(0)
    for distance in range(1, radius + 1):
        both = shifted(distance) + shifted(-distance)
        blurred += weights[:, :, distance] * both
    return materialize(blurred).reshape(images.shape)
