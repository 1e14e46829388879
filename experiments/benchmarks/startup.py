"""From the command to the end of the first step, with a cold cache and a warm one.

python experiments/benchmarks/startup.py --rounds 3

Runs `jemjax pretrain vicreg` on the built-in digits in processes of their own, and
prints the medians of what their start was made of. JAX itself says how long it traced,
lowered, and compiled or read programs; what is left is data, weights and the step.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import tyro

PARTS = {
    "importing": "interpreter, imports",
    "tracing": "tracing and lowering",
    "compiling": "compiling",
    "reading": "reading compiled programs",
    "rest": "data, weights, the first step itself",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How often, and of what."""

    rounds: int = 3
    """starts with a cold cache, each followed by one with a warm one"""
    arguments: tuple[str, ...] = ("vicreg",)
    """of `jemjax pretrain`"""


def run(begun: float, arguments: list[str]) -> None:
    """In a process of its own: a run of two steps, and what its start was made of."""
    from jemjax import cli, runtime

    runtime.prepare_process()
    import jax
    from jax import monitoring

    from jemjax.training.run import pretrain as loop

    seconds = {"importing": time.time() - begun, "tracing": 0.0, "reading": 0.0}
    seconds["compiling"] = 0.0

    def note(event: str, duration: float, **_) -> None:
        name = event.rsplit("/", 1)[-1]
        if name in ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration"):
            seconds["tracing"] += duration
        elif name == "backend_compile_duration":
            seconds["compiling"] += duration
        elif name == "cache_retrieval_time_sec":
            seconds["reading"] += duration
            seconds["compiling"] -= duration  # of which it is a part

    class Clock(loop.StepClock):
        def started(self, result) -> None:
            if "total" not in seconds:
                jax.block_until_ready(result)
                seconds["total"] = time.time() - begun
                print(json.dumps(seconds), file=sys.stderr, flush=True)
            super().started(result)

    monitoring.register_event_duration_secs_listener(note)
    loop.StepClock = Clock
    sys.argv = ["jemjax", "pretrain", *arguments]
    cli.main()


def start(cache: Path, arguments: tuple[str, ...]) -> dict[str, float]:
    """Seconds of one start, by part."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(begun), *arguments]
            + ["--steps", "2", "--output", str(Path(folder) / "run")],
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    found = [line for line in done.stderr.splitlines() if line.startswith('{"')]
    if not found:
        sys.exit(f"the run ended with code {done.returncode}: {done.stderr}")
    seconds = json.loads(found[0])
    seconds["rest"] = 2 * seconds["total"] - sum(seconds.values())
    return seconds


def main(options: Options) -> None:
    """Prints the table."""
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in starts:
                starts[kind].append(start(Path(cache), options.arguments))
    print("| seconds, median | cold cache | warm cache |\n|---|---|---|")
    for part, name in {**PARTS, "total": "**until the first step has ended**"}.items():
        cells = [median(each[part] for each in starts[kind]) for kind in starts]
        print(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run(float(sys.argv[2]), sys.argv[3:])
    else:
        main(tyro.cli(Options, description=__doc__))
