"""The operations on images, as the settings see them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jemjax import augment
from jemjax.augment import MaskRecipe, ViewRecipe

COUNT, HEIGHT, WIDTH = 8, 6, 5
VIEW = dataclasses.replace(
    augment.vicreg_small(6).views[0],
    grayscale_probability=0.5,
    blur_probability=0.5,
    solarize_probability=0.5,
)
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


def boxes(x):
    return jnp.broadcast_to(jnp.array([0, 1, 4, 3]), (x.shape[0], 4))


def factors(x):
    return 0.1 + 0.03 * jnp.arange(x.shape[0], dtype=jnp.float32)


def recipe(**changes):
    return ViewRecipe((dataclasses.replace(VIEW, **changes),))


def views(**changes):
    return lambda key, x: augment.make_views(key, x, recipe(**changes))


def masks(kind, ratio):
    def draw(key, x):
        return augment.make_masks(key, x.shape[0], 4, MaskRecipe(kind, ratio))

    return draw


# Functions of a key, or the keys of the rows, and of images (N, H, W, 3).
OPERATIONS = {
    "views": views(),
    "views, simclr": views(arithmetic="simclr"),
    "views, byol": views(arithmetic="byol"),
    "views, fused": views(color="fused"),
    "views of gray": lambda key, x: views()(key, x[..., :1]),
    "views of uint8": lambda key, x: views()(key, (255 * x).astype(jnp.uint8)),
    "views of bfloat16": lambda key, x: views()(key, x.astype(jnp.bfloat16)),
    "finish_views": lambda key, x: augment.finish_views(
        key, (jnp.concatenate([x, x[:, :, :1]], 2),), recipe()
    ),
    "evaluation_view": lambda key, x: augment.evaluation_view(x, recipe()),
    "brightness": lambda key, x: augment.adjust_brightness(x, 1),
    "brightness, byol": lambda key, x: augment.adjust_brightness(
        x, 0.2, arithmetic="byol"
    ),
    "contrast": lambda key, x: augment.adjust_contrast(x, factors(x)),
    "saturation": lambda key, x: augment.adjust_saturation(x, np.float64(0.5)),
    "saturation, simclr": lambda key, x: augment.adjust_saturation(
        x, factors(x), arithmetic="simclr"
    ),
    "hue": lambda key, x: augment.adjust_hue(x, factors(x)),
    "grayscale": lambda key, x: augment.to_grayscale(x),
    "solarize": lambda key, x: augment.solarize(x, factors(x)),
    "normalize": lambda key, x: augment.normalize(x, (0.5, 0.4, 0.3), [0.2, 0.2, 0.3]),
    "denormalize": lambda key, x: augment.denormalize(x, np.full(3, 0.5), 1),
    "jitter": lambda key, x: augment.color_jitter(key, x, **JITTER, probability=0.8),
    "random_grayscale": lambda key, x: augment.random_grayscale(
        key, x, probability=np.array(0.5)
    ),
    "random_solarize": lambda key, x: augment.random_solarize(key, x, probability=0.5),
    "random_flip": augment.random_flip,
    "random_crop": lambda key, x: augment.random_resized_crop(
        key, x, 4, scale=(0.2, 1), method="bilinear"
    ),
    "crop": lambda key, x: augment.crop_and_resize(x, boxes(x), 4),
    "crop, not antialiased": lambda key, x: augment.crop_and_resize(
        x, boxes(x), 4, antialias=False
    ),
    "blur": lambda key, x: augment.gaussian_blur(x, factors(x)),
    "random_blur": lambda key, x: augment.random_gaussian_blur(
        key, x, probability=0.5, padding="zero"
    ),
    "boxes": lambda key, x: augment.random_boxes(
        key, x.shape[0], (6, 5), scale=(0.2, 1)
    ),
    "random_patch_mask": lambda key, x: augment.random_patch_mask(
        key, x.shape[0], 9, ratio=np.array(0.5)
    ),
    "mask_of_noise": lambda key, x: augment.mask_of_noise(x[:, :, 0, 0], 0.5),
    "block_mask of a number": lambda key, x: augment.block_mask(
        key, x.shape[0], 4, num_masked=6
    ),
    "block_mask": masks("block", 0.6),
    "block_mask, own ratio": masks("block", (0.1, 0.5)),
    "multi_block_masks": lambda key, x: augment.multi_block_masks(key, x.shape[0], 4),
    "fill_masked": lambda key, x: augment.fill_masked(
        x, jnp.arange(x.shape[0] * 10).reshape(-1, 10) % 3 == 0, (2, 5)
    ),
}


def floats(made):
    return sum(
        jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(made)
    )


def with_gradient(name):
    """The operation, and the gradient of a sum, as a function of key and images."""
    operation = OPERATIONS[name]

    def call(key, images):
        gradient = jax.grad(lambda images: floats(operation(key, images)))(images)
        return operation(key, images), gradient

    return call
