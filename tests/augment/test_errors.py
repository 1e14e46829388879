"""What is refused: by the argument's name, with what was got and expected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax import augment

KEY = jax.random.key(0)
IMAGES = np.zeros((4, 8, 8, 3), np.float32)
VIEW = augment.vicreg_small(8).views[0]
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


@pytest.mark.parametrize(
    "images, got",
    [
        (np.zeros((8, 8, 3), np.float32), r"\(8, 8, 3\)"),
        (np.zeros((4, 8, 8, 2), np.float32), r"\(4, 8, 8, 2\)"),
        (np.zeros((4, 3, 8, 8), np.float32), r"\(4, 3, 8, 8\)"),
        (np.zeros((4, 0, 8, 3), np.float32), r"\(4, 0, 8, 3\)"),
        (np.zeros((4, 8, 8, 3), np.int32), "int32"),
        (np.zeros((4, 8, 8, 3), bool), "bool"),
        ([[0.5]], "list"),
    ],
)
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: augment.make_views(KEY, x, augment.vicreg_small(8)),
        lambda x: augment.evaluation_view(x, augment.vicreg_small(8)),
        lambda x: augment.random_flip(KEY, x),
        lambda x: augment.gaussian_blur(x, 1.0),
        augment.to_grayscale,
    ],
)
def test_images(images, got, operation):
    with pytest.raises(ValueError, match=f"images: got .*{got}.*expected"):
        operation(images)


CALLS = {
    "size": lambda v: augment.random_resized_crop(KEY, IMAGES, v, scale=(0.1, 1.0)),
    "scale": lambda v: augment.random_resized_crop(KEY, IMAGES, 8, scale=v),
    "ratio": lambda v: augment.random_boxes(KEY, 4, (8, 8), scale=(0.1, 1.0), ratio=v),
    "method": lambda v: augment.random_resized_crop(
        KEY, IMAGES, 8, scale=(0.1, 1.0), method=v
    ),
    "boxes": lambda v: augment.crop_and_resize(IMAGES, v, 8),
    "probability": lambda v: augment.random_flip(KEY, IMAGES, probability=v),
    "probability of grayscale": lambda v: augment.random_grayscale(
        KEY, IMAGES, probability=v
    ),
    "sigma": lambda v: augment.random_gaussian_blur(
        KEY, IMAGES, sigma=v, probability=0.5
    ),
    "sigma of blur": lambda v: augment.gaussian_blur(IMAGES, v),
    "kernel_size": lambda v: augment.gaussian_blur(IMAGES, 1.0, kernel_size=v),
    "padding": lambda v: augment.gaussian_blur(IMAGES, 1.0, padding=v),
    "hue": lambda v: augment.color_jitter(
        KEY, IMAGES, **dict(JITTER, hue=v), probability=0.8
    ),
    "contrast": lambda v: augment.color_jitter(
        KEY, IMAGES, **dict(JITTER, contrast=v), probability=0.8
    ),
    "factor": lambda v: augment.adjust_contrast(IMAGES, v),
    "factor of byol": lambda v: augment.adjust_brightness(IMAGES, v, arithmetic="byol"),
    "arithmetic": lambda v: augment.adjust_contrast(IMAGES, 1.0, arithmetic=v),
    "factor of hue": lambda v: augment.adjust_hue(IMAGES, v),
    "threshold": lambda v: augment.solarize(IMAGES, v),
    "mean": lambda v: augment.normalize(IMAGES, v, 1.0),
    "std": lambda v: augment.normalize(IMAGES, 0.0, v),
    "key": lambda v: augment.random_flip(v, IMAGES),
    "part": lambda v: augment.vicreg_small().without(v),
    "views": lambda v: augment.ViewRecipe(v),
}


@pytest.mark.parametrize(
    "argument, value",
    [
        ("size", 0),
        ("size", 8.0),
        ("size", (8, -1)),
        ("size", (8, 8, 3)),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.4)),
        ("scale", (0.5, 1.1)),
        ("scale", 0.5),
        ("ratio", (float("nan"), 1.0)),
        ("ratio", (-1.0, 1.0)),
        ("method", "nearest"),
        ("boxes", np.zeros((3, 4), np.int32)),
        ("boxes", None),
        ("probability", -0.1),
        ("probability", 1.5),
        ("probability", float("nan")),
        ("probability", "often"),
        ("probability of grayscale", 2),
        ("sigma", (0.0, 1.0)),
        ("sigma", (2.0, 1.0)),
        ("sigma of blur", 0.0),
        ("sigma of blur", float("inf")),
        ("sigma of blur", np.ones(3, np.float32)),
        ("kernel_size", 4),
        ("kernel_size", 0),
        ("kernel_size", 17),
        ("padding", "edge"),
        ("hue", 0.6),
        ("hue", -0.1),
        ("contrast", -0.1),
        ("factor", -1.0),
        ("factor", np.ones((4, 1), np.float32)),
        ("factor of byol", -1.5),
        ("arithmetic", "pillow"),
        ("factor of hue", 0.7),
        ("threshold", 128),
        ("mean", (0.5, 0.5)),
        ("std", (0.2, 0.2, 0.0)),
        ("key", jax.random.split(KEY, 5)),
        ("key", jnp.zeros(2, jnp.float32)),
        ("key", 0),
        ("part", "color"),
        ("views", ()),
    ],
)
def test_arguments(argument, value):
    name = argument.split()[0]
    with pytest.raises(ValueError, match=f"{name}: got .*expected"):
        CALLS[argument](value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("size", 0),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", [0.2, 1.0]),
        ("crop_ratio", (2.0, 1.0)),
        ("interpolation", "nearest"),
        ("flip_probability", 2.0),
        ("jitter_probability", -1.0),
        ("saturation", -0.1),
        ("hue", 0.6),
        ("blur_probability", 1.1),
        ("arithmetic", "pillow"),
        ("color", "fast"),
        ("blur_sigma", (0.0, 2.0)),
        ("blur_kernel_size", 4),
        ("blur_kernel_size", 17),
        ("solarize_threshold", 128.0),
        ("mean", (0.5, 0.5)),
        ("std", (0.5, 0.5, 0.0)),
    ],
)
def test_fields_of_a_view(field, value):
    with pytest.raises(ValueError, match=f"{field}: got .*expected"):
        dataclasses.replace(VIEW, **{field: value})


def test_what_is_not_linear_is_not_fused():
    with pytest.raises(ValueError, match="color: got 'fused' .* byol.*expected"):
        dataclasses.replace(VIEW, color="fused", arithmetic="byol")


def test_traced_numbers_are_accepted():
    @jax.jit
    def flip(probability):
        return augment.random_flip(KEY, IMAGES, probability=probability)

    np.testing.assert_array_equal(flip(0.5), IMAGES)
