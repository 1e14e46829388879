"""Image folders: which files are of which part and class, in an order that stays."""

import difflib
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jemjax.data.headers import DEFAULT_IMAGE_SIZE, choose_size, survey_folder
from jemjax.data.images import EXTENSIONS, Reading
from jemjax.data.sources import (
    Encoded,
    EncodedSource,
    Split,
    digest_of,
    file_sizes,
)
from jemjax.errors import DataError, printable


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
        sizes = file_sizes(map(self.path, range(len(self))))
        return digest_of(self, [*self.files, self.labels, sizes, *self.sample()])


def open_folder(
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
    survey = survey_folder(name, root, everything, reading)
    files, labels = zip(*parts[split], strict=True)
    return FolderSource(
        root,
        files,
        np.asarray(labels, np.int32),
        name=name,
        class_names=class_names,
        image_shape=(*choose_size(survey.sizes, image_size), survey.channels),
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
