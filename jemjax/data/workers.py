"""Processes that load images: what they say of themselves, and how they end."""

import contextlib
import faulthandler
import mmap
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jemjax.data import images

# Those that end a run, and are not for its workers.
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
_NOTE_BYTES = 4096


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Signals are not for this thread, nor for processes that it starts.

    A Ctrl-C reaches all processes of a terminal, and Slurm signals all of a step; it
    must not take the workers away from a run that wants to end its step and save.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Worker(NamedTuple):
    """What a worker wrote about itself."""

    process: int
    alive: bool
    doing: str
    stack: str


def start_worker(notes: Path, index: int, count: int) -> None:
    """Lets a worker say what it does, and end when the run does, however that ends."""
    del count
    note = notes / f"{index}.reading"
    note.write_bytes(bytes(_NOTE_BYTES))
    with note.open("r+b") as file:
        page = mmap.mmap(file.fileno(), _NOTE_BYTES)

    def tell(where: str) -> None:
        page[:] = where.encode()[:_NOTE_BYTES].ljust(_NOTE_BYTES, b"\0")

    images.on_opening = tell
    stack = (notes / f"{index}.stack").open("w")
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    (notes / f"{index}.process").write_text(str(os.getpid()))
    threading.Thread(target=_end_with_parent, args=(notes,), daemon=True).start()


def _end_with_parent(notes: Path) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    shutil.rmtree(notes, ignore_errors=True)
    os._exit(1)


def workers_of(notes: Path | None) -> list[Worker]:
    """What the workers have written, of those that have begun; none without notes."""
    if notes is None:
        return []
    living = {child.pid for child in multiprocessing.active_children()}
    workers = []
    for path in sorted(notes.glob("*.process")):
        note = path.with_suffix(".reading").read_bytes().rstrip(b"\0")
        where = note.decode("utf-8", "replace")
        process = int(path.read_text())
        workers.append(
            Worker(
                process,
                process in living,
                f"last reading {where}" if where else "before it read an image",
                path.with_suffix(".stack").read_text(errors="replace"),
            )
        )
    return workers


def mark_flags_as_parsed() -> None:
    """Grain's workers read absl's flags, which outside of absl.app nobody parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
