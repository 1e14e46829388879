"""What the loop tells while it runs: programs, people, and both of a collapse."""

from collections.abc import Mapping, Sequence

from jemjax.training.reporting.display import Display
from jemjax.training.reporting.loss_watch import LossWatch
from jemjax.training.reporting.metrics_file import MetricsFile

# Metrics of every method; what else a step logs are the terms of its method.
_OF_ALL = ("loss", "embedding_std", "gradient_norm")


class Reporter:
    """Writes `metrics.jsonl`, moves the display on, and names a collapse once.

    Args:
        file: of the run's metrics.
        display: where progress is shown.
        watch: follows the loss.
        total: steps of the run.
        advice: what to change where the run collapses.
    """

    def __init__(
        self,
        file: MetricsFile,
        display: Display,
        watch: LossWatch,
        total: int,
        advice: str,
    ):
        self._file, self._display, self._watch = file, display, watch
        self._total, self._advice = total, advice
        self._advised = False
        self._measured: dict[str, float] = {}

    def start(self, step: int) -> None:
        """The loop begins after so many steps."""
        self._display.start(self._total, step)

    def logged(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        learning_rate: float,
        skipped: int,
        rate: float,
        unreadable: int,
    ) -> None:
        """A step that is logged.

        Args:
            step: its number, from 1.
            metrics: what it returned.
            learning_rate: of its update.
            skipped: steps that were skipped so far.
            rate: images a second.
            unreadable: images that could not be read so far.
        """
        row = {
            "step": step,
            **metrics,
            "learning_rate": learning_rate,
            "skipped_steps": skipped,
            "images_per_second": round(rate, 1),
        }
        if unreadable:
            row["unreadable_images"] = unreadable
        if sentence := self._watch.logged(step, metrics["loss"]):
            self._tell_collapse(step, [sentence])
        self._file.write(row)
        shown = {
            "loss": metrics["loss"],
            **{name: metrics[name] for name in metrics if name not in _OF_ALL},
            "lr": learning_rate,
            "std": metrics["embedding_std"],
            "images/s": rate,
        }
        self._display.step(step, self._total, shown | self._measured)

    def measured(
        self, step: int, figures: Mapping[str, float], collapse: Sequence[str]
    ) -> None:
        """A measurement after a step.

        Args:
            step: its number.
            figures: by name.
            collapse: sentences that name one.
        """
        row = {"step": step, **figures}
        if collapse:
            row["collapse"] = collapse
            self._tell_collapse(step, collapse)
        if "knn" in figures:
            self._measured["kNN"] = figures["knn"]
        self._file.write(row)

    def _tell_collapse(self, step: int, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            self._display.say(f"step {step}: collapse, {sentence}")
        if not self._advised:
            self._advised = True
            self._display.say(f"  {self._advice}")

    def close(self) -> None:
        """The bar stays as it is, and the file is complete."""
        self._display.stop()
        self._file.close()
