"""What the views of an image are: a table of numbers, and the function that obeys it.

A `ViewRecipe` is data: frozen, hashable, printable. `make_views` applies the operations
of each of its rows in the order: crop, flip, color jitter, grayscale, blur, solarize,
normalize. An operation with probability 0 leaves nothing in the program but its draws.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jemjax.augment.blur import BLUR_DRAWS, blur_by_draws, kernel_radius
from jemjax.augment.color import (
    JITTER_DRAWS,
    Arithmetic,
    apply_jitter,
    check_arithmetic,
    fused_color,
    gray_where,
    normalize_floats,
    random_jitter,
    solarize_by_draws,
)
from jemjax.augment.geometry import (
    BOX_DRAWS,
    Method,
    boxes_of,
    check_method,
    crop_boxes,
    mirror_where,
    resize,
)
from jemjax.augment.inputs import (
    Array,
    check_number,
    check_pixels,
    check_range,
    check_size,
    example_keys,
    is_number,
    to_floats,
    uniforms,
)
from jemjax.augment.masking import MaskRecipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What `ViewRecipe.without` can switch off, and the field that does it.
PARTS = {
    "crop": "crop_scale",
    "flip": "flip_probability",
    "jitter": "jitter_probability",
    "grayscale": "grayscale_probability",
    "blur": "blur_probability",
    "solarize": "solarize_probability",
}
# How many uniform numbers each of them takes.
_DRAWS = {
    "crop": BOX_DRAWS,
    "flip": 1,
    "jitter": JITTER_DRAWS,
    "grayscale": 1,
    "blur": BLUR_DRAWS,
    "solarize": 1,
}


@dataclasses.dataclass(frozen=True)
class View:
    """What happens to an image on its way to one view, in this order."""

    size: int
    """height and width of the view in pixels"""
    crop_scale: tuple[float, float] | None
    """smallest and largest area of the crop as a share of the image; None: the whole
    image, resized"""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """smallest and largest width / height of the crop"""
    interpolation: Method = "bicubic"
    """of resizing: bilinear or bicubic"""
    flip_probability: float = 0.5
    """of mirroring left to right"""
    jitter_probability: float = 0.8
    """of the four changes of color that follow, in random order"""
    brightness: float = 0.4
    """strength: the factor is uniform between 1 - this and 1 + this"""
    contrast: float = 0.4
    """strength, as of brightness"""
    saturation: float = 0.2
    """strength, as of brightness"""
    hue: float = 0.1
    """strength, in full turns"""
    arithmetic: Arithmetic = "torchvision"
    """whose brightness, contrast and saturation: torchvision's, simclr's or byol's; the
    last two blur with zeros beyond the border, torchvision with the mirror image"""
    color: Literal["faithful", "fused"] = "faithful"
    """faithful: each change of color by itself, clipped to [0, 1] after each; fused:
    all of them as one matrix an image, which is fast, and clipped once"""
    grayscale_probability: float = 0.2
    """of removing color"""
    blur_probability: float = 0.0
    """of Gaussian blur"""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """smallest and largest standard deviation in pixels"""
    blur_kernel_size: int | None = None
    """pixels under the kernel, odd; None: a tenth of the view's size"""
    solarize_probability: float = 0.0
    """of inverting bright values"""
    solarize_threshold: float = 0.5
    """values from here on are inverted"""
    mean: tuple[float, ...] | float = IMAGENET_MEAN
    """of each channel, subtracted; averaged over them for one-channel images"""
    std: tuple[float, ...] | float = IMAGENET_STD
    """of each channel, divided by; averaged over them for one-channel images"""

    def __post_init__(self) -> None:
        """Refuses what no image could be treated with."""
        check_size("size", self.size)
        if self.crop_scale is not None:
            check_range("crop_scale", self.crop_scale, high=1.0)
        check_range("crop_ratio", self.crop_ratio)
        check_method("interpolation", self.interpolation)
        for part in ("flip", "jitter", "grayscale", "blur", "solarize"):
            check_number(PARTS[part], getattr(self, PARTS[part]), 0, 1)
        for name in ("brightness", "contrast", "saturation"):
            check_number(name, getattr(self, name), 0)
        check_number("hue", self.hue, 0, 0.5)
        check_arithmetic("arithmetic", self.arithmetic)
        if self.color not in ("faithful", "fused"):
            raise ValueError(
                f"color: got {self.color!r}, expected 'faithful' or 'fused'"
            )
        if self.color == "fused" and self.arithmetic != "torchvision":
            raise ValueError(
                f"color: got 'fused' with the arithmetic of {self.arithmetic}, expected"
                " 'faithful', or that of torchvision, which is linear"
            )
        check_range("blur_sigma", self.blur_sigma)
        kernel_radius("blur_kernel_size", self.blur_kernel_size, self.size)
        check_number("solarize_threshold", self.solarize_threshold, 0, 1)
        _check_channels("mean", self.mean, -math.inf)
        _check_channels("std", self.std, 0)


@dataclasses.dataclass(frozen=True)
class ViewRecipe:
    """The views that are made of each image, one row a view.

    Where there are global and local views, the global ones come first: those of the
    size of the first view.
    """

    views: tuple[View, ...]
    mask: MaskRecipe | None = None
    """which patches of a view are hidden from the branch that is trained"""

    def __post_init__(self) -> None:
        """Refuses a recipe without views."""
        if not self.views or not all(isinstance(view, View) for view in self.views):
            raise ValueError(f"views: got {self.views!r}, expected a tuple of Views")

    @property
    def num_global(self) -> int:
        """Number of global views: those of the first one's size."""
        return sum(view.size == self.views[0].size for view in self.views)

    def without(self, part: str) -> "ViewRecipe":
        """The recipe with one part switched off in every view.

        Args:
            part: "crop" (the whole image is resized instead), "flip", "jitter",
                "grayscale", "blur" or "solarize".

        Raises:
            ValueError: for another name.
        """
        if part not in PARTS:
            raise ValueError(f"part: got {part!r}, expected one of {', '.join(PARTS)}")
        off = {PARTS[part]: None if part == "crop" else 0.0}
        views = tuple(dataclasses.replace(view, **off) for view in self.views)
        return dataclasses.replace(self, views=views)

    def __str__(self) -> str:
        """A plain-text table, one row a view; the numbers after p are probabilities."""
        header = ("view", "size", "crop", *list(PARTS)[1:])
        rows = [
            (str(number), *_describe(view)) for number, view in enumerate(self.views, 1)
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)
        ]
        if self.mask is not None:
            lines.append(f"masked: {self.mask}")
        return "\n".join(lines)


def make_views(key: Array, images: Array, recipe: ViewRecipe) -> tuple[jax.Array, ...]:
    """The random views of each image.

    An example's views depend on its own key and pixels only, not on the batch or on
    the number of devices; the views of an example are drawn independently.

    Inside `shard_map` the rows are those of the shard, so that one key gives every
    shard the same views. There the keys are folded by the row in the global batch:

        rows = jax.lax.axis_index("data") * len(images) + jnp.arange(len(images))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        views = make_views(keys, images, recipe)

    Args:
        key: one key, folded with each row's index, or N keys.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        recipe: what to do.

    Returns:
        For each view of the recipe, (N, size, size, C) float32, normalized.

    Raises:
        ValueError: for wrong shapes, and floats above 1.5, such as 0 to 255 (traced
            ones cannot be checked).
    """
    floats = to_floats(images)
    check_pixels("images", images)
    draws = _draws_of_views(key, floats, recipe)
    return tuple(
        _finish_view(draws, _crop(draws, floats, view), view)
        for draws, view in zip(draws, recipe.views, strict=True)
    )


def finish_views(
    key: Array, crops: Sequence[Array], recipe: ViewRecipe
) -> tuple[jax.Array, ...]:
    """What `make_views` does after the crop, to crops that were made elsewhere.

    With the same keys: only what is drawn for the crops is not used.

    Args:
        key: one key, folded with each row's index, or N keys.
        crops: for each view of the recipe, (N, size, size, C), C = 1 or 3, float in
            [0, 1] or uint8.
        recipe: what to do.

    Returns:
        For each view of the recipe, (N, size, size, C) float32, normalized.

    Raises:
        ValueError: for wrong shapes, another number of crops, and floats above 1.5
            (traced ones cannot be checked).
    """
    images = [to_floats(crop) for crop in crops]
    count = images[0].shape[0] if images else 0
    shapes = [crop.shape[:3] for crop in images]
    expected = [(count, view.size, view.size) for view in recipe.views]
    if shapes != expected:
        raise ValueError(
            f"crops: got (N, H, W) of {shapes}, expected one for each view: {expected}"
        )
    for crop in crops:
        check_pixels("crops", crop)
    draws = _draws_of_views(key, images[0], recipe)
    return tuple(
        _finish_view(draws, mirror_where(crop, _mirrored(draws, view)), view)
        for draws, crop, view in zip(draws, images, recipe.views, strict=True)
    )


def evaluation_view(images: Array, recipe: ViewRecipe) -> jax.Array:
    """The whole images as the recipe's first view has them, with nothing random.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        recipe: gives the size, the interpolation, and mean and std.

    Returns:
        (N, size, size, C) float32, normalized.

    Raises:
        ValueError: for wrong shapes, and floats above 1.5 (traced ones cannot be
            checked).
    """
    view = recipe.views[0]
    floats = to_floats(images)
    check_pixels("images", images)
    whole = resize(floats, view.size, view.interpolation)
    return normalize_floats(jnp.clip(whole, 0, 1), view.mean, view.std)


def _draws_of_views(
    key: Array, images: jax.Array, recipe: ViewRecipe
) -> list[dict[str, jax.Array]]:
    """For each view the uniform numbers (n, N) of each operation, drawn all at once.

    Each has its own, used or not, so that to leave one out changes nothing in the
    others.
    """
    num_views, of_view = len(recipe.views), sum(_DRAWS.values())
    count = images.shape[0]
    draws = uniforms(example_keys(key, count, images), num_views * of_view)
    ends = list(itertools.accumulate(_DRAWS.values()))[:-1]
    return [
        dict(zip(_DRAWS, jnp.split(numbers, ends), strict=True))
        for numbers in draws.reshape(num_views, of_view, count)
    ]


def _crop(draws: dict[str, jax.Array], images: jax.Array, view: View) -> jax.Array:
    """The view's part of the image, mirrored or not: (N, H, W, C) -> (N, S, S, C)."""
    _, height, width, _ = images.shape
    mirrored = _mirrored(draws, view)
    if view.crop_scale is None:
        images = resize(images, view.size, view.interpolation)
        return mirror_where(images, mirrored)
    boxes = boxes_of(
        draws["crop"],
        (height, width),
        scale=view.crop_scale,
        ratio=view.crop_ratio,
    )
    size = (view.size, view.size)
    return crop_boxes(images, boxes, size, view.interpolation, mirrored=mirrored)


def _mirrored(draws: dict[str, jax.Array], view: View) -> jax.Array | None:
    """Which images are mirrored, (N,) bool; None: none is."""
    if view.flip_probability == 0:
        return None
    return draws["flip"][0] < view.flip_probability


def _finish_view(
    draws: dict[str, jax.Array], images: jax.Array, view: View
) -> jax.Array:
    """What comes after the crop, normalization included: (N, S, S, C) to the same."""
    jitter = grayed = None
    if view.jitter_probability > 0:
        jitter = random_jitter(
            draws["jitter"],
            brightness=view.brightness,
            contrast=view.contrast,
            saturation=view.saturation,
            hue=view.hue,
            probability=view.jitter_probability,
            arithmetic=view.arithmetic,
        )
    if view.grayscale_probability > 0:
        grayed = draws["grayscale"][0] < view.grayscale_probability
    if view.color == "fused" and (jitter is not None or grayed is not None):
        images = fused_color(images, jitter, grayed)
    else:
        images = jnp.clip(images, 0, 1)  # bicubic weights overshoot at edges
        if jitter is not None:
            images = apply_jitter(images, jitter, view.arithmetic)
        if grayed is not None:
            images = gray_where(images, grayed)
    if view.blur_probability > 0:
        images = blur_by_draws(
            draws["blur"],
            images,
            sigma=view.blur_sigma,
            probability=view.blur_probability,
            kernel_size=view.blur_kernel_size,
            padding="reflect" if view.arithmetic == "torchvision" else "zero",
        )
    images = jnp.clip(images, 0, 1)
    if view.solarize_probability > 0:
        images = solarize_by_draws(
            draws["solarize"][0],
            images,
            view.solarize_probability,
            view.solarize_threshold,
        )
    return normalize_floats(images, view.mean, view.std)


def _describe(view: View) -> tuple[str, ...]:
    """The cells of one row of a recipe's table."""

    def cell(part: str, detail: str = "") -> str:
        probability = getattr(view, PARTS[part])
        return f"p {probability:g}{detail}" if probability > 0 else "-"

    crop = "whole image"
    if view.crop_scale is not None:
        crop = f"{_span(view.crop_scale)} of the area"
        if view.crop_ratio != (3 / 4, 4 / 3):
            crop += f", ratio {_span(view.crop_ratio)}"
    strengths = (view.brightness, view.contrast, view.saturation, view.hue)
    jitter = ": " + " ".join(f"{strength:g}" for strength in strengths)
    if view.arithmetic != "torchvision":
        jitter += f" as {view.arithmetic}"
    if view.color == "fused":
        jitter += " fused"
    blur = f": sigma {_span(view.blur_sigma)}"
    if view.blur_kernel_size is not None:
        blur += f" of {view.blur_kernel_size} pixels"
    return (
        str(view.size),
        f"{crop}, {view.interpolation}",
        cell("flip"),
        cell("jitter", jitter),
        cell("grayscale"),
        cell("blur", blur),
        cell("solarize", f": from {view.solarize_threshold:g}"),
    )


def _span(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.3g}-{bounds[1]:.3g}"


def _check_channels(name: str, values: tuple[float, ...] | float, above: float) -> None:
    numbers = values if isinstance(values, tuple) else (values,)
    valid = len(numbers) in (1, 3) and all(
        is_number(number) and math.isfinite(number) and number > above
        for number in numbers
    )
    if not valid:
        limit = "" if above < 0 else f" > {above:g}"
        raise ValueError(
            f"{name}: got {values!r}, expected a number or a tuple of 1 or 3"
            f" numbers{limit}"
        )
