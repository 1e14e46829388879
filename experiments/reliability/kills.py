"""Runs that are killed with -9 at random moments, and resumed until their end.

python experiments/reliability/kills.py --runs 20

It prints where each kill fell, and whether the final state has the bytes of the run
that nobody disturbed. Half of the kills wait for a checkpoint that is being written.
A run of 60 steps takes ten seconds or so, most of which are its start.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from _tiny import EVERY, METHODS, STEPS, finish, said, start

from jemjax.training.reporting.metrics_file import read_metrics
from jemjax.training.storage import manifest

SAVING = "while checkpoint {} was written"


def being_written(folder: Path) -> str:
    """The step of which a checkpoint is being written, if one is."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    unfinished = [name for name in names if not name.isdecimal()]
    return unfinished[0].partition(".")[0] if unfinished else ""


def kill(method: str, folder: Path, draw: random.Random, duration: float) -> str:
    """Starts or resumes a run and kills it; says where that fell, "" if too late."""
    process = start(method, folder)
    began = time.monotonic()
    done = max(manifest.saved_steps(folder / "checkpoints"), default=0)
    if draw.random() < 0.5 and done < STEPS:
        step = str(draw.randrange(done + EVERY, STEPS + 1, EVERY))
        while process.poll() is None and being_written(folder) != step:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.03))
    else:
        moment = draw.uniform(0, duration)
        while process.poll() is None and time.monotonic() < began + moment:
            time.sleep(0.01)
    process.kill()
    if process.wait() == 0:
        return ""
    step = being_written(folder)
    if step:
        return SAVING.format(step)
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
    if (folder / "results.json").exists() or STEPS in steps:
        return "at the end, in measurements"
    resumed = [line for line in said(folder).splitlines() if "resumed" in line]
    first = int(resumed[-1].split()[-1]) if resumed else 0
    if not steps or max(steps) <= first:
        return f"at the start, {time.monotonic() - began:.1f} s after it"
    return f"between checkpoints, at step {max(steps) + 1}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    expected, duration = {}, {}
    counts = Counter()
    with tempfile.TemporaryDirectory() as place:
        for method in arguments.methods:
            finish(method, Path(place, f"{method}-first"))  # compiles
            began = time.monotonic()
            results = finish(method, Path(place, method))
            duration[method] = time.monotonic() - began
            expected[method] = results["state_sha256"]
            print(f"{method}: {results['state_sha256'][:16]} undisturbed", flush=True)
        print(f"\n{'run':>3}  {'method':<8}{'kills, in order':<70}the same bytes")
        for number in range(1, arguments.runs + 1):
            method = arguments.methods[number % len(arguments.methods)]
            folder = Path(place, f"{method}-{number}")
            falls: list[str] = []
            wanted = draw.randint(1, 2)
            while len(falls) < wanted:
                fell = kill(method, folder, draw, duration[method])
                if not fell:
                    break
                falls.append(fell)
            results = finish(method, folder)
            same = results["state_sha256"] == expected[method]
            steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
            same = same and steps == list(range(1, STEPS + 1))
            for index, fell in enumerate(falls or ["ended before it was killed"]):
                lead = f"{number:>3}  {method:<8}" if index == 0 else " " * 13
                last = index >= len(falls) - 1
                print(f"{lead}{fell:<70}{('yes' if same else 'NO') if last else ''}")
            print(end="", flush=True)
            counts["runs"] += bool(falls)
            counts["same"] += same and bool(falls)
            counts["kills"] += len(falls)
            counts["saving"] += sum(fell.startswith("while") for fell in falls)
    print(
        f"\n{counts['same']} of {counts['runs']} killed runs ended in the bytes of the"
        f" undisturbed one, each step once in metrics.jsonl; {counts['kills']} kills,"
        f" {counts['saving']} while a checkpoint was being written"
    )
    if counts["same"] < counts["runs"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
