"""Each answer of a method can be exchanged, and the traced step shows that it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.setups import (
    SIZE,
    TINY,
    Setup,
    every_method,
    setup_of,
    tiny_backbone,
    tiny_method,
)

from jemjax.augment import MaskRecipe
from jemjax.methods import METHODS
from jemjax.models import MaskedTokens
from jemjax.training.config.options import ViewOptions
from jemjax.training.config.parts import apply_views
from jemjax.training.step.branch import Branches, Statistics

EVERY = every_method()
# data2vec's network is of another kind: patches, not embeddings.
EMBEDDING = every_method("data2vec")


@functools.cache
def _shapes(method, mask=None, backbone="resnet"):
    recipe = method.views(SIZE)
    if mask is not None:
        recipe = apply_views(ViewOptions(mask=mask), recipe)
    kind = "vit" if method.name == "data2vec" else backbone
    made = tiny_backbone(kind, pooling=method.pooling)
    return Setup(method, backbone=made, recipe=recipe).shapes()


def _widths(shapes, module):
    layers = shapes[0].params[module]
    return [
        layers[name]["kernel"].shape[1] for name in sorted(layers) if "Dense" in name
    ]


@EVERY
@pytest.mark.parametrize("target", ["shared", "stop-gradient", "momentum"])
def test_any_method_has_any_target(name, target):
    state, metrics = _shapes(tiny_method(name, target=target))
    assert bool(state.target_params) == (target == "momentum")
    assert ("target_momentum" in metrics) == (target == "momentum")


@EMBEDDING
def test_no_projector(name):
    state, _ = _shapes(tiny_method(name, projector="none"))
    assert "projector" not in state.params and "projector" not in state.target_params


@EMBEDDING
@pytest.mark.parametrize("widths", [(7,), (9, 5, 6)])
def test_a_projector_of_any_depth_and_width(name, widths):
    shapes = _shapes(tiny_method(name, projector=widths))
    assert _widths(shapes, "projector") == list(widths)


@EVERY
def test_no_predictor(name):
    state, _ = _shapes(tiny_method(name, predictor="none"))
    assert "predictor" not in state.params


@EVERY
def test_a_predictor_of_the_online_branch_only(name):
    shapes = _shapes(tiny_method(name, predictor=(5,), target="momentum"))
    hidden, output = _widths(shapes, "predictor")
    width = 12 if name == "data2vec" else TINY[name]["projector"][-1]
    assert (hidden, output) == (5, width)
    assert "predictor" not in shapes[0].target_params


@pytest.mark.parametrize(
    "name", ["simsiam", pytest.param("vicreg", marks=pytest.mark.slow)]
)
def test_stopping_the_gradient_changes_the_gradient_and_not_the_loss(name):
    metrics = []
    for target in ("shared", "stop-gradient"):
        setup = setup_of(name, target=target)
        _, (of_step,) = setup.steps(setup.init(), [0])
        metrics.append(of_step)
    shared, stopped = metrics
    np.testing.assert_allclose(stopped["loss"], shared["loss"], rtol=1e-5)
    difference = abs(stopped["gradient_norm"] - shared["gradient_norm"])
    assert difference > 1e-3 * shared["gradient_norm"]


# The methods whose losses have a target side; for the others the step stops what it
# gives them, and for SwAV the scores of which its assignments are made.
SIDED = ["byol", "simsiam", "dino", "data2vec", "moco", "moco-v3"]


@every_method(names=SIDED)
@pytest.mark.parametrize("target", ["shared", "stop-gradient", "momentum"])
def test_the_target_has_a_gradient_only_if_it_is_shared(name, target):
    method = tiny_method(name, target=target)
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    online, other = (random(6, 5), random(6, 5)), (random(6, 5), random(6, 5))
    memory = {}
    if name == "moco":
        online, other, memory = online[:1], other[:1], {"queue": random(4, 5)}
    if name == "data2vec":
        online = (MaskedTokens(random(6, 4, 5), jnp.ones((6, 4), bool)),)
        other = (random(6, 2, 4, 5),)
    gradient = jax.grad(lambda other: method.loss(online, other, memory)[0])(other)
    largest = max(float(jnp.abs(leaf).max()) for leaf in gradient)
    assert (largest > 0) == (target == "shared")


@EMBEDDING
@pytest.mark.parametrize("mask", ["random", "block"])
@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_any_method_may_mask(name, mask, backbone):
    _shapes(tiny_method(name), mask, backbone)
    recipe = apply_views(ViewOptions(mask=mask), tiny_method(name).views(SIZE))
    network = tiny_method(name).network(tiny_backbone(backbone))
    branches = Branches(tiny_method(name), network, recipe)
    # Each online view has a mask, and the target a pass of its own, without one.
    masks = branches.masks(jax.random.split(jax.random.key(0), 4))
    assert tuple(masks) == branches.online_views
    assert branches.separate and not branches.are_one
    assert all(0 < mask.mean() < 1 for mask, _ in masks.values())


@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_what_is_masked_is_not_seen(backbone):
    method = tiny_method("vicreg")
    setup = Setup(method, backbone=tiny_backbone(backbone))
    recipe = dataclasses.replace(setup.recipe, mask=MaskRecipe("random", 0.5))
    branches = Branches(method, setup.network, recipe)
    assert not branches.are_one  # the target sees the views whole
    state = setup.init()
    views = list(jax.random.normal(jax.random.key(0), (2, 4, SIZE, SIZE, 3)))
    keys = jax.random.split(jax.random.key(1), 4)
    masks = branches.masks(keys)
    side = setup.network.backbone.grid(SIZE)
    hidden = masks[0][0].reshape(4, side, side)
    hidden = hidden.repeat(SIZE // side, 1).repeat(SIZE // side, 2)[..., None]
    changed = [jnp.where(hidden, 9.0, views[0]), views[1]]

    def embed(views):
        statistics = Statistics(state.batch_stats, {})
        return branches.embed(state.params, {}, statistics, views, masks, keys)

    (_, (online, whole)), (_, (other, other_whole)) = embed(views), embed(changed)
    np.testing.assert_allclose(online[0].embedding, other[0].embedding, atol=1e-5)
    assert np.abs(whole[0].embedding - other_whole[0].embedding).max() > 1e-3


def test_dropped_patches_are_not_computed():
    method = tiny_method("simclr")
    texts = {}
    for mask in ("random", "drop"):
        options = ViewOptions(mask=mask, mask_ratio=0.75)
        recipe = apply_views(options, method.views(SIZE))
        setup = Setup(method, backbone=tiny_backbone("vit"), recipe=recipe)
        texts[mask] = setup.lower().as_text()
    # Of 16 patches 4 are left, beside the class token, in both views of 16 images.
    assert "tensor<32x5x12xf32>" in texts["drop"]
    assert "tensor<32x5x12xf32>" not in texts["random"]


def test_masking_in_place_of_cropping():
    method = tiny_method("byol")
    options = ViewOptions(crop=False, mask="block")
    recipe = apply_views(options, method.views(SIZE))
    assert all(view.crop_scale is None for view in recipe.views)
    setup = Setup(method, backbone=tiny_backbone("vit"), recipe=recipe)
    # Nothing is cropped, and so nothing resampled: the views have the images' size.
    assert "tensor<16x8x8x3xf32>" in setup.lower().as_text()


@pytest.mark.parametrize("name", ["swav", "dino"])
def test_local_views_are_seen_by_the_online_branch_only(name):
    method = tiny_method(name, local_views=3)
    setup = Setup(method)
    branches = Branches(method, setup.network, setup.recipe)
    assert [view.size for view in setup.recipe.views] == [SIZE] * 2 + [SIZE // 2] * 3
    assert branches.online_views == (0, 1, 2, 3, 4)
    assert branches.target_views == (0, 1)
    _, metrics = setup.shapes()
    assert metrics["loss"].shape == ()


def test_local_views_are_never_targets():
    method = tiny_method("dino", local_views=3, target="shared")
    setup = Setup(method)
    branches = Branches(method, setup.network, setup.recipe)
    assert branches.target_views == (0, 1) and not branches.are_one


def test_all_crops_of_swav_pass_the_projector_at_once():
    setup = Setup(tiny_method("swav", local_views=2))
    text = setup.lower().as_text()
    # 2 global and 2 local views of 16 images, and the projector's 16 hidden units.
    assert "tensor<64x16xf32>" in text


@EVERY
def test_any_method_has_a_transformer(name):
    state, _ = _shapes(tiny_method(name), backbone="vit")
    assert "patch_embedding" in state.params["backbone"]


def test_data2vec_on_a_convnet_predicts_positions():
    method = tiny_method("data2vec")
    state, _ = Setup(method, backbone=tiny_backbone()).shapes()
    # The target's statistics are averages of the online ones.
    assert jax.tree.leaves(state.target_batch_stats)


# What makes no sense, and words of the reason.
REFUSED = {
    "data2vec": [({"projector": (8,)}, "place for one")],
    "moco": [({"queue_length": 0}, "moco-v3 has no queue")],
    "byol": [
        ({"target_momentum": 1.5}, "expected a number in"),
        ({"target": "shared", "target_momentum": 0.9}, "no moving average"),
        ({"projector": ()}, "--projector: got no widths"),
        ({"predictor": (0,)}, "--predictor: got"),
    ],
}


@pytest.mark.parametrize(
    ("name", "swap", "reason"),
    [(name, *row) for name, rows in REFUSED.items() for row in rows],
)
def test_a_swap_that_makes_no_sense_is_refused(name, swap, reason):
    problems = tiny_method(name, **swap).problems(16)
    assert len(problems) == 1 and reason in problems[0]


@pytest.mark.parametrize(
    ("name", "mask", "backbone", "reason"),
    [
        ("vicreg", "drop", "resnet", "transformers only"),
        ("data2vec", "drop", "vit", "cannot be left out"),
        ("data2vec", "none", "vit", "what is masked is predicted"),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(name, mask, backbone, reason):
    with pytest.raises(ValueError, match=reason):
        _shapes(tiny_method(name), mask, backbone)


def test_a_ratio_without_a_mask_is_refused():
    with pytest.raises(ValueError, match="--views.mask"):
        apply_views(ViewOptions(mask_ratio=0.5), METHODS["vicreg"]().views(SIZE))
