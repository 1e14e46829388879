"""The folder of a run: whose it is, and what it says of itself."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jemjax.errors import UserError
from jemjax.methods import METHODS
from jemjax.training.config import PretrainConfig, from_toml, method_name_of, to_toml
from jemjax.training.hosts import HOSTS_NAME
from jemjax.training.lock import LOCK_NAME
from jemjax.training.metrics import Display, replacing
from jemjax.training.resuming import COMMAND, compare

# What a run that was killed before it had its configuration may have left.
_BEFORE_A_RUN = {LOCK_NAME, HOSTS_NAME, "config.tmp"}


def check_folder(config: PretrainConfig, folder: Path) -> None:
    """Refuses a folder that is not a run's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file, expected a folder")
    used = (folder / "config.toml").exists()
    if not used and folder.exists() and {*os.listdir(folder)} - _BEFORE_A_RUN:
        raise UserError(
            f"--output {folder}: holds files that are not of a run; choose another"
            " folder"
        )
    if used and not (config.overwrite or config.resume):
        raise UserError(
            f"--output {folder}: holds a run; continue it with --resume, delete it"
            " with --overwrite, or choose another folder"
        )


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder, which goes again if it was made here and nothing stays in it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            for path in missing:
                path.rmdir()


def empty_folder(folder: Path) -> None:
    """Deletes all that a folder holds but its lock."""
    with _writing(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink()


def compare_folder(
    config: PretrainConfig, folder: Path, about: dict[str, Any], display: Display
) -> None:
    """Compares this run with the one that the folder holds, if that goes on."""
    if (folder / "config.toml").exists() and not config.overwrite:
        differences = compare(folder, about, config.allow_change)
        if differences:
            display.say(f"WARNING: {folder} was begun otherwise; other numbers follow:")
        for line in differences:
            display.say(f"  {line}")


def write_config(config: PretrainConfig, folder: Path) -> None:
    """Writes config.toml, unless it says this already."""
    path, text = folder / "config.toml", to_toml(dataclasses.replace(config, **COMMAND))
    with _writing(folder):
        if path.exists() and path.read_bytes() == text.encode():
            return
        with replacing(path) as file:
            file.write(text)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror}); choose another"
            " folder"
        ) from error


def load_config(folder: Path) -> PretrainConfig:
    """The configuration of the run in a folder."""
    path = folder / "config.toml"
    if not path.exists():
        raise UserError(f"{folder}: holds no run (no config.toml)")
    name = method_name_of(path)
    if name not in METHODS:
        raise UserError(
            f"{path}: unknown method {name!r}, expected {', '.join(METHODS)}"
        )
    config = from_toml(path, PretrainConfig(method=METHODS[name]()))
    _check_complete(config, path)
    return config


def _check_complete(config: PretrainConfig, path: Path) -> None:
    """Refuses a file of an earlier version, which lacks what a method now needs."""
    size, batch_size = config.image_size, config.batch_size
    if not size or not batch_size:  # not written by a run, which resolves them
        return
    resolved = config.method.resolve(size, batch_size, batch_size)
    for field in dataclasses.fields(resolved):
        if getattr(config.method, field.name) is None:
            needed = getattr(resolved, field.name)
            if needed is not None:
                raise UserError(
                    f"{path}: lacks method.{field.name}, which this version needs; add"
                    f" it as the run was begun (now it would be {needed!r}), or use the"
                    " version that began the run"
                )
