"""Masks: their number, their places, and that each example has its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jemjax import augment
from jemjax.augment import MaskRecipe

DRAWS = 4000
# As published; the reference file has the statistics of the official generators.
BLOCKS = {
    "beit_75": {"num_masked": 75},
    "data2vec_120": {"num_masked": 120, "min_block": 16, "max_block": 196},
    "dinov2_20": {"num_masked": 20, "min_block": 4, "max_block": 98},
    "dinov2_98": {"num_masked": 98, "min_block": 4, "max_block": 98},
}
RECIPES = {
    "random": MaskRecipe("random", 0.75),
    "block": MaskRecipe("block", 0.6),
}

make_masks = jax.jit(
    augment.make_masks, static_argnames=("batch_size", "grid", "recipe")
)


@functools.cache
def _block_masks(case):
    draw = functools.partial(augment.block_mask, **BLOCKS[case])
    return np.asarray(jax.jit(lambda key: draw(key, DRAWS, 14))(jax.random.key(0)))


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_are_distributed_as_the_official_ones(case, golden):
    masks, z = _block_masks(case), golden("block_masks_stats")
    assert masks.shape == (DRAWS, 196) and masks.dtype == bool
    count, reference = masks.sum(axis=1), z[f"{case}/count"].astype(float)
    assert count.max() == BLOCKS[case]["num_masked"]
    error = np.sqrt(reference.var() / len(reference) + count.var() / DRAWS)
    assert abs(count.mean() - reference.mean()) < 4 * error
    frequency = masks.mean(axis=0).reshape(14, 14)
    assert np.abs(frequency - z[f"{case}/freq"]).max() < 0.06


def test_blocks_are_blocks():
    """Most masked patches have masked neighbors; scattered ones do not."""

    def neighbors(masks):
        grid = masks.reshape(-1, 14, 14)
        return (grid[:, 1:] & grid[:, :-1]).sum() / grid[:, 1:].sum()

    assert neighbors(_block_masks("beit_75")) > 0.75
    scattered = augment.random_patch_mask(jax.random.key(0), 500, 196, ratio=75 / 196)
    assert neighbors(np.asarray(scattered)) < 0.45


@pytest.mark.parametrize(
    ("aspect", "height", "width"), [(1.0, 4, 4), (4.0, 8, 2), (0.25, 2, 8)]
)
def test_a_block_has_its_area_and_shape_and_reaches_every_position(
    aspect, height, width
):
    """Nothing is left after the first block, which is then a rectangle by itself."""
    draw = functools.partial(augment.block_mask, num_masked=16, min_block=16)
    masks = jax.jit(lambda key: draw(key, 1000, (12, 9), aspect=(aspect, aspect)))
    grids = np.asarray(masks(jax.random.key(0))).reshape(1000, 12, 9)
    np.testing.assert_array_equal(grids.sum(axis=(1, 2)), 16)
    np.testing.assert_array_equal(grids.any(axis=2).sum(axis=1), height)
    np.testing.assert_array_equal(grids.any(axis=1).sum(axis=1), width)
    first = grids.reshape(1000, -1).argmax(axis=1)
    assert len(np.unique(first)) == (12 - height + 1) * (9 - width + 1)


@pytest.mark.parametrize("side", [4, 7, 8, 14])
def test_small_grids_are_masked_as_much(side, key):
    masks = make_masks(key, batch_size=500, grid=side, recipe=RECIPES["block"])
    count = np.asarray(masks).sum(axis=1)
    assert count.max() == round(0.6 * side**2)
    assert count.mean() > 0.97 * round(0.6 * side**2)


def test_the_smallest_block_can_be_chosen(key):
    def edges(min_block):
        recipe = MaskRecipe("block", 0.5, min_block)
        masks = make_masks(key, batch_size=500, grid=14, recipe=recipe)
        grid = np.asarray(masks).reshape(-1, 14, 14)
        return (grid[:, 1:] != grid[:, :-1]).mean()

    assert edges(1) > 1.2 * edges(90)


def test_maes_mask(golden):
    z = golden("mae")
    ratio = float(z["mask_ratio"])
    mask = augment.mask_of_noise(z["noise"], ratio)
    np.testing.assert_array_equal(mask, z["mask"].astype(bool))
    # The official encoder sees the same patches, in the order of their noise.
    kept = z["x_masked"].shape[1]
    assert augment.num_kept_patches(z["x"].shape[1], ratio) == kept
    for x, row, expected in zip(z["x"], mask, z["x_masked"], strict=True):
        assert set(map(bytes, x[~row])) == set(map(bytes, expected.astype(np.float32)))


@given(num_patches=st.integers(1, 300), percent=st.integers(0, 100))
def test_as_many_patches_are_left_as_were_asked_for(num_patches, percent):
    kept = augment.num_kept_patches(num_patches, percent / 100)
    assert kept == num_patches * (100 - percent) // 100


def test_random_masks_have_their_number_and_reach_every_patch(key):
    masks = np.asarray(augment.random_patch_mask(key, DRAWS, 49, ratio=0.75))
    np.testing.assert_array_equal(masks.sum(axis=1), 49 - 12)
    rate = 37 / 49
    error = np.sqrt(rate * (1 - rate) / DRAWS)
    assert np.abs(masks.mean(axis=0) - rate).max() < 5 * error
    assert len(np.unique(masks, axis=0)) == DRAWS


def test_equal_noise_keeps_the_number():
    mask = augment.mask_of_noise(jnp.zeros((2, 8)), 0.75)
    np.testing.assert_array_equal(mask.sum(axis=1), [6, 6])


@pytest.mark.parametrize("kind", RECIPES)
def test_a_mask_depends_on_its_examples_key_only(kind, key):
    recipe = RECIPES[kind]
    masks = make_masks(key, batch_size=16, grid=8, recipe=recipe)
    fewer = make_masks(key, batch_size=5, grid=8, recipe=recipe)
    np.testing.assert_array_equal(masks[:5], fewer)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(16))
    own = make_masks(keys[3:6], batch_size=3, grid=8, recipe=recipe)
    np.testing.assert_array_equal(own, masks[3:6])
    other = make_masks(jax.random.key(1), batch_size=16, grid=8, recipe=recipe)
    assert (masks != other).any(axis=1).all()
    assert len(np.unique(masks, axis=0)) == 16


@pytest.mark.parametrize("kind", RECIPES)
def test_the_number_of_devices_changes_no_bit(kind, key):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    draw = functools.partial(
        augment.make_masks, batch_size=16, grid=8, recipe=RECIPES[kind]
    )
    sharded = jax.jit(draw, out_shardings=NamedSharding(mesh, P("data")))(key)
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, jax.jit(draw)(key))


@pytest.mark.parametrize("kind", RECIPES)
def test_one_program_serves_all_keys(kind):
    traces = 0

    @jax.jit
    def draw(key):
        nonlocal traces
        traces += 1
        return augment.make_masks(key, 4, 8, RECIPES[kind])

    shapes = {draw(jax.random.key(seed)).shape for seed in range(3)}
    assert traces == 1 and shapes == {(4, 64)}


def test_recipes_are_data(key):
    assert hash(MaskRecipe("block")) == hash(MaskRecipe("block", 0.6))
    draw = functools.partial(make_masks, key, batch_size=2, grid=4)
    assert draw(recipe=MaskRecipe("random", 1.0)).all()
    assert not draw(recipe=MaskRecipe("block", 0.0)).any()
    dropped = draw(recipe=MaskRecipe("drop", 0.75))
    np.testing.assert_array_equal(dropped.sum(axis=1), [12, 12])


def test_masked_patches_are_filled(key):
    images = jax.random.normal(key, (2, 6, 8, 3), jnp.float16)
    images = images.at[0, 2:4, 2:4].set(9)  # what is hidden has no part in the mean
    mask = jnp.zeros((2, 12), bool).at[0, 5].set(True).at[1, 11].set(True)
    filled = np.array(augment.fill_masked(images, mask, (3, 4)))
    assert filled.dtype == np.float16
    expected = np.array(images)
    expected[0, 2:4, 2:4] = np.nan  # second row, second column
    expected[1, 4:6, 6:8] = np.nan  # the last
    means = np.nanmean(expected.astype(np.float32), axis=(1, 2), keepdims=True)
    expected = np.where(np.isnan(expected), means, expected)
    np.testing.assert_allclose(filled, expected, atol=1e-3)


KEY = jax.random.key(0)
IMAGES = jnp.zeros((2, 8, 8, 3))
MASK = jnp.zeros((2, 16), bool)
CALLS = {
    "kind": lambda v: MaskRecipe(v),
    "ratio": lambda v: MaskRecipe("random", v),
    "ratio of a mask": lambda v: augment.random_patch_mask(KEY, 2, 16, ratio=v),
    "min_block": lambda v: MaskRecipe("block", 0.5, v),
    "min_block of a mask": lambda v: augment.block_mask(
        KEY, 2, 4, num_masked=4, min_block=v
    ),
    "batch_size": lambda v: augment.random_patch_mask(KEY, v, 16, ratio=0.5),
    "batch_size of blocks": lambda v: augment.block_mask(KEY, v, 4, num_masked=4),
    "num_patches": lambda v: augment.random_patch_mask(KEY, 2, v, ratio=0.5),
    "num_patches kept": lambda v: augment.num_kept_patches(v, 0.5),
    "key": lambda v: augment.random_patch_mask(v, 2, 16, ratio=0.5),
    "noise": lambda v: augment.mask_of_noise(v, 0.5),
    "grid": lambda v: augment.block_mask(KEY, 2, v, num_masked=4),
    "num_masked": lambda v: augment.block_mask(KEY, 2, 4, num_masked=v),
    "max_block": lambda v: augment.block_mask(
        KEY, 2, 4, num_masked=4, min_block=2, max_block=v
    ),
    "aspect": lambda v: augment.block_mask(KEY, 2, 4, num_masked=4, aspect=v),
    "images": lambda v: augment.fill_masked(v, MASK, 4),
    "mask": lambda v: augment.fill_masked(IMAGES, v, 4),
}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("kind", "blocks"),
        ("ratio", 1.5),
        ("ratio", float("nan")),
        ("ratio of a mask", -0.1),
        ("min_block", 0),
        ("min_block of a mask", 1.5),
        ("batch_size", 0),
        ("batch_size of blocks", 2.0),
        ("num_patches", 0),
        ("num_patches kept", True),
        ("key", jax.random.split(KEY, 3)),
        ("key", 0),
        ("noise", jnp.zeros(4)),
        ("grid", (4, 0)),
        ("grid", (4, 4, 4)),
        ("num_masked", 17),
        ("num_masked", -1),
        ("max_block", 1),
        ("aspect", (2.0, 1.0)),
        ("aspect", (0.0, 1.0)),
        ("images", jnp.zeros((2, 10, 8, 3))),
        ("images", jnp.zeros((2, 8, 8, 3), jnp.uint8)),
        ("images", jnp.zeros((8, 8, 3))),
        ("mask", MASK[:, 1:]),
        ("mask", MASK[:1]),
        ("mask", MASK.astype(jnp.float32)),
    ],
)
def test_refusals(argument, value):
    with pytest.raises(ValueError, match=f"{argument.split()[0]}: got .*expected"):
        CALLS[argument](value)


def test_scattered_masks_have_no_smallest_block():
    with pytest.raises(ValueError, match="min_block: got 4, expected None"):
        MaskRecipe("random", 0.5, 4)
