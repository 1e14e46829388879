"""One contender in a process of its own; started by harness.py, for any interpreter.

    python worker.py FILE FUNCTION SIZES

FUNCTION(**SIZES) of FILE returns what is timed: a call without arguments that returns
arrays. Requests are read from standard input, a JSON list a line, and answered on
standard output, a JSON object a line; what the contender prints goes to standard error.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np


def load(path, name):
    sys.path.insert(0, str(Path(path).parent))  # what its file imports from beside it
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # processes that it starts look it up by name
    spec.loader.exec_module(module)
    return getattr(module, name)


def leaves(outputs):
    """The arrays in nested tuples, lists and dicts."""
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if not isinstance(outputs, (tuple, list)):
        return [outputs]
    return [leaf for output in outputs for leaf in leaves(output)]


def wait(outputs):
    """Returns when all is computed."""
    for leaf in leaves(outputs):
        if hasattr(leaf, "block_until_ready"):
            leaf.block_until_ready()


def to_numpy(leaf):
    if hasattr(leaf, "detach"):  # of torch
        leaf = leaf.detach().cpu()
    return np.asarray(leaf)


def consume(outputs):
    """The sum of all numbers, which have to be finite."""
    total = sum(float(to_numpy(leaf).sum(dtype=np.float64)) for leaf in leaves(outputs))
    if not np.isfinite(total):
        raise ValueError("the result is not finite")
    return total


def timed(call, seconds):
    """Seconds of each of the calls that fit into so much time, at least one."""
    times, end = [], time.perf_counter() + seconds
    while True:
        begin = time.perf_counter()
        outputs = call()
        wait(outputs)
        now = time.perf_counter()
        times.append(now - begin)
        if now >= end:
            return {"times": times, "checksum": consume(outputs)}


def save(call, path):
    """Writes the arrays that a call returns, and says their shapes."""
    arrays = [to_numpy(leaf) for leaf in leaves(call())]
    np.savez(path, *arrays)
    return {"shapes": [list(array.shape) for array in arrays]}


def memory(call):
    """MiB that a call needs beyond what was there before: its results, and on the way.

    And of a compiled program of JAX what XLA plans for temporaries. None: not known.
    """

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith(f"{name}:")]
        return int(line.split()[1]) / 2**10

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
    except OSError:  # not Linux, or not allowed
        before = None
    wait(call())
    peak = None if before is None else status("VmHWM") - before
    temporary = getattr(call, "temporary_bytes", None)
    return {
        "peak_mib": peak,
        "temporary_mib": None if temporary is None else temporary / 2**20,
    }


def versions(packages):
    """Of those that are installed here."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {"versions": found}


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(act):
        try:
            result = act()
        except ModuleNotFoundError as error:
            result = {"missing": error.name, "error": str(error)}
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().split("\n")[0]
            result = {"error": f"{type(error).__name__}: {first}"}
        print(json.dumps(result), file=answers)

    call = None

    def setup():
        nonlocal call
        path, name, sizes = sys.argv[1:]
        call = load(path, name)(**json.loads(sizes))
        return {}

    actions = {
        "setup": setup,
        "timed": lambda seconds: timed(call, seconds),
        "save": lambda path: save(call, path),
        "memory": lambda: memory(call),
        "versions": versions,
    }
    for line in sys.stdin:
        action, *arguments = json.loads(line)
        answer(lambda: actions[action](*arguments))  # noqa: B023


if __name__ == "__main__":
    main()
