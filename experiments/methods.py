"""Every method of the lecture on one data set, and a table of what each learned.

python experiments/methods.py --data folder:PATH
python experiments/methods.py --data folder:PATH --methods vicreg dino --steps 2000

Each is `jemjax pretrain METHOD` with its defaults for small images, but for the number
of steps, which two CPU cores take in two to ten minutes. A run that was interrupted is
resumed. Measured figures are in experiments/README.md.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import tyro

from jemjax.cli import METHOD_NAMES


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    data: str
    """folder:PATH or tfds:NAME"""
    methods: tuple[str, ...] = METHOD_NAMES
    """which of them"""
    steps: int = 600
    """of each run"""
    final_examples: int = 10_000
    """images that the final measurements use at most"""
    output: Path = Path("runs/methods")
    """folder of the runs' folders"""


def table(folders: list[Path]) -> str:
    """The results of runs as a Markdown table."""
    lines = [
        "| | steps | training | images/s | kNN: trained | untrained | pixels"
        " | 10 labels | linear: trained | untrained | rank: features | embedding"
        " | collapse |",
        "|" + "---|" * 13,
    ]
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        knn, linear = results["knn"], results["linear"]
        collapse = results["embedding_collapse"]
        cells = (
            results["method"],
            f"{results['steps']:,}",
            f"{results['training_seconds']:.0f} s",
            f"{results['images_per_second']:.0f}",
            f"**{knn['trained']:.1%}**",
            f"{knn['untrained']:.1%}",
            f"{knn['pixels']:.1%}",
            f"{results['knn_10_labels']['trained']:.1%}",
            f"**{linear['trained']:.1%}**",
            f"{linear['untrained']:.1%}",
            f"{results['collapse']['effective_rank']:.1f}",
            f"{collapse['effective_rank']:.1f}",
            ", ".join(text.split(":")[0] for text in collapse["collapse"]) or "no",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Runs the methods one after the other, and prints the table."""
    folders = []
    for method in options.methods:
        folder = options.output / method
        command = [sys.executable, "-m", "jemjax.cli", "pretrain", method, "--resume"]
        command += ["--data", options.data, "--output", str(folder)]
        command += ["--steps", str(options.steps)]
        command += ["--final-examples", str(options.final_examples)]
        subprocess.run(command, check=True)
        folders.append(folder)
    print(table(folders))


if __name__ == "__main__":
    main(tyro.cli(Options))
