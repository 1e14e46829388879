"""The same value and gradients on any number of devices, in every context."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from losses.table import NATURAL, TABLE

from jemjax import losses
from jemjax.losses import contrastive, distillation
from jemjax.testing import CONTEXTS, assert_device_invariant

# Below and above D, and a D that no number of devices divides.
WIDE, TALL = (16, 42), (48, 10)
# Those in which a gradient is left for the caller to reduce.
UNREDUCED = ("vmap", "pmap", "shard_map of grad, unchecked")


def _random(shape, seed):
    random = np.random.default_rng(seed).standard_normal(shape)
    return (0.7 * random + 0.3).astype(np.float32)


def _check(name, shape, **keywords):
    arrays = [_random(shape, seed) for seed in range(TABLE[name].count)]
    assert_device_invariant(TABLE[name].function, *arrays, **keywords)


def _check_natural(name, **keywords):
    loss, shapes, promises = NATURAL[name]
    arrays = [_random(shape, seed) for seed, shape in enumerate(shapes)]
    batch_axes = promises["batch_axes"]
    assert_device_invariant(loss, *arrays, batch_axes=batch_axes, **keywords)


FULL = [
    ("vicreg", WIDE),
    ("vicreg", TALL),
    ("barlow_twins", WIDE),
    ("info_nce, both sides", WIDE),
]


@pytest.mark.parametrize(("name", "shape"), FULL, ids=str)
def test_every_context_on_eight_devices(name, shape):
    # Not bare: there each operation is compiled by itself.
    _check(name, shape, contexts=CONTEXTS[1:], devices=8)


@pytest.mark.parametrize("name", sorted(set(TABLE) - {name for name, _ in FULL}))
def test_the_others_on_eight_devices(name):
    contexts = ("shard_map of grad, unchecked", "grad of shard_map, Explicit")
    _check(name, WIDE, contexts=contexts, devices=8)


@pytest.mark.parametrize("name", NATURAL)
def test_arrays_of_other_axes_on_eight_devices(name):
    contexts = ("shard_map of grad", "global view, Explicit", "vmap")
    _check_natural(name, contexts=contexts, devices=8)


@pytest.mark.parametrize("name", ["dino", "swav"])
def test_gradients_made_block_by_block(monkeypatch, name):
    monkeypatch.setattr(distillation, "_BLOCK", 1)  # a row: a device has two here
    contexts = ("shard_map of grad", "grad of shard_map, Explicit", "vmap")
    _check_natural(name, contexts=contexts, devices=8)


def _scanned(function):
    """As the step of a loop."""

    def run(*arrays):
        return jax.lax.scan(lambda *_: (None, function(*arrays)), None, None, 1)[1][0]

    return run


def _chosen(function):
    return lambda *arrays: jax.lax.cond(True, function, function, *arrays)


THROUGH = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": _scanned,
    "cond": _chosen,
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("name", NATURAL)
def test_gradients_through_other_transformations(name, through, axis_type):
    """Of two axes, inside and outside of `shard_map`; to trace them is enough."""
    loss, shapes, promises = NATURAL[name]
    axes = promises["batch_axes"]
    axes = (axes,) * len(shapes) if isinstance(axes, int) else axes
    names = ("replica", "data")
    specs = tuple(
        jax.P() if axis is None else jax.P(*[None] * axis, names) for axis in axes
    )
    mesh = jax.make_mesh((2, 4), names, axis_types=(axis_type,) * 2)
    shard_map = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs)
    function = THROUGH[through](functools.partial(loss, axis_name=names))
    arrays = [
        jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
        )
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    inside = shard_map(jax.grad(function), out_specs=specs[0])
    outside = jax.grad(shard_map(function, out_specs=jax.P()))
    for gradient in (inside, outside):
        assert jax.eval_shape(gradient, *arrays).shape == shapes[0]


def test_a_queue_read_block_by_block(monkeypatch):
    monkeypatch.setattr(contrastive, "_BLOCK", 1)  # a key
    contexts = ("shard_map of grad", "grad of shard_map, Explicit", "vmap")
    _check("info_nce, queue", WIDE, contexts=contexts, devices=8)


def test_blocks_leave_float16_gradients_to_the_loss_scale(monkeypatch):
    stacked = jnp.asarray(_random((1, 2, 4, 50), 0), jnp.float16)  # (shard, V, N, K)

    def scaled(student):
        teacher, center = stacked[0], jnp.zeros(50)
        return 2.0**13 * losses.dino(student, teacher, center, axis_name="data")

    def gradient():
        return jax.vmap(jax.grad(scaled), axis_name="data")(stacked)

    whole = gradient()
    monkeypatch.setattr(distillation, "_BLOCK", 1)
    np.testing.assert_array_equal(gradient(), whole)


# As many rows as columns at most, and more; the widths are odd.
@pytest.mark.slow
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "tall"])
@pytest.mark.parametrize("name", TABLE)
def test_the_whole_matrix(name, wide):
    rows = st.sampled_from([8, 16, 24, 48])
    shapes = rows.flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.integers(n // 2, 32) if wide else st.integers(1, n // 2 - 1),
        )
    ).map(lambda shape: (shape[0], 2 * shape[1] + 1))

    @settings(max_examples=2, derandomize=True, database=None)
    @given(shape=shapes)
    def check(shape):
        _check(name, shape)
        jax.clear_caches()

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", NATURAL)
def test_the_whole_matrix_of_other_axes(name):
    _check_natural(name)


@pytest.mark.parametrize("context", [*UNREDUCED, "shard_map of grad"])
def test_without_the_mean_a_gradient_is_one_shards_part(context):
    """What the docstring of `losses` says is needed, and where it is not."""
    rows = [_random((16, 6), seed) for seed in range(2)]
    weights = _random((6, 4), 2)

    def loss(weights, x, y, **keywords):
        return losses.vicreg(x @ weights, y @ weights, **keywords)

    def of_a_shard(x, y):
        run = jax.grad(functools.partial(loss, axis_name="data"), (0, 1))
        of_weights, of_rows = run(weights, x, y)
        return of_weights, jax.lax.pmean(of_weights, "data"), of_rows

    def vmap(function, axis_name):
        return jax.jit(jax.vmap(function, axis_name=axis_name))

    if context in ("vmap", "pmap"):
        run = vmap if context == "vmap" else jax.pmap
        shards = [array.reshape(8, 2, 6) for array in rows]
        alone, mean, of_rows = run(of_a_shard, axis_name="data")(*shards)
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharded = jax.shard_map(
            lambda x, y: jax.tree.map(lambda a: a[None], of_a_shard(x, y)),
            mesh=mesh,
            in_specs=jax.P("data"),
            out_specs=jax.P("data"),
            check_vma=context not in UNREDUCED,
        )
        alone, mean, of_rows = jax.jit(sharded)(*rows)

    expected, expected_of_rows = jax.jit(jax.grad(loss, (0, 1)))(weights, *rows)
    close = functools.partial(np.allclose, rtol=1e-4, atol=1e-5)
    assert all(close(gradient, expected) for gradient in mean)
    reduced = context not in UNREDUCED
    assert all(close(gradient, expected) == reduced for gradient in alone)
    factor = 1 if reduced else 8
    assert close(of_rows.reshape(16, 6), factor * expected_of_rows)


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
