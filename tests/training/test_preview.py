"""The picture shows what a step of a run sees, and nothing else."""

import dataclasses
import itertools
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from training.setups import TINY, every_method

from jemjax.augment import denormalize
from jemjax.cli import main
from jemjax.data import batches, open_data
from jemjax.methods import METHODS
from jemjax.runtime import quick_compilation
from jemjax.training.config.options import ViewOptions
from jemjax.training.config.parts import make_network, make_recipe
from jemjax.training.config.resolve import resolve
from jemjax.training.inspect.contact_sheet import (
    BACKGROUND,
    GRAY,
    Row,
    draw,
    enlarge,
    fit_in,
    hide,
)
from jemjax.training.inspect.preview import PreviewConfig, preview, see
from jemjax.training.run.setup import build
from jemjax.training.step.branch import Branches
from jemjax.training.step.sharding import make_mesh


@pytest.fixture(scope="module")
def several_sizes(tmp_path_factory):
    """A folder of photographs of several sizes, here of noise."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(40):
        height, width = rng.integers(20, 90, 2)
        pixels = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        path = folder / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((width, height)).save(path)
        path = folder / "test" / f"class{number % 2}" / "x.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return f"folder:{folder}"


def _config(name, **options):
    method = METHODS[name](**{k: v for k, v in TINY[name].items() if "queue" not in k})
    return PreviewConfig(**{"method": method, "batch_size": 16, **options})


def _seen_by_the_step(run, source, steps, monkeypatch):
    """The views, still normalized, and masks that each step of a real run embeds."""
    seen = []
    embed = Branches.embed

    def spy(self, params, target_params, statistics, views, masks, drop_keys):
        masks_only = {number: mask for number, (mask, _) in masks.items()}
        jax.debug.callback(lambda *seen_now: seen.append(seen_now), views, masks_only)
        return embed(self, params, target_params, statistics, views, masks, drop_keys)

    monkeypatch.setattr(Branches, "embed", spy)
    built = build(run, source, make_mesh(2))

    def views_only(state, images):  # all else of the step is not compiled
        return built.step(state, images)[0].step

    step = jax.jit(views_only, compiler_options=quick_compilation())
    stream = batches(
        source, batch_size=run.batch_size, seed=run.seed, crops=built.crops
    )
    state = built.init()
    for batch in itertools.islice(stream, steps):
        state = state.replace(step=step(state, built.images(batch)))
    stream.close()
    jax.effects_barrier()
    return [jax.device_get(seen_now) for seen_now in seen]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("simclr", {"data": "digits", "seed": 7}),
        (
            "dino",
            {
                "data": None,
                "image_size": 16,
                "local_views": 1,
                "views": ViewOptions(mask="random"),
            },
        ),
    ],
)
def test_it_is_what_the_steps_of_a_run_see(name, options, several_sizes, monkeypatch):
    config = _config(name, **{**options, "data": options["data"] or several_sizes})
    source = open_data(config.data, split="train")
    run = resolve(config.run(), source)
    steps = _seen_by_the_step(run, source, 3, monkeypatch)
    branches = Branches(run.method, make_network(run), make_recipe(run))
    for number in (1, 3):
        shown = see(run, branches, source, step=number, count=5)
        views, masks = steps[number - 1]
        assert len(views) == len(shown.views) == len(branches.recipe.views)
        for seen, made, view in zip(
            shown.views, views, branches.recipe.views, strict=True
        ):
            assert made.shape[0] == 16 and seen.shape == (5, *made.shape[1:])
            pixels = np.clip(denormalize(made[:5], view.mean, view.std), 0, 1)
            np.testing.assert_allclose(seen / 255, pixels, atol=0.51 / 255)
        assert shown.masks.keys() == masks.keys()
        for of_view, mask in shown.masks.items():
            np.testing.assert_array_equal(mask, masks[of_view][:5])
        assert bool(masks) == (name == "dino")
    assert (steps[0][0][0] != steps[2][0][0]).any()


def test_originals_are_the_whole_images_that_the_views_are_of(several_sizes):
    # Nothing random is left: the view is the middle of the original.
    off = dict.fromkeys(("crop", "flip", "jitter", "grayscale", "solarize"), False)
    config = _config(
        "vicreg", data=several_sizes, image_size=24, views=ViewOptions(**off)
    )
    source = open_data(config.data, split="train")
    run = resolve(config.run(), source)
    branches = Branches(run.method, make_network(run), make_recipe(run))
    shown = see(run, branches, source, step=2, count=4)
    assert len({image.shape for image in shown.originals}) > 1
    for original, view in zip(shown.originals, shown.views[0], strict=True):
        height, width, _ = original.shape
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        middle = Image.fromarray(original).resize(
            (24, 24), Image.Resampling.BICUBIC, box
        )
        difference = np.abs(np.asarray(middle, int) - view)
        # The loader cuts the middle out before, so that its border is another.
        assert difference.mean() < 1 and difference.max() < 16


@every_method()
def test_every_method_has_a_picture(name, tmp_path):
    config = _config(name, images=2, output=str(tmp_path / "p.png"))
    with Image.open(preview(config)) as picture:
        pixels = np.asarray(picture.convert("L"))
    # Of 8 pixels, each is enlarged to a square of 16: originals and one or two views,
    # or the one view and the same masked.
    height, width = pixels.shape
    rows = 3
    assert height == pytest.approx(rows * (128 + 6) + 26, abs=2)
    assert width == pytest.approx(2 * (128 + 6) + 60, abs=10)
    source = open_data("digits", split="train")
    stream = batches(source, batch_size=16, seed=0)
    originals = next(stream)["image"]
    stream.close()
    for column in range(2):
        left = width - (2 - column) * 134
        np.testing.assert_array_equal(
            pixels[26:154, left : left + 128],
            enlarge(originals[column], 16)[..., 0],
        )
        last = pixels[26 + 268 : 26 + 268 + 128, left : left + 128]
        masked = (last == GRAY).reshape(4, 32, 4, 32).all((1, 3)).mean()
        assert (masked > 0.2) == (name == "data2vec")


def _places(picture, image):
    """Top left corners of all places at which an image is found, pixel by pixel."""
    height, width, _ = image.shape
    corners = np.argwhere((picture == image[0, 0]).all(-1))
    return [
        (top, left)
        for top, left in corners.tolist()
        if np.array_equal(
            picture[top : top + height, left : left + width],
            np.broadcast_to(image, (height, width, 3))[: picture.shape[0] - top],
        )
    ]


def test_a_picture_holds_every_pixel_of_its_images_in_rows_and_columns():
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (2, 1, 40, 40, 3), np.uint8)
    small = rng.integers(0, 256, (2, 2, 17, 17, 1), np.uint8)
    rows = [Row("view 1", large), Row("views 2, 3\n17 x 17", small)]
    picture = draw(rows, ["a class of a very long name", "b"])
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert (picture[0] == BACKGROUND).all() and (picture == 0).any(-1).any()
    ((first,), (second,)) = ([_places(picture, i) for i in cell] for cell in large)
    ((top, left),), ((top_too, right),) = first, second
    assert top == top_too and left + 40 < right
    for column, cell in zip((left, right), small, strict=True):
        ((one,), (two,)) = (_places(picture, image) for image in cell)
        assert one[0] == two[0] > top + 40
        assert one[1] == column and column + 17 < two[1]
    # The long heading ends where the next one begins.
    above = picture[:top]
    assert (above[:, right - 6 : right] == BACKGROUND).all()
    assert (above[:, right:] != BACKGROUND).any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 8), (96, 96)), ((10, 30), (30, 90)), ((200, 50), (100, 25))],
)
def test_an_original_fits_where_its_views_are(shape, expected, channels):
    image = np.full((*shape, channels), 9, np.uint8)
    image[: shape[0] // 2] = 200
    fitted = fit_in(image, 100)
    assert fitted.shape == (*expected, channels)
    middle = expected[0] // 2
    assert (fitted[: middle - 2] == 200).all() and (fitted[middle + 2 :] == 9).all()


def test_masked_patches_are_gray_and_the_others_untouched():
    image = np.random.default_rng(0).integers(128, 256, (6, 6, 3), np.uint8)
    hidden = hide(image, np.array([True, False, False, True]))
    assert (hidden[:3, :3] == GRAY).all() and (hidden[3:, 3:] == GRAY).all()
    np.testing.assert_array_equal(hidden[:3, 3:], image[:3, 3:])
    np.testing.assert_array_equal(hidden[3:, :3], image[3:, :3])


def test_the_command_says_what_it_shows_and_where(tmp_path):
    path = tmp_path / "views.png"
    path.write_text("what is overwritten")
    # The configuration of a run is one of its previews.
    (tmp_path / "config.toml").write_text(
        'method_name = "swav"\nseed = 3\n[method]\nlocal_views = 2\n'
    )
    command = [sys.executable, "-m", "jemjax.cli", "preview", "swav"]
    options = ["--images=3", "--step=20", "--views.no-jitter", f"--output={path}"]
    done = subprocess.run(
        [*command, "--config", str(tmp_path / "config.toml"), *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(path) as picture:
        width, height = picture.size
        assert picture.format == "PNG" and picture.mode == "RGB"
    assert "1,442 images of 8 x 8 x 1, 10 classes" in done.stdout
    assert "0.05-0.14 of the area" in done.stdout  # the recipe, with its local views
    assert (
        f"step 20 with seed 3, written to {path}: {width:,} x {height:,} pixels"
        in done.stdout
    )


REFUSED = [
    (["vicreg", "--step=0"], "--step: got 0, expected at least 1"),
    (["vicreg", "--images=0"], "--images: got 0, expected 1 to 128"),
    (["vicreg", "--images=129"], "--images: got 129, expected 1 to 128"),
    (["vicreg", "--local-views=2"], "vicreg has none; swav and dino do"),
    (["vicreg", "--output=x.jpg"], "expected a name that ends in .png"),
    (["vicreg", "--output=."], "is a folder, expected a file"),
    (["vicreg", "--output=nowhere/x.png"], "cannot be written"),
    (["vicreg", "--batch-size=5000"], "has only 1442 images"),
    (["vicreg", "--data=nothing"], "unknown data"),
    (["vicreg", "--views.mask=drop"], "transformers only"),
    (["data2vec", "--patch-size=3"], "expected a multiple of the patch size, 3"),
    (["vicregg"], "did you mean vicreg?"),
]


@pytest.mark.parametrize(("arguments", "reason"), REFUSED)
def test_what_makes_no_sense_is_refused(
    arguments, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jemjax.runtime.prepare_process", lambda: None)
    with pytest.raises(SystemExit) as left:
        main(["preview", *arguments])
    assert left.value.code in (2, 3)
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_are_those_of_a_run_with_the_same_defaults(several_sizes):
    config = _config("moco", data=several_sizes, seed=5, patch_size=8, image_size=32)
    run = config.run()
    for field in dataclasses.fields(config):
        if field.name not in ("images", "step", "output", "local_views"):
            assert getattr(run, field.name) == getattr(config, field.name)
