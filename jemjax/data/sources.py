"""Where images come from: built-in digits, image folders, TensorFlow Datasets, arrays.

A source has a length and gives one decoded example at a time, of one static shape, so
Grain, a thread pool or a loop can read it.
"""

import abc
import collections
import concurrent.futures
import dataclasses
import difflib
import functools
import hashlib
import io
import logging
import math
import multiprocessing
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from jemjax.data.images import (
    DEFAULT_READING,
    EXTENSIONS,
    Header,
    Reading,
    UnreadableImage,
    fit,
    read_header,
    read_image,
)
from jemjax.errors import DataError, printable

T = TypeVar("T")

Split = Literal["train", "test"]
Progress = Callable[[int, int], None]

# Every image's header is read when a folder of at most so many files is opened; of
# a larger folder an evenly spread sample.
HEADERS_READ = 20_000
HEADERS_SAMPLED = 2_000
# Files whose content is part of a fingerprint.
FINGERPRINTED = 256
# The side of the images of a set whose sizes differ.
DEFAULT_IMAGE_SIZE = 256

logger = logging.getLogger("jemjax.data")


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
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    sizes_differ: bool = False
    unreadable: dict[int, str]
    survey: "Survey | None" = None

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


class Survey(NamedTuple):
    """What the headers of a set's images, or of a sample of them, say."""

    looked_at: int
    sizes: collections.Counter[tuple[int, int]]
    """how many are of each (height, width)"""
    channels: int
    """1 if all are grey, else 3"""

    def smaller_than(self, side: int) -> int:
        """How many images have a shorter side of fewer pixels."""
        return sum(n for size, n in self.sizes.items() if min(size) < side)


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
        survey: "Survey | None" = None,
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


def check_share(
    name: str, reasons: Collection[str], images: int, reading: Reading
) -> None:
    """Refuses more unreadable images than a share of all, and a set without others.

    Raises:
        DataError: naming them.
    """
    if len(reasons) >= images:
        raise DataError(
            f"{name}: none of {images:,} images can be read:\n{list_reasons(reasons)}"
        )
    if len(reasons) > reading.max_bad_share * images:
        raise DataError(
            f"{name}: {len(reasons):,} of {images:,} images cannot be read, more than"
            f" the {reading.max_bad_share:.2%} of --max-bad-share:\n"
            + list_reasons(reasons)
        )


def list_reasons(reasons: Iterable[str], most: int = 5) -> str:
    """The first of them, a line each, and how many more there are."""
    reasons = list(reasons)
    lines = [f"  {reason}" for reason in reasons[:most]]
    if len(reasons) > most:
        lines.append(f"  and {len(reasons) - most:,} more")
    return "\n".join(lines)


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
        return _open_folder(printable(name), root, split, image_size, reading)
    if kind == "tfds" and rest:
        return _open_tfds(printable(name), rest, split, image_size, data_dir, reading)
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


# ------------------------------------------------------------------ arrays in memory


class ArraySource(Source):
    """A source over arrays in memory.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) integers, or None for images without labels.
        name: how messages call it.
        class_names: the name of each label; unless given, the labels' numbers.
        decoded_from: the source that was decoded, if one was.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        name: str = "arrays",
        class_names: Sequence[str] | None = None,
        decoded_from: Source | None = None,
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
            self._fingerprint = _digest(self, [shape, self.images, self.labels])
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


def _file_sizes(paths: Iterable[str]) -> np.ndarray:
    """In bytes; -1 for a file of which no size is to be had."""

    def size(path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError:  # what is wrong with it is told when it is read
            return -1

    return np.array([size(path) for path in paths], np.int64)


def _digest(source: Source, parts: Iterable[str | bytes | np.ndarray]) -> str:
    """Of the classes, and of paths, contents and arrays, each told from the next."""
    digest = hashlib.sha256(repr(source.class_names).encode())
    for part in parts:
        content = part.tobytes() if isinstance(part, np.ndarray) else os.fsencode(part)
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()


def spread(length: int, limit: int | None) -> np.ndarray:
    """Indices of at most `limit` examples, one of each of as many equal stretches."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1")
    if limit is None or limit >= length:
        return np.arange(length)
    edges = np.arange(limit + 1) * length // limit
    # A random one of each stretch: a fixed stride would fall in step with sets whose
    # classes take turns.
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


# ------------------------------------------------------------------ digits


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
    )


# ------------------------------------------------------------------ folders


class FolderSource(EncodedSource):
    """Image files, read and decoded one by one.

    Args:
        root: the folder.
        files: paths below it, with / between their parts.
        labels: (N,) int32; -1 without labels.
        name: how `open_data` calls it.
        class_names: the name of each label.
        image_shape: (H, W, C) to which every image is brought.
        sizes_differ: whether the images themselves are of several sizes.
        reading: how they are read.
        survey: of their headers.
    """

    def __init__(
        self,
        root: str,
        files: Sequence[str],
        labels: np.ndarray,
        **options: Any,
    ):
        super().__init__(**options)
        self.root = root
        self.files = files
        self.labels = labels

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """The file of an example."""
        return os.path.join(self.root, self.files[index])

    def encoded(self, indices: np.ndarray) -> list[Encoded]:
        """The files of the examples."""
        examples = []
        for index in indices.tolist():
            path = self.path(index)
            examples.append(Encoded(path, printable(path), int(self.labels[index])))
        return examples

    def fingerprint(self) -> str:
        """Of the names, labels and sizes of the files."""
        sizes = _file_sizes(map(self.path, range(len(self))))
        return _digest(self, [*self.files, self.labels, sizes, *self.sample()])


def _open_folder(
    name: str, root: str, split: Split, image_size: int | None, reading: Reading
) -> FolderSource:
    """Opens `train/CLASS/*` with `test` or `val`, `CLASS/*`, or a flat folder."""
    if not os.path.isdir(root):
        raise DataError(f"{name}: {_why_no_folder(root)}")
    parts, class_names = _list_parts(name, root)
    if not parts[split]:
        raise DataError(
            f"{name}: {printable(root)} holds {len(parts['train'] + parts['test'])}"
            f" image(s), too few for a {split} part; add images"
        )
    everything = [file for part in parts.values() for file, _ in part]
    survey = _survey_folder(name, root, everything, reading)
    files, labels = zip(*parts[split], strict=True)
    return FolderSource(
        root,
        files,
        np.asarray(labels, np.int32),
        name=name,
        class_names=class_names,
        image_shape=(*_choose_size(survey.sizes, image_size), survey.channels),
        sizes_differ=image_size is None and len(survey.sizes) > 1,
        reading=reading,
        survey=survey,
    )


def open_folder_parts(
    name: str, root: str, reading: Reading
) -> dict[str, FolderSource]:
    """Both parts of a folder, whatever their images are like; no file is opened."""
    if not os.path.isdir(root):
        raise DataError(f"{name}: {_why_no_folder(root)}")
    parts, class_names = _list_parts(name, root)
    return {
        part: FolderSource(
            root,
            [file for file, _ in items],
            np.array([label for _, label in items], np.int32),
            name=name,
            class_names=class_names,
            image_shape=(DEFAULT_IMAGE_SIZE, DEFAULT_IMAGE_SIZE, 3),
            sizes_differ=True,
            reading=reading,
        )
        for part, items in parts.items()
    }


def _list_parts(
    name: str, root: str
) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Both parts as lists of (file, label), and the class names."""
    folders, images = _scan(root, "")
    test_folder = next((n for n in ("test", "val", "validation") if n in folders), None)
    # A class may be called train as well: then it has other classes beside it.
    has_parts = "train" in folders and (test_folder or len(folders) == 1) and not images
    base = "train" if has_parts else ""
    groups = _group(name, root, base)
    if not groups:
        raise DataError(
            f"{name}: no images below {printable(os.path.join(root, base))}, expected"
            f" files such as {', '.join(sorted(EXTENSIONS)[:6])}; check the path"
        )
    # A single class folder says nothing about its images.
    class_names = list(groups) if len(groups) > 1 else []
    train = _label(groups, class_names)
    if has_parts and test_folder:
        test_groups = _group(name, root, test_folder)
        strangers = [n for n in test_groups if class_names and n not in class_names]
        if strangers:
            what = f"a class {printable(strangers[0])}" if strangers[0] else "images"
            raise DataError(
                f"{name}: {test_folder} holds {what} outside of the"
                f" {len(class_names)} classes of train; give both the same class"
                " folders"
            )
        test = _label(test_groups, class_names)
    else:
        train, test = _hold_out(train)
    return {"train": train, "test": test}, list(map(printable, class_names))


def _label(
    groups: dict[str, list[str]], class_names: list[str]
) -> list[tuple[str, int]]:
    label = {name: index for index, name in enumerate(class_names)}
    return [(f, label.get(name, -1)) for name, files in groups.items() for f in files]


def _hold_out(
    files: list[tuple[str, int]],
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """About a tenth of the files by a hash of their names, so a new file moves none."""

    def draw(item: tuple[str, int]) -> int:
        return int.from_bytes(hashlib.sha256(os.fsencode(item[0])).digest()[:8])

    train = [item for item in files if draw(item) % 10]
    test = [item for item in files if not draw(item) % 10]
    if not test:  # a handful of files: one of them
        test = [min(files, key=draw)]
        train.remove(test[0])
    return train, test


def _group(name: str, root: str, base: str) -> dict[str, list[str]]:
    """The image files of each class folder, or {"": files} of a flat folder."""
    folders, images = _scan(root, base)
    groups = {os.path.basename(f): list(_walk(root, f, ())) for f in folders}
    groups = {group: files for group, files in groups.items() if files}
    if groups and images:
        raise DataError(
            f"{name}: images lie beside class folders ({printable(images[0])} beside"
            f" {printable(next(iter(groups)))}), so their class is unknown; move them"
            " into a folder"
        )
    return {"": images} if images else groups


def _walk(root: str, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """The images below a folder, links followed but never in a circle."""
    status = os.stat(os.path.join(root, folder))
    identity = status.st_dev, status.st_ino
    if identity in above:
        return
    folders, images = _scan(root, folder)
    yield from images
    for inner in folders:
        yield from _walk(root, inner, (*above, identity))


def _scan(root: str, folder: str) -> tuple[list[str], list[str]]:
    """Folders and images directly in a folder, below `root`, sorted by bytes."""
    folders, images = [], []
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                below = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if _is_folder(entry):
                    folders.append(below)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    images.append(below)
    except OSError as error:
        where = printable(os.path.join(root, folder))
        raise DataError(f"{where}: cannot be listed ({error.strerror})") from error
    return sorted(folders, key=os.fsencode), sorted(images, key=os.fsencode)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for one
        return False


def _why_no_folder(root: str) -> str:
    shown = printable(root)
    if os.path.exists(root):
        return f"{shown} is a file, expected a folder of images"
    parent, last = os.path.split(os.path.abspath(root))
    beside = os.listdir(parent) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(last, beside, n=1)
    hint = f"did you mean {printable(os.path.join(parent, near[0]))}?" if near else ""
    return f"there is no folder {shown}; {hint or 'check the path'}"


def _survey_folder(
    name: str, root: str, files: Sequence[str], reading: Reading
) -> "Survey":
    """The headers of the files; of more than `HEADERS_READ` those of a sample.

    What differs from the sample is brought to the shape when it is read.
    """
    if len(files) > HEADERS_READ:
        indices = spread(len(files), HEADERS_SAMPLED)
        logger.info(
            "%s: size and channels of %d files are those of %d of them",
            name,
            len(files),
            HEADERS_SAMPLED,
        )
        # A share of a few is not that of all, which is counted as they are read.
        reading = dataclasses.replace(reading, max_bad_share=1.0)
    else:
        indices = np.arange(len(files))
    paths = tuple(os.path.join(root, files[index]) for index in indices.tolist())
    return _survey(name, paths, _stamp(paths), reading)


def _stamp(paths: Iterable[str]) -> bytes:
    """Sizes and times of change, by which a survey is known to hold still."""

    def stamp(path: str) -> tuple[int, int]:
        try:
            status = os.stat(path)
        except OSError:  # what is wrong with it is told when it is read
            return -1, -1
        return status.st_size, status.st_mtime_ns

    return np.array([stamp(path) for path in paths], np.int64).tobytes()


# Train and test part of a folder are of one survey.
@functools.lru_cache(maxsize=4)
def _survey(
    name: str, paths: tuple[str, ...], stamp: bytes, reading: Reading
) -> "Survey":
    del stamp  # changes with the files

    def header(path: str) -> Header | UnreadableImage:
        try:
            return read_header(path, printable(path), reading)
        except UnreadableImage as error:
            return error

    threads = min(16, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(header, paths))
    bad = [str(item) for item in found if isinstance(item, UnreadableImage)]
    headers = [item for item in found if isinstance(item, Header)]
    if bad and reading.on_bad_image == "refuse":
        if len(bad) == 1:
            raise DataError(bad[0])
        raise DataError(
            f"{name}: {len(bad):,} of {len(paths):,} images cannot be read:\n"
            f"{list_reasons(bad)}\n`jemjax data check` lists them, and"
            " --on-bad-image skip goes on without them"
        )
    if bad:
        check_share(name, bad, len(paths), reading)
    moving = [p for p, h in zip(paths, found, strict=True) if getattr(h, "frames", 0)]
    if moving:
        logger.warning(
            "%s: %d of %d images hold several frames, of which the first is used (%s)",
            name,
            len(moving),
            len(paths),
            printable(moving[0]),
        )
    return Survey(
        looked_at=len(paths),
        sizes=collections.Counter((h.height, h.width) for h in headers),
        channels=1 if all(h.grey for h in headers) else 3,
    )


def _choose_size(
    sizes: Collection[tuple[int, int]], image_size: int | None
) -> tuple[int, int]:
    if image_size is None and len(sizes) == 1:
        return next(iter(sizes))
    side = image_size or DEFAULT_IMAGE_SIZE
    return side, side


# ------------------------------------------------------------------ TensorFlow Datasets


class TFDSSource(EncodedSource):
    """One split of a prepared set, through tfds's random-access data source.

    Args:
        records: what `as_data_source` gave, its images still encoded.
        keys: of the image and, if there is one, of the label.
        files: of the split.
        name: how `open_data` calls it.
        class_names: the name of each label.
        image_shape: (H, W, C) to which every image is brought.
        sizes_differ: whether the images themselves are of several sizes.
        reading: how they are read.
    """

    def __init__(
        self,
        records: Any,
        keys: tuple[str, str | None],
        files: Sequence[str],
        **options: Any,
    ):
        super().__init__(**options)
        self.records = records
        self.keys = keys
        self.files = files

    def __len__(self) -> int:
        return len(self.records)

    def encoded(self, indices: np.ndarray) -> list[Encoded]:
        """The records of the examples, read together, which costs half the time."""
        image_key, label_key = self.keys
        places = indices.tolist()
        return [
            Encoded(
                io.BytesIO(record[image_key]),
                f"{self.name}[{index}]",
                int(record[label_key]) if label_key else -1,
            )
            for index, record in zip(
                places, self.records.__getitems__(places), strict=True
            )
        ]

    def fingerprint(self) -> str:
        """Of the number of examples, and of the names and sizes of the files."""
        names = [os.path.basename(path) for path in self.files]
        sizes = _file_sizes(self.files)
        return _digest(self, [str(len(self)), *names, sizes, *self.sample()])


def _open_tfds(
    name: str,
    rest: str,
    split: Split,
    image_size: int | None,
    data_dir: str | os.PathLike[str] | None,
    reading: Reading,
) -> TFDSSource:
    tfds = import_tfds()
    folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    builder = tfds.builder_from_directory(_prepared_folder(name, rest, folder))
    keys = _feature_keys(name, builder.info)

    def records(part: str) -> Any:
        return builder.as_data_source(
            part, decoders={keys[0]: tfds.decode.SkipDecoding()}
        )

    available = list(builder.info.splits)
    wanted = ("train",) if split == "train" else ("test", "validation")
    found = [part for part in wanted if part in available]
    if not found:
        raise DataError(
            f"{name}: no {' or '.join(wanted)} split, only {', '.join(available)}"
        )
    part = found[0]
    try:
        examples = records(part)
    except (NotImplementedError, ValueError) as error:
        raise DataError(
            f"{name}: {builder.data_path} is of the format"
            f" {builder.info.file_format.value}, expected array_record; prepare it"
            f" again, {_how_to_prepare(rest)}"
        ) from error
    if len(found) == 2 and keys[1] and len(examples) and examples[0][keys[1]] < 0:
        part = "validation"  # the test split's labels are withheld
        examples = records(part)
    if not len(examples):
        raise DataError(f"{name}: its split {part} is empty")
    feature = builder.info.features[keys[0]]
    height, width, channels = feature.shape
    if height is None or width is None:
        sizes = set()
        # Each costs a read of the whole record.
        for index in spread(len(examples), 256 if image_size is None else 1):
            encoded = io.BytesIO(examples[int(index)][keys[0]])
            try:
                sizes.add(read_header(encoded, f"{name}[{index}]", reading)[:2])
            except UnreadableImage:
                if reading.on_bad_image == "refuse":
                    raise
    else:
        sizes = {(height, width)}
    return TFDSSource(
        examples,
        keys,
        [os.fspath(path) for path in builder.info.splits[part].filepaths],
        name=name,
        class_names=map(printable, builder.info.features[keys[1]].names or ())
        if keys[1]
        else (),
        image_shape=(*_choose_size(sizes, image_size), 1 if channels == 1 else 3),
        sizes_differ=image_size is None and len(sizes) > 1,
        reading=reading,
    )


def import_tfds() -> Any:
    """tensorflow_datasets, which is imported only where it is used."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"TensorFlow Datasets needs {error.name}: install it with pip install"
            " 'jemjax[train]'"
        ) from error
    return tfds


def _prepared_folder(name: str, rest: str, data_dir: Path) -> Path:
    """The newest prepared version: DATA_DIR/NAME[/CONFIG]/VERSION."""
    below, _, version = rest.partition(":")
    if not re.fullmatch(r"\w+(/[\w.+-]+)?", below):
        raise DataError(f"{name}: expected tfds:NAME, tfds:NAME/CONFIG or :VERSION")

    def versions(folder: Path) -> list[tuple[int, ...]]:
        return sorted(
            tuple(map(int, path.parent.name.split(".")))
            for path in folder.glob("*/features.json")
            if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
        )

    folder = data_dir / below
    found = [".".join(map(str, numbers)) for numbers in versions(folder)]
    if found and (not version or version in found):
        return folder / (version or found[-1])
    if found:
        raise DataError(
            f"{name}: version {version} is not prepared in {data_dir}, only"
            f" {', '.join(found)}"
        )
    configs = sorted(p.name for p in folder.glob("*") if versions(p))
    if len(configs) == 1:
        return _prepared_folder(name, f"{below}/{configs[0]}", data_dir)
    if configs:
        raise DataError(
            f"{name}: has several configurations, choose one: "
            + ", ".join(f"tfds:{below}/{config}" for config in configs)
        )
    prepared = sorted(
        p.name for p in data_dir.glob("*") if any(p.rglob("features.json"))
    )
    near = difflib.get_close_matches(below, prepared, n=1)
    fix = f"did you mean tfds:{near[0]}?" if near else _how_to_prepare(below)
    raise DataError(f"{name}: not prepared in {data_dir}; {fix}")


def _how_to_prepare(below: str) -> str:
    """Nothing is downloaded here: what makes the set, and what reads images as is."""
    if below.split("/")[0] == "imagenet2012":  # not to be had without an account
        return (
            "get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org"
            f" and, where TensorFlow is, tfds build {below} --manual_dir=FOLDER_OF_BOTH"
            " --file_format=array_record; or unpack them into train/CLASS/ and"
            " val/CLASS/, and use --data folder:PATH"
        )
    return (
        f"make it of raw files with jemjax data prepare KIND RAW --name {below}, or,"
        f" where TensorFlow is, with tfds build {below} --file_format=array_record; or"
        " use images as they are with --data folder:PATH"
    )


def _feature_keys(name: str, info) -> tuple[str, str | None]:
    """The names of the image and of the class label, if there is one."""
    kinds = {key: type(feature).__name__ for key, feature in info.features.items()}
    images = [key for key, kind in kinds.items() if kind == "Image"]
    labels = [key for key, kind in kinds.items() if kind == "ClassLabel"]
    if "image" not in images and len(images) != 1:
        raise DataError(
            f"{name}: expected a feature called image, got {', '.join(kinds)}"
        )
    image = "image" if "image" in images else images[0]
    if np.dtype(info.features[image].np_dtype).kind != "u":
        raise DataError(
            f"{name}: its images are {info.features[image].np_dtype}, expected uint8"
        )
    supervised = (info.supervised_keys or (None, None))[1]
    label = next((key for key in ("label", supervised) if key in labels), None)
    return image, label
