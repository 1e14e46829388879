"""MNIST-style idx files, packed by gzip or not."""

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from jemjax.data.prepare.tfds_writer import Example, RawSet, by_split
from jemjax.errors import DataError, printable

# What the idx files themselves do not tell.
IDX_CLASS_NAMES = {
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "mnist": tuple("0123456789"),
}
# What an idx file may unpack to, whatever its header says.
MAX_IDX_BYTES = 2**32


def read_idx_set(raw: Path, name: str) -> RawSet:
    """The set in a folder of such files, with the class names of a known one."""
    arrays = {}
    for split in ("train", "test"):
        images_file = _find_idx(raw, split, "images")
        labels_file = _find_idx(raw, split, "labels")
        images = _read_idx(images_file, dimensions=3)  # (N, H, W)
        labels = _read_idx(labels_file, dimensions=1)  # (N,)
        if len(images) != len(labels):
            raise DataError(
                f"{images_file.name} holds {len(images)} images but {labels_file.name}"
                f" {len(labels)} labels; they are not of the same set"
            )
        arrays[split] = images, labels
    shapes = {images.shape[1:] for images, _ in arrays.values()}
    if len(shapes) > 1:
        raise DataError(
            f"{printable(raw)}: train and test images are of different sizes"
        )
    highest = max(int(labels.max(initial=0)) for _, labels in arrays.values())
    class_names = IDX_CLASS_NAMES.get(name, tuple(map(str, range(highest + 1))))
    if highest >= len(class_names):
        raise DataError(
            f"{name}: labels go up to {highest}, expected {len(class_names)} classes;"
            " choose another --name for this set"
        )

    def examples(split: str) -> Iterator[Example]:
        for image, label in zip(*arrays[split], strict=True):
            yield {"image": Image.fromarray(image), "label": int(label)}

    return RawSet(
        image_shape=(*shapes.pop(), 1),
        class_names={"label": class_names},
        has_ids=False,
        sizes={split: len(labels) for split, (_, labels) in arrays.items()},
        examples=by_split(examples, arrays),
    )


def _find_idx(raw: Path, split: str, what: str) -> Path:
    """The one file such as t10k-images-idx3-ubyte.gz; the unpacked one if both are."""
    marks = ("train",) if split == "train" else ("t10k", "test")
    found = sorted(
        path
        for path in raw.iterdir()
        if what in path.name and any(mark in path.name for mark in marks)
    )
    plain = [path for path in found if path.suffix != ".gz"]
    candidates = plain or found
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(printable(path.name) for path in candidates) or "none"
    example = f"{marks[0]}-{what}-idx{3 if what == 'images' else 1}-ubyte.gz"
    raise DataError(
        f"{printable(raw)}: expected one file of {split} {what} such as {example},"
        f" got {names}"
    )


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file: 0, 0, type (8: bytes), dimensions, their sizes, the values."""
    where = printable(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            head = file.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes(
                [0, 0, 8, dimensions]
            ):
                raise DataError(
                    f"{where}: starts with {head[:4].hex(' ') or 'nothing'}, expected"
                    f" 00 00 08 {dimensions:02x} (an idx file of bytes in"
                    f" {dimensions} dimension(s)); is it another file, renamed?"
                )
            shape = tuple(map(int, np.frombuffer(head, ">u4", offset=4)))
            expected = math.prod(shape)
            if expected > MAX_IDX_BYTES:
                raise DataError(
                    f"{where}: its header says {expected:,} bytes of values, more than"
                    f" the {MAX_IDX_BYTES:,} that are read; is it damaged?"
                )
            values = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: cannot be read ({error}); fetch it again") from error
    if len(values) != expected:
        got = "more" if len(values) > expected else f"{len(values):,}"
        raise DataError(
            f"{where}: is damaged: its header says {expected:,} bytes of values, it"
            f" has {got}; fetch it again"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)
