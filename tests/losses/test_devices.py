"""The same value and gradients on any number of devices, in every context."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import CONTEXTS
from losses.table import TABLE

from jemjax import losses

# Below and above D, and a D that no number of devices divides.
SHAPES = [(16, 42), (48, 10)]


@functools.cache
def _problem(name, shape):
    loss, count = TABLE[name].function, TABLE[name].count
    keys = jax.random.split(jax.random.key(0), count)
    arrays = [np.asarray(0.7 * jax.random.normal(k, shape) + 0.3) for k in keys]
    parameter = np.linspace(0.5, 1.5, shape[1], dtype=np.float32)
    return loss, parameter, arrays, CONTEXTS["bare"](loss, parameter, arrays, 1)


def _check(name, context, shape, devices):
    loss, parameter, arrays, expected = _problem(name, shape)
    got = CONTEXTS[context](loss, parameter, arrays, devices)
    for leaf, reference in zip(
        jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(reference).max()
        np.testing.assert_allclose(leaf, reference, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("context", list(CONTEXTS)[1:])
@pytest.mark.parametrize(
    ("name", "shape"),
    [*[("vicreg", shape) for shape in SHAPES], ("barlow_twins", SHAPES[0])],
    ids=str,
)
def test_every_context_on_eight_devices(name, shape, context):
    _check(name, context, shape, 8)


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"vicreg", "barlow_twins"}))
def test_the_others_on_eight_devices(name):
    _check(name, "shard_map of grad, unchecked", SHAPES[0], 8)


# Those that gather rows, or count by shards, in the contexts that differ most.
@pytest.mark.parametrize(
    "context",
    [
        "global view, Explicit",
        "grad of shard_map, Explicit",
        "shard_map of grad",
        "shard_map of grad, two axes",
        "vmap",
    ],
)
@pytest.mark.parametrize(
    "name",
    ["dino, local views", "smooth_l1, masked", "nt_xent", "info_nce, both sides"],
)
def test_gathered_rows_on_eight_devices(name, context):
    _check(name, context, SHAPES[0], 8)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("context", list(CONTEXTS)[1:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_the_whole_matrix(name, shape, context, devices):
    _check(name, context, shape, devices)


def _moved(loss, shape, devices=8):
    """The collectives in the program of one device, as (operation, result)."""
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.P("data")
    step = jax.jit(
        jax.shard_map(
            functools.partial(loss, axis_name="data"),
            mesh=mesh,
            in_specs=spec,
            out_specs=jax.P(),
        )
    )
    text = step.lower(jnp.zeros(shape)).as_text()
    return text


def test_a_small_batch_exchanges_features_and_never_forms_the_covariance():
    text = _moved(losses.covariance_penalty, (16, 64))
    assert "all_to_all" in text
    assert "tensor<64x64xf32>" not in text
    assert "tensor<16x16xf32>" in text


def test_a_large_batch_sums_covariances():
    text = _moved(losses.covariance_penalty, (64, 16))
    assert "all_to_all" not in text
    assert "tensor<16x16xf32>" in text
    assert "tensor<64x64xf32>" not in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("shape", [(8, 16), (16, 8)], ids=str)
@pytest.mark.parametrize(
    "name",
    ["vicreg", "barlow_twins", "nt_xent", "info_nce, both sides", "info_nce, queue"],
)
def test_products_are_exact_where_lowered_for_accelerators(name, shape, platform):
    loss = TABLE[name].function
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    text = str(
        jax.export.export(step, platforms=[platform])(array, array).mlir_module()
    )
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    for line in products:
        assert "precision = [HIGHEST, HIGHEST]" in line


def test_the_center_of_the_global_batch():
    center, logits = np.linspace(-1, 1, 5), np.random.default_rng(0).random((2, 8, 5))
    center, logits = center.astype(np.float32), logits.astype(np.float32)
    update = jax.jit(
        jax.shard_map(
            functools.partial(losses.update_center, axis_name="data"),
            mesh=jax.make_mesh(
                (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
            ),
            in_specs=(jax.P(), jax.P(None, "data")),
            out_specs=jax.P(),
        )
    )
    np.testing.assert_allclose(
        update(center, logits), losses.update_center(center, logits), rtol=1e-6
    )
