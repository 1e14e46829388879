"""Backbones by name, fitted to the size of the images."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from jemjax.models.resnet import (
    ResNet,
    Stem,
    resnet18,
    resnet34,
    resnet50,
    resnet_narrow,
)
from jemjax.models.vit import ViT, vit_base, vit_narrow, vit_small, vit_tiny

RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet-narrow": resnet_narrow,
}
VITS: dict[str, Callable[..., ViT]] = {
    "vit-tiny": vit_tiny,
    "vit-small": vit_small,
    "vit-base": vit_base,
    "vit-narrow": vit_narrow,
}
BACKBONES: dict[str, Callable[..., ResNet | ViT]] = {**RESNETS, **VITS}


def create_backbone(
    name: str,
    *,
    image_size: int,
    dtype: Any = jnp.float32,
    patch_size: int | None = None,
    drop_path: float = 0.0,
    pooling: Literal["class", "mean"] = "class",
    layer_scale: float | None = None,
) -> ResNet | ViT:
    """A backbone by its name, with the stem or patches that fit the images.

    Args:
        name: resnet18, resnet34, resnet50 or resnet-narrow; vit-tiny, vit-small,
            vit-base or vit-narrow.
        image_size: height and width of a view in pixels. Up to 64, a residual network
            has the small-image stem, without a stride and pooling.
        dtype: of the activations, float32 or bfloat16.
        patch_size: of a transformer, in pixels; unless given, the largest divisor of
            the image size up to 16, for images up to 64 pixels up to 4, and below 24
            pixels up to 2.
        drop_path: of a transformer, in [0, 1): see `ViT`.
        pooling: of a transformer: "class" token, or "mean" of the patches; residual
            networks take the mean over positions.
        layer_scale: of a transformer, where its branches' factors begin; None: none.

    Returns:
        A module (N, H, W, C) -> (N, num_features).

    Raises:
        ValueError: for an unknown name, or what the backbone does not have.
    """
    if name not in BACKBONES:
        raise ValueError(
            f"backbone: got {name!r}, expected one of {', '.join(BACKBONES)}"
        )
    if name in VITS:
        return VITS[name](
            patch_size=_fitting_patch(image_size) if patch_size is None else patch_size,
            image_size=image_size,
            drop_path=drop_path,
            pooling=pooling,
            layer_scale=layer_scale,
            dtype=dtype,
        )
    if patch_size is not None:
        raise ValueError(
            f"patch_size: got {patch_size}, expected None for {name}, which sees"
            " pixels, not patches"
        )
    if drop_path:
        raise ValueError(
            f"drop_path: got {drop_path}, expected 0 for {name}, of which no branch is"
            " dropped"
        )
    if name == "resnet-narrow":
        # Stages down to 4 x 4 pixels: below, convolutions waste their time.
        stem: Stem = "patch" if image_size >= 24 else "small"
        resolution = image_size / (2 if stem == "patch" else 1)
        stages = min(3, max(1, 1 + round(math.log2(resolution / 4))))
        return resnet_narrow(stage_sizes=(1,) * stages, stem=stem, dtype=dtype)
    return RESNETS[name](stem="small" if image_size <= 64 else "imagenet", dtype=dtype)


def _fitting_patch(image_size: int) -> int:
    """The size of patches that cut usual images into 16 to 256 tokens."""
    largest = 16 if image_size > 64 else 4 if image_size >= 24 else 2
    divisors = range(1, largest + 1)
    return max(size for size in divisors if image_size % size == 0)
