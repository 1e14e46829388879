"""Pixels equal to torchvision's, BYOL's and SimCLR's, every key of the files."""

import re

import jax
import numpy as np
import pytest

from jemjax import augment
from jemjax.augment.recipes import IMAGENET_MEAN, IMAGENET_STD

ADJUST = {
    name: jax.jit(getattr(augment, f"adjust_{name}"))
    for name in ("brightness", "contrast", "saturation", "hue")
}
CHAIN = tuple(zip(ADJUST.values(), (1.3, 0.7, 1.15, 0.07), strict=True))

blur = jax.jit(augment.gaussian_blur, static_argnames=("kernel_size", "padding"))
crop = jax.jit(augment.crop_and_resize, static_argnames=("size", "method", "antialias"))

# Largest, and for Pillow also mean, difference: Pillow's in levels of 255, since it
# rounds to them between the steps, and hue in its 8-bit HSV is coarse.
TENSOR = {"hue": 1e-5, "chain": 1e-5, "crop": 1e-5}
PILLOW = {
    "brightness": (1.2, 0.52),
    "contrast": (1.2, 0.52),
    "saturation": (1.2, 0.52),
    "gray": (0.6, 0.25),
    "solarize": (1e-4, 1e-4),
    "hue": (10, 1.0),
    "crop_bilinear": (1, 0.35),
    "crop_bicubic": (6, 0.35),
    "chain": (13, 2.11),
}


def _apply(name, x):
    """The operation that a key names, on images (1, H, W, C)."""
    operation, *arguments = name.split("_")
    if operation in ADJUST:
        return ADJUST[operation](x, float(arguments[0]))
    if operation == "gray":
        return augment.to_grayscale(x)
    if operation == "solarize":
        threshold = {"0.5": 0.5, "128": 128 / 255}[arguments[0]]
        return augment.solarize(x, threshold)
    if operation == "blur":
        size, sigma = re.fullmatch(r"k(\d+)_s([\d.]+)", "_".join(arguments)).groups()
        return blur(x, float(sigma), kernel_size=int(size))
    if operation == "normalize":
        return augment.normalize(x, IMAGENET_MEAN, IMAGENET_STD)
    if operation == "crop":
        box = np.array([arguments[:4]], np.int32)
        size = tuple(int(side) for side in arguments[5].split("x"))
        return crop(
            x, box, size, method=arguments[6], antialias=arguments[-1] != "noaa"
        )
    assert operation == "chain"
    for number in arguments[0]:
        adjust, factor = CHAIN[int(number)]
        x = adjust(x, factor)
    return x


@pytest.fixture
def torchvision(golden):
    arrays = golden("augment_torchvision")
    return {name: array.transpose(1, 2, 0) for name, array in arrays.items()}


def test_tensor_operations(torchvision, key):
    x = torchvision.pop("x")[None]
    np.testing.assert_array_equal(
        augment.random_flip(key, x, probability=1.0)[0], torchvision.pop("hflip")
    )
    names = [n for n in torchvision if not n.startswith("pil_") and n != "img8"]
    assert len(names) == 33
    for name in names:
        np.testing.assert_allclose(
            _apply(name, x)[0],
            torchvision[name],
            rtol=0,
            atol=TENSOR.get(name.split("_")[0], 1e-6),
            err_msg=name,
        )


def test_pillow(torchvision):
    x = torchvision["x"][None]
    # Pillow's own blur is three box filters, not a Gaussian.
    names = [n for n in torchvision if re.match("pil_(?!blur)", n)]
    assert len(names) == 23
    for name in names:
        result = _apply(name.removeprefix("pil_"), x)[0]
        difference = 255 * np.clip(result, 0, 1) - torchvision[name].astype(float)
        parts = name.split("_")
        kind = f"crop_{parts[-1]}" if parts[1] == "crop" else parts[1]
        largest, mean = PILLOW[kind]
        assert np.abs(difference).max() <= largest, name
        assert np.abs(difference).mean() <= mean, name


# A kernel's size is given as published: half of it, rounded down, on either side.
KERNEL_SIZES = {"2.0": 3, "6.4": 7, "2": 3, "22": 23}


@pytest.mark.parametrize("arithmetic, count", [("byol", 12), ("simclr", 9)])
def test_other_arithmetic(golden, arithmetic, count):
    arrays = golden(f"augment_{arithmetic}")
    x = arrays.pop("x").astype(np.float32)[None]
    # A space of color, and a resize of the old TensorFlow, that nothing here uses.
    names = [n for n in arrays if n not in ("hsv", "center_crop_16")]
    assert len(names) == count
    for name in names:
        operation, argument = name.split("_")[0], name.split("_")[-1]
        if operation in ("brightness", "contrast", "saturation"):
            adjust = getattr(augment, f"adjust_{operation}")
            result = adjust(x, float(argument), arithmetic=arithmetic)
        elif operation == "blur":
            size = KERNEL_SIZES[name.split("_")[1].removeprefix("k")]
            sigma = float(argument.removeprefix("s"))
            result = blur(x, sigma, kernel_size=size, padding="zero")
        else:
            result = _apply(name, x)
        # Their operations leave it to the caller to clip, which theirs does.
        expected = np.clip(arrays[name], 0, 1)
        np.testing.assert_allclose(result[0], expected, atol=2e-5, err_msg=name)
