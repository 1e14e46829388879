"""Backbones by name: what fits which images, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jemjax.models import BACKBONES, ViT, create_backbone

VITS = [name for name in BACKBONES if name.startswith("vit")]
RESNETS = [name for name in BACKBONES if name.startswith("resnet")]


def _features(model, size, channels):
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    init = functools.partial(model.init_with_output, train=True)
    return jax.eval_shape(init, jax.random.key(0), images)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("size", "channels"), [(32, 3), (16, 1)])
def test_every_backbone_takes_small_images(name, size, channels):
    model = create_backbone(name, image_size=size)
    features, _ = _features(model, size, channels)
    assert features.shape == (2, model.num_features)
    assert features.dtype == jnp.float32


def test_there_are_both_kinds():
    assert VITS == ["vit-tiny", "vit-small", "vit-base", "vit-narrow"]
    assert RESNETS == ["resnet18", "resnet34", "resnet50", "resnet-narrow"]


@pytest.mark.parametrize(
    ("image_size", "patch_size"),
    [(224, 16), (96, 16), (100, 10), (64, 4), (32, 4), (28, 4), (30, 3), (16, 2)]
    + [(8, 2), (9, 1)],
)
def test_patches_fit_the_images(image_size, patch_size):
    model = create_backbone("vit-narrow", image_size=image_size)
    assert isinstance(model, ViT) and model.patch_size == patch_size
    assert model.image_size == image_size
    assert model.grid(image_size) == image_size // patch_size


@pytest.mark.parametrize("name", VITS)
def test_options_reach_a_transformer(name):
    model = create_backbone(
        name,
        image_size=32,
        patch_size=8,
        drop_path=0.1,
        pooling="mean",
        layer_scale=0.1,
        dtype=jnp.bfloat16,
    )
    assert isinstance(model, ViT)
    assert (model.patch_size, model.drop_path, model.pooling) == (8, 0.1, "mean")
    assert (model.layer_scale, model.dtype) == (0.1, jnp.bfloat16)


def test_sizes_of_transformers():
    sizes = {}
    for name in VITS:
        model = create_backbone(name, image_size=32)
        _, variables = _features(model, 32, 3)
        sizes[name] = sum(x.size for x in jax.tree.leaves(variables))
    assert sizes["vit-narrow"] < sizes["vit-tiny"] / 7
    assert sizes["vit-tiny"] < sizes["vit-small"] / 3 < sizes["vit-base"] / 10


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"patch_size": 4}, "patch_size: got 4, expected None for resnet"),
        ({"drop_path": 0.1}, "drop_path: got 0.1, expected 0 for resnet"),
    ],
    ids=str,
)
def test_a_residual_network_has_no_patches_and_drops_nothing(name, option, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name, image_size=32, **option)


def test_wrong_values_are_refused(key):
    with pytest.raises(ValueError, match="expected one of resnet18"):
        create_backbone("resnet9", image_size=32)
    model = create_backbone("vit-narrow", image_size=32, patch_size=5)
    with pytest.raises(ValueError, match="image_size: got 32, expected a multiple"):
        _features(model, 32, 3)
