"""Gaussian blur, as a sum of shifted images in each direction."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jemjax.augment.inputs import (
    check_number,
    check_range,
    example_keys,
    happens,
    is_whole,
    materialize,
    per_example,
    to_images,
    to_planes,
    uniforms,
)

Padding = Literal["reflect", "zero"]

BLUR_DRAWS = 2  # uniform numbers for a blur: whether, and sigma


def gaussian_blur(
    images: jax.Array,
    sigma: jax.Array | float,
    *,
    kernel_size: int | None = None,
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
    planes = to_planes(images)
    sigmas = per_example("sigma", sigma, len(planes), 0, open_low=True)
    smaller_side = min(planes.shape[1], planes.shape[3])
    radius = kernel_radius("kernel_size", kernel_size, smaller_side)
    if padding not in ("reflect", "zero"):
        raise ValueError(f"padding: got {padding!r}, expected 'reflect' or 'zero'")
    return to_images(_blur(planes, sigmas[..., 0], radius, padding))


def random_gaussian_blur(
    key: jax.Array,
    images: jax.Array,
    *,
    sigma: tuple[float, float] = (0.1, 2.0),
    probability: float,
    kernel_size: int | None = None,
    padding: Padding = "reflect",
) -> jax.Array:
    """Blurs each image with the given probability, by a sigma drawn uniformly.

    Chen et al., 2020, SimCLR (arXiv:2002.05709).

    Args:
        key: one key, folded with each row's index, or N keys.
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
    planes = to_planes(images)
    blurred = random_blur_planes(
        uniforms(example_keys(key, len(planes)), BLUR_DRAWS),
        planes,
        sigma=sigma,
        probability=probability,
        kernel_size=kernel_size,
        padding=padding,
    )
    return to_images(blurred)


def random_blur_planes(
    draws: jax.Array,
    planes: jax.Array,
    *,
    sigma: tuple[float, float],
    probability: float,
    kernel_size: int | None,
    padding: Padding,
) -> jax.Array:
    """`random_gaussian_blur` of (N, H, C, W) float32 by (BLUR_DRAWS, N) numbers."""
    smallest, largest = check_range("sigma", sigma)
    probability = check_number("probability", probability, 0, 1)
    chance, amount = draws
    sigmas = (smallest + (largest - smallest) * amount)[:, None, None]
    smaller_side = min(planes.shape[1], planes.shape[3])
    radius = kernel_radius("kernel_size", kernel_size, smaller_side)
    planes = materialize(planes)
    blurred = _blur(planes, sigmas, radius, padding)
    return jnp.where(happens(chance, probability), blurred, planes)


def kernel_radius(name: str, kernel_size: int | None, smaller_side: int) -> int:
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
    return kernel_size // 2


def _blur(
    planes: jax.Array, sigma: jax.Array, radius: int, padding: Padding
) -> jax.Array:
    """Blurs rows and columns: planes (N, H, C, W), sigma (N or 1, 1, 1)."""
    distances = jnp.arange(radius + 1, dtype=jnp.float32)
    weights = jnp.exp(-0.5 * jnp.square(distances / sigma))  # (N or 1, 1, radius + 1)
    weights /= 2 * jnp.sum(weights, axis=-1, keepdims=True) - 1  # the center's is 1
    for axis in (1, 3):
        planes = _blur_axis(planes, weights[..., None, None], radius, padding, axis)
    return planes


def _blur_axis(
    planes: jax.Array, weights: jax.Array, radius: int, padding: Padding, axis: int
) -> jax.Array:
    """The sum of the images that are shifted along an axis: weights by distance."""
    size = planes.shape[axis]
    widths = [(0, 0)] * 4
    widths[axis] = (radius, radius)
    mode = "reflect" if padding == "reflect" else "constant"
    padded = materialize(jnp.pad(planes, widths, mode=mode))

    def shifted(by):
        return lax.slice_in_dim(padded, radius + by, radius + by + size, axis=axis)

    blurred = weights[:, :, 0] * shifted(0)
    for distance in range(1, radius + 1):
        both = shifted(distance) + shifted(-distance)
        blurred += weights[:, :, distance] * both
    return blurred
