"""Every figure under JAX's settings, on Explicit meshes, and of what users pass."""

import chex
import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.table import CALLS, labels_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jemjax import evaluation
from jemjax.evaluation import collapse, knn, knn_accuracy, linear_probe
from jemjax.evaluation.linear_probe import _fit

EACH = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def h():
    return jax.random.normal(jax.random.key(2), (8, 4))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@EACH
def test_traced_under_every_setting(name, dtype, h):
    with flags.all_of(flags.TRACED):
        jax.eval_shape(CALLS[name], h.astype(dtype))


@pytest.mark.slow
@EACH
def test_run_operation_by_operation(name, h):
    with flags.all_of(flags.BARE):
        made = CALLS[name](h)
    chex.assert_trees_all_close(made, CALLS[name](h), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("setting", flags.COMPILED)
@EACH
def test_compiled_under_every_setting(name, setting, h):
    expected = CALLS[name](h)
    call = jax.jit(CALLS[name]) if setting == "transfer guard" else CALLS[name]
    with flags.COMPILED[setting]():
        made = call(h)
    chex.assert_trees_all_close(made, expected, atol=1e-4)


def test_what_lies_on_the_device_is_not_transferred(h):
    labels = labels_of(h)
    with jax.transfer_guard("disallow"):
        evaluation.effective_rank(h)
        evaluation.rankme(h)
        knn_accuracy(h, labels, h, labels, k=2, num_classes=3)
        linear_probe(h, labels, h, labels, max_iterations=3)
        evaluation.cluster_accuracy(labels, labels)


@EACH
def test_an_explicit_mesh(name, h):
    expected = CALLS[name](h)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        made = jax.device_get(CALLS[name](jax.device_put(h, rows)))
    chex.assert_trees_all_close(made, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_gradient_of_the_effective_rank_is_finite(rank, shape, key):
    left, right = jax.random.split(key)
    h = jax.random.normal(left, (shape[0], rank)) @ jax.random.normal(
        right, (rank, shape[1])
    )
    with flags.all_of(
        {name: flags.BARE[name] for name in ("debug_nans", "debug_infs")}
    ):
        gradient = jax.grad(evaluation.effective_rank)(h)
    assert jnp.isfinite(gradient).all()


def test_the_gradient_of_the_effective_rank_equals_differences(h):
    with jax.enable_x64(True):
        h = jnp.asarray(h, jnp.float64)
        jax.test_util.check_grads(evaluation.effective_rank, (h,), 1, modes=["rev"])


NUMBERS = {
    "Python": float,
    "NumPy": np.float64,
    "array of NumPy": np.array,
    "array": jnp.asarray,
    "float16": jnp.float16,
}


@pytest.mark.parametrize("x64", [False, True])
def test_numbers_of_any_kind_compile_once(x64, h):
    labels = labels_of(h)
    # optax.lbfgs keeps some of its memory in float64 with x64, whatever the parameters.
    promotion = "standard" if x64 else "strict"
    with jax.enable_x64(x64), jax.numpy_dtype_promotion(promotion):
        for program in (collapse._rankme, knn._votes, _fit):
            program.clear_cache()
        for kind in NUMBERS.values():
            figures = (
                evaluation.rankme(h, eps=kind(0.25)),
                evaluation.knn_predict(
                    h, labels, h, k=np.int64(2), temperature=kind(0.5), num_classes=3
                ),
                linear_probe(h, labels, h, labels, l2=kind(0.5), max_iterations=3),
            )
        assert evaluation.rankme(h, eps=1) > 0
        for program in (collapse._rankme, knn._votes, _fit):
            assert program._cache_size() == 1
    assert figures[0].dtype == figures[1].dtype == jnp.float32


def test_numbers_may_be_traced(h):
    labels = labels_of(h)

    @jax.jit
    def figures(h, labels, number):
        neighbors = knn_accuracy(
            h, labels, h, labels, k=2, temperature=number, num_classes=3
        )
        linear = linear_probe(
            h, labels, h, labels, num_classes=3, l2=number, max_iterations=3
        )
        return neighbors, linear, evaluation.rankme(h, eps=number)

    expected = (
        knn_accuracy(h, labels, h, labels, k=2, temperature=0.5, num_classes=3),
        linear_probe(h, labels, h, labels, l2=0.5, max_iterations=3),
        evaluation.rankme(h, eps=0.5),
    )
    chex.assert_trees_all_close(figures(h, labels, 0.5), expected, atol=1e-5)


def test_what_must_not_be_traced_is_named(h):
    labels = labels_of(h)
    calls = {
        "num_classes": lambda n, y: linear_probe(h, y, h, y),
        "num_classes ": lambda n, y: votes_of(y, num_classes=n),
        "k": lambda n, y: votes_of(y, k=n),
        "max_iterations": lambda n, y: linear_probe(
            h, labels, h, labels, max_iterations=n
        ),
        "assignments": lambda n, y: evaluation.cluster_accuracy(y, y),
        "labels": lambda n, y: evaluation.few_labels(y, 1, 0),
        "scores": lambda n, y: evaluation.label_clusters(h + n, labels),
    }

    def votes_of(y, k=2, num_classes=3):
        return evaluation.knn_predict(h, y, h, k=k, num_classes=num_classes)

    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name.strip()}: got .*, expected"):
            jax.jit(call)(2, labels)
