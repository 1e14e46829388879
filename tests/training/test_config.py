"""From options to a configuration in which no choice is left open, and back."""

import dataclasses

import jax
import numpy as np
import pytest
import tyro
from PIL import Image

from jemjax import runtime
from jemjax.augment import MaskRecipe
from jemjax.augment.recipes import PARTS
from jemjax.data import ArraySource, Crop, open_data
from jemjax.errors import UserError
from jemjax.methods import METHODS
from jemjax.training.config.file import from_toml, to_toml
from jemjax.training.config.options import PretrainConfig
from jemjax.training.config.parts import apply_views
from jemjax.training.config.resolve import resolve
from jemjax.training.run.inputs import check_test
from jemjax.training.run.setup import build


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
        views = apply_views(options.views, published).views
        assert len(views) == len(published.views)
        for view, whole in zip(views, published.views, strict=True):
            if part == "crop":
                assert view.crop_scale is None
            else:
                assert getattr(view, field) == 0
                assert view.crop_ratio == whole.crop_ratio
    masked = apply_views(_parse(name, "--views.mask", "random").views, published)
    assert masked.mask is not None
    off = apply_views(_parse(name, "--views.mask", "none").views, published)
    assert off == dataclasses.replace(published, mask=None)


def test_digits_are_not_mirrored_unless_asked_for(digits):
    assert resolve(_parse("vicreg"), digits).views.flip is False
    assert resolve(_parse("vicreg", "--views.flip"), digits).views.flip is True


def test_a_ratio_for_each_image(digits, tmp_path):
    options = ["--views.mask-ratio", "0.1", "0.5"]
    config = resolve(_parse("data2vec", *options), digits)
    recipe = apply_views(config.views, config.method.views(8))
    assert recipe.mask == MaskRecipe("block", (0.1, 0.5))
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert from_toml(tmp_path / "config.toml", _parse("data2vec")) == config


def test_fused_color_is_an_option_of_every_methods_views(digits):
    for name, method in METHODS.items():
        resolved = resolve(_parse(name, "--views.color", "fused"), digits)
        for size in (8, 224):
            published = method().resolve(size, 64, 100).views(size)
            views = apply_views(resolved.views, published).views
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


# ------------------------------------------------------------------ C1 to C3: files


def _read(tmp_path, text, method="vicreg"):
    (tmp_path / "c.toml").write_text(text)
    return from_toml(tmp_path / "c.toml", PretrainConfig(method=METHODS[method]()))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("batch_sise = 4", "batch_sise: did you mean batch_size?"),
        ("batch-size = 4", "batch-size: did you mean batch_size?"),
        ("learning_rate = 0.1", "did you mean optimizer.learning_rate?"),
        ("on_bad_image = 'skip'", "did you mean reading.on_bad_image?"),
        ("[optimiser]\nname = 'lars'", "optimiser: did you mean optimizer?"),
        ("[optimizer]\nmomentun = 1", "did you mean optimizer.momentum?"),
        ("[method]\ncovariance_weigth = 1", "did you mean method.covariance_weight?"),
        ("[views]\nseed = 1", "unknown key views.seed: did you mean seed?"),
        ('"line\\nbreak" = 1', r"unknown key line\\nbreak"),
    ],
)
def test_c1_an_unknown_key_of_a_file_gets_a_suggestion(tmp_path, text, meant):
    with pytest.raises(UserError) as error:
        _read(tmp_path, text)
    assert meant.replace("\\\\", "\\") in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('steps = "many"', "steps: got 'many', expected a whole number"),
        ("steps = 1.5", "steps: got 1.5, expected a whole number"),
        ("steps = true", "steps: got True, expected a whole number"),
        ("resume = 1", "resume: got 1, expected true or false"),
        ("data = 1", "data: got 1, expected text in quotes"),
        ("optimizer = 1", "optimizer: got 1, expected a table [optimizer]"),
        ('compute_dtype = "f4"', 'expected "float32" or "bfloat16"'),
        ("[views]\ncrop_scale = [0.1]", "expected a list of 2, each a number"),
        ("[reading]\nalpha = 3", 'expected "white" or "black" or "mean"'),
    ],
)
def test_c2_a_value_of_another_type_is_refused(tmp_path, text, expected):
    with pytest.raises(UserError) as error:
        _read(tmp_path, text)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"lr: 1e-3\n",
        b'{"steps": 3}',
        b"steps = 1\nsteps = 2\n",
        b"a = " + b"[" * 5000,
        b"steps = " + b"9" * 5000,
        b"\xff\xfe\x00",
        b"steps =",
    ],
)
def test_c2_what_is_not_toml_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(UserError, match=r"c.toml: (is not TOML|cannot be read)"):
        from_toml(tmp_path / "c.toml", PretrainConfig(method=METHODS["vicreg"]()))


def test_c2_all_problems_of_a_file_are_listed(tmp_path):
    with pytest.raises(UserError) as error:
        _read(tmp_path, 'stepz = 1\nseed = "x"\n[optimizer]\nname = "adam"\n')
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("method", "arguments", "reasons"),
    [
        (
            "vicreg",
            ["--steps=-1", "--epochs=-2", "--batch-size=5000", "--backbone=resnet9"]
            + ["--views.mask-ratio=0.5", "--optimizer.name=sgd", "--max-pixels=0"]
            + ["--value-range", "3", "1", "--max-bad-share=2", "--load-timeout=0"],
            ["--steps: got -1", "--epochs: got -2.0", "--batch-size: got 5000"]
            + ["expected one of resnet18", "--views.mask", "--optimizer.learning-rate"]
            + ["--max-pixels: got 0", "--value-range", "--max-bad-share", "--load-t"],
        ),
        (
            "moco",
            ["--batch-size=36", "--queue-length=100", "--target-momentum=2"]
            + ["--fsdp=3"],
            ["multiple of the 8 devices", "--queue-length: got 100", "--target-mom"]
            + ["--fsdp: got 3, expected a divisor of the 8 devices"],
        ),
        (
            "dino",
            ["--views.mask-ratio=0.5", "--target=shared", "--final-target-momentum=0.9"]
            + ["--backbone=vit-tiny", "--resume", "--overwrite"],
            [
                "--views.mask too",
                "there is no moving average",
                "--resume and --overwrite",
            ],
        ),
    ],
)
def test_c3_all_problems_are_listed_at_once(method, arguments, reasons, digits):
    with pytest.raises(UserError) as error:
        resolve(_parse(method, *arguments), digits, num_devices=8)
    lines = str(error.value).splitlines()
    for reason in reasons:
        assert sum(reason in line for line in lines) == 1, (reason, lines)
    assert len(lines) == len(set(lines))


def test_c3_paths_that_no_text_file_can_hold_are_refused(digits):
    config = _parse("vicreg", "--output", "run\udcff")
    with pytest.raises(UserError, match=r"--output: got run\\xff, which is not UTF-8"):
        resolve(config, digits)


# ------------------------------------------------------------------ D13: labels


def _sets(tmp_path, train, test):
    """Two image folders with these classes; none: a flat one."""
    sources = []
    for part, labels in (("train", train), ("test", test)):
        for label in labels or [""]:
            for number in range(4):
                path = tmp_path / part / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), number).save(path)
        sources.append(open_data(f"folder:{tmp_path / part}"))
    return sources


@pytest.mark.parametrize(
    ("train", "test", "reason"),
    [
        ("ab", "abc", "its class 2 of 3 is c, that of .* 2, is none"),
        ("abc", "ab", "its class 2 of 2 is none, that of .* 3, is c"),
        ("ab", "ac", "its class 1 of 2 is c, .* is b"),
        ("ab", "", "its images have no labels, as those of .* have"),
    ],
)
def test_d13_classes_that_differ_are_refused_before_training(
    tmp_path, train, test, reason
):
    config = PretrainConfig(METHODS["vicreg"](), data="x", eval_data="y")
    with pytest.raises(UserError, match=f"--eval-data y: {reason}"):
        check_test(config, *_sets(tmp_path, list(train), list(test)))


def test_d13_a_test_part_whose_labels_are_withheld_is_refused(digits):
    withheld = ArraySource(
        digits.images, np.full(len(digits), -1), class_names=digits.class_names
    )
    config = PretrainConfig(METHODS["vicreg"](), data="x", eval_data="y")
    with pytest.raises(UserError, match="y: its images have classes, but no labels"):
        check_test(config, digits, withheld)
    check_test(config, digits, digits)


def test_c6_an_accelerator_that_is_not_used_is_told(monkeypatch):
    monkeypatch.setattr(runtime, "_ACCELERATORS", ("/dev/null",))
    assert runtime.idle_accelerator() is None  # these tests ask for the CPU
    jax.config.update("jax_platforms", "")
    try:
        warning = runtime.idle_accelerator()
        monkeypatch.setattr(runtime, "_ACCELERATORS", ("/dev/no-such-thing",))
        assert runtime.idle_accelerator() is None
    finally:
        jax.config.update("jax_platforms", "cpu")
    assert warning and "jax[cuda13]" in warning and "CpuDevice" in warning
