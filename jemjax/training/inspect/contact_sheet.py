"""Images as one picture: a column for each example, a row for each of its views."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRAY = 127  # of masked patches
BACKGROUND = 225  # neither white nor black, as images often are
_TEXT = 14  # height of letters in pixels
_GAP = 6  # pixels between images


class Row(NamedTuple):
    """Images beside each other, one or several for each column."""

    label: str
    """in front of them; it may have several lines"""
    cells: Sequence[Sequence[np.ndarray]]
    """for each column (H, W, C) uint8 images of one size, C = 1 or 3"""


def draw(rows: Sequence[Row], headings: Sequence[str]) -> np.ndarray:
    """Draws rows of images below each other, pixel by pixel.

    Args:
        rows: each with a cell for every column.
        headings: above each column; what is wider than the column is cut off.

    Returns:
        (H, W, 3) uint8.
    """
    font = ImageFont.load_default(_TEXT)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = [ruler.multiline_textbbox((0, 0), row.label, font) for row in rows]
    margin = 2 * _GAP + round(max(right for _, _, right, _ in labels))
    column = max(
        sum(image.shape[1] + _GAP for image in cell)
        for row in rows
        for cell in row.cells
    )
    heights = [
        max(round(bottom), *(image.shape[0] for cell in row.cells for image in cell))
        for row, (_, _, _, bottom) in zip(rows, labels, strict=True)
    ]
    above = 2 * _GAP + _TEXT
    width = margin + len(headings) * column
    height = above + sum(heights) + len(rows) * _GAP
    picture = Image.new("RGB", (width, height), (BACKGROUND,) * 3)
    pen = ImageDraw.Draw(picture)
    lefts = range(margin, width, column)
    for left, heading in zip(lefts, headings, strict=True):
        pen.text((left, _GAP), _cut(heading, column - _GAP, font), "black", font)
    top = above
    for row, row_height in zip(rows, heights, strict=True):
        pen.multiline_text((_GAP, top), row.label, "black", font)
        for left, cell in zip(lefts, row.cells, strict=True):
            for image in cell:
                # Of a gray image, all three channels are copies of the one.
                pixels = np.broadcast_to(image, (*image.shape[:2], 3))
                picture.paste(Image.fromarray(pixels), (left, top))
                left += image.shape[1] + _GAP
        top += row_height + _GAP
    return np.array(picture)


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Each pixel as a square of factor x factor: (H, W, C) -> (H f, W f, C)."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def fit_in(image: np.ndarray, side: int) -> np.ndarray:
    """Enlarges an image by a whole number, or reduces it, until a square holds it.

    Args:
        image: (H, W, C) uint8, C = 1 or 3.
        side: of the square in pixels.

    Returns:
        (h, w, C) uint8, h and w at most `side`.
    """
    height, width, channels = image.shape
    longest = max(height, width)
    if longest <= side:
        return enlarge(image, side // longest)
    size = [max(1, round(length * side / longest)) for length in (width, height)]
    reduced = Image.fromarray(image.squeeze(2) if channels == 1 else image)
    reduced = reduced.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    return np.asarray(reduced).reshape(size[1], size[0], channels)


def hide(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Masked patches of a square image in gray.

    Args:
        image: (S, S, C) uint8.
        mask: (T,) bool, True = masked; T patches, row by row, of a square grid whose
            side is a divisor of S.

    Returns:
        (S, S, C) uint8.
    """
    side = round(len(mask) ** 0.5)
    mask = enlarge(mask.reshape(side, side, 1), len(image) // side)
    return np.where(mask, np.uint8(GRAY), image)


def _cut(text: str, width: int, font: Any) -> str:
    """The beginning of a text that is no wider than so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
