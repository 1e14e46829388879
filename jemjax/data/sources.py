"""Where images come from: built-in digits, image folders, TensorFlow Datasets, arrays.

A source has a length and gives one decoded example at a time, of one static shape, so
Grain, a thread pool or a loop can read it.
"""

import abc
import concurrent.futures
import contextlib
import difflib
import functools
import hashlib
import io
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from jemjax.errors import DataError

Split = Literal["train", "test"]
Progress = Callable[[int, int], None]

# Every image's header is read when a folder of at most so many files is opened; of
# a larger folder an evenly spread sample.
HEADERS_READ = 20_000
HEADERS_SAMPLED = 2_000
# The side of the images of a set whose sizes differ.
DEFAULT_IMAGE_SIZE = 256

# What Pillow reads by itself. Formats that it only stubs (HDF5, GRIB) or hands to
# another program (EPS) are left out, whatever a file of theirs is called.
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm"
    " .pnm .jp2 .j2k .jpx .avif .tga .pcx .sgi .ico .icns .qoi".split()
)
_FORMATS = (
    "JPEG MPO PNG WEBP GIF BMP DIB TIFF PPM JPEG2000 AVIF TGA PCX SGI ICO ICNS QOI"
).split()
ORIENTATION = 0x0112  # of EXIF
_GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}
_SIGNATURES = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"RIFF": "a WebP image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
}

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
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    sizes_differ: bool = False

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
        which a copy on another machine shares; of a prepared set the same of its
        files; of arrays their content.
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

    @abc.abstractmethod
    def encoded(self, indices: np.ndarray) -> list[Encoded]:
        """The examples as they are stored."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch = self.gather(np.array([index]))
        return {"image": batch["image"][0], "label": batch["label"][0]}

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch, each image brought to `image_shape`."""
        examples = self.encoded(indices)
        images = [read_image(e.file, self.image_shape, e.where) for e in examples]
        labels = [example.label for example in examples]
        return {"image": np.stack(images), "label": np.array(labels, np.int32)}


def open_data(
    name: str,
    *,
    split: Split = "train",
    image_size: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
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

    Raises:
        DataError: if there is no such data, or it cannot be used.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    if image_size is not None and image_size < 1:
        raise DataError(f"image size: got {image_size}, expected at least 1 pixel")
    kind, _, rest = name.partition(":")
    if name == "digits":
        return _open_digits(split, image_size)
    if kind == "folder" and rest:
        return _open_folder(name, os.path.expanduser(rest), split, image_size)
    if kind == "tfds" and rest:
        return _open_tfds(name, rest, split, image_size, data_dir)
    raise DataError(f"unknown data {name!r}: {_suggestion(name)}")


def _suggestion(name: str) -> str:
    expected = "expected digits, folder:PATH or tfds:NAME"
    kind, colon, rest = name.partition(":")
    if os.path.isdir(os.path.expanduser(name)):
        return f"did you mean folder:{name}?"
    near = difflib.get_close_matches(kind, ["digits", "folder", "tfds"], n=1)
    if near == ["digits"]:
        return "did you mean digits?"
    if near and rest:
        return f"did you mean {near[0]}:{rest}?"
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
        fingerprint: of what was decoded; unless given, that of the arrays.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        name: str = "arrays",
        class_names: Sequence[str] | None = None,
        fingerprint: str | None = None,
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
        self.labels = labels.astype(np.int32)
        self.name = name
        self.class_names = tuple(class_names)
        self.image_shape = images.shape[1:]
        self._fingerprint = fingerprint

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
        fingerprint=source.fingerprint(),
    )


def _digest(source: Source, parts: Iterable[str | np.ndarray]) -> str:
    """Of the classes, and of paths and arrays, each told from the next."""
    digest = hashlib.sha256(repr(source.class_names).encode())
    for part in parts:
        content = os.fsencode(part) if isinstance(part, str) else part.tobytes()
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
    """

    def __init__(
        self,
        root: str,
        files: Sequence[str],
        labels: np.ndarray,
        *,
        name: str,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        sizes_differ: bool,
    ):
        self.root = root
        self.files = files
        self.labels = labels
        self.name = name
        self.class_names = tuple(class_names)
        self.image_shape = image_shape
        self.sizes_differ = sizes_differ

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
            examples.append(Encoded(path, show_path(path), int(self.labels[index])))
        return examples

    def fingerprint(self) -> str:
        """Of the names, labels and sizes of the files."""
        sizes = _file_sizes(map(self.path, range(len(self))))
        return _digest(self, [*self.files, self.labels, sizes])


def _open_folder(
    name: str, root: str, split: Split, image_size: int | None
) -> FolderSource:
    """Opens `train/CLASS/*` with `test` or `val`, `CLASS/*`, or a flat folder."""
    if not os.path.isdir(root):
        raise DataError(f"{name}: {_why_no_folder(root)}")
    parts, class_names = _list_parts(name, root)
    if not parts[split]:
        raise DataError(
            f"{name}: {show_path(root)} holds {len(parts['train'] + parts['test'])}"
            f" image(s), too few for a {split} part; add images"
        )
    everything = [file for part in parts.values() for file, _ in part]
    sizes, channels = _survey_folder(name, root, everything)
    files, labels = zip(*parts[split], strict=True)
    return FolderSource(
        root,
        files,
        np.asarray(labels, np.int32),
        name=name,
        class_names=class_names,
        image_shape=(*_choose_size(sizes, image_size), channels),
        sizes_differ=image_size is None and len(sizes) > 1,
    )


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
            f"{name}: no images below {show_path(os.path.join(root, base))}, expected"
            f" files such as {', '.join(sorted(EXTENSIONS)[:6])}; check the path"
        )
    # A single class folder says nothing about its images.
    class_names = list(groups) if len(groups) > 1 else []
    train = _label(groups, class_names)
    if has_parts and test_folder:
        test_groups = _group(name, root, test_folder)
        strangers = [n for n in test_groups if class_names and n not in class_names]
        if strangers:
            what = f"a class {show_path(strangers[0])}" if strangers[0] else "images"
            raise DataError(
                f"{name}: {test_folder} holds {what} outside of the"
                f" {len(class_names)} classes of train; give both the same class"
                " folders"
            )
        test = _label(test_groups, class_names)
    else:
        train, test = _hold_out(train)
    return {"train": train, "test": test}, list(map(show_path, class_names))


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
            f"{name}: images lie beside class folders ({show_path(images[0])} beside"
            f" {show_path(next(iter(groups)))}), so their class is unknown; move them"
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
                if entry.is_dir():
                    folders.append(below)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    images.append(below)
    except OSError as error:
        where = show_path(os.path.join(root, folder))
        raise DataError(f"{where}: cannot be listed ({error.strerror})") from error
    return sorted(folders, key=os.fsencode), sorted(images, key=os.fsencode)


def _why_no_folder(root: str) -> str:
    shown = show_path(root)
    if os.path.exists(root):
        return f"{shown} is a file, expected a folder of images"
    parent, last = os.path.split(os.path.abspath(root))
    beside = os.listdir(parent) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(last, beside, n=1)
    hint = f"did you mean {show_path(os.path.join(parent, near[0]))}?" if near else ""
    return f"there is no folder {shown}; {hint or 'check the path'}"


def _survey_folder(
    name: str, root: str, files: Sequence[str]
) -> tuple[set[tuple[int, int]], int]:
    """The sizes of the images, and their channels, from the headers of the files.

    One channel if all images are grey. Of a folder of more than `HEADERS_READ` files
    a sample is looked at; an image that differs is brought to the shape when read.
    """
    if len(files) > HEADERS_READ:
        indices = spread(len(files), HEADERS_SAMPLED)
        logger.info(
            "%s: size and channels of %d files are those of %d of them",
            name,
            len(files),
            HEADERS_SAMPLED,
        )
    else:
        indices = np.arange(len(files))
    sizes, grey = set(), True
    for index in indices.tolist():
        path = os.path.join(root, files[index])
        height, width, is_grey = read_header(path, show_path(path))
        sizes.add((height, width))
        grey = grey and is_grey
    return sizes, 1 if grey else 3


def _choose_size(
    sizes: set[tuple[int, int]], image_size: int | None
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
        name: how `open_data` calls it.
        class_names: the name of each label.
        image_shape: (H, W, C) to which every image is brought.
        sizes_differ: whether the images themselves are of several sizes.
        files: of the split.
    """

    def __init__(
        self,
        records: Any,
        keys: tuple[str, str | None],
        *,
        name: str,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        sizes_differ: bool,
        files: Sequence[str],
    ):
        self.records = records
        self.files = files
        self.keys = keys
        self.name = name
        self.class_names = tuple(class_names)
        self.image_shape = image_shape
        self.sizes_differ = sizes_differ

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
        return _digest(self, [str(len(self)), *names, _file_sizes(self.files)])


def _open_tfds(
    name: str,
    rest: str,
    split: Split,
    image_size: int | None,
    data_dir: str | os.PathLike[str] | None,
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
            sizes.add(read_header(encoded, f"{name}[{index}]")[:2])
    else:
        sizes = {(height, width)}
    return TFDSSource(
        examples,
        keys,
        name=name,
        class_names=builder.info.features[keys[1]].names if keys[1] else (),
        image_shape=(*_choose_size(sizes, image_size), 1 if channels == 1 else 3),
        sizes_differ=image_size is None and len(sizes) > 1,
        files=[os.fspath(path) for path in builder.info.splits[part].filepaths],
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
    return (
        f"make it of raw files with jemjax data prepare KIND RAW --name {below}, or,"
        f" where TensorFlow is, with tfds build {below} --file_format=array_record"
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


# ------------------------------------------------------------------ images


def _file_sizes(paths: Iterable[str]) -> np.ndarray:
    """In bytes; -1 for a file of which no size is to be had."""

    def size(path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError:  # what is wrong with it is told when it is read
            return -1

    return np.array([size(path) for path in paths], np.int64)


def show_path(path: str) -> str:
    """The path in printable characters, whatever bytes a file is named by."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode()


@contextlib.contextmanager
def opened(file: str | io.BytesIO, where: str) -> Iterator[Image.Image]:
    """An image of which the header is read; what is found wrong with it is named.

    Args:
        file: a path, or a file in memory.
        where: the name of the image in error messages.

    Raises:
        DataError: if it is no image, damaged, or not finite.
    """
    try:
        with Image.open(file, formats=_formats()) as image:
            yield image
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise almost anything
        raise _unreadable(file, where, error) from error


def read_header(file: str | io.BytesIO, where: str) -> tuple[int, int, bool]:
    """Height, width (upright) and whether grey, without decoding the pixels."""
    with opened(file, where) as image:
        return (*upright_size(image), image.mode in _GREY_MODES)


def read_image(
    file: str | io.BytesIO, shape: tuple[int | None, int | None, int], where: str
) -> np.ndarray:
    """Decodes one image.

    EXIF orientation is applied, transparency is laid on white, 16-bit, 32-bit and
    float images are scaled by their range, and the image is resized (antialiased,
    bicubic) until it covers the shape and cropped to its center.

    Args:
        file: a path, or a file in memory.
        shape: (H, W, C) of the result, C being 1 or 3; H and W of None keep the
            image's own.
        where: the name of the image in error messages.

    Returns:
        (H, W, C) uint8.

    Raises:
        DataError: if it is no image, damaged, or not finite.
    """
    with opened(file, where) as image:
        return _to_array(image, shape)


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes until (height, width) is covered and crops to the center."""
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    left = (image.width - width / scale) / 2
    top = (image.height - height / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)
    # Rounding must not put the box a hair outside of the image.
    box = (max(box[0], 0), max(box[1], 0)) + (
        min(box[2], image.width),
        min(box[3], image.height),
    )
    return image.resize((width, height), Image.Resampling.BICUBIC, box)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width after the EXIF orientation is applied, from the header."""
    width, height = image.size
    return (width, height) if _lies_on_its_side(image) else (height, width)


def _lies_on_its_side(image: Image.Image) -> bool:
    """Whether applying the EXIF orientation swaps height and width."""
    # A TIFF's size is upright already; a PNG without EXIF would be decoded to look.
    if image.format == "TIFF" or not {"exif", "xmp"} & image.info.keys():
        return False
    return image.getexif().get(ORIENTATION) in (5, 6, 7, 8)


def _to_array(
    image: Image.Image, shape: tuple[int | None, int | None, int]
) -> np.ndarray:
    height, width, channels = shape
    if image.format == "JPEG" and height and width:
        # JPEG decodes to an eighth, a quarter or a half at a fraction of the time;
        # twice the wanted size is kept for the antialiased resize.
        upright = (width, height)
        across, down = upright[::-1] if _lies_on_its_side(image) else upright
        scale = 2 * max(across / image.width, down / image.height)
        image.draft(
            None, (math.ceil(image.width * scale), math.ceil(image.height * scale))
        )
    ImageOps.exif_transpose(image, in_place=True)
    image = to_channels(image, channels)
    if height and width:
        image = fit(image, height, width)
    return np.array(image, np.uint8).reshape(image.height, image.width, channels)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Any mode of Pillow to L (one channel) or RGB (three)."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_eight_bits(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if channels == 1 else "RGB")


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Scales 16-bit, 32-bit and float values by the range that they are of.

    Integers are of 16 bits unless they exceed them; floats are of [0, 1], or else of
    8 or 16 bits; values outside of all of these are of their own range.
    """
    if not np.isfinite(values).all():
        raise FloatingPointError("holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    tops = [65535] if values.dtype.kind in "iu" else [1, 255, 65535]
    top = next((top for top in tops if 0 <= low and high <= top), None)
    if top is None:
        scaled = (values.astype(np.float64) - low) * (255 / max(high - low, 1e-30))
    else:
        scaled = values.astype(np.float64) * (255 / top)
    return np.round(scaled).astype(np.uint8)


def _unreadable(file: str | io.BytesIO, where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: {_looks_like(file, error)}, expected a readable image; replace or"
        " delete it"
    )


def _looks_like(file: str | io.BytesIO, error: Exception) -> str:
    if isinstance(file, str) and os.path.islink(file) and not os.path.exists(file):
        return "is a link to a file that does not exist"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels allowed"
    if isinstance(error, FloatingPointError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    if isinstance(file, str):
        with open(file, "rb") as opened:
            head = opened.read(512)
    else:
        head = file.getvalue()[:512]
    if not head:
        return "is an empty file"
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return f"starts as {name} but is damaged or cut short ({error})"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML)"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        return "is a text file"
    return "is no image of a known format"
