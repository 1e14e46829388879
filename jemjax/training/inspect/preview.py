"""What a step of a run sees, as a picture to look at before the run."""

import dataclasses
import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from jemjax.augment import ViewRecipe, denormalize
from jemjax.data import EncodedSource, Source, batches, open_data, read_image
from jemjax.errors import UserError, printable
from jemjax.methods import METHODS, Method
from jemjax.runtime import quick_compilation
from jemjax.training.config.options import InputConfig, PretrainConfig
from jemjax.training.config.parts import make_network, make_recipe
from jemjax.training.config.resolve import resolve
from jemjax.training.inspect.contact_sheet import Row, draw, enlarge, fit_in, hide
from jemjax.training.reporting.display import Display
from jemjax.training.run.header import describe_data, describe_views
from jemjax.training.run.setup import crops_of
from jemjax.training.step.branch import Branches, Images
from jemjax.training.step.loss import keys_of_step
from jemjax.training.step.state import keys_of_run

# Views are enlarged by the largest whole number that leaves them no larger than this.
ENLARGED = 128  # pixels


@dataclasses.dataclass(frozen=True)
class PreviewConfig(InputConfig):
    """A picture of the views of a run with the same settings."""

    method: tyro.conf.Suppress[Method]
    local_views: int | None = None
    """of swav and dino, number of small views beside the two large ones; unless given,
    by image size"""
    images: int = 8
    """how many images of the batch are shown, the first ones"""
    step: int = 1
    """of which views are shown: 1 is the first of a run"""
    output: str = "preview.png"
    """the picture, a PNG file"""

    def run(self) -> PretrainConfig:
        """The run with these settings; what its views do not depend on is left out."""
        shared = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(InputConfig)
        }
        if self.local_views is not None:
            if not _has_local_views(self.method):
                able = [name for name in METHODS if _has_local_views(METHODS[name])]
                raise UserError(
                    f"--local-views: got {self.local_views}, but {self.method.name} has"
                    f" none; {' and '.join(able)} do"
                )
            shared["method"] = dataclasses.replace(
                self.method, **{"local_views": self.local_views}
            )
        return PretrainConfig(**shared, steps=1)


def _has_local_views(method: Method | type[Method]) -> bool:
    return "local_views" in {field.name for field in dataclasses.fields(method)}


@dataclasses.dataclass(frozen=True)
class Preview:
    """What a step makes of the first images of its batch."""

    originals: list[np.ndarray]
    """(H, W, C) uint8 each"""
    labels: np.ndarray
    """(N,) int32, -1 without labels"""
    views: list[np.ndarray]
    """(N, size, size, C) uint8 each, no longer normalized"""
    masks: dict[int, np.ndarray]
    """(N, T) bool by the view's number, True = hidden from the online branch"""


def preview(config: PreviewConfig, display: Display | None = None) -> Path:
    """Draws the first images of a step's batch, their views, and what is masked.

    Args:
        config: of which run, and which of its steps.
        display: where the views' recipe and what was written are shown.

    Returns:
        The PNG file.

    Raises:
        UserError: for settings, data or an output that cannot be used.
    """
    display = display or Display()
    path = Path(config.output)
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder, expected a file")
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {path}: expected a name that ends in .png")
    source = open_data(
        config.data, split="train", data_dir=config.data_dir, reading=config.reading
    )
    run = resolve(config.run(), source)
    _check(config, run)
    try:
        branches = Branches(run.method, make_network(run), make_recipe(run))
        display.header(
            f"jemjax preview {run.method.name}", _header(run, branches, source)
        )
        shown = see(run, branches, source, step=config.step, count=config.images)
    except ValueError as error:  # argument, got, expected
        raise UserError(f"{run.method.name}: {error}") from error
    picture = Image.fromarray(draw(*_layout(shown, branches.recipe, source)))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    try:
        path.write_bytes(file.getvalue())
    except OSError as error:
        raise UserError(
            f"--output {path}: cannot be written ({error.strerror}); choose another"
            " file"
        ) from error
    display.say(
        f"step {config.step:,} with seed {run.seed}, written to {path}:"
        f" {picture.width:,} x {picture.height:,} pixels,"
        f" {os.path.getsize(path) / 1000:,.0f} kB"
    )
    return path


def see(
    run: PretrainConfig, branches: Branches, source: Source, *, step: int, count: int
) -> Preview:
    """What a run's step makes of the first images of its batch.

    Args:
        run: resolved.
        branches: the run's network and views.
        source: the training data.
        step: 1 is the first.
        count: how many images, at most the batch.

    Raises:
        DataError: if an image cannot be read.
        ValueError: for views that the network cannot see.
    """
    assert run.batch_size
    crops = crops_of(branches.recipe, source)
    # The rows of the first of as many hosts as leave it enough of them.
    rows = next(n for n in range(count, run.batch_size + 1) if run.batch_size % n == 0)
    stream = batches(
        source,
        batch_size=run.batch_size,
        seed=run.seed,
        step=step - 1,
        process_count=run.batch_size // rows,
        crops=crops,
    )
    batch = next(stream)
    stream.close()
    given = batch["views" if crops else "image"]
    images = jax.tree.map(lambda rows: rows[:count], given)
    originals = images
    if isinstance(source, EncodedSource) and crops:
        channels = source.image_shape[2]
        originals, _ = source.read_each(
            batch["index"][:count],
            lambda _, example: read_image(
                example.file, (None, None, channels), example.where, run.reading
            ),
        )

    def make(key: jax.Array, steps_before: jax.Array, images: Images):
        _, key = keys_of_run(key)
        keys = keys_of_step(key, steps_before, count)
        views, masks, _ = branches.see(keys, images)
        _trace_masked(branches, views, masks)
        shown = tuple(
            jnp.clip(denormalize(pixels, view.mean, view.std), 0, 1)
            for pixels, view in zip(views, branches.recipe.views, strict=True)
        )
        return shown, {number: mask for number, (mask, _) in masks.items()}

    make = jax.jit(make, compiler_options=quick_compilation())
    views, masks = jax.device_get(make(jax.random.key(run.seed), step - 1, images))
    return Preview(
        list(originals),
        batch["label"][:count],
        [np.round(pixels * 255).astype(np.uint8) for pixels in views],
        masks,
    )


def _trace_masked(branches: Branches, views: Any, masks: Any) -> None:
    """Has the network refuse masks that do not fit it; nothing is computed."""
    init = functools.partial(branches.network.init, jax.random.key(0), train=True)
    for number, (mask, num_kept) in masks.items():
        masked = functools.partial(init, num_kept=num_kept)
        jax.eval_shape(
            lambda view, mask, init=masked: init(view, mask=mask), views[number], mask
        )


def _check(config: PreviewConfig, run: PretrainConfig) -> None:
    assert run.batch_size
    if config.step < 1:
        raise UserError(f"--step: got {config.step}, expected at least 1")
    if not 1 <= config.images <= run.batch_size:
        raise UserError(
            f"--images: got {config.images}, expected 1 to {run.batch_size}, the batch"
            " size"
        )


def _header(run: PretrainConfig, branches: Branches, source: Source):
    yield "data", describe_data(run, source)
    yield from describe_views(branches.recipe, source)
    if branches.recipe.mask is not None:
        side = branches.network.backbone.grid(branches.recipe.views[0].size)
        yield "patches", f"{side} x {side} of {run.backbone}"


def _layout(
    shown: Preview, recipe: ViewRecipe, source: Source
) -> tuple[list[Row], list[str]]:
    """Rows of originals, views, and views with what is masked; headings of columns."""
    largest = max(view.size for view in recipe.views)
    factor = max(1, ENLARGED // largest)
    side = factor * largest
    label = "original"
    if not source.sizes_differ:
        height, width, _ = source.image_shape
        label += f"\n{height} x {width}"
    rows = [Row(label, [[fit_in(image, side)] for image in shown.originals])]
    for numbers in _lines(recipe):
        names = "views " if len(numbers) > 1 else "view "
        names += ", ".join(str(number + 1) for number in numbers)
        size = recipe.views[numbers[0]].size
        views = [shown.views[number] for number in numbers]
        rows.append(_row(f"{names}\n{size} x {size}", views, factor))
        if shown.masks.keys() >= set(numbers):
            views = [
                np.stack(list(map(hide, shown.views[number], shown.masks[number])))
                for number in numbers
            ]
            rows.append(_row(f"{names},\nmasked", views, factor))
    headings = [
        printable(source.class_names[label]) if label >= 0 else f"image {number}"
        for number, label in enumerate(shown.labels.tolist(), 1)
    ]
    return rows, headings


def _lines(recipe: ViewRecipe) -> Iterator[list[int]]:
    """Numbers of views that stand in one row: as many small ones as a large is wide."""
    sizes = [view.size for view in recipe.views]
    line: list[int] = []
    for number, size in enumerate(sizes):
        if line and (sizes[line[0]] != size or len(line) == max(sizes) // size):
            yield line
            line = []
        line.append(number)
    yield line


def _row(label: str, views: list[np.ndarray], factor: int) -> Row:
    """Of V arrays (N, S, S, C) a row of N cells with V images each."""
    cells = [
        [enlarge(image, factor) for image in cell] for cell in zip(*views, strict=True)
    ]
    return Row(label, cells)
