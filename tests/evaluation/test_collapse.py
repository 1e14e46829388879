import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jemjax.evaluation import (
    alpha_req,
    effective_rank,
    name_collapse,
    normalized_std,
    rankme,
)

FIGURES = [effective_rank, normalized_std, rankme, alpha_req]


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


def with_spectrum(eigenvalues, rows, seed=0):
    """Embeddings (N, D) of which the covariance has just these eigenvalues."""
    generator = np.random.default_rng(seed)
    dimension = len(eigenvalues)
    h = generator.normal(size=(rows, dimension))
    uncorrelated, _ = np.linalg.qr(h - h.mean(axis=0))
    rotation, _ = np.linalg.qr(generator.normal(size=(dimension, dimension)))
    return ((uncorrelated * np.sqrt(eigenvalues)) @ rotation + 0.1).astype(np.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_alpha_of_a_power_law(alpha):
    h = with_spectrum(np.arange(1.0, 25) ** -alpha, 40)
    np.testing.assert_allclose(alpha_req(h), alpha, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_alpha_is_the_slope_of_a_line(shape):
    h = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1)
    count = min(shape[1], shape[0] - 1)
    eigenvalues = np.linalg.eigvalsh(np.cov(h.T))[::-1][:count]
    slope, _ = np.polyfit(np.log(np.arange(1, count + 1)), np.log(eigenvalues), 1)
    np.testing.assert_allclose(alpha_req(h.astype(np.float32)), -slope, rtol=1e-4)


def test_alpha_leaves_out_dimensions_that_are_not_filled():
    # As rounding leaves them, and not exactly zero.
    h = with_spectrum(np.append(np.arange(1.0, 11) ** -1.5, np.zeros(22)), 64)
    np.testing.assert_allclose(alpha_req(h), 1.5, atol=1e-4)


def test_small_eigenvalues_count_to_the_precision_of_the_embeddings():
    # Of the covariance itself, in float32, the last would be lost.
    h = with_spectrum(np.array([1, 1e-9]), 40)
    np.testing.assert_allclose(alpha_req(h), 9 / np.log10(2), rtol=2e-2)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), alpha=st.floats(0.1, 3), offset=st.floats(-9, 9))
def test_alpha_sees_neither_rotation_nor_offset(seed, alpha, offset):
    h = with_spectrum(np.arange(1.0, 9) ** -alpha, 24, seed) + np.float32(offset)
    np.testing.assert_allclose(alpha_req(h), alpha, atol=1e-3)


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
    assert alpha_req(h) > 0


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
    assert float(alpha_req(h)) == 0.0


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
    elif figure is alpha_req:
        # Nor does it see this: one eigenvalue is no line.
        assert collapsed == 0
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


def names(h):
    return name_collapse(
        normalized_std=normalized_std(h),
        effective_rank=effective_rank(h),
        dimension=h.shape[1],
    )


@pytest.mark.parametrize("dimension", [2, 8, 128])
def test_embeddings_that_fill_the_space_have_not_collapsed(dimension, key):
    assert names(jax.random.normal(key, (500, dimension))) == []


@pytest.mark.parametrize("noise", [0.0, 1e-2])
def test_complete_collapse_is_named(noise, key):
    # Rows of length sqrt(128): the noise is that of normalized rows times this.
    assert names(1 + noise * jax.random.normal(key, (200, 128))) == [
        "type 1: every image has nearly the same embedding (normalized std"
        f" {noise / np.sqrt(128):.4f}, ideal 0.0884)"
    ]


@pytest.mark.parametrize("dimension", [2, 8, 128])
def test_informational_collapse_is_named(dimension, key):
    line = jax.random.normal(key, (200, 1)) * jnp.ones((1, dimension))
    assert names(line) == [
        "type 2: the embeddings fill few dimensions (effective rank 1.0 of"
        f" {dimension})"
    ]


def test_classes_that_are_points_have_not_collapsed():
    h = jnp.repeat(jnp.eye(10, 64), 20, axis=0)
    assert names(h) == []
    assert len(names(h.at[20:].set(0.0))) == 1


@settings(max_examples=50)
@given(
    share=st.floats(0, 1),
    rank=st.floats(1, 2000),
    dimension=st.integers(1, 2000),
)
def test_at_most_one_collapse_is_named(share, rank, dimension):
    sentences = name_collapse(
        normalized_std=share / np.sqrt(dimension),
        effective_rank=min(rank, dimension),
        dimension=dimension,
    )
    assert len(sentences) <= 1
    if share > 0.06 and rank >= 2:
        assert sentences == []
    if share < 0.04:
        assert sentences[0].startswith("type 1")
    elif share > 0.06 and rank < 2 and dimension > 40:
        assert sentences[0].startswith("type 2")


def test_figures_that_are_not_finite_are_not_hidden():
    (sentence,) = name_collapse(
        normalized_std=float("nan"), effective_rank=9.0, dimension=16
    )
    assert "not finite (normalized std nan, effective rank 9)" in sentence


def test_a_dimension_is_at_least_one():
    with pytest.raises(ValueError, match="dimension: got 0"):
        name_collapse(normalized_std=0.1, effective_rank=1.0, dimension=0)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_rankme_needs_a_positive_eps(eps):
    with pytest.raises(ValueError, match="eps: got"):
        rankme(np.eye(3, dtype=np.float32), eps=eps)
