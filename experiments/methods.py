"""Every method of the lecture on one data set, and a table of what each learned.

python experiments/methods.py --data folder:PATH
python experiments/methods.py --data folder:PATH --methods vicreg dino --minutes 10
python experiments/methods.py --data digits --backbones resnet-narrow vit-narrow
python experiments/methods.py --data folder:PATH --methods byol --seeds 3

Each is `jemjax pretrain METHOD` with its defaults for small images, but for the number
of steps, which two CPU cores take in two to ten minutes. A run that was interrupted is
resumed, and one that is finished is not run again. Measured figures are in
experiments/README.md.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from jemjax.cli import METHOD_NAMES

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    data: str
    """Training data, as of `jemjax pretrain`."""
    methods: tuple[str, ...] = METHOD_NAMES
    """Which methods."""
    backbones: tuple[str, ...] = ()
    """Which backbones; unless given, each method's own."""
    steps: int = 600
    """Steps of each run."""
    minutes: float | None = None
    """Minutes of each run, instead of --steps."""
    seeds: int = 1
    """Runs of each, with the seeds 0, 1, 2, ..."""
    final_examples: int = 10_000
    """Images that the final measurements use at most."""
    data_dir: str | None = None
    """Where prepared TensorFlow Datasets are."""
    output: Path = Path("runs/methods")
    """Folder of the runs' folders."""


def run(options: Options, method: str, backbone: str, seed: int) -> Results:
    """Trains, unless it was done before; returns what `results.json` holds."""
    folder = options.output / "-".join(filter(None, (method, backbone, str(seed))))
    done = folder / "results.json"
    if not done.exists():
        command = [sys.executable, "-m", "jemjax.cli", "pretrain", method, "--resume"]
        command += ["--data", options.data, "--output", str(folder)]
        command += ["--seed", str(seed)]
        command += ["--final-examples", str(options.final_examples)]
        length = ("steps", options.steps)
        if options.minutes is not None:
            length = ("minutes", options.minutes)
        command += [f"--{length[0]}", str(length[1])]
        command += ["--backbone", backbone] if backbone else []
        command += ["--data-dir", options.data_dir] if options.data_dir else []
        subprocess.run(command, check=True)
    results = json.loads(done.read_text())
    asked = {"method": method, "data": options.data}
    asked |= {} if options.minutes else {"steps": options.steps}
    for name, value in asked.items():
        if results[name] != value:
            sys.exit(
                f"{folder}: got {name} {results[name]}, expected {value}: choose"
                " another --output"
            )
    return results


def _mean(runs: list[Results], figure: Callable[[Results], float], form: str) -> str:
    """The mean, and with several runs the least and the largest."""
    values = [figure(results) for results in runs]
    text = f"{statistics.mean(values):{form}}"
    if len(values) > 1:
        text += f" ({min(values):{form}} to {max(values):{form}})"
    return text


def _collapse(runs: list[Results]) -> str:
    """What is named at the end of any of the runs: of what, and of which type."""
    named = {}
    for results in runs:
        for what, key in (
            ("features", "collapse"),
            ("embedding", "embedding_collapse"),
        ):
            for sentence in results[key]["collapse"]:
                named[f"{what}: {sentence.split(':')[0]}"] = None
        if results["loss_collapse"]:
            named["loss"] = None
    return ", ".join(named) or "no"


def table(rows: dict[str, list[Results]]) -> str:
    """The results of runs as a Markdown table, a row for each method and backbone."""
    lines = [
        "| | steps | training | images/s | kNN: trained | untrained | pixels"
        " | 10 labels | linear: trained | untrained | rank: features | embedding"
        " | collapse |",
        "|" + "---|" * 13,
    ]
    for name, runs in rows.items():
        cells = (
            name,
            _mean(runs, lambda r: r["steps"], ",.0f"),
            # Of a run that was resumed, what was left of it.
            _mean(runs, lambda r: r.get("training_seconds", 0), ",.0f") + " s",
            _mean(runs, lambda r: r.get("images_per_second", 0), ",.0f"),
            f"**{_mean(runs, lambda r: r['knn']['trained'], '.1%')}**",
            _mean(runs, lambda r: r["knn"]["untrained"], ".1%"),
            _mean(runs[:1], lambda r: r["knn"]["pixels"], ".1%"),
            _mean(runs, lambda r: r["knn_10_labels"]["trained"], ".1%"),
            f"**{_mean(runs, lambda r: r['linear']['trained'], '.1%')}**",
            _mean(runs, lambda r: r["linear"]["untrained"], ".1%"),
            _mean(runs, lambda r: r["collapse"]["effective_rank"], ".1f"),
            _mean(runs, lambda r: r["embedding_collapse"]["effective_rank"], ".1f"),
            _collapse(runs),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Runs the methods one after the other, and prints the table."""
    rows: dict[str, list[Results]] = {}
    for method in options.methods:
        for backbone in options.backbones or ("",):
            name = f"{method}, {backbone}" if backbone else method
            rows[name] = [
                run(options, method, backbone, seed) for seed in range(options.seeds)
            ]
    print(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
