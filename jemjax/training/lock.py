"""One run a folder: who writes into it holds its lock."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from jemjax.errors import UserError

LOCK_NAME = ".jemjax-lock"


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
