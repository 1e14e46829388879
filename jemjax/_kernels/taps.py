"""Rows and columns of images, each mixed of a few pixels with weights."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jemjax._kernels.fusion import materialize

# Except on CPUs, images up to this side are mixed by products with whole matrices; of
# all others only the pixels that have a weight are read. A guess: no chip was timed.
LARGEST_PRODUCT = 64


class Taps(NamedTuple):
    """Which pixels of an axis an output pixel is a mixture of: T of them."""

    sources: jax.Array
    """(N, out, T) indices of pixels, int32"""
    weights: jax.Array
    """(N, out, T), sums 1"""


def mix(images: jax.Array, rows: Taps, columns: Taps) -> jax.Array:
    """Mixes rows and columns of each image, in the way that suits the platform.

    Args:
        images: (N, H, W, C) float32.
        rows: (N, height, T).
        columns: (N, width, T).

    Returns:
        (N, height, width, C) float32.
    """
    if max(images.shape[1:3]) > LARGEST_PRODUCT:
        return mix_by_taps(images, rows, columns)
    return lax.platform_dependent(
        images, rows, columns, cpu=mix_by_taps, default=mix_by_products
    )


def mix_by_taps(images: jax.Array, rows: Taps, columns: Taps) -> jax.Array:
    """Mixes rows and columns of each image, reading only pixels that have a weight."""
    rows, columns = materialize((rows, columns))
    images = materialize(_mix_axis(images, rows, axis=1))
    return materialize(_mix_axis(images, columns, axis=2))


def mix_by_products(images: jax.Array, rows: Taps, columns: Taps) -> jax.Array:
    """`mix_by_taps` as products with matrices: rows @ image @ columns'.

    At full precision, or the pixels would be those of another image on a TPU.
    """
    _, height, width, _ = images.shape
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    mixed = product("nyh,nhwc->nywc", _matrix(rows, height), images)
    return product("nywc,nxw->nyxc", mixed, _matrix(columns, width))


def _mix_axis(images: jax.Array, taps: Taps, axis: int) -> jax.Array:
    """Mixes the rows of each image, axis 1, or its columns, axis 2."""
    beside = (2, 3) if axis == 1 else (1, 3)

    # Rows are read in long runs. Of columns each pixel is told where to read, or XLA on
    # CPUs gathers whole columns, and transposes what it has.
    def part(tap):
        sources = jnp.expand_dims(taps.sources[..., tap], beside)
        if axis == 2:
            told = (*images.shape[:2], sources.shape[2], 1)
            sources = jnp.broadcast_to(sources, told)
        read = jnp.take_along_axis(images, sources, axis, mode="promise_in_bounds")
        return jnp.expand_dims(taps.weights[..., tap], beside) * read

    return functools.reduce(jnp.add, map(part, range(taps.sources.shape[-1])))


def _matrix(taps: Taps, pixels: int) -> jax.Array:
    """The weights of all pixels of the axis: (N, out, pixels)."""
    numbers = jnp.arange(pixels, dtype=jnp.int32).reshape(1, 1, 1, -1)
    chosen = taps.sources[..., None] == numbers
    # (N, out, T, pixels) -> (N, out, pixels)
    return jnp.sum(jnp.where(chosen, taps.weights[..., None], 0.0), axis=2)
