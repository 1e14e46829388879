import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps, JpegImagePlugin

from jemjax.augment import crop_and_resize, random_boxes
from jemjax.augment.inputs import example_keys
from jemjax.augment.inputs import uniforms as device_uniforms
from jemjax.data import Crop, DataError
from jemjax.data.crops import (
    DRAWS,
    Box,
    cut_out,
    random_box,
    read_crops,
    reduction_for,
    uniforms,
)
from jemjax.data.images import ORIENTATION

RANDOM = np.random.default_rng(0)
COUNT = 4000  # boxes of which statistics are taken


def smooth(height, width, channels=3):
    """An image without fine detail, of which a reduced decode loses nothing."""
    coarse = RANDOM.integers(0, 256, (5, 6, channels), np.uint8)
    image = Image.fromarray(coarse.squeeze())
    return image.resize((width, height), Image.Resampling.BICUBIC)


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def crops_of(file, *crops, row=0, channels=3):
    draws = [uniforms(3, view, row, 1)[0] for view in range(len(crops))]
    made = read_crops(file, crops, draws, channels, "image")
    return [crop.astype(int) for crop in made]


# ------------------------------------------------------------------ boxes


@pytest.mark.parametrize("case", ["simclr_0.08_1", "local_0.05_0.4", "global_0.4_1"])
def test_boxes_have_torchvisions_distribution(case, golden):
    reference = {
        name.partition("/")[2]: value
        for name, value in golden("rrc_stats").items()
        if name.startswith(f"{case}/")
    }
    height, width = (int(side) for side in reference["hw"])
    scale = tuple(reference["scale"].tolist())
    boxes = [
        random_box(draws, height, width, scale, (3 / 4, 4 / 3))
        for draws in uniforms(0, 0, 0, COUNT)
    ]
    top, left, h, w = np.array(boxes, float).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    sigma = 4 * np.sqrt(1 / 4000 + 1 / COUNT)  # of both samples' means
    for name, values in (
        ("area", h * w / (height * width)),
        ("logratio", np.log(w / h)),
    ):
        mean, std = reference[f"{name}_mean_std"]
        assert abs(values.mean() - mean) < sigma * std
        np.testing.assert_allclose(
            np.percentile(values, (5, 25, 50, 75, 95)),
            reference[f"{name}_quantiles_5_25_50_75_95"],
            atol=0.03,
        )
    centers = np.array([(top + h / 2) / height, (left + w / 2) / width])
    assert (abs(centers.mean(1) - reference["centre_mean_frac"]) < sigma * 0.2).all()


@pytest.mark.parametrize("size", [(40, 60), (500, 375), (6, 60), (1, 1)])
def test_boxes_are_those_of_the_device_for_the_same_draws(size, key):
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    expected = random_boxes(key, 500, size, scale=scale, ratio=ratio)
    draws = np.asarray(device_uniforms(example_keys(key, 500), DRAWS), np.float64).T
    height, width = size
    boxes = [random_box(row, height, width, scale, ratio) for row in draws]
    # In another precision a number may be rounded to the other side.
    assert np.mean((np.array(boxes) == expected).all(axis=1)) > 0.995


def test_draws_of_a_row_depend_on_seed_view_and_row_only():
    everything = uniforms(1, 0, 0, 40)
    np.testing.assert_array_equal(uniforms(1, 0, 17, 5), everything[17:22])
    others = [uniforms(1, 1, 0, 40), uniforms(2, 0, 0, 40), uniforms(1, 0, 40, 40)]
    numbers = np.concatenate([everything, *others]).ravel()
    assert len(np.unique(numbers)) == len(numbers)
    assert abs(numbers.mean() - 0.5) < 4 / np.sqrt(12 * len(numbers))


# ------------------------------------------------------------------ pixels


def test_pixels_are_those_of_pillows_crop_and_resize(golden):
    arrays = {n: a for n, a in golden("augment_torchvision").items()}
    image = Image.fromarray(arrays["img8"].transpose(1, 2, 0))
    names = [name for name in arrays if name.startswith("pil_crop_")]
    assert len(names) == 6
    for name in names:
        *box, _, size, method = name.removeprefix("pil_crop_").split("_")
        crop = Crop(int(size.split("x")[0]), (0.1, 1.0), interpolation=method)
        made = cut_out(image, Box(*map(int, box)), 1, crop)
        np.testing.assert_array_equal(made, arrays[name].transpose(1, 2, 0), name)


@pytest.mark.parametrize("method, levels", [("bilinear", 1), ("bicubic", 6)])
def test_pixels_are_those_of_the_device(method, levels):
    image = smooth(61, 47)
    scale, ratio = (0.1, 1.0), (3 / 4, 4 / 3)
    crop = Crop(24, scale, ratio, method)
    boxes = [random_box(draws, 61, 47, scale, ratio) for draws in uniforms(3, 0, 0, 8)]
    images = jnp.broadcast_to(np.asarray(image), (8, 61, 47, 3))
    on_device = jax.jit(crop_and_resize, static_argnames=("size", "method"))
    expected = on_device(images, np.array(boxes), size=24, method=method) * 255
    file = stored(image, "PNG")
    made = [crops_of(file, crop, row=row)[0] for row in range(8)]
    np.testing.assert_allclose(made, np.clip(expected, 0, 255), atol=levels)


def test_a_view_without_a_crop_is_the_largest_centered_square():
    image = Image.new("RGB", (60, 20), "white")
    image.paste("red", (20, 0, 40, 20))
    (made,) = crops_of(stored(image, "PNG"), Crop(10, None))
    np.testing.assert_array_equal(made, np.broadcast_to([255, 0, 0], (10, 10, 3)))


def test_views_have_their_own_sizes_and_boxes():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (150, 200))
    file = stored(Image.fromarray(ramp), "PNG")
    first, second, local = crops_of(
        file, Crop(8, (0.2, 0.4)), Crop(8, (0.2, 0.4)), Crop(4, (0.05, 0.1)), channels=1
    )
    assert first.shape == second.shape == (8, 8, 1) and local.shape == (4, 4, 1)
    assert (first != second).any()


# ------------------------------------------------------------------ reduced decoding


@pytest.mark.parametrize(
    "boxes, sizes, expected",
    [
        ([(64, 64)], [64], 1),
        ([(127, 300)], [64], 1),
        ([(128, 128)], [64], 2),
        ([(300, 128)], [64], 2),
        ([(256, 256)], [64], 4),
        ([(2000, 2000)], [64], 8),
        ([(2000, 2000), (130, 900)], [64, 64], 2),
        ([(2000, 2000), (130, 900)], [64, 32], 4),
        ([(3, 3)], [64], 1),
    ],
)
def test_the_reduction_leaves_every_crop_its_resolution(boxes, sizes, expected):
    boxes = [Box(0, 0, *sides) for sides in boxes]
    crops = [Crop(size, (0.1, 1.0)) for size in sizes]
    assert reduction_for(boxes, crops) == expected


@pytest.fixture
def decoded(monkeypatch):
    """The sizes at which JPEGs are decoded."""
    sizes = []
    load = JpegImagePlugin.JpegImageFile.load

    def spy(self):
        sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", spy)
    return sizes


def oriented(how, orientation):
    if how == "XMP":
        return {"xmp": f'<x tiff:Orientation="{orientation}"/>'.encode()}
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return {"exif": exif}


@pytest.mark.parametrize(
    "how, orientation", [*(("EXIF", number) for number in range(1, 9)), ("XMP", 6)]
)
@pytest.mark.parametrize("size, reduction", [(250, 1), (150, 2), (75, 4), (40, 8)])
def test_a_jpeg_is_decoded_no_larger_than_needed_and_shows_the_same(
    size, reduction, how, orientation, decoded
):
    image = smooth(403, 501)
    file = stored(image, "JPEG", quality=95, **oriented(how, orientation))
    # Boxes have at least 383 pixels a side, and never more than 403 both ways.
    crops = [Crop(size, (0.81, 1.0), (0.9, 1.1)), Crop(size // 2, None)]
    made = crops_of(file, *crops)
    assert decoded[0] == (-(-501 // reduction), -(-403 // reduction))
    upright = ImageOps.exif_transpose(Image.open(file))
    expected = crops_of(stored(upright, "PNG", exif=Image.Exif()), *crops)
    for crop, pixels in zip(expected, made, strict=True):
        np.testing.assert_allclose(pixels, crop, atol=6)
        assert np.mean(abs(pixels - crop)) < 0.8


def test_what_cannot_be_read_is_named():
    with pytest.raises(DataError, match="image: is a text file"):
        crops_of(io.BytesIO(b"text"), Crop(8, (0.2, 1.0)))
    cut = stored(smooth(300, 300), "JPEG").getvalue()[:-500]
    with pytest.raises(DataError, match="image: starts as a JPEG image but is damaged"):
        crops_of(io.BytesIO(cut), Crop(8, (0.2, 1.0)))
