"""Data by name: built-in digits, image folders, TensorFlow Datasets."""

import difflib
import os
import re
from typing import Any

import numpy as np
from PIL import Image

from jemjax.data.folders import open_folder
from jemjax.data.images import DEFAULT_READING, Reading, fit
from jemjax.data.sources import ArraySource, Source, Split, ViewDefaults
from jemjax.data.tfds import open_tfds
from jemjax.errors import DataError, printable

DIGITS = ViewDefaults(
    flip=False,  # the mirror images of digits are other signs
    crop_scale=(0.4, 1.0),  # of 8 x 8 pixels, a smaller part no longer tells which
    remark="digits are centered and of one size, so raw pixels are strong",
)


def open_data(
    name: str,
    *,
    split: Split = "train",
    image_size: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    reading: Reading = DEFAULT_READING,
) -> Source:
    """Opens one part of a data set.

    Args:
        name: `digits`, `folder:PATH` (an image folder), or `tfds:NAME` (a prepared
            TensorFlow Datasets set; `NAME/CONFIG` and `:VERSION` may follow).
        split: "train" or "test". A folder without a test part has a tenth of each
            class held out for it, chosen by file name.
        image_size: makes every image a square of this side, by resizing its shorter
            side and cropping the center. Unless given, images keep their size if it
            is the same for all, and are 256 x 256 otherwise (but see `sizes_differ`).
        data_dir: where prepared TensorFlow Datasets are; unless given, their default.
        reading: how image files are read, and what follows on those that cannot be.

    Raises:
        DataError: if there is no such data, or it cannot be used.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    if image_size is not None and image_size < 1:
        raise DataError(f"image size: got {image_size}, expected at least 1 pixel")
    for problem in reading.problems():
        raise DataError(problem)
    kind, _, rest = name.partition(":")
    if name == "digits":
        return _open_digits(split, image_size)
    if kind == "folder" and rest:
        root = os.path.expanduser(rest)
        return open_folder(printable(name), root, split, image_size, reading)
    if kind == "tfds" and rest:
        return open_tfds(printable(name), rest, split, image_size, data_dir, reading)
    raise DataError(f"unknown data {printable(name)!r}: {_suggestion(name)}")


def _suggestion(name: str) -> str:
    expected = "expected digits, folder:PATH or tfds:NAME"
    kind, colon, rest = name.partition(":")
    if os.path.isdir(os.path.expanduser(name)):
        return f"did you mean folder:{printable(name)}?"
    near = difflib.get_close_matches(kind, ["digits", "folder", "tfds"], n=1)
    if near == ["digits"]:
        return "did you mean digits?"
    if near and rest:
        return f"did you mean {near[0]}:{printable(rest)}?"
    if not colon and not near and re.fullmatch(r"[a-z]\w*", name):
        return f"did you mean tfds:{name}? ({expected})"
    return expected


def _open_digits(split: Split, image_size: int | None) -> ArraySource:
    """scikit-learn's 1797 handwritten digits, every fifth of a class for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "digits: they come with scikit-learn, which is not installed; install it"
            " with pip install 'jemjax[train]'"
        ) from error
    digits: Any = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    position = np.empty(len(images), np.int64)  # of an image within its class
    for label in range(10):
        members = np.flatnonzero(digits.target == label)
        position[members] = np.arange(len(members))
    chosen = (position % 5 == 4) == (split == "test")
    images = images[chosen]
    if image_size is not None:
        resized = [fit(Image.fromarray(i), image_size, image_size) for i in images]
        images = np.stack([np.asarray(image) for image in resized])
    return ArraySource(
        images[..., None],  # (N, 8, 8, 1)
        digits.target[chosen],
        name="digits",
        class_names=[str(label) for label in range(10)],
        defaults=DIGITS,
    )
