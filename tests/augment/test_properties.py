"""What holds of views whatever is drawn, and how it is drawn."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lowered import inexact, lowered, products
from scipy import stats

from jemjax import augment
from jemjax.augment import View, ViewRecipe

PLAIN = View(
    size=2,
    crop_scale=None,
    flip_probability=0.0,
    jitter_probability=0.0,
    grayscale_probability=0.0,
    mean=0.0,
    std=1.0,
)
ARITHMETIC = ("torchvision", "simclr", "byol")
# What changes nothing; BYOL's brightness is added.
NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}

make_views = jax.jit(augment.make_views, static_argnames="recipe")
adjust_saturation = jax.jit(augment.adjust_saturation, static_argnames="arithmetic")
flip = jax.jit(functools.partial(augment.random_flip, probability=1.0))


def _images(seed, shape=(4, 6, 5, 3)):
    return np.random.default_rng(seed).random(shape, np.float32)


@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_no_strength_changes_nothing(name, arithmetic):
    images, adjust = _images(0), getattr(augment, f"adjust_{name}")
    amount = 0.0 if (name, arithmetic) == ("brightness", "byol") else NEUTRAL[name]
    whose = {} if name == "hue" else {"arithmetic": arithmetic}
    np.testing.assert_allclose(adjust(images, amount, **whose), images, atol=2e-6)


@pytest.mark.parametrize("color", ["faithful", "fused"])
def test_parts_of_no_strength_change_nothing(color, key):
    """All parts are on, and blur, which has a smallest strength, is nearly nothing."""
    view = dataclasses.replace(
        PLAIN,
        size=6,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        jitter_probability=1.0,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
        color=color,
        blur_probability=1.0,
        blur_sigma=(0.01, 0.01),
        solarize_probability=1.0,
        solarize_threshold=1.0,
    )
    images = _images(0, (4, 6, 6, 3))
    (same,) = make_views(key, images, ViewRecipe((view,)))
    np.testing.assert_allclose(same, images, atol=2e-6)


EXTREME = {
    "torchvision": augment.dinov2_imagenet(12, num_local=0).views[1],
    "fused": dataclasses.replace(augment.swav_small(12).views[0], color="fused"),
    "simclr": augment.simclr_imagenet(12).views[0],
    "byol": augment.byol_imagenet(12).views[1],
}


@pytest.mark.parametrize("name", EXTREME)
def test_before_normalization_values_are_in_range(name, key):
    """Of checkers, which bicubic weights overshoot, in black and white, and in red."""
    view = dataclasses.replace(
        EXTREME[name], brightness=1.0, contrast=1.0, hue=0.5, mean=0.0, std=1.0
    )
    checkers = np.indices((64, 16, 16, 3)).sum(0) % 2
    checkers[::3] = np.indices((22, 16, 16, 3))[3] == 0  # red
    (made,) = make_views(key, checkers.astype(np.float32), ViewRecipe((view,)))
    assert made.min() == 0 and 0.99 < made.max() <= 1


@given(seed=st.integers(0, 2**16))
def test_a_flip_twice_is_the_identity(seed):
    images = _images(seed)
    once = flip(jax.random.key(seed), images)
    np.testing.assert_array_equal(once, images[:, :, ::-1])
    np.testing.assert_array_equal(flip(jax.random.key(seed), once), images)


# All that follows a crop: of a mirrored image it makes the mirrored view, so that it is
# all one whether a recipe flips first or last.
COLORED = dataclasses.replace(
    PLAIN,
    size=10,
    jitter_probability=0.8,
    grayscale_probability=0.3,
    blur_probability=0.5,
    solarize_probability=0.5,
)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_a_flip_commutes_with_what_follows_it(arithmetic, key):
    recipe = ViewRecipe((dataclasses.replace(COLORED, arithmetic=arithmetic),))
    images = _images(0, (32, 10, 10, 3))
    (view,) = make_views(key, images, recipe)
    (mirrored,) = make_views(key, images[:, :, ::-1], recipe)
    np.testing.assert_allclose(mirrored, view[:, :, ::-1], atol=2e-5)
    assert np.abs(view - images).max() > 0.1


@given(seed=st.integers(0, 2**16), factor=st.floats(0, 1))
def test_grayscale_and_saturation_commute(seed, factor):
    """torchvision's: less saturation leaves the gray of a pixel; of gray, any all."""
    images = _images(seed)
    gray = augment.to_grayscale(images)
    # The weights of gray sum to 0.9999, here as there.
    less = adjust_saturation(images, factor)
    np.testing.assert_allclose(augment.to_grayscale(less), gray, atol=2e-4)
    np.testing.assert_allclose(adjust_saturation(gray, factor), gray, atol=2e-4)
    np.testing.assert_allclose(augment.to_grayscale(gray), gray, atol=2e-4)
    for arithmetic in ("simclr", "byol"):
        more = adjust_saturation(gray, 1 + factor, arithmetic=arithmetic)
        np.testing.assert_allclose(more, gray, atol=1e-6)


COUNT, STEPS = 1500, 3
DRAWS = ("flip", "brightness", "top", "left")


@functools.cache
def _draws():
    """What two views draw, read off them: for each draw (steps, views, examples).

    Of a ramp in a gray that brightness scales, and of a corner, whose place is seen.
    """
    view = dataclasses.replace(
        PLAIN,
        crop_scale=(0.25, 0.25),
        crop_ratio=(1.0, 1.0),
        interpolation="bilinear",
        size=16,
    )
    cropped = ViewRecipe((view,) * 2)
    jitter = dataclasses.replace(
        PLAIN,
        flip_probability=0.5,
        jitter_probability=1.0,
        brightness=0.4,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
    )
    colored = ViewRecipe((jitter,) * 2)
    rows, columns = np.indices((32, 32)) / 32
    place = np.stack([rows, columns, rows], axis=-1)
    place = np.broadcast_to(place, (COUNT, 32, 32, 3)).astype(np.float32)
    ramp = np.array([0.2, 0.6]).reshape(1, 1, 2, 1)
    ramp = np.broadcast_to(ramp, (COUNT, 2, 2, 3)).astype(np.float32)
    draws = {name: np.zeros((STEPS, 2, COUNT)) for name in DRAWS}
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(0), step)
        for number, made in enumerate(make_views(key, ramp, colored)):
            draws["flip"][step, number] = made[:, 0, 0, 0] > made[:, 0, 1, 0]
            draws["brightness"][step, number] = made[:, 0].sum((1, 2)) / 2.4
        for number, made in enumerate(make_views(key, place, cropped)):
            draws["top"][step, number] = np.round(32 * made[:, 0, 0, 0])
            draws["left"][step, number] = np.round(32 * made[:, 0, 0, 1])
    return draws


def test_draws_are_uniform():
    draws = _draws()
    for step, view in itertools.product(range(STEPS), range(2)):
        flips = int(draws["flip"][step, view].sum())
        assert stats.binomtest(flips, COUNT).pvalue > 1e-3
        brightness = draws["brightness"][step, view]
        assert stats.kstest(brightness, "uniform", (0.6, 0.8)).pvalue > 1e-3
        for name in ("top", "left"):
            places = np.bincount(draws[name][step, view].astype(int))
            assert len(places) == 17  # of 16 among 32 pixels
            assert stats.chisquare(places).pvalue > 1e-3


def _independent(one, other):
    halves = [np.ravel(x > x.mean()).astype(int) for x in (one, other)]
    table = np.histogram2d(*halves, bins=2)[0]
    return stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["steps", "views", "examples"])
def test_draws_of_different_steps_views_and_examples_are_independent(axis, name):
    draws = _draws()[name]
    numbers = range(draws.shape[axis])
    assert _independent(draws.take(numbers[1:], axis), draws.take(numbers[:-1], axis))
    assert not _independent(draws, draws)


def test_draws_of_different_operations_are_independent():
    for one, other in itertools.combinations(DRAWS, 2):
        assert _independent(_draws()[one], _draws()[other]), (one, other)


def test_the_batch_size_changes_no_draw(key):
    recipe = ViewRecipe((COLORED,) * 2)
    images = _images(0, (32, 10, 10, 3))
    for view, few in zip(
        make_views(key, images, recipe),
        make_views(key, images[:5], recipe),
        strict=True,
    ):
        np.testing.assert_allclose(few, view[:5], atol=2e-6)


def test_all_steps_are_one_program():
    traces = 0

    @functools.partial(jax.jit, static_argnames="recipe")
    def make(key, images, recipe):
        nonlocal traces
        traces += 1
        return augment.make_views(key, images, recipe)

    for step in range(3):
        key = jax.random.fold_in(jax.random.key(0), step)
        # An equal recipe is the same one.
        recipe = ViewRecipe((dataclasses.replace(PLAIN),))
        make(key, _images(step), recipe)
    assert traces == 1


@pytest.mark.parametrize(
    "name", ["byol_imagenet", "simclr_imagenet", "dinov2_imagenet", "fused"]
)
def test_views_of_photographs_lower_for_accelerators(name, key):
    if name == "fused":
        views = augment.swav_imagenet(num_local=1).views
        views = tuple(dataclasses.replace(view, color="fused") for view in views)
        recipe = ViewRecipe(views)
    else:
        recipe = getattr(augment, name)()
        recipe = dataclasses.replace(recipe, views=recipe.views[:3])
    images = jax.ShapeDtypeStruct((8, 256, 320, 3), jnp.uint8)
    make = jax.jit(functools.partial(augment.make_views, recipe=recipe))
    text = lowered(make, key, images)
    assert "8x224x224x3xf32" in text
    # Crops of large images, blur and the fused colors are sums.
    assert not products(text)


def test_crops_of_small_images_are_exact_products_on_accelerators(key):
    recipe = ViewRecipe((dataclasses.replace(PLAIN, color="fused"),))
    make = jax.jit(functools.partial(augment.make_views, recipe=recipe))
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.uint8)
    of_crops = products(lowered(make, key, images))
    assert of_crops and not any(map(inexact, of_crops))
    # On CPUs the program has both, and chooses the other.
    assert "dot" not in make.lower(key, images).compile().as_text()
