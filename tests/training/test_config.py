"""From options to a configuration in which no choice is left open, and back."""

import dataclasses

import pytest
import tyro
from PIL import Image

from jemjax.augment import MaskRecipe
from jemjax.augment.recipes import PARTS
from jemjax.data import Crop, open_data
from jemjax.errors import UserError
from jemjax.methods import METHODS
from jemjax.training.config import PretrainConfig, from_toml, resolve, to_toml
from jemjax.training.loop import build


@pytest.fixture(scope="module")
def digits():
    return open_data("digits", split="train")


def _parse(method, *arguments):
    default = PretrainConfig(method=METHODS[method]())
    return tyro.cli(PretrainConfig, args=arguments, default=default)


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_survives_its_file(name, digits, tmp_path):
    config = resolve(PretrainConfig(method=METHODS[name]()), digits)
    (tmp_path / "config.toml").write_text(to_toml(config))
    read = from_toml(tmp_path / "config.toml", PretrainConfig(method=METHODS[name]()))
    assert read == config
    assert resolve(read, digits) == config


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--projector", "64", "32"], "projector", (64, 32)),
        (["--projector", "none"], "projector", "none"),
        (["--predictor", "none"], "predictor", "none"),
        (["--predictor"], "predictor", ()),
        (["--target", "shared"], "target", "shared"),
        (["--target-momentum", "0.9"], "target_momentum", 0.9),
    ],
)
def test_swaps_on_the_command_line(arguments, field, value, digits):
    config = resolve(_parse("byol", *arguments), digits)
    assert getattr(config.method, field) == value


@pytest.mark.parametrize("name", METHODS)
def test_every_part_of_the_views_can_be_switched_off(name, digits):
    published = METHODS[name]().resolve(224, 64, 100).views(224)
    for part, field in PARTS.items():
        options = resolve(_parse(name, "--views.flip", f"--views.no-{part}"), digits)
        views = options.views.apply(published).views
        assert len(views) == len(published.views)
        for view, whole in zip(views, published.views, strict=True):
            if part == "crop":
                assert view.crop_scale is None
            else:
                assert getattr(view, field) == 0
                assert view.crop_ratio == whole.crop_ratio
    masked = _parse(name, "--views.mask", "random").views.apply(published)
    assert masked.mask is not None
    off = _parse(name, "--views.mask", "none").views.apply(published)
    assert off == dataclasses.replace(published, mask=None)


def test_digits_are_not_mirrored_unless_asked_for(digits):
    assert resolve(_parse("vicreg"), digits).views.flip is False
    assert resolve(_parse("vicreg", "--views.flip"), digits).views.flip is True


def test_a_ratio_for_each_image(digits, tmp_path):
    options = ["--views.mask-ratio", "0.1", "0.5"]
    config = resolve(_parse("data2vec", *options), digits)
    recipe = config.views.apply(config.method.views(8))
    assert recipe.mask == MaskRecipe("block", (0.1, 0.5))
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert from_toml(tmp_path / "config.toml", _parse("data2vec")) == config


def test_fused_color_is_an_option_of_every_methods_views(digits):
    for name, method in METHODS.items():
        resolved = resolve(_parse(name, "--views.color", "fused"), digits)
        for size in (8, 224):
            published = method().resolve(size, 64, 100).views(size)
            views = resolved.views.apply(published).views
            assert {view.color for view in views} == {"fused"}
            assert {view.arithmetic for view in views} == {"torchvision"}


# Options, and words of the reason for which they are refused.
REFUSED = [
    ("moco", ["--queue-length", "100"], "expected a multiple of the batch size, 128"),
    ("vicreg", ["--views.mask-ratio", "0.5"], "expected --views.mask too"),
    ("vicreg", ["--views.mask", "drop"], "transformers only"),
    (
        "vicreg",
        ["--views.mask", "random", "--views.mask-ratio", "0.1", "0.5"],
        "expected one number for masks without blocks",
    ),
    ("vicreg", ["--patch-size", "4"], "sees pixels, not patches"),
    ("data2vec", ["--views.mask", "none"], "what is masked is predicted"),
    ("simsiam", ["--optimizer.schedule", "epochs"], "expected 0 with"),
    ("byol", ["--optimizer.name", "sgd"], "--optimizer.learning-rate"),
]


@pytest.mark.parametrize(("method", "arguments", "reason"), REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(
    method, arguments, reason, digits
):
    with pytest.raises(UserError, match=reason):
        build(resolve(_parse(method, *arguments), digits), digits).check()


def _folder(path, sizes):
    for part in ("train", "test"):
        (path / part).mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.new("RGB", size).save(path / part / f"{number}.png")
    return open_data(f"folder:{path}")


def test_images_of_several_sizes_are_cropped_by_the_loader(tmp_path):
    options = (
        "--batch-size=16",
        "--image-size=24",
        "--accumulate=2",
        "--local-views=2",
    )
    options += ("--backbone=resnet-narrow",)
    several = _folder(tmp_path / "several", [(30, 20)] * 15 + [(20, 30)])
    run = build(resolve(_parse("swav", *options), several), several)
    whole, local = Crop(24, (0.14, 1.0)), Crop(12, (0.05, 0.14))
    assert run.crops == (whole, whole, local, local)
    _, images = run.shapes()
    assert [x.shape for x in images] == [(16, n, n, 3) for n in (24, 24, 12, 12)]
    run.check()
    one = _folder(tmp_path / "one", [(30, 20)] * 16)
    run = build(resolve(_parse("swav", *options), one), one)
    assert run.crops == () and run.shapes()[1].shape == (16, 20, 30, 3)
