"""Gaussian blur, as a sum of shifted images in each direction."""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jemjax._kernels.fusion import materialize

Padding = Literal["reflect", "zero"]

# What a CPU blurs at a time: 1.3 MB, a part of which stays in its second-level cache.
NUMBERS_BLURRED_AT_ONCE = 320_000


def blur(
    images: jax.Array, sigma: jax.Array, radius: int, padding: Padding
) -> jax.Array:
    """Blurs rows and columns: images (N, H, W, C), sigma (N or 1, 1, 1)."""
    distances = jnp.arange(radius + 1, dtype=jnp.float32).reshape(1, 1, -1)
    weights = jnp.exp(-0.5 * jnp.square(distances / sigma))  # (N or 1, 1, radius + 1)
    weights /= 2 * jnp.sum(weights, axis=-1, keepdims=True) - 1  # the center's is 1
    for axis in (1, 2):
        images = _blur_axis(images, weights[..., None], radius, padding, axis)
    return images


def plain(
    images: jax.Array, sigma: jax.Array, radius: int, padding: Padding
) -> jax.Array:
    """The reference: what `blur` computes, as a convolution in both directions."""
    reach = jnp.arange(-radius, radius + 1, dtype=jnp.float32).reshape(1, -1)
    weights = jax.nn.softmax(-0.5 * jnp.square(reach / sigma[..., 0]))  # (N, K)
    beyond = ((0, 0), (radius, radius), (radius, radius), (0, 0))
    mode = "reflect" if padding == "reflect" else "constant"
    padded = jnp.pad(images, beyond, mode)
    kernels = weights[:, :, None, None] * weights[:, None, :, None]  # (N, K, K, 1)
    convolve = partial(jax.scipy.signal.convolve, mode="valid")
    return jax.vmap(convolve)(padded, kernels)


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


def images_at_once(shape: tuple[int, ...]) -> int:
    """How many images a turn blurs: as many turns have to do all of them exactly."""
    count, *sides = shape
    most = min(count, max(1, NUMBERS_BLURRED_AT_ONCE // math.prod(sides)))
    return max(n for n in range(1, most + 1) if count % n == 0)


# Compiled by itself, or each call outside of `jit` would compile the loop anew.
@partial(jax.jit, static_argnames=("radius", "padding", "at_once"))
def blur_where(
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
        blurred = blur(images, sigmas, radius, padding)
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
