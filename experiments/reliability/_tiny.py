"""Runs so small that starting them is most of their time."""

import json
import os
import subprocess
import sys
from pathlib import Path

STEPS, EVERY = 60, 5

OPTIONS = [
    f"--steps={STEPS}",
    f"--checkpoint-every={EVERY}",
    "--batch-size=64",
    "--image-size=8",
    "--backbone=resnet-narrow",
    "--log-every=1",
    "--eval-every=0",
    "--final-examples=200",
]
# What each remembers between steps: nothing; a center and a target; a queue.
METHODS = {
    "vicreg": ["--projector", "64"],
    "dino": ["--projector", "32", "16", "--num-prototypes=40"],
    "swav": [
        "--projector",
        "32",
        "16",
        "--num-prototypes=40",
        "--queue-length=128",
        "--queue-start=0",
    ],
}


def start(method: str, folder: Path, *more: str) -> subprocess.Popen:
    """Starts or resumes a run; what it says goes to `said.txt` beside its folder."""
    command = [sys.executable, "-m", "jemjax.cli", "pretrain", method, *OPTIONS]
    command += [*METHODS[method], f"--output={folder}", "--resume", *more]
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    with folder.with_name(f"{folder.name}-said.txt").open("a") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env=environment)


def said(folder: Path) -> str:
    """All that the starts of a run have said."""
    return folder.with_name(f"{folder.name}-said.txt").read_text()


def finish(method: str, folder: Path, *more: str) -> dict:
    """Runs to the end, and gives the results."""
    code = start(method, folder, *more).wait()
    if code:
        raise SystemExit(f"{folder}: exit code {code}\n{said(folder)[-3000:]}")
    return json.loads((folder / "results.json").read_text())
