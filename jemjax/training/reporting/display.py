"""What a run tells people: one progress bar, or plain lines."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from jemjax.errors import printable, printable_lines


class Display:
    """A progress bar on a terminal, plain lines elsewhere; nothing if it is quiet."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._live = self.console.is_terminal
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._started = 0.0
        self._first = 0

    def header(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """What will happen, before it does."""
        self.console.print(f"[bold]{escape(printable(title))}[/]")
        for name, text in rows:
            self.say(f"  {name:<12} {text}")

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(escape(printable_lines(text)))

    def reading(self, what: str) -> Callable[[int, int], None]:
        """A function of (done, total) that says every few seconds how far it is."""
        last = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 5:
                last = time.monotonic()
                self.say(f"reading {what}: {done:,} of {total:,} images")

        return progress

    def start(self, total: int, completed: int) -> None:
        """The bar of the training loop appears."""
        if self._live:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "training", total=total, completed=completed, text="compiling"
            )
            self._progress.start()

    def step(self, step: int, total: int, fields: Mapping[str, float]) -> None:
        """The figures of a logged step."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in fields.items())
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if self._started == 0:  # what came before was compilation
            self._started, self._first = now, step
        if now - self._last_line >= 10 or step >= total:
            self._last_line = now
            line = f"step {step}/{total}  {text}"
            if step > self._first:
                left = (now - self._started) * (total - step) / (step - self._first)
                line += f"  {_clock(left)} left"
            self.say(line)

    def stop(self) -> None:
        """The bar stays as it is, and lines follow."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def results(self, results: Mapping[str, Any]) -> None:
        """The final figures, each beside what it is to be compared with."""
        table = Table(box=None, padding=(0, 2), header_style="bold")
        for column in ("", "trained", "untrained", "raw pixels"):
            table.add_column(column, justify="left" if not column else "right")
        names = {
            "knn": "kNN (k = 20)",
            "knn_10_labels": "kNN, 10 labels a class",
            "linear": "linear probe",
        }
        for protocol, name in names.items():
            if protocol in results:
                figures = results[protocol]
                table.add_row(
                    name,
                    *[f"{figures[k]:.1%}" for k in ("trained", "untrained", "pixels")],
                )
        if table.row_count:
            self.console.print(table)
        if "clusters" in results:
            self._clusters(results["clusters"])
        for name, key in (
            ("features", "collapse"),
            ("embedding", "embedding_collapse"),
        ):
            if key not in results:
                continue
            figures = results[key]
            self.say(
                f"{name}: normalized std {figures['normalized_std']:.4f} (ideal"
                f" {figures['ideal_normalized_std']:.4f}), effective rank"
                f" {figures['effective_rank']:.1f}, RankMe {figures['rankme']:.1f},"
                f" alpha-ReQ {figures['alpha_req']:.2f}"
            )
            for sentence in figures["collapse"]:
                self.say(f"  collapse, {sentence}")
        for sentence in results.get("loss_collapse", ()):
            self.say(f"collapse, {sentence}")
        if "advice" in results:
            self.say(f"  {results['advice']}")

    def _clusters(self, clusters: Mapping[str, float]) -> None:
        text = (
            f"clusters: {clusters['used_prototypes']} of {clusters['prototypes']}"
            f" prototypes used (perplexity {clusters['perplexity']:.1f})"
        )
        if "hungarian_accuracy" in clusters:
            text += (
                f", mutual information {clusters['normalized_mutual_information']:.3f},"
                f" Hungarian accuracy {clusters['hungarian_accuracy']:.1%}, with"
                f" {clusters['labels_per_class']} labels a class"
                f" {clusters['few_label_accuracy']:.1%}"
            )
        self.say(text)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
