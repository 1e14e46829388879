"""The network and the views that a resolved configuration stands for."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from jemjax.augment import MaskRecipe, ViewRecipe
from jemjax.models import create_backbone
from jemjax.training.config.options import PretrainConfig, ViewOptions


def make_network(config: PretrainConfig) -> nn.Module:
    """The network of a resolved configuration.

    Raises:
        ValueError: for values of which none can be made.
    """
    assert config.image_size and config.backbone
    backbone = create_backbone(
        config.backbone,
        image_size=config.image_size,
        dtype=jnp.dtype(config.compute_dtype),
        patch_size=config.patch_size,
        drop_path=config.drop_path or 0.0,
        pooling=config.method.pooling,
        layer_scale=config.layer_scale,
    )
    return config.method.network(backbone)


def make_recipe(config: PretrainConfig) -> ViewRecipe:
    """The views of a resolved configuration.

    Raises:
        ValueError: for values of which none can be made.
    """
    assert config.image_size
    return apply_views(config.views, config.method.views(config.image_size))


def apply_views(options: ViewOptions, recipe: ViewRecipe) -> ViewRecipe:
    """The recipe with these options.

    Raises:
        ValueError: where they do not fit it, or one another.
    """
    if options.crop_scale is not None:
        scale = tuple(options.crop_scale)
        views = [
            dataclasses.replace(view, crop_scale=scale)
            for view in recipe.views[: recipe.num_global]
        ]
        views += recipe.views[recipe.num_global :]
        recipe = dataclasses.replace(recipe, views=tuple(views))
    if options.color is not None:
        whose = {"arithmetic": "torchvision"} if options.color == "fused" else {}
        views = tuple(
            dataclasses.replace(view, color=options.color, **whose)
            for view in recipe.views
        )
        recipe = dataclasses.replace(recipe, views=views)
    if options.mask == "none":
        recipe = dataclasses.replace(recipe, mask=None)
    elif options.mask is not None:
        ratio = {"drop": 0.75}.get(options.mask, 0.6)
        recipe = dataclasses.replace(recipe, mask=MaskRecipe(options.mask, ratio))
    if options.mask_ratio is not None:
        if recipe.mask is None:
            raise ValueError(
                f"mask_ratio: got {options.mask_ratio} where nothing is masked,"
                " expected --views.mask too"
            )
        mask = dataclasses.replace(recipe.mask, ratio=options.mask_ratio)
        recipe = dataclasses.replace(recipe, mask=mask)
    for part in ("crop", "flip", "jitter", "grayscale", "blur", "solarize"):
        if getattr(options, part) is False:
            recipe = recipe.without(part)
    return recipe
