import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jemjax.evaluation import effective_rank, normalized_std, rankme

FIGURES = [effective_rank, normalized_std, rankme]


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-3), (True, 1e-6)])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_rankme_equals_the_reference(golden, index, x64, tolerance):
    z = golden("rankme")
    with jax.enable_x64(x64):
        embeddings = z[f"z{index}"].astype(np.float64 if x64 else np.float32)
        np.testing.assert_allclose(
            rankme(embeddings, eps=1e-5), z[f"rankme_eps1e-5_{index}"], rtol=tolerance
        )
        np.testing.assert_allclose(
            rankme(embeddings), z[f"rankme_paper_eps1e-7_{index}_own"], rtol=tolerance
        )


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_effective_rank_from_the_covariance(shape):
    h = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1)
    eigenvalues = np.linalg.eigvalsh(np.cov(h.T)).clip(0)
    q = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    expected = np.exp(-np.sum(q * np.log(q)))
    np.testing.assert_allclose(effective_rank(h.astype(np.float32)), expected, 1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_equal_eigenvalues(rank):
    # Every sign pattern of the first `rank` dimensions once: a cube around (1, 1, ...).
    signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * rank), -1).reshape(-1, rank)
    h = 1 + np.pad(signs, ((0, 0), (0, 10 - rank))).astype(np.float32)
    np.testing.assert_allclose(effective_rank(h), rank, rtol=1e-4)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), log_scale=st.integers(-10, 10))
def test_the_scale_does_not_count(seed, log_scale):
    h = np.random.default_rng(seed).normal(size=(24, 6)).astype(np.float32) + 1
    for figure in FIGURES:
        np.testing.assert_allclose(figure(h * 10.0**log_scale), figure(h), rtol=1e-3)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_the_bounds(seed):
    h = np.random.default_rng(seed).normal(size=(24, 6)).astype(np.float32)
    assert 1 <= effective_rank(h) <= 6.001
    assert 0.9 <= rankme(h) <= 6.01
    assert 0 < normalized_std(h) <= 1.001 / np.sqrt(6)


def test_even_embeddings_have_the_ideal_std(key):
    h = jax.random.normal(key, (4000, 16))
    np.testing.assert_allclose(normalized_std(h), 1 / 4, rtol=1e-2)


@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
@pytest.mark.parametrize("value", [0.0, 0.1, 3e38, 1e-40])
def test_complete_collapse(shape, value):
    h = jnp.full(shape, value, jnp.float32)
    assert float(normalized_std(h)) <= 1e-6
    assert float(effective_rank(h)) == 1.0
    np.testing.assert_allclose(rankme(h), 1, atol=1e-3)


@pytest.mark.parametrize("rows", ["zeros", "constant", "one-hot", "some zeros"])
def test_the_gradient_of_the_std_is_finite(rows):
    h = {
        "zeros": np.zeros((8, 4)),
        "constant": np.full((8, 4), 0.1),
        "one-hot": np.tile(np.eye(4), (2, 1)),
        "some zeros": np.eye(8, 4),
    }[rows]
    gradient = jax.grad(normalized_std)(jnp.asarray(h, jnp.float32))
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_gradient_of_the_std_equals_differences(one_hot):
    h = np.random.default_rng(0).normal(size=(6, 3))
    h = np.tile(np.eye(3), (2, 1)) if one_hot else h
    with jax.enable_x64(True):
        check_grads(normalized_std, (jnp.asarray(h),), order=1, modes=["rev"])


def test_the_std_of_a_sharded_batch(key):
    h = jax.random.normal(key, (64, 8))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(h, NamedSharding(mesh, PartitionSpec("data")))
    got = jax.jit(lambda x: normalized_std(2 * x))(sharded)
    np.testing.assert_allclose(got, normalized_std(h), rtol=1e-5)


@pytest.mark.parametrize("figure", FIGURES)
def test_dimensional_collapse_is_visible(figure, key):
    h = jax.random.normal(key, (100, 16))
    line = h[:, :1] * jnp.ones((1, 16))
    full, collapsed = float(figure(h)), float(figure(line))
    if figure is normalized_std:
        # It does not see this: the two ends of a line are apart.
        np.testing.assert_allclose(collapsed, full, rtol=0.05)
    else:
        np.testing.assert_allclose(collapsed, 1, atol=1e-2)
        assert full > 12


@pytest.mark.parametrize("figure", FIGURES)
def test_what_is_not_finite_is_not_hidden(figure):
    h = np.eye(4, dtype=np.float32)
    h[0, 1] = np.nan
    assert not np.isfinite(figure(h))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("figure", FIGURES)
def test_low_precision_is_computed_in_float32(figure, dtype, key):
    h = (300 * jax.random.normal(key, (20, 6))).astype(dtype)
    got = figure(h)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, figure(h.astype(jnp.float32)), rtol=1e-6)


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize(
    "embeddings",
    [np.zeros(4, np.float32), np.zeros((4, 2), np.int32), np.zeros((0, 2), np.float32)],
    ids=["rank", "integers", "empty"],
)
def test_refusals(figure, embeddings):
    with pytest.raises(ValueError, match="embeddings: got"):
        figure(embeddings)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_rankme_needs_a_positive_eps(eps):
    with pytest.raises(ValueError, match="eps: got"):
        rankme(np.eye(3, dtype=np.float32), eps=eps)
