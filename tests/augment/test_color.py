"""Color changes: the right share of images, amounts and orders; gray stays gray."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax import augment
from jemjax.augment import color
from jemjax.augment.inputs import example_keys, uniforms

STRENGTHS = {"brightness": 0.4, "contrast": 0.6, "saturation": 0.8, "hue": 0.1}

static = (*STRENGTHS, "probability", "arithmetic")
color_jitter = jax.jit(augment.color_jitter, static_argnames=static)
# With traced factors, compiled once each.
ADJUST = {
    name: jax.jit(
        getattr(augment, f"adjust_{name}"),
        static_argnames=() if name == "hue" else "arithmetic",
    )
    for name in STRENGTHS
}


@functools.partial(jax.jit, static_argnames=("count", *static))
def random_jitter(key, count, **options):
    draws = uniforms(example_keys(key, count), color.JITTER_DRAWS)
    return color.random_jitter(draws, **options)


ARITHMETIC = pytest.mark.parametrize("arithmetic", ["torchvision", "simclr", "byol"])


@pytest.fixture
def images(key):
    return jax.random.uniform(key, (64, 6, 5, 3))


@pytest.fixture
def gray_images(key):
    return jax.random.uniform(key, (64, 6, 5, 1))


def _orders(jitter):
    """The names of the four adjustments, in the order in which each image has them."""
    names = list(jitter.factors)
    for row, place in zip(np.asarray(jitter.order), jitter.place, strict=True):
        order = [names[number] for number in row]
        if jitter.turns is not None:
            order.insert(int(place), "hue")
        yield tuple(order)


@ARITHMETIC
def test_jitter_is_the_adjustments_in_the_order_drawn(arithmetic, key, images):
    images = images[:24]
    # Strong enough that the clipping between them tells the orders apart.
    strengths = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
    options = {"probability": 0.8, "arithmetic": arithmetic}
    result = color_jitter(key, images, **strengths, **options)
    jitter = random_jitter(key, 24, **strengths, **options)
    neutral = {"hue": 0, "brightness": 0 if arithmetic == "byol" else 1}
    unchanged = np.ones(24, bool)
    for n, order in enumerate(_orders(jitter)):
        expected = images[n : n + 1]
        for name in order:
            amount = jitter.turns[n] if name == "hue" else jitter.factors[name][n]
            whose = {} if name == "hue" else {"arithmetic": arithmetic}
            expected = ADJUST[name](expected, amount, **whose)
            unchanged[n] &= bool(amount == neutral.get(name, 1))
        np.testing.assert_allclose(result[n : n + 1], expected, atol=2e-5)
    assert 0 < unchanged.sum() < 12
    np.testing.assert_array_equal(result[unchanged], images[unchanged])


def test_jitter_draws_uniform_factors_turns_and_orders(key):
    count = 12_000
    jitter = random_jitter(key, count, **STRENGTHS, probability=0.8)
    applied = np.asarray(jitter.turns != 0)
    assert abs(applied.mean() - 0.8) < 4 * 0.4 / np.sqrt(count)
    draws = {name: np.asarray(value) for name, value in jitter.factors.items()}
    draws["hue"] = 1 + np.asarray(jitter.turns)
    for name, strength in STRENGTHS.items():
        np.testing.assert_array_equal(draws[name][~applied], 1)
        values = draws[name][applied] - 1
        assert np.abs(values).max() <= strength * (1 + 1e-6)
        np.testing.assert_allclose(
            np.percentile(values, (5, 25, 50, 75, 95)),
            strength * np.array([-0.9, -0.5, 0, 0.5, 0.9]),
            atol=0.05 * strength,
        )
    correlations = np.corrcoef([draws[name][applied] for name in STRENGTHS])
    assert np.abs(correlations - np.eye(4)).max() < 0.05
    frequencies = collections.Counter(_orders(jitter))
    assert len(frequencies) == 24
    shares = np.array(list(frequencies.values())) / count
    assert np.abs(shares - 1 / 24).max() < 4.5 * np.sqrt(1 / 24 / count)


def test_factors_are_never_negative(key):
    strengths = dict(STRENGTHS, brightness=3.0)
    jitter = random_jitter(key, 2000, **strengths, probability=1.0)
    factors = np.asarray(jitter.factors["brightness"])
    assert 0 <= factors.min() < 0.1 and 3.9 < factors.max() <= 4


def test_what_has_no_strength_is_left_out(key, images):
    none = dict.fromkeys(STRENGTHS, 0.0)
    np.testing.assert_array_equal(
        color_jitter(key, images, **none, probability=1.0), images
    )
    only = dict(none, saturation=0.5)
    jitter = random_jitter(key, 64, **only, probability=1.0)
    np.testing.assert_allclose(
        color_jitter(key, images, **only, probability=1.0),
        augment.adjust_saturation(images, jitter.factors["saturation"]),
        atol=1e-6,
    )


def test_one_channel_has_brightness_and_contrast_only(key, gray_images):
    for operation in (augment.adjust_saturation, augment.adjust_hue):
        np.testing.assert_array_equal(operation(gray_images, 0.3), gray_images)
    np.testing.assert_array_equal(augment.to_grayscale(gray_images), gray_images)
    np.testing.assert_array_equal(
        augment.random_grayscale(key, gray_images, probability=1.0), gray_images
    )
    mean = gray_images.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(
        augment.adjust_contrast(gray_images, 0.5),
        0.5 * gray_images + 0.5 * mean,
        atol=1e-6,
    )
    jittered = color_jitter(key, gray_images, **STRENGTHS, probability=1.0)
    assert jittered.shape == gray_images.shape
    assert (np.abs(jittered - gray_images).max((1, 2, 3)) > 1e-3).all()


def test_hue_turns(images):
    red = jnp.zeros((1, 1, 1, 3)).at[..., 0].set(1)
    np.testing.assert_allclose(ADJUST["hue"](red, 1 / 3)[0, 0, 0], [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(
        ADJUST["hue"](red, -1 / 3)[0, 0, 0], [0, 0, 1], atol=1e-6
    )
    there = ADJUST["hue"](images, 0.37)
    np.testing.assert_allclose(ADJUST["hue"](there, -0.37), images, atol=1e-5)
    gray = augment.to_grayscale(images)
    np.testing.assert_array_equal(ADJUST["hue"](gray, 0.2), gray)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_a_factor_for_each_image(name, images):
    factors = np.linspace(-0.4, 0.4, 64, dtype=np.float32) + (name != "hue")
    together = ADJUST[name](images, factors)
    for n in (0, 17, 63):
        alone = ADJUST[name](images[n : n + 1], float(factors[n]))
        np.testing.assert_allclose(together[n], alone[0], atol=1e-6)


@pytest.mark.parametrize(
    "random, operation",
    [
        (augment.random_grayscale, augment.to_grayscale),
        (augment.random_solarize, augment.solarize),
    ],
)
def test_the_given_share_of_images_is_changed(random, operation, key):
    images = jax.random.uniform(key, (4000, 2, 2, 3))
    result = random(key, images, probability=0.2)
    changed = (np.asarray(result) != images).any((1, 2, 3))
    assert abs(changed.mean() - 0.2) < 4 * 0.4 / np.sqrt(4000)
    np.testing.assert_allclose(result[changed], operation(images)[changed], atol=1e-6)
    np.testing.assert_array_equal(random(key, images, probability=0.0), images)


def test_solarize_inverts_from_the_threshold():
    images = jnp.array([0.0, 0.4, 0.5, 0.9]).reshape(4, 1, 1, 1)
    np.testing.assert_allclose(
        augment.solarize(images, 0.5).ravel(), [0, 0.4, 0.5, 0.1], atol=1e-6
    )
    thresholds = jnp.array([0.0, 0.5, 0.6, 1.0])
    np.testing.assert_allclose(
        augment.solarize(images, thresholds).ravel(), [1, 0.4, 0.5, 0.9], atol=1e-6
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_denormalize_is_the_inverse_of_normalize(images, channels):
    images = images[..., :channels]
    for mean, std in [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (0.4, 0.2)]:
        normalized = augment.normalize(images, mean, std)
        assert np.abs(normalized - images).max() > 0.5
        np.testing.assert_allclose(
            augment.denormalize(normalized, mean, std), images, atol=1e-6
        )


def test_normalize_one_channel_by_the_mean_of_three(gray_images):
    expected = (gray_images - 0.449) / 0.226
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    np.testing.assert_allclose(
        augment.normalize(gray_images, mean, std), expected, atol=1e-5
    )
    np.testing.assert_allclose(
        augment.normalize(gray_images, 0.449, 0.226), expected, atol=1e-5
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_fused_is_faithful_where_nothing_is_clipped(key, images, channels):
    images = 0.4 + 0.2 * images[..., :channels]
    strengths = {"brightness": 0.3, "contrast": 0.4, "saturation": 0.4, "hue": 0.0}
    jitter = random_jitter(key, len(images), **strengths, probability=0.8)
    assert len(set(_orders(jitter))) == 6
    faithful = color_jitter(key, images, **strengths, probability=0.8)
    np.testing.assert_allclose(
        color.fused_color(images, jitter, None), faithful, atol=2e-6
    )
    # And without color: the gray of that.
    grayed = np.arange(len(images)) % 2 == 0
    expected = np.where(
        grayed[:, None, None, None], augment.to_grayscale(faithful), faithful
    )
    np.testing.assert_allclose(
        color.fused_color(images, jitter, grayed), expected, atol=2e-6
    )


def test_fused_hue_is_that_of_hsv_for_thirds_of_a_turn(images):
    for turns in (1 / 3, -1 / 3, 0.0):
        jitter = color.Jitter(
            {},
            np.zeros((len(images), 0), np.int32),
            np.full(len(images), turns, np.float32),
            np.zeros(len(images), np.float32),
        )
        expected = augment.adjust_hue(images, turns)
        np.testing.assert_allclose(
            color.fused_color(images, jitter, None), expected, atol=2e-6
        )


def test_fused_hue_comes_at_its_place(key, images):
    images = 0.4 + 0.2 * images
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.9, "hue": 1 / 3}
    jitter = random_jitter(key, len(images), **strengths, probability=1.0)
    thirds = jitter._replace(turns=np.sign(jitter.turns).astype(np.float32) / 3)
    assert {0, 1} <= set(np.asarray(thirds.place).tolist())
    expected = color.apply_jitter(images, thirds)
    np.testing.assert_allclose(
        color.fused_color(images, thirds, None), expected, atol=2e-6
    )
