"""Sinkhorn's assignments and SwAV: the official values, hazards, limits, devices."""

import collections
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from jemjax import losses
from jemjax.losses.clustering import assign, sinkhorn, swapped_cross_entropy, swav
from jemjax.losses.collectives import batch_mean
from jemjax.testing import CONTEXTS, assert_device_invariant

N, K = 12, 8
TOLERANCES = {np.float32: 1e-4, np.float64: 1e-9}
EITHER_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: d.__name__)
# The form of computation, and the offset of outliers at which it is chosen.
OFFSETS = {"scaling": 0.0, "logarithms": 60.0}


def _cosines(shape, seed=0):
    rng = np.random.default_rng(seed)
    rows, prototypes = rng.standard_normal((2, *shape, 6))
    rows = rows[..., 0, :]
    prototypes = prototypes[..., 0, :, :] if len(shape) > 2 else prototypes[0]
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    prototypes /= np.linalg.norm(prototypes, axis=-1, keepdims=True)
    return (rows @ np.swapaxes(prototypes, -1, -2)).astype(np.float32)


def _outlying(shape, offset, seed=0):
    """Cosines, and one row and one column far from the others, which keep their say."""
    scores = _cosines(shape, seed)
    scores[1] += offset
    scores[:, 2] -= 0.7 * offset
    return scores


def _log_sum_exp(x, axis):
    largest = x.max(axis=axis, keepdims=True)
    return largest + np.log(np.exp(x - largest).sum(axis=axis, keepdims=True))


def _official(scores, epsilon, num_iterations):
    """The published iterations, on logarithms in float64."""
    log_q = np.asarray(scores, np.float64) / epsilon
    for _ in range(num_iterations):
        log_q = log_q - _log_sum_exp(log_q, 0)
        log_q = log_q - _log_sum_exp(log_q, 1)
    return np.exp(log_q - _log_sum_exp(log_q, 1))


# Official values


@EITHER_DTYPE
@pytest.mark.parametrize("file", ["swav_sinkhorn_KltB", "swav_sinkhorn_KgtB"])
def test_sinkhorn_equals_the_official_code(golden, file, dtype):
    z = golden(file)
    names = [name for name in z if name.startswith("q_eps")]
    assert len(names) == 5
    with jax.enable_x64(dtype is np.float64):
        for name in names:
            epsilon, num_iterations = re.fullmatch(r"q_eps(.*)_it(.*)", name).groups()
            got = sinkhorn(
                z["scores"].astype(dtype),
                epsilon=float(epsilon),
                num_iterations=int(num_iterations),
            )
            assert got.dtype == dtype
            np.testing.assert_allclose(got, z[name], rtol=TOLERANCES[dtype])


@EITHER_DTYPE
def test_sinkhorn_of_two_ranks_equals_the_official_code(golden, dtype):
    z = golden("swav_sinkhorn_2rank")
    with jax.enable_x64(dtype is np.float64):
        shards = z["scores"].astype(dtype).reshape(2, 12, 9)
        got = jax.vmap(
            functools.partial(
                sinkhorn,
                epsilon=float(z["epsilon"]),
                num_iterations=int(z["n_iters"]),
                axis_name="data",
            ),
            axis_name="data",
        )(shards)
        np.testing.assert_allclose(
            got.reshape(24, 9), z["q"], rtol=TOLERANCES[dtype], atol=1e-30
        )


@EITHER_DTYPE
@pytest.mark.parametrize(
    "file", ["swav_loss_2crop", "swav_loss_multicrop_2g4l", "swav_loss_queue"]
)
def test_swav_equals_the_official_code(golden, file, dtype):
    z = golden(file)
    gradient_tolerance = {np.float32: 2e-4, np.float64: 1e-7}[dtype]
    options = {
        "epsilon": float(z["epsilon"]),
        "num_iterations": int(z["sinkhorn_iterations"]),
    }
    with jax.enable_x64(dtype is np.float64):

        def scores(embeddings, prototypes):
            embeddings = embeddings.reshape(-1, int(z["bs"]), prototypes.shape[1])
            lengths = jnp.linalg.norm(embeddings, axis=2, keepdims=True)
            return embeddings / lengths @ prototypes.T

        embeddings = jnp.asarray(z["z"], dtype)
        prototypes = jnp.asarray(z["prototypes_normalized"], dtype)
        queue = None
        if "queue" in z:
            queue = jnp.asarray(z["queue"], dtype) @ prototypes.T

        def loss(embeddings, prototypes):
            return swav(
                scores(embeddings, prototypes),
                queue_scores=queue,
                temperature=float(z["temperature"]),
                **options,
            )

        run = jax.jit(jax.value_and_grad(loss, (0, 1)))
        value, gradients = run(embeddings, prototypes)
        assert value.dtype == dtype
        np.testing.assert_allclose(value, z["loss"], rtol=TOLERANCES[dtype])
        for gradient, name in zip(
            gradients, ("grad_z", "grad_prototypes"), strict=True
        ):
            np.testing.assert_allclose(
                gradient,
                z[name],
                rtol=gradient_tolerance,
                atol={np.float32: 1e-6, np.float64: 1e-12}[dtype],
            )
        got = assign(scores(embeddings, prototypes)[:2], queue, **options)
        np.testing.assert_allclose(
            got, [z["q0"], z["q1"]], rtol=TOLERANCES[dtype], atol=1e-30
        )


@pytest.mark.parametrize(
    ("shape", "num_iterations", "dtype"),
    [
        *[((12, 8), n, np.float32) for n in (0, 1, 3)],
        ((12, 8), 100, np.float64),
        ((4, 9), 3, np.float32),
    ],
)
def test_every_number_of_iterations_is_the_official_one(shape, num_iterations, dtype):
    with jax.enable_x64(dtype is np.float64):
        for scores in (_cosines(shape), _outlying(shape, 3.0), _outlying(shape, -40.0)):
            for epsilon in (1.0, 0.05, 0.02):
                np.testing.assert_allclose(
                    sinkhorn(
                        scores.astype(dtype),
                        epsilon=epsilon,
                        num_iterations=num_iterations,
                    ),
                    _official(scores, epsilon, num_iterations),
                    rtol=10 * TOLERANCES[dtype],
                    atol=TOLERANCES[dtype],
                )


# Hazards


def _hazards():
    cosines = _cosines((N, K))
    signs = np.where(cosines > 0, 1, -1).astype(np.float32)
    outlier = cosines.copy()
    outlier[3, 4] = -1e4
    return {
        # What makes exp(scores / epsilon) overflow or vanish
        "logits from 0 to 4, epsilon .04": (2 + 2 * cosines, 0.04),
        "cosine 1, epsilon .01": (np.eye(N, K, dtype=np.float32), 0.01),
        "float16 cosine .6": (np.full((N, K), 0.6, np.float16), 0.05),
        "float16": (cosines.astype(np.float16), 0.05),
        "unnormalized": (300 * cosines, 0.05),
        "all -1": (-np.ones((N, K), np.float32), 0.05),
        "all -1, epsilon .01": (-np.ones((N, K), np.float32), 0.01),
        "one low outlier": (outlier, 0.05),
        "one high outlier": (-outlier, 0.05),
        "one dead prototype": (np.where(np.arange(K) == 2, -50.0, cosines), 0.05),
        "live prototypes: one": (np.where(np.arange(K) == 2, cosines, -50.0), 0.05),
        "cosines 1 and -1, epsilon .02": (signs, 0.02),
        "cosines 1 and -1, epsilon .05": (signs, 0.05),
        "equal": (np.zeros((N, K), np.float32), 0.05),
        "equal rows": (np.tile(cosines[:1], (N, 1)), 0.05),
        "N = 1": (cosines[:1], 0.05),
        "K = 1": (cosines[:, :1], 0.05),
        "N < K, dead prototypes": (_outlying((4, 40), 30.0), 0.05),
        "N < K": (_cosines((4, 300)), 0.05),
        "epsilon 1e-6": (cosines, 1e-6),
        "epsilon 1e-30": (cosines, 1e-30),
        "epsilon 1e-300": (cosines, 1e-300),
        "epsilon 1e30": (cosines, 1e30),
        "float16 max": (65504 * signs.astype(np.float16), 0.05),
        "bfloat16 max": (jnp.asarray(3.38e38 * signs, jnp.bfloat16), 0.05),
        "1e20": (1e20 * cosines, 0.05),
        "1e20, equal": (np.full((N, K), 1e20, np.float32), 0.05),
        "float32 max": (np.finfo(np.float32).max * signs, 0.05),
        "1e20, epsilon 1e-30": (1e20 * cosines, 1e-30),
        "subnormal": (1e-41 * cosines, 0.05),
    }


@functools.cache
def _balanced(num_iterations):
    """Sinkhorn, and the gradient of a weighted sum of its result."""

    @jax.jit
    def run(scores, epsilon):
        weights = jnp.cos(jnp.arange(float(scores.size))).reshape(scores.shape)

        def weighted(scores):
            assignments = sinkhorn(
                scores, epsilon=epsilon, num_iterations=num_iterations
            )
            return jnp.sum(weights * assignments), assignments

        gradient, assignments = jax.grad(weighted, has_aux=True)(scores)
        return assignments, gradient

    return run


@pytest.mark.parametrize("hazard", _hazards())
def test_sinkhorn_is_finite_for_finite_scores(hazard):
    scores, epsilon = _hazards()[hazard]
    # Elsewhere only the values, which take a fraction of the time to compile.
    with_gradient = scores.dtype == np.float32 and scores.shape == (N, K)
    for num_iterations in (0, 3):
        if with_gradient:
            assignments, gradient = _balanced(num_iterations)(scores, epsilon)
            # It is of order 1 / epsilon, which float32 has to hold.
            assert np.isfinite(gradient).all() or epsilon < 1e-38
        else:
            assignments = sinkhorn(
                scores, epsilon=epsilon, num_iterations=num_iterations
            )
        assert assignments.dtype == jnp.float32
        np.testing.assert_allclose(jnp.sum(assignments, axis=1), 1.0, rtol=1e-5)
        assert np.all(assignments >= 0)


def test_the_gradient_is_finite_at_the_ends_of_the_scaling_form():
    """Rows that sum to exp(-22) and to exp(22), and a cotangent of ordinary size."""
    scores = np.full((4, 2), 22, np.float32)
    scores[1] = -22
    cotangent = np.where(scores > 0, 100, -100) * np.float32([1, -1])
    for num_iterations in (0, 3):
        _, pull_back = jax.vjp(
            functools.partial(sinkhorn, epsilon=1.0, num_iterations=num_iterations),
            scores,
        )
        (gradient,) = pull_back(cotangent.astype(np.float32))
        assert np.isfinite(gradient).all()


@given(
    scores=hnp.arrays(
        np.float32,
        (N, K),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    exponent=st.floats(-30, 30),
)
def test_sinkhorn_is_finite_for_whatever_is_drawn(scores, exponent):
    epsilon = jnp.float32(10.0**exponent)
    assignments = jax.jit(sinkhorn)(scores, epsilon=epsilon)
    np.testing.assert_allclose(jnp.sum(assignments, axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("num_assigned", [1, 2, 3])
def test_swav_is_finite_with_finite_gradients(num_assigned):
    loss = jax.jit(
        jax.value_and_grad(functools.partial(swav, num_assigned=num_assigned))
    )
    for scale in (0.0, 1e-25, 1.0, 65504.0, 1e20):
        for array in (_cosines((3, N, K)), np.sign(_cosines((3, N, K)))):
            value, gradient = loss(np.float32(scale) * array)
            assert 0 <= value < np.inf, scale
            chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_hidden(bad):
    for num_iterations in (0, 3):
        scores = _cosines((N, K))
        scores[2, 3] = bad
        assert not np.isfinite(sinkhorn(scores, num_iterations=num_iterations)).all()
    for view in range(3):
        scores = _cosines((3, N, K))
        scores[view, 2, 3] = bad
        assert not np.isfinite(swav(scores))
    queue = _cosines((2, N, K))
    queue[1, 2, 3] = bad
    assert not np.isfinite(swav(_cosines((3, N, K)), queue_scores=queue))


# Properties


@given(
    seed=st.integers(0, 2**16),
    epsilon=st.sampled_from([1.0, 0.05, 0.01]),
    offset=st.sampled_from([0.0, 50.0]),
)
def test_rows_sum_to_one_and_the_order_does_not_matter(seed, epsilon, offset):
    scores = _outlying((N, K), offset, seed)
    run = functools.partial(jax.jit(sinkhorn), epsilon=jnp.float32(epsilon))
    assignments = run(scores)
    np.testing.assert_allclose(jnp.sum(assignments, axis=1), 1.0, rtol=1e-6)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(N), rng.permutation(K)
    np.testing.assert_allclose(
        run(scores[rows][:, columns]),
        assignments[rows][:, columns],
        rtol=1e-3,
        atol=1e-6,
    )


@given(seed=st.integers(0, 2**16), shift=st.floats(-64, 64, width=16))
def test_neither_a_constant_nor_one_scale_of_scores_and_epsilon_matters(seed, shift):
    scores = _cosines((N, K), seed)
    run = jax.jit(sinkhorn)
    expected = run(scores, epsilon=jnp.float32(0.1))
    moved = run(scores + np.float32(shift), epsilon=jnp.float32(0.1))
    np.testing.assert_allclose(moved, expected, rtol=1e-3)
    scaled = run(1000 * scores, epsilon=jnp.float32(100.0))
    np.testing.assert_allclose(scaled, expected, rtol=1e-4)


@given(seed=st.integers(0, 2**16))
def test_from_k_means_to_uniform_assignments(seed):
    scores = _cosines((N, K), seed)
    run = jax.jit(sinkhorn, static_argnames="num_iterations")
    nearest = run(scores, epsilon=jnp.float32(1e-9), num_iterations=0)
    np.testing.assert_array_equal(nearest, np.eye(K)[scores.argmax(axis=1)])
    for num_iterations in (0, 3):
        uniform = run(scores, epsilon=jnp.float32(1e9), num_iterations=num_iterations)
        np.testing.assert_allclose(uniform, 1 / K, rtol=1e-6)
    np.testing.assert_allclose(
        run(scores, epsilon=jnp.float32(0.1), num_iterations=0),
        jax.nn.softmax(scores / 0.1, axis=1),
        rtol=1e-5,
    )


@given(seed=st.integers(0, 2**16), offset=st.sampled_from([0.0, 50.0]))
def test_prototypes_get_equal_shares_at_convergence(seed, offset):
    scores = _outlying((N, K), offset, seed)
    run = jax.jit(sinkhorn, static_argnames="num_iterations")
    shares = jnp.sum(run(scores, epsilon=jnp.float32(0.2), num_iterations=500), axis=0)
    np.testing.assert_allclose(shares, N / K, rtol=1e-3)


def test_agrees_with_ott_at_convergence():
    pytest.importorskip("ott")
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as ott_sinkhorn

    # OTT itself promotes integers, and ranks.
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        scores = jnp.asarray(_cosines((N, K)), jnp.float64)
        problem = linear_problem.LinearProblem(
            geometry.Geometry(cost_matrix=-scores, epsilon=0.1)
        )
        solve = ott_sinkhorn.Sinkhorn(threshold=1e-10, max_iterations=5000)
        got = sinkhorn(scores, epsilon=0.1, num_iterations=2000)
        np.testing.assert_allclose(got / N, solve(problem).matrix, rtol=1e-6)


@pytest.mark.parametrize("views", [2, 5])
def test_collapse_is_visible(views):
    run = jax.jit(swav)
    for scale in (0.3, 1.0, 100.0):
        row = scale * _cosines((1, K))
        expected = _log_sum_exp(row / 0.1, 1)[0, 0] - row.mean() / 0.1
        value = run(np.tile(row, (views, N, 1)))
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        assert value > np.log(K)
    for constant in (0.0, 0.7, -1e8):
        value = run(np.full((views, N, K), constant, np.float32))
        np.testing.assert_allclose(value, np.log(K), rtol=1e-6)


def test_swav_is_the_mean_over_the_pairs_of_views():
    views, assigned, temperature = 5, 3, 0.2
    scores = _cosines((views, N, K))
    assignments = [_official(s, 0.05, 3) for s in scores[:assigned].astype(np.float64)]
    logits = scores.astype(np.float64) / temperature
    log_probabilities = logits - _log_sum_exp(logits, 2)
    pairs = [
        -(q * log_probabilities[v]).sum(axis=1).mean()
        for i, q in enumerate(assignments)
        for v in range(views)
        if v != i
    ]
    assert len(pairs) == assigned * (views - 1)
    got = swav(scores, num_assigned=assigned, temperature=temperature)
    np.testing.assert_allclose(got, np.mean(pairs), rtol=1e-5)


def test_the_order_of_the_batch_and_of_the_views_does_not_matter():
    scores = _cosines((4, N, K))
    value = swav(scores)
    order = np.random.default_rng(0).permutation(N)
    np.testing.assert_allclose(swav(scores[:, order]), value, rtol=1e-5)
    np.testing.assert_allclose(swav(scores[[1, 0, 3, 2]]), value, rtol=1e-5)


def test_assignments_are_balanced_together_with_the_queue():
    scores, queue = _cosines((2, N, K)), _cosines((2, 20, K), seed=1)
    for view, got in enumerate(assign(scores, queue)):
        together = np.concatenate([queue[view], scores[view]])
        np.testing.assert_allclose(got, sinkhorn(together)[20:], rtol=1e-6)
    alone = [sinkhorn(view) for view in scores]
    np.testing.assert_allclose(assign(scores), alone, rtol=1e-6)
    assert not np.allclose(assign(scores, queue), alone, rtol=0.1)


def test_swav_stops_the_gradient_at_the_assignments():
    scores, queue = jnp.asarray(_cosines((3, N, K))), jnp.asarray(_cosines((2, N, K)))
    fixed = assign(scores[:2], queue)
    of_scores, of_queue = jax.grad(
        lambda s, q: swav(s, queue_scores=q), argnums=(0, 1)
    )(scores, queue)
    np.testing.assert_allclose(
        of_scores,
        jax.grad(lambda s: swapped_cross_entropy(s, fixed))(scores),
        rtol=1e-6,
    )
    np.testing.assert_array_equal(of_queue, 0.0)
    through = jax.grad(lambda s: swapped_cross_entropy(s, assign(s[:2], queue)))(scores)
    assert not np.allclose(through, of_scores, rtol=0.1)


def test_hyper_parameters_may_be_traced():
    scores = _cosines((3, N, K))

    def loss(temperature, epsilon):
        return swav(scores, temperature=temperature, epsilon=epsilon)

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(0.2, 0.08)
    np.testing.assert_allclose(
        value, swav(scores, temperature=0.2, epsilon=0.08), rtol=1e-6
    )
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_any_float_in_float32_out(dtype):
    scores = jnp.asarray(_cosines((2, N, K)), dtype)
    value, gradient = jax.value_and_grad(swav)(scores)
    assert value.dtype == jnp.float32 and gradient.dtype == dtype
    np.testing.assert_allclose(value, swav(scores.astype(jnp.float32)), rtol=1e-6)
    assert sinkhorn(scores[0]).dtype == jnp.float32


# Gradients


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize(
    ("shape", "num_iterations"), [((5, 4), 0), ((5, 4), 3), ((3, 6), 2)]
)
def test_gradients_agree_with_finite_differences(shape, offset, num_iterations):
    with jax.enable_x64(True):
        # An offset of 600 epsilon is beyond the range of float64's exponents.
        scores = _outlying(shape, offset).astype(np.float64)
        check_grads(
            functools.partial(sinkhorn, epsilon=0.1, num_iterations=num_iterations),
            (scores,),
            order=1,
            modes=("rev",),
        )


@pytest.mark.parametrize("assigned", [1, 3])
def test_the_losses_gradients_agree_with_finite_differences(assigned):
    with jax.enable_x64(True):
        scores = _cosines((3, 4, 5)).astype(np.float64)
        queue = _cosines((assigned, 3, 5), seed=1).astype(np.float64)
        fixed = assign(scores[:assigned], queue)
        check_grads(swapped_cross_entropy, (scores, fixed), order=1, modes=("rev",))

        def differentiable(scores, queue):
            assignments = assign(scores[:assigned], queue, epsilon=0.2)
            return swapped_cross_entropy(scores, assignments, temperature=0.3)

        check_grads(differentiable, (scores, queue), order=1, modes=("rev",))


def _gradient_of_official(scores, epsilon, weights):
    """By central differences of the float64 reference."""
    gradient = np.zeros(scores.shape)
    step = 1e-4 * epsilon
    for index in np.ndindex(*scores.shape):
        moved = np.zeros(scores.shape)
        moved[index] = step
        high, low = (
            np.sum(weights * _official(scores + sign * moved, epsilon, 3))
            for sign in (1, -1)
        )
        gradient[index] = (high - low) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    "spread", [43.0, 46.0], ids=["just scaling", "just logarithms"]
)
def test_both_forms_meet_where_one_gives_way_to_the_other(spread):
    """44.4 is the range of exponents that float32 allows the scaling form."""
    scores = _cosines((N, K)).astype(np.float64)
    epsilon = (scores.max() - scores.min()) / spread
    weights = np.cos(np.arange(N * K)).reshape(N, K)

    def weighted(scores):
        assignments = sinkhorn(scores, epsilon=epsilon)
        return jnp.sum(weights.astype(np.float32) * assignments), assignments

    gradient, assignments = jax.grad(weighted, has_aux=True)(scores.astype(np.float32))
    np.testing.assert_allclose(
        assignments, _official(scores, epsilon, 3), rtol=1e-4, atol=1e-7
    )
    expected = _gradient_of_official(scores, epsilon, weights)
    np.testing.assert_allclose(
        gradient, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )


# Batches of problems


def test_vmap_equals_a_loop_with_ordinary_and_extreme_problems_together():
    cosines = _cosines((N, K))
    problems = np.stack(
        [
            cosines,
            0 * cosines,
            1e20 * cosines,
            _outlying((N, K), 60.0),
            np.finfo(np.float32).max * np.sign(cosines),
        ]
    )
    weights = np.cos(np.arange(N * K, dtype=np.float32)).reshape(N, K)

    def weighted(scores):
        assignments = sinkhorn(scores)
        return jnp.sum(weights * assignments), assignments

    run = jax.jit(jax.grad(weighted, has_aux=True))
    gradients, assignments = jax.jit(jax.vmap(jax.grad(weighted, has_aux=True)))(
        problems
    )
    for problem, gradient, assignment in zip(
        problems, gradients, assignments, strict=True
    ):
        expected_gradient, expected = run(problem)
        np.testing.assert_allclose(assignment, expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(
            gradient,
            expected_gradient,
            rtol=1e-3,
            atol=1e-5,  # of entries of order 1 / epsilon
        )
        chex.assert_tree_all_finite((gradient, assignment))


def test_vmap_of_swav_equals_a_loop():
    scores = np.stack([_cosines((3, N, K)), 1e6 * _cosines((3, N, K), seed=1)])
    run = jax.value_and_grad(swav)
    values, gradients = jax.vmap(run)(scores)
    for problem, value, gradient in zip(scores, values, gradients, strict=True):
        expected, expected_gradient = run(problem)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


# Devices


def _sinkhorn_loss(x, y, *, epsilon, axis_name=None):
    assignments = sinkhorn(x, epsilon=epsilon, axis_name=axis_name)
    return batch_mean(jnp.sum(assignments * y, axis=1), axis_name)


def _swav_loss(x, y, *, axis_name=None):
    return swav(jnp.stack([x, y, x + y]), axis_name=axis_name)


def _queue_loss(x, y, queue, *, axis_name=None):
    scores, queue = jnp.stack([x, y, x * y]), jnp.stack([queue])
    assignments = assign(scores[:1], queue, axis_name=axis_name)
    return swapped_cross_entropy(scores, assignments, axis_name=axis_name)


LOSSES = {
    "scaling, with a queue": (_queue_loss, 3),
    "logarithms": (functools.partial(_sinkhorn_loss, epsilon=0.02), 2),
    "scaling": (functools.partial(_sinkhorn_loss, epsilon=0.3), 2),
    "swav": (_swav_loss, 2),
}
# Each takes seconds to compile, with both forms and their gradients in all of them.
CASES = [(name, context) for name in LOSSES for context in CONTEXTS[1:]]
QUICK = {
    "scaling, with a queue": {
        "global view, Explicit",
        "grad of shard_map",
        "shard_map of grad, unchecked",
        "shard_map of grad, two axes",
        "vmap",
    },
    "logarithms": {"grad of shard_map", "shard_map of grad, unchecked"},
}


@pytest.mark.parametrize(
    ("name", "context"),
    [
        case
        if case[1] in QUICK.get(case[0], ())
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in CASES
    ],
)
def test_every_context_on_eight_devices(name, context):
    loss, count = LOSSES[name]
    arrays = [_cosines((16, K), seed) for seed in range(count)]
    assert_device_invariant(loss, *arrays, contexts=context, devices=8, rtol=1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
def test_the_shards_assignments_are_those_of_the_whole_batch(offset, check_vma):
    scores = _outlying((16, K), offset)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        functools.partial(sinkhorn, axis_name="data"),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P("data"),
        check_vma=check_vma,
    )
    np.testing.assert_allclose(
        jax.jit(sharded)(scores), sinkhorn(scores), rtol=1e-4, atol=1e-7
    )


def _sent(jaxpr, times=1):
    """The collectives of a program by operation and numbers, those in loops counted."""
    sent = collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.startswith(("psum", "pmax", "all_")):
            sizes = sum(variable.aval.size for variable in equation.outvars)
            sent[name.split("_")[0], sizes] += times
        repeats = times * equation.params.get("length", 1)
        branches = equation.params.get("branches")
        if branches is not None:
            sent["branches"] = tuple(
                _sent(branch.jaxpr, repeats) for branch in branches
            )
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sent.update(_sent(inner, repeats))
    return sent


@pytest.mark.parametrize("num_iterations", [0, 1, 3])
def test_an_iteration_sends_one_number_a_prototype(num_iterations):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        functools.partial(sinkhorn, num_iterations=num_iterations, axis_name="data"),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P("data"),
    )
    scores = jnp.zeros((64, 5))
    sent = _sent(jax.make_jaxpr(sharded)(scores).jaxpr)
    logarithms, scaling = sent.pop("branches")
    assert sent == {("pmax", 2): 1}
    if num_iterations == 0:
        assert not logarithms and not scaling
    else:
        assert scaling == {("psum", 5): num_iterations}
        assert logarithms == {
            ("psum", 5): num_iterations,
            ("pmax", 5): num_iterations,
        }
    text = jax.jit(sharded).lower(scores).as_text()
    reductions = re.findall(
        r'"stablehlo.all_reduce".*?\) : \(tensor<(\w+)>\) ->', text, re.DOTALL
    )
    # A loop for all the iterations but the last: once in the text, in it and after it.
    assert set(reductions) <= {"2xf32", "5xf32", "1x5xf32"}
    assert len(reductions) == 1 + 3 * min(num_iterations, 2)
    for other in ("all_gather", "all_to_all", "collective_permute"):
        assert f"stablehlo.{other}" not in text


def _primitives(jaxpr):
    """Every (primitive, shape of a result) of a program and of those inside it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield equation.primitive.name, getattr(variable.aval, "shape", ())
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)


def _log_softmax_loss(student, teacher):
    targets = jax.nn.softmax(teacher)
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(student), axis=-1))


def _forms_a_log_softmax(loss, *arrays):
    """Whether something of the shape (..., N, K) is less a logarithm (..., N, 1)."""
    program = list(_primitives(jax.make_jaxpr(loss)(*arrays).jaxpr))
    logarithms = [shape for name, shape in program if name == "log"]
    assert logarithms
    return any(shape[-1:] == (1,) or shape[-1:] == (K,) for shape in logarithms)


def test_the_students_logarithms_of_probabilities_are_never_formed():
    rows, views = jnp.zeros((N, K)), jnp.zeros((4, N, K))
    assert _forms_a_log_softmax(_log_softmax_loss, rows, rows)
    assert not _forms_a_log_softmax(losses.cross_entropy, rows, rows)
    assert not _forms_a_log_softmax(losses.dino, views, views[:2], rows[0])
    fixed = jnp.zeros((2, N, K))
    assert not _forms_a_log_softmax(swapped_cross_entropy, views, fixed)
    text = jax.jit(swav).lower(jnp.zeros((6, 16, 32))).as_text()
    assert "tensor<2x6x16x32" not in text and "tensor<2x5x16x32" not in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_products_are_exact_where_lowered_for_accelerators(platform):
    step = jax.jit(jax.grad(lambda s: jnp.sum(jnp.square(sinkhorn(s)))))
    scores = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    text = str(jax.export.export(step, platforms=[platform])(scores).mlir_module())
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    for line in products:
        assert "precision = [HIGHEST, HIGHEST]" in line


# Refusals


def _refused(message, function, *arguments, **keywords):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **keywords)


def test_refused_shapes():
    good = jnp.ones((3, 4, 5))
    for bad in (jnp.ones(4), good, jnp.ones((4, 5), int), jnp.ones((4, 0))):
        _refused("scores: got", sinkhorn, bad)
    _refused("scores: got list, expected an array", sinkhorn, [[1.0]])
    _refused("scores: got .*expected", sinkhorn, jnp.ones((0, 5)))
    _refused(r"scores: got shape \(4, 5\), expected \(V, N, K\)", swav, good[0])
    _refused("scores: got .*, expected V >= 2", swav, good[:1])
    for bad in (good[:1], good, good[0], good[:2, :, :4], good[:2, :0]):
        _refused("queue_scores: got", swav, good, queue_scores=bad)
    _refused("queue_scores: got", assign, good[:2], good)
    for bad in (good[:, :3], good[:, :, :3], good[0], jnp.ones((4, 4, 5))):
        _refused("got .*expected", swapped_cross_entropy, good, bad)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", -0.05),
        ("epsilon", float("nan")),
        ("epsilon", float("inf")),
        ("num_iterations", -1),
        ("num_iterations", 3.0),
        ("num_iterations", True),
        ("num_iterations", "3"),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("num_assigned", 0),
        ("num_assigned", 4),
        ("num_assigned", 2.0),
    ],
)
def test_refused_hyper_parameters(argument, value):
    scores = jnp.ones((3, 4, 5))
    message = f"{argument}: got .*, expected"
    _refused(message, swav, scores, **{argument: value})
    if argument in ("epsilon", "num_iterations"):
        _refused(message, sinkhorn, scores[0], **{argument: value})
        _refused(message, assign, scores, **{argument: value})
    if argument == "temperature":
        _refused(message, swapped_cross_entropy, scores, scores, temperature=value)


def test_one_example_and_one_prototype_are_allowed():
    np.testing.assert_allclose(sinkhorn(jnp.zeros((1, 4))), 0.25)
    np.testing.assert_allclose(sinkhorn(jnp.ones((3, 1))), 1.0)
    np.testing.assert_allclose(swav(jnp.zeros((2, 1, 4))), np.log(4), rtol=1e-6)
