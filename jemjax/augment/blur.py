"""Gaussian blur, as a sum of shifted images in each direction."""

import jax
from jax.sharding import AxisType

from jemjax._kernels.blur import Padding, blur, blur_where, images_at_once
from jemjax._kernels.fusion import materialize
from jemjax.augment.inputs import (
    Array,
    Range,
    Scalar,
    Whole,
    check_number,
    check_range,
    example_keys,
    is_whole,
    per_example,
    to_floats,
    uniforms,
)

BLUR_DRAWS = 2  # uniform numbers for a blur: whether, and sigma


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
    return blur(images, sigmas[..., 0], radius, padding)


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
    return blur_where(
        materialize(images),
        sigmas,
        chance < probability,
        radius=radius,
        padding=padding,
        at_once=images_at_once(images.shape) if in_turns else None,
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
