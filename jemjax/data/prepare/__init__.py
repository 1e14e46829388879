"""Raw files to a TensorFlow Datasets set, without TensorFlow: `jemjax data prepare`.

The set is written in ArrayRecord form under the name, version and features by which
TensorFlow Datasets registers it, so that `tfds.data_source` reads it everywhere.
"""

import logging
import os
import re
from pathlib import Path
from typing import Literal

from jemjax.data.prepare.cifar import read_cifar_set
from jemjax.data.prepare.folder import read_folder
from jemjax.data.prepare.idx import read_idx_set
from jemjax.data.prepare.tfds_writer import write
from jemjax.data.sources import Progress
from jemjax.data.tfds import import_tfds
from jemjax.errors import DataError, printable

logger = logging.getLogger("jemjax.data")

# The versions that TensorFlow Datasets 4.9 registers.
OFFICIAL_VERSIONS = {
    "mnist": "3.0.1",
    "fashion_mnist": "3.0.1",
    "cifar10": "3.0.2",
    "cifar100": "3.0.2",
}


def prepare(
    kind: Literal["idx", "cifar", "folder"],
    raw: str | os.PathLike[str],
    *,
    name: str,
    out: str | os.PathLike[str] | None = None,
    version: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes a set that `tfds:NAME` and `tfds.data_source` read.

    A set that is there already is left as it is.

    Args:
        kind: "idx" (MNIST-style files, packed by gzip or not), "cifar" (the unpacked
            Python or binary archive of CIFAR-10 or CIFAR-100), or "folder" (what
            `folder:PATH` reads, with its parts train and test, as `DEFAULT_READING`).
        raw: the folder of the raw files.
        name: of the set: lower-case letters, digits and underscores.
        out: the folder of prepared sets; unless given, TensorFlow Datasets' own.
        version: MAJOR.MINOR.PATCH; unless given, the registered one, or 1.0.0.
        progress: called with how many examples are written, and of how many.

    Returns:
        The folder of the set, OUT/NAME/VERSION.

    Raises:
        DataError: if raw files are missing, damaged, or of another kind.
    """
    version = version or OFFICIAL_VERSIONS.get(name, "1.0.0")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(
            f"name: got {name!r}, expected lower-case letters, digits and underscores"
        )
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise DataError(f"version: got {version!r}, expected one such as 1.0.0")
    readers = {"idx": read_idx_set, "cifar": read_cifar_set, "folder": read_folder}
    if kind not in readers:
        raise DataError(f"kind: got {kind!r}, expected idx, cifar or folder")
    tfds = import_tfds()
    out = Path(out or tfds.core.constants.DATA_DIR).expanduser()
    folder = out / name / version
    if (folder / "dataset_info.json").exists():
        logger.warning("%s %s is prepared already in %s", name, version, folder)
        return folder
    raw = Path(raw).expanduser()
    if not raw.is_dir():
        raise DataError(f"no folder {printable(raw)} of raw files; check the path")
    write(tfds, readers[kind](raw, name), name, version, out, progress)
    return folder
