"""A true Gaussian, as wide as published, with nothing lost at the border."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax import augment
from jemjax._kernels import blur as kernels
from jemjax.augment import blur

gaussian_blur = jax.jit(
    augment.gaussian_blur, static_argnames=("kernel_size", "padding")
)
random_gaussian_blur = jax.jit(
    augment.random_gaussian_blur, static_argnames=("sigma", "probability")
)


@pytest.mark.parametrize("side, width", [(224, 23), (96, 9), (32, 3), (8, 3)])
def test_the_kernel_is_a_tenth_of_the_image(side, width):
    middle = side // 2
    impulse = jnp.zeros((1, side, side, 1)).at[0, middle, middle, 0].set(1)
    row = gaussian_blur(impulse, 100.0)[0, middle, :, 0]
    assert np.count_nonzero(np.asarray(row) > 1e-9) == width


def test_the_kernel_is_gaussian():
    impulse = jnp.zeros((1, 31, 31, 1)).at[0, 15, 15, 0].set(1)
    blurred = gaussian_blur(impulse, 1.7, kernel_size=21)[0, :, :, 0]
    d = np.arange(31) - 15
    weights = np.exp(-(d**2) / (2 * 1.7**2)) * (abs(d) <= 10)
    weights /= weights.sum()
    np.testing.assert_allclose(blurred, np.outer(weights, weights), atol=1e-6)


@pytest.mark.parametrize("size", [(7, 9), (65, 34)])
@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_padding(key, padding, size):
    images = jax.random.uniform(key, (2, *size, 3))
    sigmas = np.array([0.7, 3.0], np.float32)
    blurred = gaussian_blur(images, sigmas, kernel_size=7, padding=padding)
    d = np.arange(7) - 3
    mode = "reflect" if padding == "reflect" else "constant"
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode=mode)
    for n, sigma in enumerate(sigmas):
        weights = np.exp(-(d**2) / (2 * sigma**2))
        weights /= weights.sum()
        windows = np.lib.stride_tricks.sliding_window_view(padded[n], (7, 7), (0, 1))
        expected = np.einsum("yxcij,i,j->yxc", windows, weights, weights)
        np.testing.assert_allclose(blurred[n], expected, atol=1e-6)


def test_one_sigma_for_all(key):
    images = jax.random.uniform(key, (3, 8, 8, 1))
    np.testing.assert_array_equal(
        gaussian_blur(images, 0.8),
        gaussian_blur(images, np.full(3, 0.8, np.float32)),
    )


def test_random_blur_of_the_given_share_by_different_amounts(key):
    images = jnp.zeros((2000, 5, 5, 1)).at[:, 2, 2].set(1)
    blurred = random_gaussian_blur(key, images, sigma=(0.5, 2.0), probability=0.3)
    peak = np.asarray(blurred[:, 2, 2, 0])
    changed = peak < 1
    assert abs(changed.mean() - 0.3) < 4 * np.sqrt(0.21 / 2000)
    ends = gaussian_blur(images[:2], np.array([2.0, 0.5], np.float32))
    lowest, highest = ends[:, 2, 2, 0]
    assert lowest - 1e-6 <= peak[changed].min() < lowest + 0.02
    assert highest - 0.05 < peak[changed].max() <= highest + 1e-6
    np.testing.assert_array_equal(blurred[~changed], images[~changed])


@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_is_chosen_is_blurred_in_turns(key, share, padding, monkeypatch):
    images = jax.random.uniform(key, (12, 10, 9, 3))
    draws = jax.random.uniform(key, (blur.BLUR_DRAWS, 12))
    options = {"sigma": (0.5, 2.0), "kernel_size": 5, "padding": padding}

    def some(images):
        return blur.blur_by_draws(draws, images, probability=share, **options)

    def all_of_them(images):
        blurred = blur.blur_by_draws(draws, images, probability=1.0, **options)
        return jnp.where(draws[0].reshape(-1, 1, 1, 1) < share, blurred, images)

    def derivatives(blurred):
        def weighted(images):
            return jnp.vdot(jnp.sin(9 * blurred(images)), images)

        return jax.value_and_grad(weighted)(images)

    expected = all_of_them(images), derivatives(all_of_them)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for numbers in (1, 1000, 10**6):  # an image in a turn, three, and all
        monkeypatch.setattr(kernels, "NUMBERS_BLURRED_AT_ONCE", numbers)
        assert "while" in str(jax.make_jaxpr(some)(images))
        actual = some(images), derivatives(some)
        chex.assert_trees_all_close(actual, expected, atol=1e-5)


@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize("size, radius", [((9, 12), 3), ((5, 4), 3), ((2, 7), 1)])
def test_sums_of_shifted_images_are_the_convolution(key, size, radius, padding):
    images = jax.random.uniform(key, (3, *size, 3))
    sigma = jnp.array([0.3, 1.0, 2.5]).reshape(3, 1, 1)
    blurred = kernels.blur(images, sigma, radius, padding)
    expected = kernels.plain(images, sigma, radius, padding)
    np.testing.assert_allclose(blurred, expected, atol=1e-6)


def test_a_call_without_jit_compiles_once(key, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    images = jax.random.uniform(key, (4, 6, 6, 1))
    augment.random_gaussian_blur(key, images, probability=0.5)
    compiled = kernels.blur_where._cache_size()
    augment.random_gaussian_blur(key, images, probability=0.5)
    assert kernels.blur_where._cache_size() == compiled


@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize("size", [(1, 5), (4, 1), (6, 7)])
def test_a_kernel_of_one_pixel_changes_nothing(key, size, padding):
    images = jax.random.uniform(key, (2, *size, 3))
    blurred = augment.gaussian_blur(images, 1.5, kernel_size=1, padding=padding)
    np.testing.assert_allclose(blurred, images, atol=1e-7)


def test_blur_in_turns_inside_shard_map_of_images_that_all_shards_have(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    images = jax.random.uniform(jax.random.key(1), (4, 6, 6, 1))
    keys = jax.random.split(jax.random.key(2), 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def of_shard(key, images):
        return augment.random_gaussian_blur(key[0], images, probability=0.5)

    specs = jax.P("data"), jax.P()
    sharded = jax.shard_map(
        of_shard, mesh=mesh, in_specs=specs, out_specs=jax.P("data")
    )
    blurred = jax.jit(sharded)(keys, images)
    expected = jnp.concatenate([of_shard(key[None], images) for key in keys])
    np.testing.assert_allclose(blurred, expected, atol=1e-6)


def test_images_on_an_explicit_mesh_of_one_device(key):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    images = jax.random.uniform(key, (4, 6, 6, 1))
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        sharded = jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))
        blurred = augment.random_gaussian_blur(key, sharded, probability=0.5)
    expected = augment.random_gaussian_blur(key, images, probability=0.5)
    np.testing.assert_allclose(blurred, expected, atol=1e-6)
