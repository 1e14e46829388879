"""Convolutions against XLA's own: values, gradients, shards, and other platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jemjax._kernels.winograd import convolve
from jemjax.training.step.sharding import batch_sharding, make_mesh, replicated

LAYOUT = ("NHWC", "HWIO", "NHWC")
# Images, features, kernel, stride; with those of the first, products on CPUs.
CASES = {
    "products": ((4, 12, 14, 64), 72, 3, 1),
    "products of one tile": ((2, 2, 2, 2048), 64, 3, 1),
    "small images": ((2, 8, 8, 64), 64, 3, 1),
    "odd size": ((2, 11, 14, 64), 64, 3, 1),
    "stride": ((2, 12, 14, 64), 64, 3, 2),
    "few channels": ((2, 8, 8, 3), 64, 3, 1),
    "1 x 1": ((2, 8, 8, 16), 64, 1, 2),
}


def _of(convolution, stride, size):
    """Value and gradients as a function of images, kernel and the output's gradient."""
    padding = ((size // 2, size // 2),) * 2

    def call(images, kernel, gradient):
        def apply(images, kernel):
            return convolution(
                images, kernel, (stride, stride), padding, dimension_numbers=LAYOUT
            )

        value, transpose = jax.vjp(apply, images, kernel)
        return value, *transpose(gradient)

    return call


def _arguments(key, shape, features, size, stride):
    keys = jax.random.split(key, 3)
    images = 1 + jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (size, size, shape[-1], features))
    output = (shape[0], -(-shape[1] // stride), -(-shape[2] // stride), features)
    return images, kernel, jax.random.normal(keys[2], output)


def _exact(arguments, stride, size):
    with jax.enable_x64(True):
        arguments = [jnp.asarray(np.float64(x)) for x in arguments]
        call = jax.jit(_of(lax.conv_general_dilated, stride, size))
        return [np.asarray(x) for x in call(*arguments)]


def _error(x, exact):
    return np.abs(np.asarray(x, np.float64) - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_float64(key, case):
    shape, features, size, stride = CASES[case]
    arguments = _arguments(key, shape, features, size, stride)
    ours = jax.jit(_of(convolve, stride, size))(*arguments)
    for x, exact in zip(ours, _exact(arguments, stride, size), strict=True):
        assert x.dtype == jnp.float32
        assert _error(x, exact) < 2e-6


def test_shards_of_the_batch_give_the_whole(key):
    shape, features, size, stride = CASES["products"]
    arguments = _arguments(key, shape, features, size, stride)
    mesh = make_mesh(4)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    placed = [
        jax.device_put(x, sharding)
        for x, sharding in zip(arguments, (rows, whole, rows), strict=True)
    ]
    call = jax.jit(_of(convolve, stride, size), out_shardings=(rows, rows, whole))
    for x, exact in zip(call(*placed), _exact(arguments, stride, size), strict=True):
        assert _error(x, exact) < 2e-6


def test_gradients_inside_shard_map_are_those_of_the_whole(key):
    shape, features, size, stride = CASES["products"]
    arguments = _arguments(key, shape, features, size, stride)
    call = jax.shard_map(
        _of(convolve, stride, size),
        mesh=make_mesh(4),
        in_specs=(P("data"), P(), P("data")),
        out_specs=(P("data"), P("data"), P()),
    )
    exact = _exact(arguments, stride, size)
    for x, wanted in zip(jax.jit(call)(*arguments), exact, strict=True):
        assert _error(x, wanted) < 2e-6


def _lowered(platform, dtype=jnp.float32):
    shape, features, size, stride = CASES["products"]
    arguments = _arguments(jax.random.key(0), shape, features, size, stride)
    arguments = [x.astype(dtype) for x in arguments]
    traced = jax.jit(_of(convolve, stride, size)).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_convolve(platform):
    text = _lowered(platform)
    assert text.count("stablehlo.convolution") == 3
    assert "stablehlo.dot_general" not in text and "barrier" not in text


def test_cpus_multiply_in_float32_only():
    assert "stablehlo.convolution" not in _lowered("cpu")
    assert "stablehlo.dot_general" in _lowered("cpu")
    half = _lowered("cpu", jnp.bfloat16)
    assert half.count("stablehlo.convolution") == 3
    assert "stablehlo.dot_general" not in half
