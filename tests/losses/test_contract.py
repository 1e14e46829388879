"""What every loss promises: dtypes, finiteness, refusals, invariances, collapse."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads
from losses.table import NATURAL, TABLE

from jemjax import losses
from jemjax.runtime import quick_compilation
from jemjax.testing import assert_loss_contract

N, D = 16, 12
WIDE = (6, 20)  # N < D: the route by the Gram matrix of the examples


def _every(promise=lambda loss: True):
    return pytest.mark.parametrize(
        "name", [name for name, loss in TABLE.items() if promise(loss)]
    )


EVERY = _every()


def _shapes(promise=lambda loss: True):
    """Every loss, and the wide shape for those that then take another route."""
    cases = [
        (name, shape)
        for name, loss in TABLE.items()
        if promise(loss)
        for shape in ([(N, D), WIDE] if loss.wide else [(N, D)])
    ]
    return pytest.mark.parametrize(("name", "shape"), cases, ids=str)


@functools.cache
def _compiled(name):
    loss = TABLE[name]
    run = jax.value_and_grad(loss.function, tuple(range(loss.count)))
    return jax.jit(run, compiler_options=quick_compilation())


def _value_and_grads(name, arrays):
    """The value, and the gradients for all the arrays: zeros for the constant ones."""
    return _compiled(name)(*arrays[: TABLE[name].count])


def _random(shape, seed=0, count=2):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


# The loss with a queue sees collapse where the queue has collapsed too: below.
@_shapes(lambda loss: loss is not TABLE["info_nce, queue"])
def test_the_contract(name, shape):
    assert_loss_contract(TABLE[name].function, **TABLE[name].contract(shape))


@pytest.mark.parametrize("name", NATURAL)
def test_the_contract_in_the_shapes_of_its_own(name):
    loss, shapes, keywords = NATURAL[name]
    assert_loss_contract(loss, shapes, **keywords)


@_shapes()
def test_beyond_the_range_infinite_or_zero_but_never_nan(name, shape):
    signs = np.sign(_random(shape)[0])
    for magnitude in (1e20,) if TABLE[name].normalizing else (1e20, 3e38):
        value, _ = _value_and_grads(name, [magnitude * signs, -magnitude * signs])
        assert not np.isnan(value)
        if "hinge" not in name and not TABLE[name].normalizing:
            assert value == np.inf


@_every(lambda loss: loss.direct)
@pytest.mark.parametrize("context", ["bare", "jit"])
def test_refusals(name, context):
    loss, names, count = TABLE[name].function, TABLE[name].arguments, TABLE[name].count
    run = loss if context == "bare" else jax.jit(loss)
    good = jnp.ones((4, 3))

    def refused(message, *arrays, **keywords):
        with pytest.raises(ValueError, match=message):
            (loss if keywords else run)(*arrays, **keywords)

    for bad in (jnp.ones(4), jnp.ones((4, 3, 2)), jnp.ones((4, 3), int), jnp.ones(())):
        refused(f"{names[0]}: got", *[bad] * count)
    if TABLE[name].of_each:
        refused("got a global batch of 0, expected at least 1", *[good[:0]] * count)
    else:
        refused("got a global batch of 1, expected at least 2", *[good[:1]] * count)
    refused(r"got shape \(4, 0\), expected [DK] >= 1", *[good[:, :0]] * count)
    if count == 2:
        expected = rf"{names[1]}: got shape \({{}}\), expected \(4, 3\)"
        refused(expected.format("1, 3"), good, good[:1])
        refused(expected.format("4, 1"), good, good[:, :1])


@_every(lambda loss: loss.of_each)
def test_of_one_example(name):
    """It is what the loss is the mean of."""
    arrays = _random((3, 4), count=TABLE[name].count)
    alone = [TABLE[name].function(*[a[i : i + 1] for a in arrays]) for i in range(3)]
    np.testing.assert_allclose(TABLE[name].function(*arrays), np.mean(alone), rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.byol, losses.nt_xent, losses.vicreg])
def test_float8_is_refused(loss):
    rows = jnp.ones((4, 3), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=": got dtype float8_e4m3fn, expected one of"):
        loss(rows, rows)


ROWS, STACK, OUTPUTS = (4, 3), (2, 4, 3), (3,)
TEMPERATURES = [
    ("student_temperature", 0.0),
    ("teacher_temperature", -0.04),
    ("teacher_temperature", float("nan")),
    ("stop_gradient", 1),
]
# loss: shapes of its arrays, and what it refuses
REFUSED = {
    losses.vicreg: (
        (ROWS, ROWS),
        [
            ("invariance_weight", -1.0),
            ("variance_weight", float("inf")),
            ("covariance_weight", float("nan")),
            ("gamma", -0.5),
            ("eps", 0.0),
        ],
    ),
    losses.vicreg_terms: ((ROWS, ROWS), [("gamma", float("nan")), ("eps", -1e-4)]),
    losses.variance_hinge: ((ROWS,), [("gamma", -1), ("eps", 0), ("on", "deviation")]),
    losses.lecture_energy: (
        (ROWS, ROWS),
        [("gamma", float("inf")), ("center", "yes")],
    ),
    losses.barlow_twins: (
        (ROWS, ROWS),
        [("off_diagonal_weight", -0.1), ("eps", float("nan"))],
    ),
    losses.barlow_twins_terms: (
        (ROWS, ROWS),
        [("eps", 0.0), ("eps", "small"), ("eps", jnp.ones(2))],
    ),
    losses.cross_entropy: ((ROWS, ROWS), TEMPERATURES),
    losses.dino: ((STACK, STACK, OUTPUTS), TEMPERATURES),
    losses.update_center: (
        (OUTPUTS, STACK),
        [("momentum", 1.5), ("momentum", -0.1), ("momentum", float("nan"))],
    ),
    losses.byol: ((ROWS, ROWS), [("stop_gradient", None)]),
    losses.negative_cosine: ((ROWS, ROWS), [("stop_gradient", "no")]),
    losses.data2vec_target: (
        ((2, 2, 4, 3),),
        [
            ("layer_normalization", "batch"),
            ("final_normalization", True),
            ("stop_gradient", 0),
        ],
    ),
    losses.smooth_l1: (
        (STACK, STACK),
        [
            ("beta", -1.0),
            ("beta", float("inf")),
            ("mask", np.ones((2, 4))),
            ("mask", np.ones((4, 2), bool)),
            ("mask", True),
            ("stop_gradient", None),
        ],
    ),
    losses.nt_xent: (
        (ROWS, ROWS),
        [("temperature", 0.0), ("temperature", float("inf"))],
    ),
    losses.info_nce: (
        (ROWS, ROWS),
        [
            ("temperature", -1.0),
            ("queue", np.ones((5, 2), np.float32)),
            ("queue", np.ones((0, 3), np.float32)),
            ("stop_gradient", 0),
        ],
    ),
}


@pytest.mark.parametrize(
    ("loss", "argument", "value"),
    [(loss, *row) for loss, (_, rows) in REFUSED.items() for row in rows],
)
def test_refused_hyper_parameters(loss, argument, value):
    arrays = [np.ones(shape, np.float32) for shape in REFUSED[loss][0]]
    with pytest.raises(ValueError, match=f"{argument}: got .* expected"):
        loss(*arrays, **{argument: value})


@pytest.mark.parametrize(
    ("loss", "shapes", "message"),
    [
        (losses.dino, (ROWS, STACK, (3,)), r"student_logits: .* \(V, N, K\)"),
        (losses.dino, (STACK, ROWS, (3,)), r"teacher_logits: .* \(G, N, K\)"),
        (losses.dino, (STACK, STACK, (1, 3)), r"center: .* \(K,\)"),
        (losses.dino, (STACK, STACK, (2,)), r"center: .* \(3,\), with K as in stu"),
        (losses.dino, (STACK, (2, 5, 3), (3,)), r"teacher_logits: .* \(2, 4, 3\)"),
        (losses.dino, ((1, 4, 3), (1, 4, 3), (3,)), "got 1 views, expected at least 2"),
        (losses.dino, (STACK, (3, 4, 3), (3,)), "got 2 views, .* the 3 of teacher"),
        (losses.dino, ((2, 0, 3), (2, 0, 3), (3,)), "got a global batch of 0"),
        (losses.update_center, ((4,), STACK), r"teacher_logits: .* \(2, 4, 4\)"),
        (losses.data2vec_target, (STACK,), r"layers: .* \(L, N, T, D\)"),
        (losses.data2vec_target, ((0, 2, 4, 3),), "layers: .* expected L >= 1"),
        (losses.smooth_l1, (ROWS, ROWS), r"prediction: .* \(N, T, D\)"),
        (losses.smooth_l1, (STACK, (2, 4, 1)), r"target: .* \(2, 4, 3\)"),
        (losses.smooth_l1, ((0, 4, 3), (0, 4, 3)), "got a global batch of 0"),
        (losses.info_nce, (ROWS, ROWS, STACK), r"queue: .* \(Q, D\)"),
    ],
)
def test_refused_shapes(loss, shapes, message):
    with pytest.raises(ValueError, match=message):
        loss(*[np.ones(shape, np.float32) for shape in shapes])


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


HYPER_PARAMETERS = pytest.mark.parametrize(
    ("loss", "shapes", "argument", "number"),
    [
        (losses.cross_entropy, (ROWS, ROWS), "student_temperature", 0.2),
        (losses.cross_entropy, (ROWS, ROWS), "teacher_temperature", 0.07),
        (losses.dino, (STACK, STACK, OUTPUTS), "teacher_temperature", 0.07),
        (losses.update_center, (OUTPUTS, STACK), "momentum", 0.7),
        (losses.smooth_l1, (STACK, STACK), "beta", 0.3),
        (losses.nt_xent, (ROWS, ROWS), "temperature", 0.5),
        (losses.info_nce, (ROWS, ROWS), "temperature", 0.5),
        (losses.vicreg, (ROWS, ROWS), "gamma", 0.5),
        (losses.barlow_twins, (ROWS, ROWS), "eps", 0.5),
    ],
)


@HYPER_PARAMETERS
def test_a_traced_hyper_parameter_is_as_the_number(loss, shapes, argument, number):
    arrays = [_random(shape, seed)[0] for seed, shape in enumerate(shapes)]

    def total(traced):
        result = loss(*arrays, **{argument: traced})
        return jnp.sum(result), result

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, traced), gradient = run(number)
    np.testing.assert_allclose(traced, loss(*arrays, **{argument: number}), rtol=1e-5)
    assert np.isfinite(gradient)
    if argument == "teacher_temperature":
        assert gradient == 0  # as of all that makes the targets
    # Another dtype than the arrays' does not change the result's.
    (_, half), _ = run(jnp.bfloat16(number))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, traced, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("loss", "shapes", "argument"),
    [
        (losses.nt_xent, (ROWS, ROWS), "temperature"),
        (losses.info_nce, (ROWS, ROWS), "temperature"),
        (losses.cross_entropy, (ROWS, ROWS), "student_temperature"),
        (losses.cross_entropy, (ROWS, ROWS), "teacher_temperature"),
        (losses.dino, (STACK, STACK, OUTPUTS), "student_temperature"),
        (losses.dino, (STACK, STACK, OUTPUTS), "teacher_temperature"),
        (losses.smooth_l1, (STACK, STACK), "beta"),
        (losses.swav, (STACK,), "temperature"),
        (losses.vicreg, (ROWS, ROWS), "eps"),
    ],
)
def test_a_number_below_the_dtypes_smallest_is_not_zero(loss, shapes, argument):
    arrays = [_random(shape, seed)[0] for seed, shape in enumerate(shapes)]
    for first in (arrays[0], 0 * arrays[0]):
        value, gradient = jax.value_and_grad(loss)(
            first, *arrays[1:], **{argument: 1e-50}
        )
        # Infinite where a derivative of order 1 / temperature is beyond the range.
        assert not np.isnan(value) and not np.isnan(gradient).any()


@pytest.mark.parametrize("name", ["nt_xent", "info_nce"])
def test_a_contrastive_loss_is_never_negative(name):
    run = jax.jit(functools.partial(TABLE[name].function, temperature=1e-3))
    for seed in range(20):
        (x,) = _random((N, D), seed, count=1)
        assert run(x, x) >= 0


@pytest.mark.parametrize("weight", [0.0, jnp.zeros(())], ids=["number", "traced"])
def test_a_weight_of_zero_removes_even_an_infinite_term(weight):
    signs = np.float32(1e15) * np.sign(_random((N, D))[0])
    value = losses.vicreg(signs, signs, covariance_weight=weight)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)


@_every(lambda loss: loss.symmetric)
@given(seed=st.integers(0, 2**16))
def test_the_views_may_be_swapped(name, seed):
    x, y = _random((N, D), seed)
    value, (of_x, of_y) = _value_and_grads(name, [x, y])
    swapped, (of_y_swapped, of_x_swapped) = _value_and_grads(name, [y, x])
    np.testing.assert_allclose(swapped, value, rtol=1e-6)
    np.testing.assert_allclose(of_x_swapped, of_x, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_y_swapped, of_y, rtol=1e-4, atol=1e-6)


@_every(lambda loss: loss.translated)
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


@_every(lambda loss: loss.scaled)
@given(seed=st.integers(0, 2**16))
def test_the_length_of_a_row_does_not_matter(name, seed):
    arrays = _random((N, D), seed)
    value, gradients = _value_and_grads(name, arrays)
    # Powers of two, so that the rows' directions are exactly the same.
    scales = np.exp2(np.random.default_rng(seed).integers(-8, 60, (2, N, 1)))
    scales = scales.astype(np.float32)
    scaled = [a * scale for a, scale in zip(arrays, scales, strict=True)]
    moved, moved_gradients = _value_and_grads(name, scaled)
    np.testing.assert_allclose(moved, value, rtol=1e-5, atol=1e-6)
    for gradient, other, scale in zip(gradients, moved_gradients, scales, strict=True):
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(other * scale, gradient, atol=1e-5 * largest)


@_every(lambda loss: loss.collapsed is not None)
def test_collapse_is_visible(name):
    loss = TABLE[name]
    for rows in (N, 11) if loss.sized else (N,):
        for constant in (0.0, 0.1, -3.7, 1e4, 1e8):
            array = np.full((rows, D), constant, np.float32)
            expected = loss.collapsed(rows, D)
            if constant == 0 and loss.collapsed_at_zero is not None:
                expected = loss.collapsed_at_zero
            value, _ = _value_and_grads(name, [array] * loss.count)
            np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-12)


def _check_grads(function, arrays, varied):
    """Against finite differences, of the first `varied` of the arrays."""
    constants = arrays[varied:]
    check_grads(
        jax.jit(lambda *varied: function(*varied, *constants)),
        tuple(arrays[:varied]),
        order=1,
        modes=("rev",),
    )


@_every(lambda loss: loss.scaled)
def test_gradients_of_rows_of_one_entry(name):
    """Their largest entry is their length, up to which they are scaled."""
    with jax.enable_x64(True):
        arrays = [a.astype(np.float64) for a in _random((4, 4), seed=1)]
        arrays[0] = 3.0 * np.eye(4)
        _check_grads(TABLE[name].function, arrays, TABLE[name].varied)


@_every(lambda loss: loss.scaled)
def test_float16_gradients_of_short_rows(name):
    x, y = (jnp.asarray(a, jnp.float16) for a in _random((N, D)))
    for length in (0.0, 6e-8, 1e-5, 1e-3):
        short = jnp.asarray(length * x, jnp.float16)
        chex.assert_tree_all_finite(_value_and_grads(name, [short, y]))
        chex.assert_tree_all_finite(_value_and_grads(name, [y, short]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_queue_or_a_center_that_is_not_finite_is_not_hidden(bad):
    x, y = _random((N, D))
    queue, center = y.copy(), y[0].copy()
    queue[2, 1] = center[1] = bad
    assert not np.isfinite(losses.info_nce(np.abs(x), y, queue))
    stacked = np.stack([x, y])
    assert not np.isfinite(losses.dino(stacked, stacked, center))
    assert not np.isfinite(losses.update_center(center, stacked)).all()


@pytest.mark.parametrize("length", [20.0, -100.0])
def test_a_queue_may_have_long_rows(length):
    x, y = _random((N, D))
    q = x / np.linalg.norm(x, axis=1, keepdims=True)
    k = y / np.linalg.norm(y, axis=1, keepdims=True)

    def loss(x, temperature=0.2):
        return losses.info_nce(x, y, length * q[:5], temperature=temperature)

    value, gradient = jax.value_and_grad(loss)(x)
    traced = jax.jit(jax.value_and_grad(loss))(x, jnp.float32(0.2))
    chex.assert_trees_all_close((value, gradient), traced, rtol=1e-5, atol=1e-6)
    positive = np.sum(q * k, axis=1, keepdims=True, dtype=np.float64)
    logits = np.concatenate([positive, length * q @ q[:5].T], axis=1) / 0.2
    expected = np.mean(np.logaddexp.reduce(logits, axis=1) - logits[:, 0])
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize(
    "name",
    [
        "cross_entropy",
        "dino",
        "dino, local views",
        "byol",
        "negative_cosine",
        "smooth_l1, masked",
        "smooth_l1, squared",
        "info_nce",
        "info_nce, queue",
    ],
)
def test_without_stop_gradient_the_targets_get_theirs(name):
    function = functools.partial(TABLE[name].function, stop_gradient=False)
    with jax.enable_x64(True):
        arrays = [0.3 * a.astype(np.float64) for a in _random((5, 4), seed=1)]
        # Softer targets: a temperature of 0.04 is hard on finite differences.
        if "teacher_logits" in TABLE[name].arguments:
            function = functools.partial(function, teacher_temperature=0.2)
        _check_grads(function, arrays, 2)
        value, gradient = jax.jit(jax.value_and_grad(function, 1))(*arrays)
        stopped = jax.jit(functools.partial(function, stop_gradient=True))(*arrays)
        np.testing.assert_allclose(value, stopped, rtol=1e-12)
        assert np.any(gradient)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)], ids=str)
def test_both_routes_agree_with_the_definition(shape):
    (h,) = _random(shape, seed=5, count=1)
    covariance = np.cov(h.astype(np.float64), rowvar=False)
    expected = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
    got = losses.covariance_penalty(h)
    np.testing.assert_allclose(got, expected / shape[1], rtol=1e-5)


@EVERY
def test_vmap_over_independent_batches(name):
    arrays = _random((3, N, D), count=TABLE[name].count)
    together = jax.jit(jax.vmap(TABLE[name].function))(*arrays)
    one_by_one = [
        _value_and_grads(name, batch)[0] for batch in zip(*arrays, strict=True)
    ]
    np.testing.assert_allclose(together, one_by_one, rtol=1e-5)


def test_numpy_float64_is_float32_where_x64_is_off():
    x, y = (a.astype(np.float64) for a in _random((N, D)))
    assert losses.nt_xent(x, y).dtype == jnp.float32


@functools.cache
def _masked_smooth_l1():
    def run(prediction, target, mask):
        return jax.value_and_grad(losses.smooth_l1)(prediction, target, mask=mask)

    return jax.jit(run)


@given(seed=st.integers(0, 2**16))
def test_nothing_but_the_masked_tokens_counts(seed):
    prediction, target = _random((3, 4, D), seed)
    mask = np.random.default_rng(seed).random((3, 4)) < 0.4
    prediction[~mask] = np.nan

    run = _masked_smooth_l1()
    value, gradient = run(prediction, target, mask)
    distance = np.abs(prediction - target)[mask]
    expected = np.where(distance < 2, distance**2 / 4, distance - 1)
    np.testing.assert_allclose(value, expected.mean() if mask.any() else 0, rtol=1e-5)
    assert np.all(gradient[~mask] == 0) and np.all(gradient[mask] != 0)
    value, gradient = run(prediction, target, 0 * mask > 0)
    assert value == 0 and not np.any(gradient)


@given(seed=st.integers(0, 2**16))
def test_dino_is_the_mean_over_pairs_of_different_views(seed):
    cross_entropy, dino = jax.jit(losses.cross_entropy), jax.jit(losses.dino)
    student, teacher = _random((5, 3, D), seed)
    teacher, center = teacher[:3], teacher[4, 0]
    pairs = [
        cross_entropy(student[v], teacher[g] - center)
        for v in range(5)
        for g in range(3)
        if v != g
    ]
    value = dino(student, teacher, center)
    np.testing.assert_allclose(value, np.mean(pairs), rtol=1e-5)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "cross_entropy"])
def test_any_temperature(name):
    keyword = "student_temperature" if name == "cross_entropy" else "temperature"

    @jax.jit
    def run(x, y, temperature):
        function = functools.partial(TABLE[name].function, **{keyword: temperature})
        return jax.value_and_grad(function, (0, 1))(x, y)

    x, y = _random((N, D))
    for temperature in (1e-6, 1e-3, 1e3):
        for other in (x, -x, y, 0 * y):
            chex.assert_tree_all_finite(run(x, other, temperature))


@pytest.mark.parametrize("final", [None, "layer", "instance"])
@pytest.mark.parametrize("layer", [None, "layer", "instance"])
def test_data2vec_targets_of_large_layers(layer, final):
    layers = _random((2, 3, 4, D))[0]
    run = jax.jit(
        functools.partial(
            losses.data2vec_target, layer_normalization=layer, final_normalization=final
        )
    )
    for hazard in (
        0 * layers,
        0 * layers + 3e4,
        1e20 * np.sign(layers),
        1e-41 * layers,
    ):
        chex.assert_tree_all_finite(run(hazard.astype(np.float32)))
    if layer or final:
        np.testing.assert_allclose(
            run(1e20 * layers), run(1e3 * layers), rtol=1e-4, atol=1e-5
        )
    assert not np.any(jax.grad(lambda x: jnp.sum(run(x)[0]))(layers))


def test_data2vec_targets_without_stop_gradient():
    with jax.enable_x64(True):
        layers = _random((2, 3, 4, 5))[0].astype(np.float64)
        run = functools.partial(losses.data2vec_target, stop_gradient=False)
        check_grads(jax.jit(lambda x: run(x)[:, 1]), (layers,), order=1, modes=("rev",))


def test_the_center_is_a_constant_and_stays_float32():
    teacher = jnp.asarray(_random((2, N, D))[0], jnp.bfloat16)
    center = jnp.linspace(-1.0, 1.0, D)
    updated = losses.update_center(center, teacher)
    assert updated.dtype == jnp.float32
    expected = 0.9 * center + 0.1 * teacher.astype(jnp.float32).mean((0, 1))
    np.testing.assert_allclose(updated, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(
        losses.update_center(center, teacher, momentum=1), center
    )

    def loss(center):
        moved = losses.update_center(center, teacher)
        return losses.dino(teacher, teacher, center) + jnp.sum(moved)

    assert not np.any(jax.grad(loss)(center))
