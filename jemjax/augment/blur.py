"""Gaussian blur, as one product with a banded matrix on each side."""

from typing import Literal

import jax
import jax.numpy as jnp

from jemjax.augment.geometry import resample
from jemjax.augment.inputs import (
    check_images,
    check_number,
    check_range,
    example_keys,
    happens,
    is_whole,
    per_example,
    uniforms,
)

Padding = Literal["reflect", "zero"]


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
    images = check_images(images)
    count, height, width, _ = images.shape
    sigmas = per_example("sigma", sigma, images, 0, open_low=True)
    sigmas = jnp.broadcast_to(sigmas[..., 0], (count, 1, 1))
    radius = _radius(kernel_size, min(height, width))
    if padding not in ("reflect", "zero"):
        raise ValueError(f"padding: got {padding!r}, expected 'reflect' or 'zero'")
    rows = _blur_matrix(sigmas, radius, height, padding)  # (N, H, H)
    columns = _blur_matrix(sigmas, radius, width, padding)  # (N, W, W)
    return resample(images, rows, columns)


def random_gaussian_blur(
    key: jax.Array,
    images: jax.Array,
    *,
    sigma: tuple[float, float] = (0.1, 2.0),
    probability: float,
) -> jax.Array:
    """Blurs each image with the given probability, by a sigma drawn uniformly.

    Chen et al., 2020, SimCLR (arXiv:2002.05709).

    Args:
        key: one key, folded with each row's index, or N keys.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        sigma: smallest and largest standard deviation in pixels, > 0.
        probability: in [0, 1].

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: for wrong shapes, or numbers out of range.
    """
    images = check_images(images)
    smallest, largest = check_range("sigma", sigma)
    probability = check_number("probability", probability, 0, 1)
    chance, amount = uniforms(example_keys(key, len(images)), 2)
    blurred = gaussian_blur(images, smallest + (largest - smallest) * amount)
    return jnp.where(happens(chance, probability), blurred, images)


def _radius(kernel_size: int | None, smaller_side: int) -> int:
    if kernel_size is None:
        return min(max(1, smaller_side // 20), smaller_side - 1)
    if not is_whole(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size: got {kernel_size!r}, expected an odd integer >= 1"
        )
    if kernel_size // 2 >= smaller_side:
        raise ValueError(
            f"kernel_size: got {kernel_size}, expected at most {2 * smaller_side - 1}"
            f" for a side of {smaller_side} pixels"
        )
    return kernel_size // 2


def _blur_matrix(
    sigma: jax.Array, radius: int, size: int, padding: Padding
) -> jax.Array:
    """Weights (N, size, size) of each pixel in each blurred pixel, from (N, 1, 1)."""

    def kernel(distance):
        weights = jnp.exp(-0.5 * jnp.square(distance / sigma))
        return jnp.where(jnp.abs(distance) <= radius, weights, 0.0)

    taps = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
    total = jnp.sum(kernel(taps), axis=-1, keepdims=True)
    target = jnp.arange(size, dtype=jnp.float32)[:, None]
    source = jnp.arange(size, dtype=jnp.float32)
    weights = kernel(source - target)
    if padding == "reflect":
        # Pixel s is also at -s and at 2 (size - 1) - s, its mirror images.
        last = size - 1
        weights += jnp.where(source > 0, kernel(source + target), 0.0)
        weights += jnp.where(source < last, kernel(2 * last - source - target), 0.0)
    return weights / total
