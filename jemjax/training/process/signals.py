"""Signals that end a run: noted, until the step is done and its state is saved."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self, TypeVar

import jax

T = TypeVar("T")

# Ctrl-C, the end of a job, and the warning that a cluster sends some time before.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class _Interrupted(BaseException):
    """Leaves a wait or a measurement; not an `Exception`, which others catch."""


class Signals:
    """Within its context the first signal is noted, and a second ends the process.

    The main thread installs the handlers and puts those that were there before back;
    in other threads, and for signals that are ignored or of which a handler is not
    Python's, nothing changes.

    A run on several hosts has to end after the same step on all of them. JAX sees to
    that for SIGTERM, with a handler of its own; the other two are passed on as that.
    """

    received: signal.Signals | None = None
    """what was noted first"""

    def __init__(self) -> None:
        self.passed_on = jax.distributed.is_initialized()
        self._before: dict[signal.Signals, Any] = {}
        self._interruptible = False

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in NAMES:
            if not hasattr(signal, name) or (self.passed_on and name == "SIGTERM"):
                continue
            number = signal.Signals[name]
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):
                self._before[number] = before
        # Python runs a handler between two of its own instructions: not while XLA
        # compiles. What is written into the pipe at once is read by a thread.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._watcher = threading.Thread(
            target=self._watch, args=(self._pipe[0],), daemon=True
        )
        self._watcher.start()
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, before in self._before.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])  # by which the thread ends
        self._watcher.join(timeout=5)

    def _watch(self, pipe: int) -> None:
        seen = 0
        while read := os.read(pipe, 64):
            ours = [number for number in read if number in self._before]
            if ours and not seen:
                with contextlib.suppress(
                    OSError, ValueError
                ):  # nobody is there to read
                    print(
                        f"\njemjax: {signal.Signals(ours[0]).name}: stopping after this"
                        " step; at once if it comes again",
                        file=sys.stderr,
                        flush=True,
                    )
            seen += len(ours)
            if seen > 1:
                os._exit(128 + ours[-1])
        os.close(pipe)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if self.passed_on:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._interruptible:
            self._interruptible = False
            raise _Interrupted

    def interruptibly(self, work: Callable[[], T]) -> T | None:
        """`work()`, or None if it is left since a signal comes, or has come.

        For what changes no state. Of several hosts none leaves the others alone in it.
        """
        try:
            # Within both, since the signal may come in the last line too.
            try:
                self._interruptible = not self.passed_on
                if self._interruptible and self.received:
                    raise _Interrupted
                return work()
            finally:
                self._interruptible = False
        except _Interrupted:
            return None

    @property
    def stopping(self) -> bool:
        """Whether the run is to be stopped here; of several hosts, JAX says when."""
        return bool(self.received) and not self.passed_on

    @property
    def exit_code(self) -> int:
        """Of a process that ends because of what was received."""
        return 128 + (self.received or signal.SIGTERM)

    @property
    def name(self) -> str:
        """Of what was received, here or by another host."""
        return (self.received or signal.SIGTERM).name
