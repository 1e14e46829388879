"""Boxes are torchvision's in distribution; a crop sees its box and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jemjax import augment
from jemjax._kernels import taps
from jemjax.augment import geometry

CASES = ("simclr_0.08_1", "local_0.05_0.4", "global_0.4_1", "swav_0.14_1")
DRAWS = 20_000

crop_and_resize = jax.jit(
    augment.crop_and_resize, static_argnames=("size", "method", "antialias")
)
random_boxes = jax.jit(
    augment.random_boxes, static_argnames=("count", "image_size", "scale", "ratio")
)
random_resized_crop = jax.jit(
    augment.random_resized_crop, static_argnames=("size", "scale")
)


@pytest.mark.parametrize("case", CASES)
def test_boxes_are_distributed_as_torchvisions(case, golden, key):
    reference = {
        name.removeprefix(f"{case}/"): value
        for name, value in golden("rrc_stats").items()
        if name.startswith(f"{case}/")
    }
    height, width = (int(side) for side in reference["hw"])
    boxes = random_boxes(
        key, DRAWS, (height, width), scale=tuple(reference["scale"].tolist())
    )
    top, left, h, w = np.asarray(boxes, float).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()

    sigma = 4 * np.sqrt(1 / 4000 + 1 / DRAWS)  # of both samples' means
    percent = (5, 25, 50, 75, 95)
    for name, values in (
        ("area", h * w / (height * width)),
        ("logratio", np.log(w / h)),
    ):
        mean, std = reference[f"{name}_mean_std"]
        assert abs(values.mean() - mean) < sigma * std
        np.testing.assert_allclose(values.std(), std, rtol=0.05)
        np.testing.assert_allclose(
            np.percentile(values, percent),
            reference[f"{name}_quantiles_5_25_50_75_95"],
            atol=0.02,
        )
    centers = np.array([(top + h / 2) / height, (left + w / 2) / width])
    assert (abs(centers.mean(1) - reference["centre_mean_frac"]) < sigma * 0.2).all()
    whole = np.mean((h == height) & (w == width))
    assert abs(whole - reference["fallback_fraction_full_image"]) < 0.003


def test_boxes_reach_every_position(key):
    boxes = random_boxes(key, 2000, (8, 9), scale=(0.2, 0.3), ratio=(1.0, 1.0))
    top, left, h, w = np.asarray(boxes).T
    four = (h == 4) & (w == 4)
    assert set(zip(top[four], left[four], strict=True)) == {
        (i, j) for i in range(5) for j in range(6)
    }


@pytest.mark.parametrize(
    "image_size, expected",
    [((4, 40), (0, 17, 4, 5)), ((40, 4), (17, 0, 5, 4)), ((6, 6), (0, 0, 6, 6))],
)
def test_where_no_box_fits_the_largest_centered_one_is_taken(key, image_size, expected):
    ratio = (0.8, 1.25)
    if image_size == (6, 6):
        ratio = (0.5, 0.5)  # never fits with the whole area; allowed aspect: 3 wide
        expected = (0, 1, 6, 3)
    boxes = random_boxes(key, 3, image_size, scale=(1.0, 1.0), ratio=ratio)
    np.testing.assert_array_equal(boxes, [expected] * 3)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
def test_the_whole_image_at_its_size_is_itself(key, method, antialias):
    images = jax.random.uniform(key, (2, 7, 9, 3))
    boxes = np.array([[0, 0, 7, 9]] * 2)
    same = crop_and_resize(images, boxes, (7, 9), method=method, antialias=antialias)
    np.testing.assert_allclose(same, images, atol=1e-6)


@st.composite
def _boxes(draw, height=10, width=12):
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    return draw(st.integers(0, height - h)), draw(st.integers(0, width - w)), h, w


@given(box=_boxes(), bicubic=st.booleans(), antialias=st.booleans())
def test_a_crop_sees_its_box_only(box, bicubic, antialias):
    inside = np.zeros((1, 10, 12, 1), bool)
    top, left, h, w = box
    inside[:, top : top + h, left : left + w] = True
    images = np.where(inside, np.float32(0.25), np.float32(1e6))
    crop = crop_and_resize(
        images,
        np.array([box]),
        (6, 5),
        method="bicubic" if bicubic else "bilinear",
        antialias=antialias,
    )
    np.testing.assert_allclose(crop, 0.25, atol=1e-5)


def test_shrinking_by_a_whole_number_averages(key):
    # A triangle as wide as two output pixels, on a grid of 2: weights 1 3 3 1.
    images = jax.random.uniform(key, (1, 12, 12, 1))
    half = crop_and_resize(images, np.array([[0, 0, 12, 12]]), 6, method="bilinear")
    x = np.asarray(images)[0, :, :, 0]
    weights = np.array([1, 3, 3, 1]) / 8
    np.testing.assert_allclose(
        half[0, 2, 3, 0], weights @ x[3:7, 5:9] @ weights, atol=1e-6
    )


def test_random_crops_stay_in_range_and_cut_boxes(key):
    checkers = np.indices((16, 16)).sum(0) % 2  # bicubic overshoots here
    images = np.broadcast_to(checkers[None, :, :, None], (32, 16, 16, 1))
    images = images.astype(np.float32)
    crops = random_resized_crop(key, images, 24, scale=(0.1, 1.0))
    assert crops.shape == (32, 24, 24, 1)
    assert crops.min() == 0 and crops.max() == 1
    boxes = random_boxes(key, 32, (16, 16), scale=(0.1, 1.0))
    expected = jnp.clip(crop_and_resize(images, boxes, 24), 0, 1)
    np.testing.assert_allclose(crops, expected, atol=1e-6)
    assert np.ptp(np.asarray(crops).mean((1, 2, 3))) > 1e-3  # not all alike


def test_flip_mirrors_about_the_given_share(key):
    images = jnp.tile(jnp.arange(6.0).reshape(1, 1, 6, 1) / 6, (4000, 2, 1, 1))
    flipped = np.asarray(augment.random_flip(key, images))
    first = flipped[:, 0, 0, 0]
    mirrored = first == images[0, 0, -1, 0]
    np.testing.assert_array_equal(
        flipped, np.where(mirrored.reshape(-1, 1, 1, 1), images[:, :, ::-1], images)
    )
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    few = augment.random_flip(key, images, probability=0.1)[:, 0, 0, 0] > 0
    assert abs(few.mean() - 0.1) < 4 * 0.3 / np.sqrt(4000)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 150), (90, 70)])
def test_products_mix_what_taps_do(key, size, method, antialias, monkeypatch):
    images = jax.random.uniform(key, (6, 90, 70, 3))
    boxes = random_boxes(key, 5, (90, 70), scale=(0.01, 1.0))
    boxes = np.concatenate([boxes, [[0, 0, 90, 70]]])
    options = {"method": method, "antialias": antialias}
    mixed = crop_and_resize(images, boxes, size, **options)
    monkeypatch.setattr(taps, "mix_by_taps", taps.mix_by_products)
    product = augment.crop_and_resize(images, boxes, size, **options)
    np.testing.assert_allclose(mixed, product, atol=2e-5)


def test_a_crop_can_be_mirrored_on_the_way(key):
    images = jax.random.uniform(key, (8, 12, 12, 3))
    boxes = random_boxes(key, 8, (12, 12), scale=(0.1, 1.0))
    mirrored = np.arange(8) % 2 == 0
    plain = geometry.crop_boxes(images, boxes, (9, 10), "bicubic")
    crops = geometry.crop_boxes(images, boxes, (9, 10), "bicubic", mirrored=mirrored)
    expected = np.where(mirrored[:, None, None, None], plain[:, :, ::-1], plain)
    np.testing.assert_allclose(crops, expected, atol=1e-6)
