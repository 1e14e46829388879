"""What a set's files are like: sizes and channels, and how many cannot be read.

Their headers tell, of all or of an evenly spread sample.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jemjax.data.images import Header, Reading, UnreadableImage, read_header
from jemjax.errors import DataError, printable

# Every image's header is read when a folder of at most so many files is opened; of
# a larger folder an evenly spread sample.
HEADERS_READ = 20_000
HEADERS_SAMPLED = 2_000
# The side of the images of a set whose sizes differ.
DEFAULT_IMAGE_SIZE = 256

logger = logging.getLogger("jemjax.data")


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


def survey_folder(
    name: str, root: str, files: Sequence[str], reading: Reading
) -> Survey:
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
) -> Survey:
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


def choose_size(
    sizes: Collection[tuple[int, int]], image_size: int | None
) -> tuple[int, int]:
    """Height and width of a set's images: as asked for, or their own if all agree."""
    if image_size is None and len(sizes) == 1:
        return next(iter(sizes))
    side = image_size or DEFAULT_IMAGE_SIZE
    return side, side


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
