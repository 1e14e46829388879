"""The folder of a run: whose it is, and who writes into it. This imports no jax."""

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from jemjax.errors import UserError

# A file by which the one process that writes into a folder is known.
LOCK_NAME = ".jemjax-lock"
# A file by which hosts see that they share a folder.
HOSTS_NAME = ".jemjax-hosts"
# What a run that was killed before it had its configuration may have left.
_BEFORE_A_RUN = {LOCK_NAME, HOSTS_NAME, "config.tmp"}


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses a folder that is not a run's, or that holds a run that is to stay.

    Args:
        folder: of the run.
        resume: whether a run that it holds is continued.
        overwrite: whether a run that it holds is deleted.

    Raises:
        UserError: saying what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file, expected a folder")
    used = (folder / "config.toml").exists()
    if not used and folder.exists() and {*os.listdir(folder)} - _BEFORE_A_RUN:
        raise UserError(
            f"--output {folder}: holds files that are not of a run; choose another"
            " folder"
        )
    if used and not (overwrite or resume):
        raise UserError(
            f"--output {folder}: holds a run; continue it with --resume, delete it"
            " with --overwrite, or choose another folder"
        )


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder, which goes again if it was made here and nothing stays in it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            for path in missing:
                path.rmdir()


def empty_folder(folder: Path) -> None:
    """Deletes all that a folder holds but its lock."""
    with writing(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says what to do where a folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror}); choose another"
            " folder"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A block during which no other process of ours writes into a folder.

    The system releases the lock of a process that ends, however it ends, so that of a
    dead one is simply taken over; the file says who holds it.

    Args:
        folder: of a run; it has to exist.

    Raises:
        UserError: if somebody else holds the lock, naming the owner.
    """
    path = folder / LOCK_NAME
    descriptor = _open(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_identity()).encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """The lock's file, locked."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"{path.parent}: cannot be written ({error.strerror}); choose another"
                " folder"
            ) from error
        taken = _take(descriptor)
        # Its owner may have deleted it since it was opened: then it locks nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                if taken:
                    return descriptor
                owner = _owner(path)
                os.close(descriptor)
                raise UserError(
                    f"{path.parent}: {owner} is writing there; wait until it has ended,"
                    " or choose another --output"
                )
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks: then nobody can be kept out.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _identity() -> dict[str, str | int]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
