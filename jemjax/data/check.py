"""Every image of a set decoded, and all that is odd about it told: `data check`."""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jemjax.data.folders import FolderSource, open_folder_parts
from jemjax.data.images import (
    DEFAULT_READING,
    Header,
    Inspection,
    Reading,
    inspect_image,
)
from jemjax.data.open import open_data
from jemjax.data.sources import ArraySource, EncodedSource, Progress, Source
from jemjax.errors import DataError, printable


@dataclasses.dataclass
class Findings:
    """What a set holds."""

    name: str
    parts: dict[str, int]
    """how many images the parts train and test have"""
    classes: collections.Counter[str]
    """how many images each class has"""
    shorter: list[int]
    """the shorter side of each image that can be read, in pixels"""
    longer: list[int]
    """the longer side"""
    formats: collections.Counter[str]
    modes: collections.Counter[str]
    """as Pillow calls them"""
    values: dict[str, tuple[float, float]]
    """the least and the greatest value by mode, of modes of more than 8 bits"""
    transparent: int
    frames: list[str]
    """images that hold several frames, of which the first is used"""
    outside: int
    """files that are links out of the folder"""
    small: list[str]
    """images whose shorter side is less than was asked for"""
    unreadable: list[str]
    """a sentence for each file that cannot be read"""
    notes: list[str]
    """what else a run would stumble over"""

    @property
    def good(self) -> bool:
        """Whether a run can use every image."""
        return not self.small and not self.unreadable

    def rows(self) -> Iterator[tuple[str, str]]:
        """The table: what is counted, and how many."""
        images = sum(self.parts.values())
        yield "images", f"{images:,} ({_counts(self.parts)})"
        if self.classes:
            sizes = self.classes.values()
            yield (
                "classes",
                f"{len(self.classes):,} of {min(sizes):,} to {max(sizes):,} images"
                f" ({_counts(self.classes)})",
            )
        else:
            yield "classes", "none: images without labels"
        if self.shorter:
            for side, lengths in (("short", self.shorter), ("long", self.longer)):
                yield (
                    f"{side} sides",
                    f"{min(lengths):,} to {max(lengths):,} pixels, median"
                    f" {statistics.median(lengths):,.0f}",
                )
        yield "formats", _counts(self.formats) or "none"
        yield "modes", _counts(self.modes) or "none"
        for mode, (low, high) in self.values.items():
            yield f"{mode} values", f"{low:g} to {high:g}"
        yield "transparent", f"{self.transparent:,}"
        yield "many frames", f"{len(self.frames):,}{_first(self.frames)}"
        if self.outside:
            yield "links", f"{self.outside:,} to files outside of the folder"
        yield "too small", f"{len(self.small):,}"
        yield "unreadable", f"{len(self.unreadable):,}"


def check(
    name: str,
    *,
    min_size: int = 1,
    reading: Reading = DEFAULT_READING,
    data_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Decodes every image of a set, in parallel.

    Args:
        name: a folder, or what `open_data` opens.
        min_size: the least shorter side in pixels; smaller images are named.
        reading: how image files are read.
        data_dir: where prepared TensorFlow Datasets are; unless given, their default.
        progress: called with how many images are done, and of how many.

    Returns:
        What was found.

    Raises:
        DataError: if there is no such set, or what it holds is no set of images.
    """
    if min_size < 1:
        raise DataError(f"--min-size: got {min_size}, expected at least 1")
    for problem in reading.problems():
        raise DataError(problem)
    if ":" not in name and name != "digits" or os.path.isdir(os.path.expanduser(name)):
        name = f"folder:{name}"
    notes: list[str] = []
    parts = _parts(name, reading, data_dir, notes)
    findings = Findings(
        name=printable(name),
        parts={part: len(source) for part, source in parts.items()},
        classes=collections.Counter(),
        shorter=[],
        longer=[],
        formats=collections.Counter(),
        modes=collections.Counter(),
        values={},
        transparent=0,
        frames=[],
        outside=0,
        small=[],
        unreadable=[],
        notes=notes,
    )
    total, done = sum(findings.parts.values()), 0
    threads = min(32, 2 * (os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for source in parts.values():
                starts = range(0, len(source), 64)
                chunks = [np.arange(i, min(i + 64, len(source))) for i in starts]
                looks = functools.partial(_look, source, reading)
                for looked_at in pool.map(looks, chunks):
                    for look in looked_at:
                        _add(findings, source, look, min_size)
                    done += len(looked_at)
                    if progress is not None:
                        progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return findings


class _Look(NamedTuple):
    """One image, looked at."""

    where: str
    label: int
    found: Inspection | DataError
    outside: bool


def _look(source: Source, reading: Reading, indices: np.ndarray) -> list[_Look]:
    if isinstance(source, ArraySource):
        height, width, channels = source.image_shape
        mode = "L" if channels == 1 else "RGB"
        header = Header(height, width, channels == 1, mode, "array", False)
        labels = source.labels[indices].tolist()
        return [_Look("", n, Inspection(header, False, None), False) for n in labels]
    assert isinstance(source, EncodedSource)
    looks = []
    root = os.path.realpath(source.root) if isinstance(source, FolderSource) else ""
    for file, where, label in source.encoded(indices):
        try:
            found = inspect_image(file, where, reading)
        except DataError as error:  # a disk's failure too, which others survive
            found = error
        outside = isinstance(file, str) and not os.path.realpath(file).startswith(
            os.path.join(root, "")
        )
        looks.append(_Look(where, label, found, outside))
    return looks


def _add(findings: Findings, source: Source, look: _Look, min_size: int) -> None:
    if look.label >= 0:
        findings.classes[source.class_names[look.label]] += 1
    findings.outside += look.outside
    if isinstance(look.found, DataError):
        findings.unreadable.append(str(look.found))
        return
    header, transparent, extremes = look.found
    shorter, longer = sorted((header.height, header.width))
    findings.shorter.append(shorter)
    findings.longer.append(longer)
    findings.formats[header.format] += 1
    findings.modes[header.mode] += 1
    findings.transparent += transparent
    if header.frames:
        findings.frames.append(look.where)
    if shorter < min_size:
        findings.small.append(
            f"{look.where}: is of {header.height} x {header.width} pixels, expected at"
            f" least {min_size}"
        )
    if extremes is not None:
        low, high = findings.values.get(header.mode, extremes)
        findings.values[header.mode] = min(low, extremes[0]), max(high, extremes[1])


def _parts(
    name: str,
    reading: Reading,
    data_dir: str | os.PathLike[str] | None,
    notes: list[str],
) -> Mapping[str, Source]:
    """The sources of train and test part, opened whatever their images are."""
    kind, _, rest = name.partition(":")
    if kind == "folder" and rest:
        return open_folder_parts(printable(name), os.path.expanduser(rest), reading)
    lenient = dataclasses.replace(reading, on_bad_image="skip", max_bad_share=1.0)
    parts = {"train": open_data(name, data_dir=data_dir, reading=lenient)}
    try:
        parts["test"] = open_data(
            name, split="test", data_dir=data_dir, reading=lenient
        )
    except DataError as error:
        notes.append(f"{error}; --eval-data can name another set to measure on")
    return parts


def _counts(counts: Mapping[str, int], most: int = 5) -> str:
    """The largest of them."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    texts = [f"{name} {count:,}" for name, count in ordered[:most]]
    return ", ".join(texts + ["..."] * (len(ordered) > most))


def _first(names: list[str]) -> str:
    return f" (the first is used), such as {names[0]}" if names else ""
