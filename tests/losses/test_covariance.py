"""The sums of squares that the covariance losses share, by each form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax import losses
from jemjax.losses.covariance import cheapest_form
from jemjax.runtime import quick_compilation
from jemjax.testing import assert_device_invariant

jit = functools.partial(jax.jit, compiler_options=quick_compilation())

# On four devices, by the form that they choose.
SHAPES = {"all_to_all": (4, 21), "gather": (8, 12), "sum": (12, 6)}


def _derivatives(loss):
    """Value, gradients, and second derivatives along a direction."""

    def gradients(x, y):
        return jax.value_and_grad(loss, (0, 1))(x, y)

    def derivatives(x, y, directions):
        (value, first), (change, second) = jax.jvp(gradients, (x, y), directions)
        return value, first, change, second

    return derivatives


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize(
    ("name", "check_vma"),
    [("vicreg", True), ("vicreg", False), ("barlow_twins", False)],
)
def test_every_form_has_the_same_derivatives_to_second_order(name, form, check_vma):
    loss, shape = getattr(losses, name), SHAPES[form]
    assert cheapest_form(*shape, 4) == form
    mesh = jax.make_mesh(
        (4,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:4],
    )
    sharded = jax.shard_map(
        functools.partial(loss, axis_name="data"),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P(),
        check_vma=check_vma,
    )
    x, y, *directions = jax.random.normal(jax.random.key(0), (4, *shape))
    arrays = (x, y, tuple(directions))
    got = jit(_derivatives(sharded))(*arrays)
    expected = jit(_derivatives(loss))(*arrays)
    for leaf, reference in zip(
        jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(reference).max()
        np.testing.assert_allclose(leaf, reference, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
def test_second_derivatives_are_those_of_the_formula(shape):
    def formula(h):
        c = jnp.cov(h, rowvar=False)
        return (jnp.sum(c**2) - jnp.sum(jnp.diagonal(c) ** 2)) / h.shape[1]

    h, direction = jax.random.normal(jax.random.key(1), (2, *shape))
    got, expected = (
        jit(lambda h, f=f: jax.jvp(jax.grad(f), (h,), (direction,)))(h)
        for f in (losses.covariance_penalty, formula)
    )
    for leaf, reference in zip(got, expected, strict=True):
        scale = np.abs(reference).max()
        np.testing.assert_allclose(leaf, reference, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("form", ["gather", "sum"])
def test_large_and_small_embeddings_neither_overflow_nor_vanish(form):
    rows, features = SHAPES[form]
    h = np.random.default_rng(0).standard_normal((rows, features)).astype(np.float32)
    run = jit(jax.value_and_grad(losses.covariance_penalty))
    unit, _ = run(h)
    for magnitude in (1e-8, 1e-4, 1e4, 1e8):
        value, gradient = run(magnitude * h)
        np.testing.assert_allclose(value, float(unit) * magnitude**4, rtol=1e-4)
        # Of the fourth degree: the gradient along h is four times the value.
        np.testing.assert_allclose(
            np.sum(gradient * magnitude * h), 4 * value, rtol=1e-4
        )


@pytest.mark.parametrize(
    "context",
    ["grad of shard_map, Explicit", "shard_map of grad, two axes", "vmap", "pmap"],
)
def test_exchanged_features_where_contexts_differ_most(context):
    shape = (8, 42)  # of features that the devices do not divide
    assert cheapest_form(*shape, 8) == "all_to_all"
    x, y = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    assert_device_invariant(losses.vicreg, x, y, contexts=context, devices=8)


def _plain_vicreg(x, y):
    value = 25 * jnp.mean((x - y) ** 2)
    for h in (x, y):
        h = h - jnp.mean(h, axis=0, keepdims=True)
        c = h.T @ h / (h.shape[0] - 1)
        std = jnp.sqrt(jnp.diagonal(c) + 1e-4)
        value = value + 12.5 * jnp.mean(jax.nn.relu(1 - std))
        value = value + jnp.sum(_off_diagonal(c) ** 2) / h.shape[1]
    return value


def _plain_barlow_twins(x, y):
    x, y = (
        (h - jnp.mean(h, axis=0, keepdims=True))
        / jnp.sqrt(jnp.var(h, axis=0, keepdims=True) + 1e-5)
        for h in (x, y)
    )
    c = x.T @ y / x.shape[0]
    on_diagonal = jnp.sum((jnp.diagonal(c) - 1) ** 2)
    return on_diagonal + 0.0051 * jnp.sum(_off_diagonal(c) ** 2)


def _off_diagonal(c):
    return c * (1 - jnp.eye(c.shape[0], dtype=c.dtype))


DRAWS = 4


def _concatenated(value_and_gradients):
    """The value, and the gradients as one array."""
    value, gradients = jax.device_get(value_and_gradients)
    return np.asarray(value), np.stack(gradients)


def _embeddings(kind, rows, features, draw):
    normal = np.random.default_rng(draw).standard_normal
    x, change = normal((rows, features)), 0.3 * normal((rows, features))
    if kind == "correlated":
        x = normal((rows, features // 8)) @ normal((features // 8, features)) + 0.1 * x
    elif kind == "off-center":
        x = x + 100 * normal(features)
    elif kind == "nearly collapsed":
        x, change = 3 + 1e-3 * x, 1e-3 * change
    return np.stack([x, x + change]).astype(np.float32)


@pytest.mark.parametrize("shape", [(64, 256), (176, 192), (256, 64)], ids=str)
@pytest.mark.parametrize("name", ["vicreg", "barlow_twins"])
def test_as_exact_as_the_plain_form(name, shape):
    loss = jit(jax.value_and_grad(getattr(losses, name), (0, 1)))
    formula = {"vicreg": _plain_vicreg, "barlow_twins": _plain_barlow_twins}[name]
    plain = jit(jax.value_and_grad(formula, (0, 1)))
    # A sum of N D numbers is rounded once for each level of its tree, by eps / 2 at
    # most: no order of the terms, which depends on the processor, has less to answer
    # for. One draw may be exact by chance, so the worst of several are compared.
    rounding = 0.5 * np.finfo(np.float32).eps * np.log2(shape[0] * shape[1])
    for kind in ("well-spread", "correlated", "off-center", "nearly collapsed"):
        errors = np.zeros(
            (2, DRAWS, 2)
        )  # ours and the plain form's, of value, gradient
        for draw in range(DRAWS):
            x, y = _embeddings(kind, *shape, draw)
            with jax.enable_x64(True):
                arrays = x.astype(np.float64), y.astype(np.float64)
                exact = _concatenated(plain(*arrays))
            for of_run, run in zip(errors, (loss, plain), strict=True):
                got = _concatenated(run(x, y))
                of_run[draw] = [
                    np.linalg.norm(a - b) / np.linalg.norm(b)
                    for a, b in zip(got, exact, strict=True)
                ]
        ours, of_plain = errors.max(axis=1)
        assert np.all(ours <= 3 * np.maximum(of_plain, rounding)), (
            kind,
            ours,
            of_plain,
        )
