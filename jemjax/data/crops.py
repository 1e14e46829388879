"""Random resized crops of image files, for sets whose images differ in size.

A device crops images of one shape only. Of others the loader makes the crops of all
views, with Pillow, and decodes a JPEG no larger than they need; what comes after the
crop is the device's (`jemjax.augment.finish_views`).
"""

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from jemjax.data.images import (
    DEFAULT_READING,
    ORIENTATION,
    Reading,
    naming,
    opened,
    to_channels,
    upright_size,
)
from jemjax.data.sources import Encoded, EncodedSource

TRIES = 10  # boxes that are drawn before the centered one is taken
# Uniform numbers for a crop: area and aspect of each try, and the place.
DRAWS = 2 * TRIES + 2
_BLOCK = 4  # numbers that Philox makes at once
_BLOCKS = math.ceil(DRAWS / _BLOCK)
# What a JPEG can be decoded at, as divisors of its size.
_REDUCTIONS = (8, 4, 2)
_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclasses.dataclass(frozen=True)
class Crop:
    """How one view is cut out of an image of any size."""

    size: int
    """height and width of the result in pixels"""
    scale: tuple[float, float] | None
    """smallest and largest area of the box as a share of the image, in (0, 1]; None:
    the largest centered square"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """smallest and largest width / height of the box"""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """of resizing, with antialiasing"""


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: float
    left: float
    height: float
    width: float


def gather_crops(
    source: EncodedSource,
    crops: Sequence[Crop],
    seed: int,
    number: int,
    indices: np.ndarray,
) -> dict[str, Any]:
    """One of the equal parts of a stream of examples, as crops.

    Args:
        source: the images.
        crops: how each of V views is cut out.
        seed: of the draws, in [0, 2^64).
        number: of the part: its rows are number b, number b + 1, ... of the stream.
        indices: (b,) of the rows' examples in the source.

    Returns:
        {"views": V arrays (b, size, size, C) uint8, "label": (b,) int32}

    Raises:
        DataError: if an image cannot be read.
    """
    channels = source.image_shape[2]
    count = len(indices)
    draws = [
        uniforms(seed, view, number * count, count) for view in range(len(crops))
    ]  # V of (b, DRAWS)

    def read(row: int, example: Encoded) -> list[np.ndarray]:
        numbers = [d[row] for d in draws]
        return read_crops(
            example.file, crops, numbers, channels, example.where, source.reading
        )

    rows, labels = source.read_each(indices, read)
    views = tuple(np.stack(view) for view in zip(*rows, strict=True))
    return {"views": views, "label": labels}


def uniforms(seed: int, view: int, first: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) of rows of a stream, however it is divided.

    Salmon et al., 2011, Parallel random numbers: as easy as 1, 2, 3.

    Args:
        seed: in [0, 2^64).
        view: the number of the crop.
        first: the first row.
        count: how many rows.

    Returns:
        (count, DRAWS) float64; those of a row depend on seed, view and row only.
    """
    key = np.array([seed, view], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=first * _BLOCKS))
    return generator.random((count, _BLOCKS * _BLOCK))[:, :DRAWS]


def random_box(
    draws: np.ndarray,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """The box of a random resized crop, as of `jemjax.augment.random_boxes`.

    Args:
        draws: (DRAWS,) uniform in [0, 1).
        height: of the image.
        width: of the image.
        scale: smallest and largest area as a share of the image, in (0, 1].
        ratio: smallest and largest width / height.

    Returns:
        A box in whole pixels.
    """
    *tries, for_top, for_left = draws.tolist()
    narrowest, widest = ratio
    for for_area, for_aspect in zip(tries[:TRIES], tries[TRIES:], strict=True):
        area = height * width * _between(for_area, *scale)
        aspect = math.exp(_between(for_aspect, math.log(narrowest), math.log(widest)))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = math.floor(for_top * (height - box_height + 1))
            left = math.floor(for_left * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    box_height, box_width = height, width
    if width / height < narrowest:
        box_height = max(1, round(width / narrowest))
    elif width / height > widest:
        box_width = max(1, round(height * widest))
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return Box(top, left, box_height, box_width)


def read_crops(
    file: str | io.BytesIO,
    crops: Sequence[Crop],
    draws: Sequence[np.ndarray],
    channels: int,
    where: str,
    reading: Reading = DEFAULT_READING,
) -> list[np.ndarray]:
    """Decodes an image once and makes its crops.

    Channels and orientation are those of `jemjax.data.images.read_image`. A JPEG is
    decoded at an eighth, a quarter or a half of its size where that leaves each box at
    least as many pixels as its crop has, in both directions.

    Args:
        file: a path, or a file in memory.
        crops: how each of V views is cut out.
        draws: V of (DRAWS,), uniform in [0, 1).
        channels: C, 1 or 3.
        where: the name of the image in error messages.
        reading: what the file leaves open.

    Returns:
        V arrays (size, size, C) uint8.

    Raises:
        DataError: if it is no image, damaged, or not finite.
    """
    with opened(file, where, reading) as image:
        if image.format != "JPEG":  # of others the header may not tell the whole
            ImageOps.exif_transpose(image, in_place=True)
        boxes = [
            _box(crop, numbers, *upright_size(image))
            for crop, numbers in zip(crops, draws, strict=True)
        ]
        reduction = reduction_for(boxes, crops) if image.format == "JPEG" else 1
        if reduction > 1:
            boxes = _shift(boxes, image, reduction)
            # The largest of JPEG's reductions that still covers this size.
            width, height = image.width // reduction, image.height // reduction
            image.draft(None, (width, height))
        ImageOps.exif_transpose(image, in_place=True)
        image = to_channels(image, channels, reading)
    with naming(f"cropping {where}"):
        return [
            cut_out(image, box, reduction, crop)
            for box, crop in zip(boxes, crops, strict=True)
        ]


def _box(crop: Crop, draws: np.ndarray, height: int, width: int) -> Box:
    if crop.scale is not None:
        return random_box(draws, height, width, crop.scale, crop.ratio)
    side = min(height, width)
    return Box((height - side) / 2, (width - side) / 2, side, side)


def reduction_for(boxes: Sequence[Box], crops: Sequence[Crop]) -> int:
    """The largest one that leaves every box the pixels of its crop."""
    spare = min(
        min(box.height, box.width) / crop.size
        for box, crop in zip(boxes, crops, strict=True)
    )
    return next((r for r in _REDUCTIONS if r <= spare), 1)


def _shift(boxes: Sequence[Box], image: Image.Image, reduction: int) -> list[Box]:
    """Boxes by what a reduced image begins with that is not of the image.

    Its sides are rounded up, so that the last row and column reach beyond the image.
    They become the first where the EXIF orientation turns the image round.
    """
    height, width = upright_size(image)
    orientation = image.getexif().get(ORIENTATION)
    top = -height % reduction if orientation in (3, 4, 7, 8) else 0
    left = -width % reduction if orientation in (2, 3, 6, 7) else 0
    return [box._replace(top=box.top + top, left=box.left + left) for box in boxes]


def cut_out(image: Image.Image, box: Box, reduction: int, crop: Crop) -> np.ndarray:
    """A box, given in pixels of the full image, out of the reduced one, resized."""
    top, left = box.top / reduction, box.left / reduction
    bottom = (box.top + box.height) / reduction
    right = (box.left + box.width) / reduction
    x, y = math.floor(left), math.floor(top)
    # Cut out first: pixels beyond the box have no weight in its crop.
    part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    part = part.resize(
        (crop.size, crop.size),
        _RESAMPLING[crop.interpolation],
        (left - x, top - y, right - x, bottom - y),
    )
    return np.asarray(part).reshape(crop.size, crop.size, -1)


def _between(uniform: float, low: float, high: float) -> float:
    return low + (high - low) * uniform
