"""What every loss promises: dtypes, finiteness, refusals, invariances, collapse."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads
from losses.table import ALL, COLLAPSED, NORMALIZING, PAIRS

from jemjax import losses

N, D = 16, 12
WIDE = (6, 20)  # N < D: the route by the Gram matrix of the examples
EVERY = pytest.mark.parametrize("name", ALL)


@functools.cache
def _compiled(name):
    loss, count = ALL[name]
    return jax.jit(jax.value_and_grad(loss, tuple(range(count))))


def _value_and_grads(name, arrays):
    return _compiled(name)(*arrays[: ALL[name][1]])


def _random(shape, seed=0, count=2):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_any_float_in_float32_out(name, dtype):
    arrays = [jnp.asarray(a, dtype) for a in _random((N, D))]
    value, gradients = _value_and_grads(name, arrays)
    assert value.dtype == jnp.float32 and value.shape == ()
    exact, _ = _value_and_grads(name, [a.astype(jnp.float32) for a in arrays])
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    for gradient in gradients:
        assert gradient.dtype == dtype


def _hazards(shape, largest):
    rows, columns = shape
    random = _random(shape, seed=3, count=1)[0]
    ones = np.ones(shape, np.float32)
    return {
        "zeros": 0 * ones,
        "constant": 3.7 * ones,
        "large constant": largest * ones,
        "duplicated rows": np.tile(random[:1], (rows, 1)),
        "half of the rows duplicated": np.concatenate(
            [random[: rows // 2], random[: rows - rows // 2]]
        ),
        "one-hot": np.eye(rows, columns, dtype=np.float32),
        "one live column": random * (np.arange(columns) == 0),
        "subnormal": (1e-41 * random).astype(np.float32),
        "tiny": (1e-25 * random).astype(np.float32),
        "float16 max": np.sign(random) * np.float32(65504.0),
        "largest": (largest * np.sign(random)).astype(np.float32),
        "largest, unequal": (largest * np.tanh(random)).astype(np.float32),
        "off center": random * 1e-3 + 300,
        "unequal columns": random * np.logspace(-6, 6, columns, dtype=np.float32),
    }


@EVERY
@pytest.mark.parametrize("shape", [(N, D), WIDE], ids=str)
def test_finite_with_finite_gradients(name, shape):
    hazards = _hazards(shape, 1e20 if name in NORMALIZING else 1e8)
    for hazard, array in hazards.items():
        for other in (array, np.roll(array, 1, axis=0), -array):
            value, gradients = _value_and_grads(name, [array, other])
            assert np.isfinite(value), (hazard, value)
            for gradient in gradients:
                assert np.isfinite(gradient).all(), hazard


@EVERY
def test_float16_at_its_limits(name):
    array = jnp.full((N, D), 65504, jnp.float16).at[::2].set(-65504)
    value, gradients = _value_and_grads(name, [array, array])
    assert np.isfinite(value)
    chex.assert_tree_all_finite(_value_and_grads(name, [array * 0, array * 0]))


@given(
    arrays=st.tuples(
        *[
            hnp.arrays(
                np.float32,
                (N, D),
                elements=st.floats(-(2.0**26), 2.0**26, width=32),
            )
        ]
        * 2
    )
)
@pytest.mark.parametrize("name", ["vicreg", "lecture_energy", "barlow_twins"])
def test_finite_for_whatever_is_drawn(name, arrays):
    chex.assert_tree_all_finite(_value_and_grads(name, arrays))


@EVERY
@pytest.mark.parametrize("shape", [(N, D), WIDE], ids=str)
@pytest.mark.parametrize("magnitude", [1e20, 3e38])
def test_beyond_the_range_infinite_or_zero_but_never_nan(name, shape, magnitude):
    if name in NORMALIZING:
        magnitude = 1e20
    signs = np.sign(_random(shape)[0])
    value, _ = _value_and_grads(name, [magnitude * signs, -magnitude * signs])
    assert not np.isnan(value)
    if "hinge" not in name and name not in NORMALIZING:
        assert value == np.inf


@EVERY
@pytest.mark.parametrize("shape", [(N, D), WIDE], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_hidden(name, shape, bad):
    for argument in range(ALL[name][1]):
        arrays = _random(shape)
        arrays[argument][1, 2] = bad
        value, _ = _value_and_grads(name, arrays)
        assert not np.isfinite(value)


@EVERY
@pytest.mark.parametrize("context", ["bare", "jit"])
def test_refusals(name, context):
    loss, count = ALL[name]
    run = loss if context == "bare" else jax.jit(loss)
    good = jnp.ones((4, 3))
    names = ("x", "y") if count == 2 else ("h",)

    def refused(message, *arrays, **keywords):
        with pytest.raises(ValueError, match=message):
            (loss if keywords else run)(*arrays, **keywords)

    for bad in (jnp.ones(4), jnp.ones((4, 3, 2)), jnp.ones((4, 3), int), jnp.ones(())):
        refused(f"{names[0]}: got", *[bad] * count)
    refused(r"got a global batch of 1, expected at least 2", *[good[:1]] * count)
    refused(r"got shape \(4, 0\), expected D >= 1", *[good[:, :0]] * count)
    if count == 2:
        refused(r"y: got shape \(1, 3\), expected \(4, 3\)", good, good[:1])
        refused(r"y: got shape \(4, 1\), expected \(4, 3\)", good, good[:, :1])


NUMBERS = {
    losses.vicreg: [
        ("invariance_weight", -1.0),
        ("variance_weight", float("inf")),
        ("covariance_weight", float("nan")),
        ("gamma", -0.5),
        ("eps", 0.0),
    ],
    losses.vicreg_terms: [("gamma", float("nan")), ("eps", -1e-4)],
    losses.variance_hinge: [("gamma", -1), ("eps", 0), ("on", "deviation")],
    losses.lecture_energy: [("gamma", float("inf")), ("center", "yes")],
    losses.barlow_twins: [("off_diagonal_weight", -0.1), ("eps", float("nan"))],
    losses.barlow_twins_terms: [("eps", 0.0), ("eps", "small"), ("eps", jnp.ones(2))],
}


@pytest.mark.parametrize(
    ("loss", "argument", "value"),
    [(loss, *row) for loss, rows in NUMBERS.items() for row in rows],
)
def test_refused_hyper_parameters(loss, argument, value):
    arrays = _random((4, 3), count=1 if loss is losses.variance_hinge else 2)
    with pytest.raises(ValueError, match=f"{argument}: got .* expected"):
        loss(*arrays, **{argument: value})


def test_hyper_parameters_may_be_traced():
    x, y = _random((N, D))
    weights = jnp.array([10.0, 20.0, 3.0, 0.8, 1e-3])
    names = ("invariance_weight", "variance_weight", "covariance_weight")

    def loss(weights):
        keywords = dict(zip((*names, "gamma", "eps"), weights, strict=True))
        return losses.vicreg(x, y, **keywords)

    value, gradient = jax.jit(jax.value_and_grad(loss))(weights)
    keywords = dict(zip((*names, "gamma", "eps"), weights.tolist(), strict=True))
    np.testing.assert_allclose(value, losses.vicreg(x, y, **keywords), rtol=1e-6)
    np.testing.assert_allclose(
        gradient[:3], losses.vicreg_terms(x, y, gamma=0.8, eps=1e-3), rtol=1e-5
    )


@pytest.mark.parametrize("weight", [0.0, jnp.zeros(())], ids=["number", "traced"])
def test_a_weight_of_zero_removes_even_an_infinite_term(weight):
    signs = np.float32(1e15) * np.sign(_random((N, D))[0])
    value = losses.vicreg(signs, signs, covariance_weight=weight)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)


@EVERY
@pytest.mark.parametrize("shape", [(N, D), WIDE], ids=str)
@given(seed=st.integers(0, 2**16))
def test_the_order_of_the_batch_does_not_matter(name, shape, seed):
    arrays = _random(shape, seed)
    order = np.random.default_rng(seed).permutation(shape[0])
    value, gradients = _value_and_grads(name, arrays)
    permuted, permuted_gradients = _value_and_grads(name, [a[order] for a in arrays])
    np.testing.assert_allclose(permuted, value, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(gradients, permuted_gradients, strict=True):
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(other, gradient[order], atol=1e-5 * scale)


@pytest.mark.parametrize("name", PAIRS)
@given(seed=st.integers(0, 2**16))
def test_the_views_may_be_swapped(name, seed):
    x, y = _random((N, D), seed)
    value, (of_x, of_y) = _value_and_grads(name, [x, y])
    swapped, (of_y_swapped, of_x_swapped) = _value_and_grads(name, [y, x])
    np.testing.assert_allclose(swapped, value, rtol=1e-6)
    np.testing.assert_allclose(of_x_swapped, of_x, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_y_swapped, of_y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in ALL if "uncentered" not in n])
@given(seed=st.integers(0, 2**16), shift=st.floats(-64, 64, width=16))
def test_translation_of_both_views_does_not_matter(name, seed, shift):
    arrays = _random((N, D), seed)
    value, _ = _value_and_grads(name, arrays)
    moved, _ = _value_and_grads(name, [a + np.float32(shift) for a in arrays])
    np.testing.assert_allclose(moved, value, rtol=2e-4, atol=1e-5)


@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(0.5, 64, width=16),
    shift=st.floats(-8, 8, width=16),
)
def test_barlow_twins_does_not_see_affine_changes_of_a_dimension(seed, scale, shift):
    x, y = _random((N, D), seed)
    value, _ = _value_and_grads("barlow_twins", [x, y])
    scales = np.linspace(1, scale, D, dtype=np.float32)
    moved, _ = _value_and_grads("barlow_twins", [x * scales + np.float32(shift), y])
    np.testing.assert_allclose(moved, value, rtol=1e-3)


@pytest.mark.parametrize("name", COLLAPSED)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.7, 1e4, 1e8])
@pytest.mark.parametrize("rows", [N, 11])
def test_collapse_is_visible(name, constant, rows):
    loss, count = ALL[name]
    array = np.full((rows, D), constant, np.float32)
    np.testing.assert_allclose(loss(*[array] * count), COLLAPSED[name], rtol=1e-6)


@EVERY
@pytest.mark.parametrize("shape", [(5, 4), (4, 7)], ids=str)
def test_gradients_agree_with_finite_differences(name, shape):
    loss, count = ALL[name]
    with jax.enable_x64(True):
        arrays = [0.6 * a.astype(np.float64) for a in _random(shape, seed=1)]
        check_grads(loss, arrays[:count], order=1, modes=("rev",))


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)], ids=str)
def test_both_routes_agree_with_the_definition(shape):
    (h,) = _random(shape, seed=5, count=1)
    covariance = np.cov(h.astype(np.float64), rowvar=False)
    expected = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
    got = losses.covariance_penalty(h)
    np.testing.assert_allclose(got, expected / shape[1], rtol=1e-5)


@EVERY
def test_vmap_over_independent_batches(name):
    loss, count = ALL[name]
    arrays = _random((3, N, D), count=count)
    together = jax.vmap(loss)(*arrays)
    one_by_one = [loss(*batch) for batch in zip(*arrays, strict=True)]
    np.testing.assert_allclose(together, one_by_one, rtol=1e-5)
