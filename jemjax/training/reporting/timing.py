"""How fast a run is, and where its time goes."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

import jax


class StepClock:
    """Times steps as the devices finish them, without the loop waiting for them.

    A thread waits for each step's result and notes the time. What is not in a step is
    time in which the devices wait, for a measurement, a checkpoint, or the loop.
    """

    def __init__(self):
        self._steps: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._latest: jax.Array | None = None
        self._begun: float | None = None
        self._finished = 0.0
        self._stepping = 0.0
        self._spent: dict[str, float] = {}

    def started(self, result: jax.Array) -> None:
        """A step was given to the devices, which will yield this of it."""
        self._latest = result
        self._steps.put((time.monotonic(), result))

    @contextlib.contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """The loop does something else with the state, which is given its name."""
        jax.block_until_ready(self._latest)  # that is the step's time
        began = time.monotonic()
        try:
            yield
        finally:
            if self._begun is not None:
                took = time.monotonic() - began
                self._spent[what] = self._spent.get(what, 0.0) + took

    def stop(self) -> dict[str, float]:
        """Waits for the last step.

        Returns:
            Seconds: of all after the first step, which compiles ("total"), of the steps
            in it ("steps"), and by each name. {} if there was no second step.
        """
        self._steps.put(None)
        self._thread.join()
        if self._begun is None or self._finished == self._begun:
            return {}
        total = self._finished - self._begun
        return {"total": total, "steps": self._stepping} | self._spent

    def _watch(self) -> None:
        while (step := self._steps.get()) is not None:
            given, result = step
            with contextlib.suppress(Exception):  # the loop meets it too, and says so
                jax.block_until_ready(result)
            now = time.monotonic()
            if self._begun is None:
                self._begun = now
            else:
                self._stepping += now - max(given, self._finished)
            self._finished = now


class Throughput:
    """Images a second, without compilation and measurements."""

    def __init__(self, batch_size: int, first: int):
        """`first` steps were taken before; the next interval holds the compilation."""
        self.seconds = 0.0
        """in steps"""
        self._batch_size, self._first = batch_size, first
        self._steps = 0
        self._step, self._time = first, time.monotonic()

    def after(self, step: int) -> float:
        """Images a second since the last call of this or `pause`."""
        now = time.monotonic()
        steps, seconds = step - self._step, now - self._time
        if self._step > self._first:  # the first interval holds the compilation
            self.seconds += seconds
            self._steps += steps
        self._step, self._time = step, now
        return steps * self._batch_size / seconds

    def pause(self, step: int) -> None:
        """What has been done since the last call was no training."""
        self._step, self._time = step, time.monotonic()

    @property
    def mean(self) -> float:
        """Images a second in all of the steps; 0 if none was counted."""
        return self._steps * self._batch_size / self.seconds if self.seconds else 0.0


def describe(seconds: dict[str, float]) -> str:
    """What `StepClock.stop` returns, in words."""
    total = seconds["total"]
    parts = {"in steps": seconds["steps"]} | {
        name: took for name, took in seconds.items() if name not in ("total", "steps")
    }
    parts["else"] = max(0.0, total - sum(parts.values()))
    return f"{total:.1f} s: " + ", ".join(
        f"{took / total:.1%} {name}" for name, took in parts.items()
    )
