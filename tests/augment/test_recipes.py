"""Views: the recipe's parts in their order, each example on its own, on any devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jemjax import augment, wire
from jemjax.augment import color
from jemjax.augment.geometry import boxes_of
from jemjax.augment.inputs import example_keys, to_floats, uniforms

PARTS = ("crop", "flip", "jitter", "grayscale", "blur", "solarize")
# All parts in one small view, of pixels in [0, 1].
EVERYTHING = augment.ViewRecipe(
    (
        dataclasses.replace(
            augment.vicreg_small(12).views[0],
            grayscale_probability=0.5,
            blur_probability=0.5,
            blur_kernel_size=5,
            solarize_probability=0.5,
            mean=0.0,
            std=1.0,
        ),
    )
)

# What the recipes below do not change, as published for VICReg, Barlow Twins and BYOL.
NO_BLUR = augment.View(
    size=224,
    crop_scale=(0.08, 1.0),
    crop_ratio=(3 / 4, 4 / 3),
    interpolation="bicubic",
    flip_probability=0.5,
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale_probability=0.2,
    blur_probability=0.0,
    blur_sigma=(0.1, 2.0),
    blur_kernel_size=None,
    solarize_probability=0.0,
    solarize_threshold=0.5,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    arithmetic="torchvision",
    color="faithful",
)


def changed(view=NO_BLUR, **changes):
    jitter = changes.pop("jitter", None)
    if jitter is not None:
        names = ("brightness", "contrast", "saturation", "hue")
        changes |= dict(zip(names, jitter, strict=True))
    return dataclasses.replace(view, **changes)


BYOL = (
    changed(blur_probability=1.0),
    changed(blur_probability=0.1, solarize_probability=0.2),
)
SMALL = changed(size=32, crop_scale=(0.2, 1.0))
SMALL_PAIR = (SMALL, changed(SMALL, solarize_probability=0.2))
STRONG = (0.8, 0.8, 0.8, 0.2)
MEDIUM = (0.4, 0.4, 0.4, 0.1)
SWAV = changed(
    jitter=STRONG,
    blur_probability=0.5,
    interpolation="bilinear",
    std=(0.228, 0.224, 0.225),
)
NO_COLOR = changed(jitter_probability=0.0, grayscale_probability=0.0)
LEJEPA = changed(
    crop_scale=(0.3, 1.0),
    interpolation="bilinear",
    blur_probability=0.5,
    blur_kernel_size=7,
    solarize_probability=0.2,
)
PUBLISHED = {
    "vicreg_imagenet": BYOL,
    "byol_imagenet": tuple(changed(view, arithmetic="byol") for view in BYOL),
    "simclr_imagenet": (
        changed(
            jitter=STRONG,
            blur_probability=0.5,
            mean=0.0,
            std=1.0,
            arithmetic="simclr",
        ),
    )
    * 2,
    "moco_imagenet": (
        changed(
            crop_scale=(0.2, 1.0),
            interpolation="bilinear",
            jitter=MEDIUM,
            blur_probability=0.5,
        ),
    )
    * 2,
    "mocov3_imagenet": tuple(
        changed(view, crop_scale=(0.2, 1.0), interpolation="bilinear") for view in BYOL
    ),
    "swav_imagenet": (changed(SWAV, crop_scale=(0.14, 1.0)),) * 2
    + (changed(SWAV, size=96, crop_scale=(0.05, 0.14)),) * 6,
    "dino_imagenet": tuple(changed(view, crop_scale=(0.4, 1.0)) for view in BYOL)
    + (changed(size=96, crop_scale=(0.05, 0.4), blur_probability=0.5),) * 8,
    # As its code ran, which blurs with one minus the probability that it names.
    "dinov2_imagenet": tuple(
        changed(
            solarize_probability=solarize,
            size=size,
            crop_scale=scale,
            blur_probability=blur,
            blur_kernel_size=9,
        )
        for size, scale, blur, solarize in [
            (224, (0.32, 1.0), 0.0, 0.0),
            (224, (0.32, 1.0), 0.9, 0.2),
            *[(96, (0.05, 0.32), 0.5, 0.0)] * 8,
        ]
    ),
    "mae_imagenet": (changed(NO_COLOR, crop_scale=(0.2, 1.0)),),
    "ijepa_imagenet": (
        changed(
            NO_COLOR,
            crop_scale=(0.3, 1.0),
            interpolation="bilinear",
            flip_probability=0.0,
        ),
    ),
    "lejepa_imagenet": (LEJEPA,) * 2
    + (changed(LEJEPA, size=98, crop_scale=(0.05, 0.3)),) * 6,
    "data2vec_imagenet": (
        changed(
            jitter_probability=1.0, jitter=(0.4, 0.4, 0.4, 0), grayscale_probability=0
        ),
    ),
    "vicreg_small": (changed(SMALL, solarize_probability=0.1),) * 2,
    "byol_small": SMALL_PAIR,
    "simclr_small": (changed(SMALL, jitter=MEDIUM, mean=0.0, std=1.0),) * 2,
    "moco_small": (changed(SMALL, jitter=MEDIUM),) * 2,
    "swav_small": (changed(SMALL, jitter=STRONG),) * 2,
    "dino_small": SMALL_PAIR,
    "lejepa_small": (changed(SMALL, solarize_probability=0.2),) * 2,
    "data2vec_small": (
        changed(
            SMALL,
            jitter_probability=1.0,
            jitter=(0.4, 0.4, 0.4, 0),
            grayscale_probability=0,
        ),
    ),
}
MASKED = {
    # BEiT's blocks, 120 of 196 patches.
    "data2vec_imagenet": "61% of the patches, in blocks",
    "data2vec_small": "61% of the patches, in blocks",
    "mae_imagenet": "75% of the patches, left out",
}
MULTI_CROP = (
    "swav_imagenet",
    "dino_imagenet",
    "dinov2_imagenet",
    "lejepa_imagenet",
    "swav_small",
    "dino_small",
    "lejepa_small",
)

make_views = jax.jit(augment.make_views, static_argnames="recipe")


def nothing_random(recipe):
    return functools.reduce(augment.ViewRecipe.without, PARTS, recipe)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 14, 3), np.uint8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_views(name):
    recipe = getattr(augment, name)()
    assert recipe.views == PUBLISHED[name]
    table = str(recipe).splitlines()
    masked = [f"masked: {MASKED[name]}"] if name in MASKED else []
    assert table[1 + len(recipe.views) :] == masked


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_size_is_that_of_the_global_views_and_nothing_else_depends_on_it(name):
    make = getattr(augment, name)
    for number, view in enumerate(make(48).views):
        expected = PUBLISHED[name][number]
        size = 48 if number < 2 else 14 if name.startswith("lejepa") else 16
        assert view == changed(expected, size=size)


@pytest.mark.parametrize(
    ("name", "global_scale"),
    [
        ("swav_imagenet", (0.08, 1.0)),
        ("dino_imagenet", (0.14, 1.0)),
        ("dinov2_imagenet", (0.32, 1.0)),
        ("lejepa_imagenet", (0.3, 1.0)),
    ],
)
def test_photographs_without_local_views(name, global_scale):
    recipe = getattr(augment, name)(num_local=0)
    pair = PUBLISHED[name][:2]
    assert recipe.views == tuple(changed(v, crop_scale=global_scale) for v in pair)


@pytest.mark.parametrize(
    ("name", "local_scale", "global_scale"),
    [
        ("swav_small", (0.05, 0.14), (0.14, 1.0)),
        ("dino_small", (0.05, 0.4), (0.4, 1.0)),
        ("lejepa_small", (0.05, 0.3), (0.3, 1.0)),
    ],
)
def test_local_views_of_small_images_have_half_their_size(
    name, local_scale, global_scale
):
    first, second, *local = getattr(augment, name)(32, num_local=3).views
    pair = PUBLISHED[name]
    assert (first, second) == tuple(changed(v, crop_scale=global_scale) for v in pair)
    assert local == [changed(pair[0], size=16, crop_scale=local_scale)] * 3


def test_where_crops_of_residual_networks_and_transformers_differ():
    for view in augment.mocov3_imagenet(smallest_crop=0.08).views:
        assert view.crop_scale == (0.08, 1.0)
    first, second, *local = augment.dino_imagenet(smallest_crop=0.14).views
    assert first.crop_scale == second.crop_scale == (0.14, 1.0)
    assert {view.crop_scale for view in local} == {(0.05, 0.14)}


@pytest.mark.parametrize("name", MULTI_CROP)
@pytest.mark.parametrize("num_local", [-1, 1.5, True])
def test_the_number_of_local_views_is_checked(name, num_local):
    with pytest.raises(ValueError, match="num_local: got"):
        getattr(augment, name)(num_local=num_local)


def test_global_and_local_views(images, key):
    recipe = augment.dino_small(12, num_local=2)
    assert recipe.num_global == 2
    views = jax.eval_shape(lambda: augment.make_views(key, images, recipe))
    assert [view.shape for view in views] == [(16, n, n, 3) for n in (12, 12, 6, 6)]
    whole = augment.evaluation_view(images, recipe)
    assert whole.shape == views[0].shape


def test_two_different_views_of_each_image(images, key):
    views = make_views(key, images, augment.vicreg_small(12))
    assert [view.shape for view in views] == [(16, 12, 12, 3)] * 2
    assert all(view.dtype == jnp.float32 for view in views)
    assert (np.abs(views[0] - views[1]).mean((1, 2, 3)) > 0.01).all()


@pytest.mark.parametrize("operation", ["flip", "jitter", "blur", "solarize"])
def test_crops_made_elsewhere_are_finished_with_the_same_draws(images, key, operation):
    others = [part for part in PARTS if part != operation]
    recipe = functools.reduce(
        augment.ViewRecipe.without, others, augment.byol_small(14)
    )
    view = dataclasses.replace(recipe.views[0], **{f"{operation}_probability": 0.5})
    recipe = augment.ViewRecipe((view, view))
    square = images[:, :14]
    finish = jax.jit(augment.finish_views, static_argnames="recipe")
    made = finish(key, (square, square), recipe)
    expected = make_views(key, square, recipe)  # the whole image is the crop
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (np.abs(made[0] - made[1]).max((1, 2, 3)) > 0.01).any()


def test_crops_that_are_not_the_recipes_are_refused(images, key):
    recipe = augment.vicreg_small(14)
    square = images[:, :14]
    for crops in [(), (square,), (square, images), (square, square[:8])]:
        with pytest.raises(ValueError, match=r"crops: got .* expected one for each"):
            augment.finish_views(key, crops, recipe)


def test_another_key_makes_another_view(images, key):
    (first,) = make_views(key, images, EVERYTHING)
    (second,) = make_views(jax.random.key(1), images, EVERYTHING)
    assert first.min() >= 0 and first.max() <= 1
    assert (np.abs(first - second).mean((1, 2, 3)) > 0.01).all()


def test_an_example_does_not_see_its_batch(images, key):
    (view,) = make_views(key, images, EVERYTHING)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(16))
    some = np.array([11, 3, 8, 0, 14])
    (alone,) = make_views(keys[some], images[some], EVERYTHING)
    np.testing.assert_allclose(alone, view[some], atol=2e-6)


def test_raw_keys_and_scaled_images_are_the_same_input(images, key):
    expected = augment.random_flip(key, images)
    scaled = images.astype(np.float32) / 255
    np.testing.assert_allclose(
        augment.random_flip(jax.random.key_data(key), scaled), expected, atol=1e-7
    )


def _mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def test_views_do_not_depend_on_the_number_of_devices(images, key, monkeypatch):
    with monkeypatch.context() as alone:
        alone.setattr(jax, "device_count", lambda: 1)
        make = functools.partial(augment.make_views, recipe=EVERYTHING)
        expected = jax.jit(make)(key, images)
    rows = NamedSharding(_mesh(), P("data"))
    sharded = jax.device_put(images, rows)
    program = make_views.lower(key, sharded, EVERYTHING).compile()
    views = program(key, sharded)
    assert views[0].sharding.is_equivalent_to(rows, 4)
    np.testing.assert_allclose(views[0], expected[0], atol=1e-6)
    assert wire.collectives(program) == []


def test_draws_are_the_same_bits_on_any_number_of_devices(key):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(64))

    @jax.jit
    def draw(keys):
        boxes = augment.random_boxes(keys, 64, (32, 32), scale=(0.08, 1.0))
        jitter = color.random_jitter(
            uniforms(keys, color.JITTER_DRAWS),
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            probability=0.8,
        )
        return boxes, jitter

    sharded = jax.device_put(keys, NamedSharding(_mesh(), P("data")))
    jax.tree.map(np.testing.assert_array_equal, draw(sharded), draw(keys))


def _program(recipe, images, key):
    return make_views.lower(key, images, recipe).as_text()


@pytest.fixture(scope="module")
def everything(images):
    return _program(EVERYTHING, images, jax.random.key(0))


@pytest.mark.parametrize("part", PARTS)
def test_what_is_left_out_is_not_in_the_program(part, images, key, everything):
    program = _program(EVERYTHING.without(part), images, key)
    assert len(program.splitlines()) < len(everything.splitlines())


def test_nothing_random_is_the_evaluation_view(images, key):
    recipe = nothing_random(EVERYTHING)
    (view,) = make_views(key, images, recipe)
    np.testing.assert_allclose(view, augment.evaluation_view(images, recipe), atol=1e-6)
    program = _program(recipe, images, key)
    assert "threefry" not in program and "while" not in program


def test_parts_are_applied_in_the_published_order(images, key):
    view = EVERYTHING.views[0]

    @jax.jit
    def one_by_one(key, images):
        draws = uniforms(example_keys(key, 16), 34)
        flip, grayscale, blur, sigma, solarize = (
            draws[i, :, None, None, None] for i in (22, 30, 31, 32, 33)
        )
        boxes = boxes_of(
            draws[:22], images.shape[1:3], scale=view.crop_scale, ratio=view.crop_ratio
        )
        x = jnp.clip(augment.crop_and_resize(images, boxes, 12), 0, 1)
        x = jnp.where(flip < 0.5, x[:, :, ::-1], x)
        jitter = color.random_jitter(
            draws[23:30],
            brightness=view.brightness,
            contrast=view.contrast,
            saturation=view.saturation,
            hue=view.hue,
            probability=view.jitter_probability,
        )
        x = color.apply_jitter(to_floats(x), jitter)
        x = jnp.where(grayscale < 0.5, augment.to_grayscale(x), x)
        sigma = 0.1 + 1.9 * sigma.ravel()
        blurred = augment.gaussian_blur(x, sigma, kernel_size=5)
        x = jnp.where(blur < 0.5, blurred, x)
        return jnp.where(solarize < 0.5, augment.solarize(x), x)

    np.testing.assert_allclose(
        make_views(key, images, EVERYTHING)[0], one_by_one(key, images), atol=2e-6
    )


def test_the_evaluation_view_of_images_of_the_right_size_is_normalized_only(images):
    square = images[:, :14]
    recipe = augment.vicreg_small(14)
    np.testing.assert_allclose(
        augment.evaluation_view(square, recipe),
        augment.normalize(square, recipe.views[0].mean, recipe.views[0].std),
        atol=1e-6,
    )


def test_one_channel(images, key):
    gray = images[..., :1]
    (view,) = make_views(key, gray, EVERYTHING)
    assert view.shape == (16, 12, 12, 1)
    assert view.min() >= 0 and view.max() <= 1
    assert augment.evaluation_view(gray, EVERYTHING).shape == (16, 12, 12, 1)


@pytest.mark.parametrize("color", ["faithful", "fused"])
@pytest.mark.parametrize("devices", [1, 8])
def test_float32_under_strict_promotion_and_x64(
    images, key, devices, color, monkeypatch
):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    view = dataclasses.replace(EVERYTHING.views[0], color=color)
    make = functools.partial(augment.make_views, recipe=augment.ViewRecipe((view,)))
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        (view,) = jax.eval_shape(make, key, images)
    assert view.dtype == jnp.float32


def test_a_recipe_is_a_key_and_a_table():
    assert hash(augment.vicreg_small()) == hash(augment.vicreg_small(32))
    assert augment.vicreg_small() != augment.vicreg_small(64)
    header, first, second = str(augment.vicreg_imagenet()).splitlines()
    assert header.split() == ["view", "size", *PARTS]
    assert "224" in first and "0.08-1" in first and "0.4 0.4 0.2 0.1" in first
    assert first.endswith("-") and second.endswith("p 0.2: from 0.5")
    assert "0.4 0.4 0.2 0.1 as byol" in str(augment.byol_imagenet())
    fused = changed(color="fused")
    assert "0.4 0.4 0.2 0.1 fused" in str(augment.ViewRecipe((fused,)))
    assert "sigma 0.1-2 of 9 pixels" in str(augment.dinov2_imagenet())
    bare = str(nothing_random(augment.vicreg_imagenet())).splitlines()[1]
    assert bare.split() == ["1", "224", "whole", "image,", "bicubic", *"-----"]
