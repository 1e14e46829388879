"""Whether two runs are given the same images, told by a short text."""

import hashlib
import io
from pathlib import Path

import numpy as np

from jemjax.data.sources import ArraySource, EncodedSource, FolderSource, Source, spread

# Images that are read to tell data on a disk; of data in memory it is all.
SAMPLE = 256


def fingerprint(source: Source) -> str:
    """SHA-256 of what a source holds; where it lies does not matter.

    Of data in memory it is over all images and labels; of files over all names and
    labels, and over the contents of 256 of them, evenly spread.

    Args:
        source: the opened data.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(repr(values).encode("utf-8", "surrogateescape"))

    add(len(source), source.class_names, source.image_shape)
    indices = spread(len(source), SAMPLE)
    if isinstance(source, ArraySource):
        digest.update(source.labels.tobytes())
        digest.update(np.ascontiguousarray(source.images).data)
    elif isinstance(source, EncodedSource):
        if isinstance(source, FolderSource):
            digest.update(source.labels.tobytes())
            digest.update("\0".join(source.files).encode("utf-8", "surrogateescape"))
        for example in source.encoded(indices):
            add(example.label)
            digest.update(_contents(example.file))
    else:
        batch = source.gather(indices)
        digest.update(batch["label"].tobytes())
        digest.update(np.ascontiguousarray(batch["image"]).data)
    return digest.hexdigest()


def _contents(file: str | io.BytesIO) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    try:
        return Path(file).read_bytes()
    except OSError:  # the loader tells it, by its own rules
        return b""
