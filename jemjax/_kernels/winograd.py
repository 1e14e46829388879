"""Convolutions that are fast on CPUs, and XLA's own everywhere else.

On a CPU, a 3 x 3 convolution of stride 1 is computed from tiles of 2 x 2 outputs by
Winograd's algorithm, with 16 products for 36 (Lavin and Gray, 2016, Fast algorithms for
convolutional neural networks, arXiv:1509.09308): with the matrices below,

    Y = A [(G w G') * (B x B')] A',    x a tile of 4 x 4 inputs, w the kernel,

where * is a product of matrices, over the channels, at each of the 16 places. Its
gradients are computed in the same way. The rounding is that of the direct sum.
"""

import functools
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jemjax._kernels.fusion import computed_once

Matrix = tuple[tuple[float, ...], ...]
Grid = list[list[jax.Array]]

_A: Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))
_B: Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_G: Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
# G of a reversed kernel is G with its rows in this order.
_REVERSED = (3, 1, 2, 0)
# With fewer channels the products are too small to pay for the sums around them, and
# smaller images take less time than the compilation, which is twice as long.
_LEAST_CHANNELS = 64
_LEAST_NUMBERS = 8192
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> jax.Array:
    """`lax.conv_general_dilated`, as `flax.linen.Conv` calls it.

    Of float32 the derivatives are those of reverse mode: there is no forward mode.

    Args:
        images: (N, H, W, C).
        kernel: (height, width, C, features).
        window_strides: of both axes.
        padding: before and after each of both axes.
        options: flax's defaults; there are no groups and no dilation.

    Returns:
        (N, H', W', features).
    """
    assert options.pop("feature_group_count", 1) == 1
    strides, padding = tuple(window_strides), tuple(map(tuple, padding))
    if not images.dtype == kernel.dtype == jnp.float32:
        return plain(images, kernel, strides, padding)
    return _convolve(images, kernel, strides, padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(images, kernel, strides, padding):
    direct = partial(plain, strides=strides, padding=padding)
    on_cpu = _winograd if _fits(images, kernel, strides, padding) else direct
    return lax.platform_dependent(images, kernel, cpu=on_cpu, default=direct)


def _forward(images, kernel, strides, padding):
    images = computed_once(images)
    return _convolve(images, kernel, strides, padding), (images, kernel)


def _backward(strides, padding, saved, gradient):
    images, kernel = saved

    def direct(images, kernel, gradient):
        convolution = partial(plain, strides=strides, padding=padding)
        return jax.vjp(convolution, images, kernel)[1](gradient)

    fits = _fits(images, kernel, strides, padding)
    return lax.platform_dependent(
        images,
        kernel,
        computed_once(gradient),
        cpu=_winograd_gradients if fits else direct,
        default=direct,
    )


_convolve.defvjp(_forward, _backward)


def plain(images, kernel, strides, padding):
    """The reference: what `convolve` computes, by XLA."""
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=_LAYOUT
    )


def _fits(images, kernel, strides, padding) -> bool:
    """Whether Winograd's algorithm applies, and is faster."""
    return (
        kernel.shape[:2] == (3, 3)
        and strides == (1, 1)
        and padding == ((1, 1), (1, 1))
        and images.shape[1] % 2 == images.shape[2] % 2 == 0
        and min(kernel.shape[2:]) >= _LEAST_CHANNELS
        and math.prod(images.shape[1:]) >= _LEAST_NUMBERS
    )


def _winograd(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """(N, H, W, C), (3, 3, C, F) -> (N, H, W, F)."""
    return _outputs("nhwc,cf->nhwf", _input_tiles(images), _kernel_tiles(kernel))


def _winograd_gradients(
    images: jax.Array, kernel: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(N, H, W, C), (3, 3, C, F), (N, H, W, F) -> of the images, and of the kernel."""
    kernels = _kernel_tiles(kernel)
    kernels = [[kernels[i][j] for j in _REVERSED] for i in _REVERSED]
    of_images = _outputs("nhwf,cf->nhwc", _input_tiles(gradient), kernels)
    of_tiles = _sandwich(_transposed(_A), _every_other(gradient, 2))
    # (C, N H W / 4) by (N H W / 4, F): XLA is slow to transpose by itself.
    columns = [[_rows(x).T for x in row] for row in _input_tiles(images)]
    columns = lax.optimization_barrier(columns)
    products = [
        [x @ _rows(y) for x, y in zip(*rows, strict=True)]
        for rows in zip(columns, of_tiles, strict=True)
    ]
    of_kernel = _sandwich(_transposed(_G), lax.optimization_barrier(products))
    of_kernel = jnp.stack([jnp.stack(row) for row in of_kernel])
    return _summed_as(images, of_images), _summed_as(kernel, of_kernel)


def _summed_as(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Summed over the axes of `jax.shard_map` along which x does not vary."""
    axes = jax.typeof(gradient).mat.varying - jax.typeof(x).mat.varying
    return lax.psum(gradient, tuple(axes)) if axes else gradient


def _input_tiles(images: jax.Array) -> Grid:
    """B x B' of the tiles of 4 x 4 inputs: 4 x 4 of (N, H / 2, W / 2, C)."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return _sandwich(_B, _every_other(padded, 4))


def _kernel_tiles(kernel: jax.Array) -> Grid:
    """G w G': (3, 3, C, F) -> 4 x 4 of (C, F)."""
    tiles = _sandwich(_G, [list(row) for row in kernel])
    return lax.optimization_barrier(tiles)


def _outputs(equation: str, tiles: Grid, kernels: Grid) -> jax.Array:
    """A [kernels * tiles] A': (N, H, W, F)."""
    products = [
        [jnp.einsum(equation, x, y) for x, y in zip(*rows, strict=True)]
        for rows in zip(tiles, kernels, strict=True)
    ]
    y = [jnp.stack(row, axis=3) for row in _sandwich(_A, products)]
    y = jnp.stack(y, axis=2)  # (N, H / 2, 2, W / 2, 2, F)
    batch, height, _, width, _, features = y.shape
    return y.reshape(batch, 2 * height, 2 * width, features)


def _every_other(x: jax.Array, size: int) -> Grid:
    """Rows i, i + 2, ... and columns j, j + 2, ... of x, for i and j below `size`."""
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    return [
        [x[:, i : i + height : 2, j : j + width : 2] for j in range(size)]
        for i in range(size)
    ]


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _sandwich(matrix: Matrix, x: Grid) -> Grid:
    """The product matrix x matrix', of a grid of arrays."""
    columns = [_times(matrix, column) for column in zip(*x, strict=True)]
    return [_times(matrix, row) for row in zip(*columns, strict=True)]


def _times(matrix: Matrix, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The matrix by a vector of arrays, without what is multiplied by zero."""
    return [
        functools.reduce(
            operator.add,
            [x if c == 1 else c * x for c, x in zip(row, arrays, strict=True) if c],
        )
        for row in matrix
    ]


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))
