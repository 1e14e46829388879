"""Settings and transformations that other projects use the losses under."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from losses.table import NATURAL, TABLE

from jemjax import losses
from jemjax.losses import clustering, contrastive, covariance, distillation
from jemjax.losses.collectives import is_local


def _random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# A batch of unknown size


@pytest.mark.parametrize("constraints", [(), ("b >= 16",)], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_a_symbolic_batch_is_traced(name, constraints):
    loss = TABLE[name]
    (batch,) = jax.export.symbolic_shape("b", constraints=constraints)
    rows = jax.ShapeDtypeStruct((batch, 6), jnp.float32)
    run = jax.value_and_grad(loss.function, tuple(range(loss.count)))
    _, gradients = jax.eval_shape(run, *[rows] * loss.count)
    assert {gradient.shape for gradient in gradients} == {(batch, 6)}


@pytest.mark.parametrize("name", ["vicreg", "barlow_twins", "nt_xent", "dino"])
def test_an_exported_loss_takes_any_batch(name):
    loss = TABLE[name]
    run = jax.jit(jax.value_and_grad(loss.function, tuple(range(loss.count))))
    rows = jax.ShapeDtypeStruct((jax.export.symbolic_shape("b")[0], 6), jnp.float32)
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(run, platforms=platforms)(*[rows] * loss.count)
    arrays = [_random((3, 6), seed) for seed in range(loss.count)]
    expected = jax.tree.leaves(run(*arrays))
    for got, leaf in zip(
        jax.tree.leaves(exported.call(*arrays)), expected, strict=True
    ):
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-6)


# No infinity is made and discarded


def _cold(x, y):
    return losses.nt_xent(x, y, temperature=0.01)


def _target(x):
    target = losses.data2vec_target(x.reshape(1, 2, 2, -1), stop_gradient=False)
    return jnp.sum(jnp.square(target))


@pytest.mark.parametrize(
    "loss",
    [losses.covariance_penalty, losses.variance_hinge, losses.nt_xent, _cold, _target],
    ids=lambda loss: loss.__name__,
)
def test_no_infinity_is_made_on_purpose(loss):
    count = 2 if loss in (losses.nt_xent, _cold) else 1
    arrays = [jnp.asarray(_random((4, 6), seed)) for seed in range(count)]
    with jax.debug_infs(True), jax.debug_nans(True):
        jax.value_and_grad(loss)(*arrays)


# Forms of little memory


def test_what_is_on_one_device_may_be_cut():
    assert jax.device_count() == 8
    rows = jnp.zeros((8, 3))
    auto = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(rows, NamedSharding(auto, jax.P("data")))

    def seen(array):
        result = []
        jax.jit(lambda a: result.append(is_local(jnp.sin(a), None))).lower(array)
        return result[0]

    assert is_local(rows, None) and seen(rows)
    assert not is_local(sharded, None) and not seen(sharded)
    with jax.set_mesh(auto):
        assert not is_local(rows, None) and not seen(rows)
    inside = []
    jax.eval_shape(
        jax.shard_map(
            lambda a: inside.append(is_local(a, "data")) or a,
            mesh=auto,
            in_specs=jax.P("data"),
            out_specs=jax.P("data"),
        ),
        sharded,
    )
    assert inside == [True]


@pytest.mark.parametrize("name", ["dino", "swav"])
def test_a_gradient_outside_of_jit_compiles_once(monkeypatch, name):
    traced = []
    computed = distillation._sum_and_gradient

    def counted(*arrays):
        traced.append(1)
        return computed(*arrays)

    # A size of block that no other test has compiled for.
    monkeypatch.setattr(distillation, "_BLOCK", 80)
    monkeypatch.setattr(distillation, "_sum_and_gradient", counted)
    loss, shapes, _ = NATURAL[name]
    arrays = [jnp.asarray(_random(shape)) for shape in shapes]
    jax.grad(loss)(*arrays)
    assert len(traced) == 1
    jax.grad(loss)(*arrays)
    assert len(traced) == 1


NUMBERS = {
    "Python": float,
    "NumPy": np.float32,
    "array of NumPy": np.array,
    "array": jnp.asarray,
    "float16": jnp.float16,
}


COMPILED = {
    "sinkhorn": (clustering, "_by_scaling", clustering._assignments),
    "info_nce": (contrastive, "row_products", contrastive._log_others_and_mean_key),
    "dino": (distillation, "_sum_and_gradient", distillation._in_blocks),
}


@pytest.mark.parametrize("name", COMPILED)
def test_numbers_of_any_kind_compile_once(monkeypatch, name):
    monkeypatch.setattr(distillation, "_BLOCK", 88)
    module, traced, program = COMPILED[name]
    original, traces = getattr(module, traced), []

    def counted(*arguments, **keywords):
        traces.append(1)
        return original(*arguments, **keywords)

    x, y, queue = map(jnp.asarray, _random((3, 8, 6)))
    views = jnp.stack([x, y])

    def gradient(number):
        return jax.grad(losses.dino)(views, views, x[0], student_temperature=number)

    calls = {
        "sinkhorn": lambda number: losses.sinkhorn(x, epsilon=number),
        "info_nce": lambda number: losses.info_nce(x, y, queue, temperature=number),
        "dino": gradient,
    }
    program.clear_cache()
    monkeypatch.setattr(module, traced, counted)
    made, counts = [], []
    for kind in NUMBERS.values():
        made.append(calls[name](kind(0.25)))
        counts.append(len(traces))
    assert counts[0] > 0 and set(counts) == {counts[0]}
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])


def _numbers_of(name):
    """The hyper-parameters of a loss of the table that are numbers, and defaults."""
    function = TABLE[name].function
    given = getattr(function, "keywords", {})
    function = getattr(function, "func", function)
    if not TABLE[name].direct:
        function = getattr(losses, name.split(",")[0])
    return {
        key: parameter.default
        for key, parameter in inspect.signature(function).parameters.items()
        if isinstance(parameter.default, float) and key not in given
    }


FAST = ("vicreg", "swav", "dino", "nt_xent", "info_nce, queue")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in TABLE
        if _numbers_of(name)
    ],
)
def test_vmap_over_hyper_parameters(name):
    loss, numbers = TABLE[name], _numbers_of(name)
    arrays = [_random((8, 6), seed) for seed in range(loss.count)]

    def run(hyper):
        return jax.value_and_grad(
            lambda x, hyper: loss.function(x, *arrays[1:], **hyper), (0, 1)
        )(arrays[0], hyper)

    sets = [{key: scale * n for key, n in numbers.items()} for scale in (0.7, 1.6)]
    stacked = jax.tree.map(lambda *each: jnp.array(each), *sets)
    together, one = jax.jit(jax.vmap(run))(stacked), jax.jit(run)
    for index, hyper in enumerate(sets):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=index: leaf[i], together),
            one(jax.tree.map(jnp.float32, hyper)),
            rtol=1e-4,
            atol=1e-5,
        )


# A third axis of a mesh


@pytest.mark.parametrize("rows", [None, ("a", "b")])
@pytest.mark.parametrize("spread", [0.1, 100.0])
def test_prototypes_over_an_axis_of_an_explicit_mesh(rows, spread):
    """Of a small range, and of one that is computed from logarithms."""
    mesh = jax.make_mesh(
        (2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Explicit,) * 3
    )
    scores, queue = spread * _random((2, 8, 6)), spread * _random((2, 4, 6), 1)
    run = jax.value_and_grad(
        lambda scores, queue: (
            losses.swav(scores, queue_scores=queue)
            + jnp.sum(jnp.square(losses.sinkhorn(scores[0])))
        )
    )
    value, gradient = jax.jit(run)(scores, queue)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, jax.P(None, rows, "c"))
        placed = [jax.device_put(array, place) for array in (scores, queue)]
        got, of_scores = jax.device_get(jax.jit(run)(*placed))
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(of_scores, gradient, atol=1e-5 * np.abs(gradient).max())


# Where views agree


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("teachers", [2, 3, 4, 5])
def test_the_gradient_is_zero_where_student_and_teacher_are_certain(teachers, outputs):
    views, rows = 5, 7
    student = np.zeros((views, rows, outputs), np.float32)
    student[..., outputs // 2] = 40.0 + np.arange(rows)
    teacher, center = student[:teachers], np.zeros(outputs, np.float32)

    @jax.jit
    def run(student, temperature):
        def loss(student):
            of_views = losses.dino(
                student, teacher, center, student_temperature=temperature
            )
            return of_views + losses.cross_entropy(
                student[0], teacher[0], student_temperature=temperature
            )

        return jax.value_and_grad(loss)(student)

    for temperature in (0.07, 0.1, 0.13, 0.3):
        value, gradient = run(student, temperature)
        assert value == 0 and not np.any(gradient)


# Where one form gives way to another


@pytest.mark.parametrize("rows", [11, 12])
@pytest.mark.parametrize("name", ["vicreg", "lecture_energy", "barlow_twins"])
def test_forms_agree_on_both_sides_of_the_switch(monkeypatch, name, rows):
    assert covariance.cheapest_form(rows, 16, 1) == ("gather", "sum")[rows - 11]
    run = functools.partial(jax.value_and_grad, argnums=(0, 1))
    arrays = [_random((rows, 16), seed) for seed in range(2)]
    results = []
    for form in ("gather", "sum"):
        monkeypatch.setattr(covariance, "cheapest_form", lambda *_, form=form: form)
        value, gradients = jax.jit(run(getattr(losses, name)))(*arrays)
        results.append((value, np.stack(gradients)))
    for by_examples, by_features in zip(*results, strict=True):
        scale = np.abs(by_features).max()
        np.testing.assert_allclose(by_examples, by_features, atol=2e-6 * scale, rtol=0)


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("name", ["vicreg", "lecture_energy", "barlow_twins"])
def test_forms_agree_over_an_axis(monkeypatch, name, rows):
    """Of two shards: the rows of all are gathered, exchanged for columns, or summed."""
    arrays = [_random((2, rows, 16), seed) for seed in range(2)]
    shard = jax.value_and_grad(
        functools.partial(getattr(losses, name), axis_name="data"), (0, 1)
    )
    results = []
    for form in ("gather", "all_to_all", "sum"):
        monkeypatch.setattr(covariance, "cheapest_form", lambda *_, form=form: form)
        run = jax.jit(jax.vmap(shard, axis_name="data"))
        value, gradients = run(*arrays)
        results.append((value, np.stack(gradients)))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            scale = np.abs(expected).max()
            np.testing.assert_allclose(got, expected, atol=3e-6 * scale, rtol=0)
