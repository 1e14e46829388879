"""What the loader reads: sources of images of one shape, decoded ones and files.

A source has a length and gives one decoded example at a time, of one static shape, so
Grain, a thread pool or a loop can read it.
"""

import abc
import concurrent.futures
import hashlib
import io
import logging
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from jemjax.data.headers import Survey, check_share, spread
from jemjax.data.images import Reading, UnreadableImage, read_image
from jemjax.errors import DataError

T = TypeVar("T")

Split = Literal["train", "test"]
Progress = Callable[[int, int], None]

# Files whose content is part of a fingerprint.
FINGERPRINTED = 256

logger = logging.getLogger("jemjax.data")


class ViewDefaults(NamedTuple):
    """What suits the images of a set, where the user does not say otherwise."""

    flip: bool = True
    """whether a mirror image is an image of the same kind"""
    crop_scale: tuple[float, float] | None = None
    """smallest and largest area of a crop; None: the method's"""
    remark: str = ""
    """what to know about figures that are measured on them"""


ANY_VIEWS = ViewDefaults()


class Source(abc.ABC):
    """Images of one shape, each with a label or -1.

    Attributes:
        name: how `open_data` calls it.
        class_names: the name of each label; empty for images without labels.
        image_shape: (H, W, C) of every image.
        sizes_differ: whether the images themselves are of several sizes, of which
            `image_shape` shows the centers only; crops of them are made of the files
            (`jemjax.data.crops`).
        unreadable: of examples that could not be read so far, by index, and why;
            others took their place.
        survey: of the files' headers, where they were read.
        defaults: what suits these images.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    sizes_differ: bool = False
    unreadable: dict[int, str]
    survey: Survey | None = None
    defaults: ViewDefaults = ANY_VIEWS

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for images without labels."""
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """An example: "image" (H, W, C) uint8 and "label" () int32."""

    @abc.abstractmethod
    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Examples as a batch: "image" (b, H, W, C) uint8 and "label" (b,) int32."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A SHA-256 by which a resumed run sees that the data are other ones.

        Of image files their names below the folder, their labels and sizes in bytes,
        and the content of 256 of them, which a copy on another machine shares; of a
        prepared set the same of its files and records; of arrays their content.
        """


class Encoded(NamedTuple):
    """An image that is not decoded yet, and its label."""

    file: str | io.BytesIO
    """a path, or a file in memory"""
    where: str
    """how messages call it"""
    label: int


class EncodedSource(Source):
    """Images that are decoded each time they are asked for."""

    def __init__(
        self,
        *,
        name: str,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        sizes_differ: bool,
        reading: Reading,
        survey: Survey | None = None,
    ):
        self.name = name
        self.class_names = tuple(class_names)
        self.image_shape = image_shape
        self.sizes_differ = sizes_differ
        self.reading = reading
        self.survey = survey
        self.unreadable = {}

    @abc.abstractmethod
    def encoded(self, indices: np.ndarray) -> list[Encoded]:
        """The examples as they are stored."""

    def sample(self) -> Iterator[bytes]:
        """The bytes of a few examples, evenly spread."""
        for file, _, _ in self.encoded(spread(len(self), FINGERPRINTED)):
            try:
                yield Path(file).read_bytes() if isinstance(file, str) else file.read()
            except OSError:  # what is wrong with it is told when it is read
                yield b""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch = self.gather(np.array([index]))
        return {"image": batch["image"][0], "label": batch["label"][0]}

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch, each image brought to `image_shape`."""

        def read(row: int, example: Encoded) -> np.ndarray:
            del row
            return read_image(
                example.file, self.image_shape, example.where, self.reading
            )

        images, labels = self.read_each(indices, read)
        return {"image": np.stack(images), "label": labels}

    def read_each(
        self, indices: np.ndarray, read: Callable[[int, Encoded], T]
    ) -> tuple[list[T], np.ndarray]:
        """Reads examples, or in place of each that cannot be read the one after it.

        Which takes its place depends on the files only, so a resumed run, other hosts
        and other workers see the same.

        Args:
            indices: (b,) of the examples.
            read: a function of the row and the example.

        Returns:
            What `read` gave, and the labels (b,) int32.

        Raises:
            DataError: if an image cannot be read, or, where those are skipped, if
                they are more than the share of them that is put up with.
        """
        results, labels = [], np.empty(len(indices), np.int32)
        for row, example in enumerate(self.encoded(indices)):
            index = int(indices[row])
            while True:
                try:
                    results.append(read(row, example))
                    break
                except UnreadableImage as error:
                    if self.reading.on_bad_image == "refuse":
                        raise
                    self.note_unreadable(index, str(error))
                index = (index + 1) % len(self)
                example = self.encoded(np.array([index]))[0]
            if not -1 <= example.label < max(self.num_classes, 1):
                raise DataError(
                    f"{example.where}: has the label {example.label}, but there are"
                    f" {self.num_classes} classes"
                )
            labels[row] = example.label
        return results, labels

    def note_unreadable(self, index: int, reason: str) -> None:
        """Counts an image that cannot be read, and warns of it once.

        Raises:
            DataError: if they are more than is put up with, or all.
        """
        if index not in self.unreadable:
            self.unreadable[index] = reason
            if multiprocessing.parent_process() is None:  # that of a worker warns
                logger.warning("%s; the next image takes its place", reason)
        check_share(self.name, self.unreadable.values(), len(self), self.reading)


# ------------------------------------------------------------------ fingerprints


def file_sizes(paths: Iterable[str]) -> np.ndarray:
    """In bytes; -1 for a file of which no size is to be had."""

    def size(path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError:  # what is wrong with it is told when it is read
            return -1

    return np.array([size(path) for path in paths], np.int64)


def digest_of(source: Source, parts: Iterable[str | bytes | np.ndarray]) -> str:
    """Of the classes, and of paths, contents and arrays, each told from the next."""
    digest = hashlib.sha256(repr(source.class_names).encode())
    for part in parts:
        content = part.tobytes() if isinstance(part, np.ndarray) else os.fsencode(part)
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()


# ------------------------------------------------------------------ arrays in memory


class ArraySource(Source):
    """A source over arrays in memory.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) integers, or None for images without labels.
        name: how messages call it.
        class_names: the name of each label; unless given, the labels' numbers.
        decoded_from: the source that was decoded, if one was.
        defaults: what suits these images.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        name: str = "arrays",
        class_names: Sequence[str] | None = None,
        decoded_from: Source | None = None,
        defaults: ViewDefaults = ANY_VIEWS,
    ):
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f"images: got {images.dtype} of shape {images.shape}, expected uint8"
                " of shape (N, H, W, C)"
            )
        if labels is None:
            labels = np.full(len(images), -1)
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels: got {labels.dtype} of shape {labels.shape}, expected"
                f" integers of shape ({len(images)},)"
            )
        if class_names is None:
            class_names = [str(i) for i in range(labels.max(initial=-1) + 1)]
        self.images = images
        if len(labels) and not -1 <= labels.min() <= labels.max() < max(
            len(class_names), 1
        ):
            raise ValueError(
                f"labels: got {labels.min()} to {labels.max()}, expected -1 (none) or"
                f" those of {len(class_names)} classes"
            )
        self.labels = labels.astype(np.int32)
        self.name = name
        self.class_names = tuple(class_names)
        self.image_shape = images.shape[1:]
        self.unreadable = decoded_from.unreadable if decoded_from else {}
        self.survey = decoded_from.survey if decoded_from else None
        self.defaults = decoded_from.defaults if decoded_from else defaults
        self._fingerprint = decoded_from.fingerprint() if decoded_from else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch by one NumPy index, which is much faster than by single examples."""
        return {"image": self.images[indices], "label": self.labels[indices]}

    def fingerprint(self) -> str:
        """Of the content."""
        if self._fingerprint is None:
            shape = str(self.images.shape)
            self._fingerprint = digest_of(self, [shape, self.images, self.labels])
        return self._fingerprint


def load_arrays(
    source: Source, *, limit: int | None = None, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a source, or an evenly spread part of it, into arrays.

    Args:
        source: what to read.
        limit: at most so many examples, one of each of as many equal stretches of
            the source; always the same ones.
        progress: called with how many examples are done, and of how many.

    Returns:
        Images (N, H, W, C) uint8 and labels (N,) int32.
    """
    indices = spread(len(source), limit)
    if isinstance(source, ArraySource):
        batch = source.gather(indices)
        return batch["image"], batch["label"]
    total = len(indices)
    images = np.empty((total, *source.image_shape), np.uint8)
    labels = np.empty(total, np.int32)

    def load(part: slice) -> int:
        batch = source.gather(indices[part])
        images[part], labels[part] = batch["image"], batch["label"]
        return len(batch["label"])

    parts = [slice(i, i + 64) for i in range(0, total, 64)]
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        done = 0
        try:
            for count in pool.map(load, parts):
                done += count
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return images, labels


def in_memory(
    source: Source, *, max_bytes: int = 2 * 2**30, progress: Progress | None = None
) -> Source:
    """The source decoded into memory if it fits, else the source as it is.

    So are images of several sizes, of which an array could hold the centers only.
    """
    fits = len(source) * math.prod(source.image_shape) <= max_bytes
    if isinstance(source, ArraySource) or source.sizes_differ or not fits:
        return source
    return ArraySource(
        *load_arrays(source, progress=progress),
        name=source.name,
        class_names=source.class_names,
        decoded_from=source,
    )
