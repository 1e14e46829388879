"""The training loop."""

import dataclasses
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax

from jemjax.data import Source
from jemjax.training.config.options import PretrainConfig
from jemjax.training.process.distributed import stop
from jemjax.training.process.signals import Signals
from jemjax.training.reporting.reporter import Reporter
from jemjax.training.reporting.timing import StepClock, Throughput
from jemjax.training.run.setup import Setup
from jemjax.training.step.branch import Images
from jemjax.training.step.state import TrainState
from jemjax.training.storage.checkpoints import Checkpoints
from jemjax.training.storage.skipped_steps import SkippedSteps

# What `protocols.monitor` gives.
Monitored = tuple[dict[str, float], list[str]]


@dataclasses.dataclass(frozen=True)
class Loop:
    """The steps of a run, and what is done between them."""

    setup: Setup
    source: Source
    stream: Iterator[dict[str, Any]]
    """batches of the source, from the first step on"""
    monitor: Callable[[TrainState], Monitored]
    reporter: Reporter
    throughput: Throughput
    clock: StepClock
    checkpoints: Checkpoints
    skipping: SkippedSteps
    signals: Signals

    def run(self, state: TrainState) -> None:
        """Takes the steps that are left; the last state is saved when this returns."""
        config, first = self.setup.config, int(state.step)
        total = config.steps
        assert total
        images = self._load()
        if images is None:
            where = f"after step {first}, no other was taken"
            stop_by_signal(self.signals, config, where)
        for step in range(first + 1, total + 1):
            assert images is not None  # else the run is stopped below
            state, metrics = self.setup.step(state, images)
            self.clock.started(metrics["loss"])
            self.checkpoints.check()
            if step < total:  # the next batch is loaded while the devices work
                images = self._load()
            if step % config.log_every == 0 or step in (first + 1, total):
                self._report(step, state, metrics)
            if _due(step, config.eval_every) and step < total:
                self._measure(step, state)
            stopping = self.checkpoints.preempted(step) or self.signals.stopping
            last = stopping or step == total
            if last or _due(step, config.checkpoint_every):
                self._save(step, state, last)
            if stopping:
                where = f"after step {step}, which is saved"
                stop_by_signal(self.signals, config, where)

    def _load(self) -> Images | None:
        """What the next step is given; None if a signal came."""
        return self.signals.interruptibly(lambda: self.setup.images(next(self.stream)))

    def _report(self, step: int, state: TrainState, metrics: dict[str, Any]) -> None:
        """Waits for the step's metrics, and tells them."""
        row = {name: float(value) for name, value in metrics.items()}
        skipped = self.skipping.report_skipped(step, state)
        self.reporter.logged(
            step,
            row,
            learning_rate=float(self.setup.schedule(step - skipped - 1)),
            skipped=skipped,
            rate=self.throughput.after(step),
            unreadable=len(self.source.unreadable),
        )

    def _measure(self, step: int, state: TrainState) -> None:
        """Measures what has been learned so far, unless a signal comes."""
        with self.clock.spent("measuring"):
            found = self.signals.interruptibly(lambda: self.monitor(state))
        if found is not None:
            self.reporter.measured(step, *found)
        self.throughput.pause(step)

    def _save(self, step: int, state: TrainState, last: bool) -> None:
        """Saves a state whose numbers are finite."""
        self.skipping.report_skipped(step, state)
        self.skipping.require_finite(step, state)
        with self.clock.spent("saving"):
            self.checkpoints.save(step, state, last=last)


def stop_by_signal(signals: Signals, config: PretrainConfig, where: str) -> NoReturn:
    """Ends a run because of a signal, once what is being saved is saved."""
    command = ["jemjax", "pretrain", config.method.name, "--config"]
    command += [str(Path(config.output or "") / "config.toml"), "--resume"]
    command += ["--multihost"] if jax.process_count() > 1 else []
    command += [] if config.fallback else ["--no-fallback"]
    if config.allow_change:
        command += ["--allow-change", *config.allow_change]
    stop(
        f"stopped by {signals.name} {where}; it continues with:\n"
        f"  {shlex.join(command)}",
        signals.exit_code,
    )


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0
