"""Every operation under JAX's settings, on Explicit meshes, and of what users pass."""

import functools

import chex
import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augment.table import COUNT, HEIGHT, OPERATIONS, WIDTH, recipe, with_gradient
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jemjax import augment
from jemjax.augment.inputs import example_keys

EACH = pytest.mark.parametrize("name", OPERATIONS)


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(1), (COUNT, HEIGHT, WIDTH, 3))


@EACH
def test_traced_under_every_setting(name, key, images):
    with flags.all_of(flags.TRACED):
        jax.eval_shape(with_gradient(name), key, images)


@pytest.mark.slow
@EACH
def test_run_operation_by_operation(name, key, images):
    with flags.all_of(flags.BARE):
        made = with_gradient(name)(key, images)
    expected = jax.jit(with_gradient(name))(key, images)
    chex.assert_trees_all_close(made, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("setting", flags.COMPILED)
@EACH
def test_compiled_under_every_setting(name, setting, key, images):
    expected = jax.jit(with_gradient(name))(key, images)
    with flags.COMPILED[setting]():
        made = jax.jit(with_gradient(name))(key, images)
    chex.assert_trees_all_close(made, expected, atol=1e-6)
    chex.assert_trees_all_equal_dtypes(made, expected)


def explicit(*axes):
    names, sizes = zip(*axes, strict=True)
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Explicit,) * len(axes))


MESHES = {
    "one axis": ((("data", 8),), P("data")),
    "three axes": ((("a", 2), ("b", 2), ("model", 2)), P(("a", "b"))),
}


def on_a_mesh(name):
    """The operation, by keys that lie as the images do, which masks have of nothing."""

    def call(key, images):
        keys = example_keys(key, COUNT, images)
        return with_gradient(name)(keys, images)

    return call


@pytest.mark.parametrize("mesh", MESHES)
@EACH
def test_rows_stay_where_they_lie_on_an_explicit_mesh(name, mesh, key, images):
    axes, rows = MESHES[mesh]
    mesh = explicit(*axes)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(images, NamedSharding(mesh, rows))
        # One key, of which random operations make those of the rows.
        _, gradient = jax.eval_shape(with_gradient(name), key, sharded)
        made, _ = jax.eval_shape(on_a_mesh(name), key, sharded)
    for leaf in jax.tree.leaves((made, gradient)):
        assert leaf.sharding.spec[0] == rows[0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "views" else pytest.mark.slow)
        for name in OPERATIONS
    ],
)
def test_values_on_an_explicit_mesh(name, key, images):
    mesh = explicit(("data", 8))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(images, NamedSharding(mesh, P("data")))
        made = jax.device_get(jax.jit(with_gradient(name))(key, sharded))
    expected = jax.jit(with_gradient(name))(key, images)
    chex.assert_trees_all_close(made, expected, atol=1e-6)


def test_the_rows_of_a_shard_are_given_the_keys_of_the_whole_batch(key, images):
    """What the docstring of `make_views` says of `shard_map`."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def draw(key, images):
        first = jax.lax.axis_index("data") * len(images)
        rows = first + jnp.arange(len(images))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        return augment.random_flip(keys, images), augment.random_flip(key, images)

    sharded = jax.shard_map(
        draw, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    by_row, by_shard = jax.jit(sharded)(key, images)
    expected = augment.random_flip(key, images)
    np.testing.assert_array_equal(by_row, expected)
    assert (by_shard != expected).any()


def test_block_masks_inside_shard_map(key):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    draw = functools.partial(augment.block_mask, grid=4, num_masked=6, min_block=2)
    sharded = jax.shard_map(
        lambda keys: draw(keys, 1), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    keys = example_keys(key, 8)
    np.testing.assert_array_equal(jax.jit(sharded)(keys), draw(keys, 8))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, jnp.bfloat16])
def test_floats_up_to_255_are_refused(kind, key):
    images = kind(np.full((1, 6, 6, 3), 255.0, np.float32))
    calls = {
        "images": lambda x: augment.make_views(key, x, recipe()),
        "images ": lambda x: augment.evaluation_view(x, recipe()),
        "crops": lambda x: augment.finish_views(key, (x,), recipe()),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name.strip()}: got .* up to 25"):
            call(images)
        jax.eval_shape(call, images)  # traced, they have no values


def test_what_overshoots_is_not_refused(key):
    images = np.full((1, 6, 6, 3), 1.2, np.float32)
    (view,) = augment.make_views(key, images, recipe(mean=0.0, std=1.0))
    assert view.max() <= 1


@pytest.mark.parametrize(
    "value", [0.5, np.float64(0.5), np.array(0.5), jnp.float16(0.5)]
)
def test_a_probability_of_any_kind(value, key, images):
    expected = augment.random_flip(key, images)
    with jax.enable_x64(True):
        flipped = augment.random_flip(key, images, probability=value)
    assert flipped.dtype == jnp.float32
    np.testing.assert_array_equal(flipped, expected)


def test_numbers_that_fix_a_shape_are_not_traced(key):
    with pytest.raises(ValueError, match="ratio: got .*expected a number"):
        jax.jit(lambda r: augment.random_patch_mask(key, 2, 9, ratio=r))(0.5)


def test_a_traced_number_compiles_once(key, images):
    flip = chex.assert_max_traces(augment.random_flip, n=1)
    flip = jax.jit(flip)
    for value in (0.2, 0.3, 0.9):
        flip(key, images, probability=value)
