"""Checkpoints as they lie on the disk: what is whole, damaged, or left over.

A checkpoint is a folder `checkpoints/STEP` that orbax wrote. Its manifest has the size
and the SHA-256 of every file, since orbax does not notice when bytes of an array
change. A folder gets its name once all of it is there. This imports no jax.
"""

import concurrent.futures
import contextlib
import datetime
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jemjax.errors import CheckpointDamaged, UserError

MANIFEST = "manifest.json"
DAMAGED = ".damaged"
# What is being written, by us and by orbax, or deleted.
UNFINISHED = ".unfinished"
TEMPORARY = ".orbax-checkpoint-tmp"
# Bytes of a file that is hashed before all of them are written.
LARGE = 2**20
# Files that are read at a time: hashing does not hold Python's lock.
READERS = 4


class Manifest(NamedTuple):
    """What a checkpoint is made of."""

    step: int
    saved: str
    """when, in ISO format, UTC"""
    about: dict[str, Any]
    """of the run: its configuration, versions, data and devices"""
    leaves: dict[str, str]
    """dtype and shape of each array, by its path in the state"""
    files: dict[str, list[Any]]
    """size and SHA-256 of each file, by its path below the checkpoint"""

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(size for size, _ in self.files.values())


def unfinished(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is written, until `finish`."""
    return checkpoints / f"{step}{UNFINISHED}"


class Digests:
    """SHA-256 of the files of a checkpoint, begun while others are being written."""

    def __init__(self, checkpoints: Path, step: int):
        self._checkpoints, self._step = checkpoints, step
        self._known: dict[tuple[int, ...], str] = {}
        self._written = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._written.wait(0.05):
            for folder in self._checkpoints.glob(f"{self._step}{UNFINISHED}*"):
                for name in list(_files(folder)):
                    with contextlib.suppress(OSError):  # it may be moved meanwhile
                        # Small ones may be written again; data files are not.
                        if (folder / name).stat().st_size >= LARGE:
                            self.of(folder / name)

    def stop(self) -> None:
        """Ends the watching; to be called in any case."""
        self._written.set()
        self._thread.join()

    def of(self, path: Path) -> str:
        """The digest of a file, from before if nobody has written to it since."""
        before = _identity(path)
        if before not in self._known:
            digest = _sha256(path)
            if _identity(path) != before:
                return digest
            self._known[before] = digest
        return self._known[before]


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def finish(
    checkpoints: Path,
    step: int,
    about: Mapping[str, Any],
    leaves: Mapping[str, str],
    digests: Digests,
) -> None:
    """Writes the manifest of a checkpoint that orbax has committed, and names it.

    Args:
        checkpoints: the folder of all.
        step: of the checkpoint.
        about: of the run, to be compared when it is resumed; JSON.
        leaves: dtype and shape of each array.
        digests: of its files, as far as they are known.

    Raises:
        OSError: if a file cannot be read, or the manifest cannot be written.
    """
    folder = unfinished(checkpoints, step)
    names = sorted(_files(folder))
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        sums = list(pool.map(lambda name: digests.of(folder / name), names))
    manifest = Manifest(
        step,
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        dict(about),
        dict(leaves),
        {
            name: [(folder / name).stat().st_size, digest]
            for name, digest in zip(names, sums, strict=True)
        },
    )
    with (folder / MANIFEST).open("w") as file:
        file.write(_encode(manifest))
        file.flush()
        os.fsync(file.fileno())
    os.rename(folder, checkpoints / str(step))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, whose files are not looked at.

    Raises:
        CheckpointDamaged: if it is not there, or not as it was written.
    """
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        values = json.loads(text)
        values.pop("sha256")
        manifest = Manifest(**values)
        whole = _encode(manifest) == text
    except FileNotFoundError as error:
        raise CheckpointDamaged(
            f"checkpoint {folder.name}: file {MANIFEST} is missing"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole or str(manifest.step) != folder.name.partition(".")[0]:
        raise CheckpointDamaged(
            f"checkpoint {folder.name}: file {MANIFEST} is not as it was written"
        )
    return manifest


def verify(folder: Path, *, contents: bool = True) -> Manifest:
    """Compares every file of a checkpoint with its manifest.

    Args:
        folder: of the checkpoint.
        contents: whether the bytes are compared too, or the sizes only.

    Returns:
        The manifest.

    Raises:
        CheckpointDamaged: naming the first file that is not as it was written.
        OSError: if a file cannot be read.
    """
    manifest = read_manifest(folder)

    def damaged(name: str, what: str) -> CheckpointDamaged:
        return CheckpointDamaged(f"checkpoint {folder.name}: file {name} {what}")

    root = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise damaged(
                    str(path.relative_to(folder)), f"is a link to {path.resolve()}"
                )
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(root):
            raise damaged(name, "is not inside the checkpoint")
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise damaged(name, "is missing") from error
        if not stat.S_ISREG(status.st_mode):
            raise damaged(name, "is not a file")
        if status.st_size != size:
            raise damaged(
                name, f"has {status.st_size:,} bytes, its manifest says {size:,}"
            )
    if contents:
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            digests = pool.map(lambda name: _sha256(folder / name), manifest.files)
            for (name, (_, expected)), digest in zip(
                manifest.files.items(), digests, strict=True
            ):
                if digest != expected:
                    raise damaged(name, "has other contents than its manifest says")
    return manifest


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that have a checkpoint, whole or not, in order."""
    names = [path.name for path in _entries(checkpoints) if path.is_dir()]
    return sorted(int(n) for n in names if n.isdecimal() and str(int(n)) == n)


def _entries(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []


def set_aside(checkpoints: Path, step: int) -> Path:
    """Renames a damaged checkpoint, so that nothing uses it; returns its new place."""
    place = checkpoints / f"{step}{DAMAGED}"
    number = 1
    while place.exists():
        number += 1
        place = checkpoints / f"{step}{DAMAGED}-{number}"
    os.rename(checkpoints / str(step), place)
    return place


def set_aside_before(checkpoints: Path) -> list[str]:
    """The names of the checkpoints that were set aside."""
    return [path.name for path in _entries(checkpoints) if DAMAGED in path.name]


def remove_unfinished(checkpoints: Path) -> tuple[int, int]:
    """Deletes what interrupted saves and deletions have left, under the run's lock.

    Returns:
        How many there were, and how many bytes they had.
    """
    folders = [path for path in _entries(checkpoints) if _unfinished(path)]
    freed = sum(remove(folder) for folder in folders)
    return len(folders), freed


def _unfinished(path: Path) -> bool:
    return UNFINISHED in path.name or TEMPORARY in path.name


def remove(folder: Path) -> int:
    """Deletes a checkpoint, as far as it can be, and returns the bytes that it had."""
    size = folder_size(folder)
    if folder.is_symlink():
        folder.unlink()
        return size
    if not _unfinished(folder):  # no half of it is to be taken for a checkpoint
        folder = folder.rename(folder.with_name(folder.name + UNFINISHED))
    shutil.rmtree(folder, ignore_errors=True)
    return size


def folder_size(folder: Path) -> int:
    """The bytes of all files below a folder, of which some may vanish meanwhile."""
    size = 0
    for name in _files(folder):
        with contextlib.suppress(FileNotFoundError):
            size += (folder / name).lstat().st_size
    return size


def _files(folder: Path) -> Iterator[str]:
    """The paths of all files below a folder, but its manifest."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.relpath(os.path.join(parent, name), folder)
            if path != MANIFEST:
                yield path.replace(os.sep, "/")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode(manifest: Manifest) -> str:
    """The one text of a manifest; it holds its own digest."""
    values = manifest._asdict()
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "sha256": digest}, indent=1, sort_keys=True) + "\n"


# ------------------------------------------------- what `jemjax checkpoint` does


class Row(NamedTuple):
    """A checkpoint, or what is left of one, in a list."""

    name: str
    size: int
    saved: str
    state: str

    @property
    def broken(self) -> bool:
        """Whether it is in the place of a checkpoint, and is not one."""
        return self.name.isdecimal() and self.state not in ("whole", "complete")


def find_checkpoints(folder: Path) -> Path:
    """The `checkpoints` folder of a run, which may be given itself.

    Raises:
        UserError: if there is none.
    """
    for place in (folder / "checkpoints", folder.absolute()):
        if place.name == "checkpoints" and place.is_dir():
            return place
    raise UserError(f"{folder}: holds no checkpoints; expected the folder of a run")


def list_checkpoints(checkpoints: Path, *, contents: bool = False) -> list[Row]:
    """All that there is, the oldest first.

    Args:
        checkpoints: the folder.
        contents: whether every file is read, to see whether it is as it was written;
            else its size tells.
    """
    rows = []
    for step in saved_steps(checkpoints):
        place = checkpoints / str(step)
        saved, state = "", "whole" if contents else "complete"
        try:
            saved = verify(place, contents=contents).saved
        except CheckpointDamaged as error:
            if not place.exists():  # a run has just replaced it by a newer one
                continue
            state = "damaged: " + str(error).partition(": ")[2]
        except OSError as error:
            if not place.exists():
                continue
            state = f"cannot be read: {error}"
        rows.append(Row(place.name, folder_size(place), saved, state))
    for place in _entries(checkpoints):
        if _unfinished(place):
            rows.append(Row(place.name, folder_size(place), "", "unfinished"))
        elif DAMAGED in place.name:
            rows.append(Row(place.name, folder_size(place), "", "set aside"))
    return rows


def prune(checkpoints: Path, keep: int) -> tuple[list[str], int]:
    """Deletes all but the newest whole checkpoints, under the run's lock.

    Args:
        checkpoints: the folder.
        keep: how many stay, at least 1.

    Returns:
        The names of what was deleted, and the bytes that it had.
    """
    if keep < 1:
        raise UserError(f"--keep: got {keep}, expected at least 1")
    rows = list_checkpoints(checkpoints, contents=True)
    whole = [row.name for row in rows if row.state == "whole"]
    if not whole and rows:
        raise UserError(
            f"{checkpoints}: holds no whole checkpoint, so nothing was deleted"
        )
    kept = set(whole[-keep:])
    gone = [row.name for row in rows if row.name not in kept]
    return gone, sum(remove(checkpoints / name) for name in gone)
