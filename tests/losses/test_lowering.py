"""Every loss lowers for TPU and GPU where there is neither, with exact products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from losses.table import TABLE
from lowered import inexact, lowered, products

# Those that multiply matrices, forward and backward.
MULTIPLYING = {name for name in TABLE if TABLE[name].wide} | {
    name for name in TABLE if name.startswith(("swav", "nt_xent", "info_nce"))
}


def _step(loss, devices):
    """Value and gradients; `devices` of None: the bare call, without an axis."""
    function = loss.function
    if devices is not None:
        # 256 chips are there in name only, which lowering does not ask.
        mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))
        function = jax.shard_map(
            functools.partial(function, axis_name="data"),
            mesh=mesh,
            in_specs=jax.P("data"),
            out_specs=jax.P(),
        )
    return jax.jit(jax.value_and_grad(function, tuple(range(loss.count))))


def _lowered(name, devices, dtype=jnp.float32, columns=10):
    loss = TABLE[name]
    array = jax.ShapeDtypeStruct((4 * (devices or 8), columns), dtype)
    return lowered(_step(loss, devices), *[array] * loss.count)


# Rows of 4 a device: with 8 devices, covariances are summed for 10 columns, and
# rows gathered for 40 and exchanged for 128.
SHAPES = [
    (name, columns)
    for name in TABLE
    for columns in ([10, 40, 128] if TABLE[name].wide else [10])
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("devices", [None, 8], ids=["bare", "8 devices"])
@pytest.mark.parametrize(("name", "columns"), SHAPES)
def test_every_loss_with_exact_products(name, columns, devices, dtype):
    lines = products(_lowered(name, devices, dtype, columns))
    assert bool(lines) == (name in MULTIPLYING)
    assert not [line for line in lines if inexact(line)]


@pytest.mark.parametrize(("name", "columns"), [*SHAPES, ("vicreg", 4096)])
def test_for_a_pod_of_256_chips(name, columns):
    text = _lowered(name, 256, columns=columns)
    assert '"data"=256' in text
    assert not [line for line in products(text) if inexact(line)]


# The table gives "dino" a center of float64 there, which its loss then is too.
@pytest.mark.parametrize("name", sorted(set(TABLE) - {"dino", "dino, local views"}))
def test_nothing_becomes_float64_where_it_could(name):
    with jax.enable_x64(True):
        _lowered(name, None)


def _float64(x):
    return (x.astype("float64") ** 2).sum().astype("float32")


def _printing(x):
    jax.debug.print("{}", x[0, 0])
    return x.sum()


def _pure(x):
    return jax.pure_callback(np.sum, jax.ShapeDtypeStruct((), x.dtype), x)


def _ordered(x):
    return jax.experimental.io_callback(
        np.sum, jax.ShapeDtypeStruct((), x.dtype), x, ordered=True
    )


def _inside(x):
    return jax.lax.scan(lambda total, row: (total + _pure(row), None), 0.0, x)[0]


def _eigenvalues(x):
    return jnp.linalg.eigh(x.T @ x)[0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (_float64, "float64"),
        (_printing, "calls of the host"),
        (_pure, "calls of the host"),
        (_ordered, "calls of the host"),
        (_inside, "calls of the host"),
        (_eigenvalues, "calls of other code"),
    ],
)
def test_a_planted_fault_is_found(function, said):
    with jax.enable_x64(True), pytest.raises(AssertionError, match=said):
        lowered(jax.jit(function), jax.ShapeDtypeStruct((4, 4), jnp.float32))


def test_a_planted_inexact_product_is_found():
    highest = jax.lax.Precision.HIGHEST
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    h = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)

    def found(array, **keywords):
        step = jax.jit(lambda a: jnp.matmul(a, a, **keywords))
        lines = products(lowered(step, array))  # one for each platform
        assert len(lines) == 2
        return all(inexact(line) for line in lines)

    assert found(x)
    assert not found(x, precision=highest)
    assert found(h, precision=highest)
    assert not found(h, precision=highest, preferred_element_type=jnp.float32)
