"""A long run with many measurements and checkpoints: is its memory flat?

python experiments/reliability/endurance.py --minutes 30

It trains on the built-in digits, measures and saves every few seconds, and reads the
resident memory of the process from /proc (Linux) meanwhile.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVERY = 200  # steps between measurements, and between checkpoints
WARM_UP = 10  # minutes in which memory may grow


def resident(pid: int) -> float:
    """Megabytes of memory that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    return 0.0  # it has ended


def main() -> None:
    """Prints the memory of each minute, and leaves with 1 if it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    minutes = parser.parse_args().minutes
    if minutes < WARM_UP + 2:
        parser.error(f"--minutes: got {minutes:g}, expected at least {WARM_UP + 2}")
    with tempfile.TemporaryDirectory() as place:
        command = f"pretrain vicreg --output {place}/run --steps 10000000"
        command += f" --eval-every {EVERY} --checkpoint-every {EVERY}"
        process = subprocess.Popen(
            [sys.executable, "-m", "jemjax.cli", *command.split()],
            stdout=subprocess.DEVNULL,
        )
        by_minute: dict[int, list[float]] = {}
        began = time.monotonic()
        try:
            while (passed := (time.monotonic() - began) / 60) < minutes:
                if process.poll() is not None:
                    sys.exit(f"the run ended with code {process.returncode}")
                minute = int(passed)
                if by_minute and minute not in by_minute:
                    ended, held = list(by_minute.items())[-1]
                    low, high = min(held), max(held)
                    print(
                        f"minute {ended:>3}: {low:,.0f} to {high:,.0f} MB", flush=True
                    )
                by_minute.setdefault(minute, []).append(resident(process.pid))
                time.sleep(1)
        finally:
            process.terminate()
            process.wait()
        steps = Path(place, "run", "metrics.jsonl").read_text().count('"loss"') * 10
    later = [max(held) for minute, held in by_minute.items() if minute >= WARM_UP]
    half = len(later) // 2
    before, after = max(later[:half]), max(later[half:])
    print(
        f"{steps:,} steps, a measurement and a checkpoint each {EVERY}: at most"
        f" {before:,.0f} MB in the first half after minute {WARM_UP},"
        f" {after:,.0f} MB in the second ({after / before - 1:+.1%})"
    )
    sys.exit(after > 1.02 * before)


if __name__ == "__main__":
    main()
