"""Several hosts, one run: all run the same program, and wait for one another.

A host that stops while others wait for it would leave them hanging. So what can fail on
one of them, such as opening data, is done in a block that all of them leave alike
(`all_hosts`), and a host that fails anywhere else leaves at once (`leaving_at_once`).
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jemjax.errors import UserError, explaining_disk

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_COUNT = "JAX_NUM_PROCESSES"
_INDEX = "JAX_PROCESS_ID"
# By which a process is seen to be one of several, JAX's and those of Slurm, Open MPI.
_COUNTS = (_COUNT, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Seconds after which somebody who waits for other hosts is told so.
PATIENCE = 10


class CommonError(UserError):
    """An error that all hosts stop with, and that the first one tells."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def connect(multihost: bool) -> None:
    """Joins the hosts of a run. Call it before devices are used.

    On Cloud TPU, Slurm and Open MPI jax finds the others by itself. Elsewhere the
    environment names them: `JAX_COORDINATOR_ADDRESS` (host:port, the same everywhere,
    of the first host), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0).

    Args:
        multihost: whether there are others. If not, a host that can be seen to be one
            of several is refused: each would train a network of its own.

    Raises:
        UserError: if the hosts cannot be joined, or are not to be.
    """
    if jax.distributed.is_initialized():
        return
    if not multihost:
        counts = {name: _number(name) or 1 for name in _COUNTS}
        # On a slice of TPUs each host sees all devices even so.
        counts["jax.process_count()"] = jax.process_count()
        name = max(counts, key=lambda name: counts[name])
        if counts[name] > 1:
            raise UserError(
                f"this is one of {counts[name]} processes, as {name} says, each of"
                " which would train a network of its own: add --multihost, or start it"
                " without"
            )
        return
    count = _number(_COUNT)
    address = os.environ.get(_ADDRESS)
    if address and not address.rpartition(":")[2].isdecimal():
        raise UserError(f"{_ADDRESS}: got {address}, expected HOST:PORT")
    index = _number(_INDEX)
    waiting = threading.Timer(PATIENCE, _say_waiting)
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(address, count, index)
    except Exception as error:  # of many kinds; each means: there is no connection
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"--multihost: the hosts cannot be joined ({reason})."
            " On Cloud TPU, Slurm and Open MPI they find each other; elsewhere set"
            f" {_ADDRESS} (HOST:PORT of the first, for all), {_COUNT} and {_INDEX}"
            " (0, 1, ...), and start all of them"
        ) from error
    finally:
        waiting.cancel()


def _say_waiting() -> None:
    # Then jax ends the process, and no Python can say why.
    print(
        "jemjax: waiting for the other hosts, for 5 minutes at most: each has to be"
        " started, with the same command, and to reach the first",
        file=sys.stderr,
        flush=True,
    )


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isdecimal():
        raise UserError(f"{name}: got {value}, expected a number")
    return int(value)


def is_first() -> bool:
    """Whether this is the host that writes files and tells what happens."""
    return jax.process_index() == 0


def end_on_sigterm() -> None:
    """From here on SIGTERM ends the process, where nobody asks whether it came.

    With other hosts jax only takes note of it, for a loop that saves and stops.
    """
    if (
        jax.distributed.is_initialized()
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def require_shared(mark: Path) -> None:
    """Stops all hosts where one does not see a file that the first writes.

    Args:
        mark: the file, in the folder of the run; it goes again.

    Raises:
        UserError: as in `all_hosts`.
    """
    if jax.process_count() == 1:
        return
    with all_hosts():
        if is_first():
            mark.write_text(uuid.uuid4().hex)
    written = broadcast_from_first(mark.read_text() if is_first() else "")
    try:
        with all_hosts():
            if not mark.exists() or mark.read_text() != written:
                raise UserError(
                    f"--output {mark.parent}: the first host's files are not seen here;"
                    " expected a folder that all hosts share"
                )
    finally:
        if is_first():
            mark.unlink()


def gather(text: str) -> list[str]:
    """What each host gives, on all of them; each has to call it."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(encoded)])).ravel()
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def broadcast_from_first(text: str) -> str:
    """What the first host gives, on all of them; each has to call it."""
    return gather(text)[0] if jax.process_count() > 1 else text


def stop(message: str, exit_code: int) -> NoReturn:
    """Ends all hosts, each of which has to call it; the first one says why.

    Args:
        message: the reason, with what to do.
        exit_code: of the process.

    Raises:
        CommonError: on the first host.
        SystemExit: on others, which are silent.
    """
    if is_first():
        raise CommonError(message, exit_code)
    sys.exit(exit_code)


@contextlib.contextmanager
def all_hosts() -> Iterator[None]:
    """A block that fails on all hosts if it fails on one; each has to enter it.

    Raises:
        UserError: if the block raised one on any host, or found its disk full; on the
            first host only.
        SystemExit: on others then.
    """
    report = ""
    try:
        with explaining_disk():
            yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        report = f"{error.exit_code} {error}"
    if jax.process_count() == 1:
        return
    for host, reported in enumerate(gather(report)):
        if reported:
            code, message = reported.split(" ", 1)
            stop(f"host {host}: {message}" if host else message, int(code))


def require_equal(text: str, message: str) -> None:
    """Stops all hosts with a message where `text` is not the same on each."""
    if jax.process_count() > 1 and len(set(gather(text))) > 1:
        stop(message, UserError.exit_code)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """A host that fails alone leaves without waiting for the others, which wait for it.

    When a process ends, jax has it wait for all others to end. They would be waiting
    for it, in the middle of a step, for minutes; so they see it gone and end too.
    """
    try:
        with explaining_disk():
            yield
    except (CommonError, SystemExit):
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        name, code = f"jemjax: host {jax.process_index()}", 1
        if isinstance(error, UserError):
            print(f"{name}: {error}", file=sys.stderr)
            code = error.exit_code
        elif isinstance(error, KeyboardInterrupt):
            print(f"\n{name}: interrupted", file=sys.stderr)
            code = 130
        else:
            traceback.print_exc()
            print(f"{name}: stopped, maybe because another did", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
