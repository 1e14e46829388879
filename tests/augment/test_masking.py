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
from lowered import lowered
from scipy import stats

from jemjax import augment, wire
from jemjax.augment import MaskRecipe, masking

DRAWS = 4000
# As published; the reference file has the statistics of the official generators.
BLOCKS = {
    "beit_75": {"num_masked": 75},
    "data2vec_120": {"num_masked": 120, "min_block": 16, "max_block": 196},
    "dinov2_20": {"num_masked": 20, "min_block": 4, "max_block": 98},
    "dinov2_40": {"num_masked": 40, "min_block": 4, "max_block": 98},
    "dinov2_60": {"num_masked": 60, "min_block": 4, "max_block": 98},
    "dinov2_98": {"num_masked": 98, "min_block": 4, "max_block": 98},
}
IBOT = MaskRecipe("block", (0.1, 0.5))
RECIPES = {
    "random": MaskRecipe("random", 0.75),
    "block": MaskRecipe("block", 0.6),
    "ratio of its own": IBOT,
}

make_masks = jax.jit(
    augment.make_masks, static_argnames=("batch_size", "grid", "recipe")
)


@functools.cache
def _block_masks(case):
    draw = functools.partial(augment.block_mask, **BLOCKS[case])
    return np.asarray(jax.jit(lambda key: draw(key, DRAWS, 14))(jax.random.key(0)))


def test_the_reference_has_no_other_blocks(golden):
    cases = {name.split("/")[0] for name in golden("block_masks_stats")}
    assert cases == {*BLOCKS, "ibot_block_r0.3v0.2"}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_are_distributed_as_the_official_ones(case, golden):
    masks = _block_masks(case)
    assert masks.sum(axis=1).max() == BLOCKS[case]["num_masked"]
    _compare_with_the_official(masks, case, golden)


def test_blocks_of_a_ratio_drawn_by_each_example(golden, key):
    masks = np.asarray(make_masks(key, batch_size=DRAWS, grid=14, recipe=IBOT))
    _compare_with_the_official(masks, "ibot_block_r0.3v0.2", golden)
    # Not only on average: the whole distribution of their number.
    reference = golden("block_masks_stats")["ibot_block_r0.3v0.2/count"]
    assert stats.ks_2samp(masks.sum(axis=1), reference).pvalue > 0.01
    fixed = make_masks(
        key, batch_size=DRAWS, grid=14, recipe=MaskRecipe("block", (0.3, 0.3))
    )
    assert np.ptp(masks.sum(axis=1)) > 70 > 20 > np.ptp(fixed.sum(axis=1))


def _compare_with_the_official(masks, case, golden):
    z = golden("block_masks_stats")
    assert masks.shape == (DRAWS, 196) and masks.dtype == bool
    count, reference = masks.sum(axis=1), z[f"{case}/count"].astype(float)
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


def test_each_example_may_have_its_own_number(key):
    """DINOv2's: half of the images are not masked, the others from 10 % to 50 %."""
    numbers = np.where(np.arange(200) % 2, np.linspace(20, 98, 200), 0)

    @jax.jit
    def draw(numbers):
        return augment.block_mask(key, 200, 14, num_masked=numbers, min_block=4)

    count = np.asarray(draw(numbers)).sum(axis=1)
    assert (count <= numbers).all() and (count[::2] == 0).all()
    assert (numbers - count)[1::2].mean() < 2
    one = augment.block_mask(key, 200, 14, num_masked=60, min_block=4)
    np.testing.assert_array_equal(draw(np.full(200, 60)), one)


@functools.cache
def _multi_block_masks():
    draw = jax.jit(augment.multi_block_masks, static_argnums=(1, 2))
    return jax.tree.map(np.asarray, draw(jax.random.key(0), DRAWS, 14))


def _size_of(target):
    return target.any(axis=1).sum(), target.any(axis=0).sum()


def test_one_draw_sets_area_and_shape_of_a_target(golden):
    z = golden("ijepa")
    target = masking.block_size(z["u"], (14, 14), (0.15, 0.2), (0.75, 1.5))
    context = masking.block_size(z["u"], (14, 14), (0.85, 1.0), (1.0, 1.0))
    np.testing.assert_array_equal(np.stack([*target, *context], 1), z["block_hw"])


def test_targets_are_blocks_and_no_part_of_the_context():
    hidden, targets = _multi_block_masks()
    assert hidden.shape == (DRAWS, 196) and targets.shape == (DRAWS, 4, 196)
    assert hidden.dtype == targets.dtype == bool
    assert not (~hidden & targets.any(axis=1)).any()
    # The context block of the published grid has one size, and so one place.
    block = np.pad(np.ones((13, 13), bool), ((0, 1), (0, 1))).reshape(-1)
    np.testing.assert_array_equal(~hidden, block & ~targets.any(axis=1))
    sizes = set()
    for example in targets[:500].reshape(-1, 4, 14, 14):
        (height, width), *others = map(_size_of, example)
        assert others == [(height, width)] * 3
        np.testing.assert_array_equal(example.sum(axis=(1, 2)), height * width)
        sizes.add((height, width))
    # All that there are: of the extremes of u, and between them.
    assert sizes == {(5, 6), (6, 5), (6, 6), (7, 5), (8, 5)}


def test_targets_and_contexts_are_distributed_as_the_official_ones(golden):
    """In batches of four, with one size each, and cut to the shortest context."""
    z, (hidden, targets) = golden("ijepa"), _multi_block_masks()
    images, batches = int(z["stat_n"]), len(z["stat_context_len"])
    assert images == 4 * batches

    def compare(values, reference, number):
        error = values.std(axis=0) * np.sqrt(1 / number + 1 / len(values))
        assert (np.abs(values.mean(axis=0) - reference) <= 4.5 * error).all()

    # Of one image the four targets are of one size, and of one batch too.
    compare(targets.mean(axis=1), z["stat_pos_pred"], images)
    area = targets[:, 0].sum(axis=1)
    compare(area, z["stat_target_len"].mean(), batches)

    cut, length = [], []
    size = targets[:, 0].reshape(-1, 14, 14).any(axis=2).sum(axis=1) * 100 + area
    for one in np.unique(size):
        contexts = ~hidden[size == one]
        contexts = contexts[: len(contexts) // 4 * 4].reshape(-1, 4, 196)
        shortest = contexts.sum(axis=2).min(axis=1)
        first = contexts.cumsum(axis=2) <= shortest[:, None, None]
        cut.append((contexts & first).reshape(-1, 196))
        length.append(shortest)
    compare(np.concatenate(cut), z["stat_pos_enc"], images)
    compare(np.concatenate(length), z["stat_context_len"].mean(), batches)
    assert z["stat_images_with_overlap"] == 0


def test_places_of_targets_are_uniform_and_independent():
    targets = _multi_block_masks().targets.reshape(-1, 4, 14, 14)
    square = targets[targets[:, 0].sum(axis=(1, 2)) == 36]  # 6 x 6
    first = square.reshape(len(square), 4, 196).argmax(axis=2)
    top, left = first // 14, first % 14
    for place in (*top.T, *left.T):
        count = np.bincount(place, minlength=8)
        assert len(count) == 8 and stats.chisquare(count).pvalue > 1e-3
    for one, other in [(top[:, 0], left[:, 0]), (top[:, 0], top[:, 1])]:
        table = np.histogram2d(one, other, bins=8)[0]
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_multi_block_masks_of_another_form(key):
    hidden, targets = augment.multi_block_masks(
        key,
        50,
        (8, 12),
        num_targets=2,
        target_scale=(0.1, 0.1),
        target_aspect=(1.0, 1.0),
        context_scale=(0.5, 0.5),
    )
    assert hidden.shape == (50, 96) and targets.shape == (50, 2, 96)
    assert (targets.sum(axis=2) == 9).all()  # 3 x 3 of floor(9.6)
    assert (hidden | (targets.sum(axis=1) == 0)).all()
    union = np.asarray(~hidden | targets.any(axis=1)).reshape(50, 8, 12)
    assert 7 * 7 <= union.sum(axis=(1, 2)).min()  # of 48


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


@functools.partial(jax.jit, static_argnames=("kind", "count"))
def _draw(key, kind, count):
    """The masks of 8 x 8 patches, (count, 64)."""
    if kind == "multi-block":
        return augment.multi_block_masks(key, count, 8).hidden
    return augment.make_masks(key, count, 8, RECIPES[kind])


EVERY = pytest.mark.parametrize("kind", [*RECIPES, "multi-block"])


@EVERY
def test_a_mask_depends_on_its_examples_key_only(kind, key):
    masks = _draw(key, kind, 16)
    np.testing.assert_array_equal(masks[:5], _draw(key, kind, 5))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(16))
    np.testing.assert_array_equal(_draw(keys[3:6], kind, 3), masks[3:6])
    other = _draw(jax.random.key(1), kind, 16)
    assert (masks != other).any(axis=1).all()
    assert len(np.unique(masks, axis=0)) == 16


@EVERY
def test_the_number_of_devices_changes_no_bit(kind, key):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    draw = jax.jit(functools.partial(_draw, kind=kind, count=16), out_shardings=rows)
    sharded = draw(key)
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, _draw(key, kind, 16))
    assert wire.collectives(draw.lower(key).compile()) == []


@EVERY
def test_one_program_serves_all_keys(kind):
    traces = 0

    @jax.jit
    def draw(key):
        nonlocal traces
        traces += 1
        return _draw(key, kind, 4)

    shapes = {draw(jax.random.key(seed)).shape for seed in range(3)}
    assert traces == 1 and shapes == {(4, 64)}


@EVERY
def test_masks_lower_for_accelerators(kind, key):
    text = lowered(jax.jit(lambda key: _draw(key, kind, 4)), key)
    assert "4x64xi1" in text


def test_recipes_are_data(key):
    assert hash(MaskRecipe("block")) == hash(MaskRecipe("block", 0.6))
    draw = functools.partial(make_masks, key, batch_size=2, grid=4)
    assert draw(recipe=MaskRecipe("random", 1.0)).all()
    assert not draw(recipe=MaskRecipe("block", 0.0)).any()
    assert str(IBOT) == "10% to 50% of the patches, in blocks"
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
    "ratio of blocks": lambda v: MaskRecipe("block", v),
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
    "num_targets": lambda v: augment.multi_block_masks(KEY, 2, 4, num_targets=v),
    "target_scale": lambda v: augment.multi_block_masks(KEY, 2, 4, target_scale=v),
    "target_aspect": lambda v: augment.multi_block_masks(KEY, 2, 4, target_aspect=v),
    "context_scale": lambda v: augment.multi_block_masks(KEY, 2, 4, context_scale=v),
    "batch_size of targets": lambda v: augment.multi_block_masks(KEY, v, 4),
    "grid of targets": lambda v: augment.multi_block_masks(KEY, 2, v),
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
        ("ratio", (0.1, 0.5)),  # the number of scattered patches is static
        ("ratio of blocks", (0.5, 0.1)),
        ("ratio of blocks", (0.0, 0.5)),
        ("ratio of blocks", (0.5, 1.5)),
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
        ("num_masked", jnp.ones(3)),
        ("num_masked", 2.5),
        ("num_targets", 0),
        ("target_scale", (0.2, 1.5)),
        ("target_aspect", (0.0, 1.0)),
        ("context_scale", 0.9),
        ("batch_size of targets", 0),
        ("grid of targets", (1, 8)),
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
