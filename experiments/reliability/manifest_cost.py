"""What the manifest costs, as a share of a save.

python experiments/reliability/manifest_cost.py --megabytes 20 350

States of random numbers, which do not compress, are saved one after the other. The
whole is from the call to the moment when the checkpoint has its name; the manifest is
the part after orbax's commit, by which it makes a save longer: a thread has hashed most
files by then. All of it is beside the training, but for the call.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jemjax.training.step.state import Skipped, TrainState
from jemjax.training.storage import manifest
from jemjax.training.storage.checkpoints import Checkpoints


def make_state(megabytes: float, arrays: int = 160) -> TrainState:
    """A state of so many bytes: parameters and two moments of each."""
    size = int(megabytes * 1e6 / 4 / 3 / arrays)
    draw = np.random.default_rng(0)

    def tree():
        return {
            f"layer_{number}": jnp.asarray(draw.normal(size=size), jnp.float32)
            for number in range(arrays)
        }

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0),
        params=tree(),
        batch_stats={},
        opt_state={"first": tree(), "second": tree()},
        skipped=Skipped(*[jnp.zeros((), jnp.int32) for _ in Skipped._fields]),
    )


def main() -> None:
    """Prints a line a size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[20, 350])
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--folder", help="on the disk to measure", default=None)
    arguments = parser.parse_args()
    parts: list[float] = []
    finish = manifest.finish

    def timed(*values):
        began = time.perf_counter()
        finish(*values)
        parts.append(time.perf_counter() - began)

    manifest.finish = timed
    for megabytes in arguments.megabytes:
        state = jax.block_until_ready(make_state(megabytes))
        wholes, calls = [], []
        parts.clear()
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            with Checkpoints(Path(place)) as checkpoints:
                for step in range(arguments.saves + 1):
                    began = time.perf_counter()
                    checkpoints.save(step, state)
                    calls.append(time.perf_counter() - began)
                    checkpoints.wait()
                    wholes.append(time.perf_counter() - began)
                began = time.perf_counter()
                checkpoints.restore(state)
                restore = time.perf_counter() - began
                began = time.perf_counter()
                manifest.verify(Path(place, "checkpoints", str(arguments.saves)))
                verify = time.perf_counter() - began
        # The first also makes the programs that copy.
        whole, call, part = (statistics.median(x[1:]) for x in (wholes, calls, parts))
        shares = sorted(p / w for p, w in zip(parts[1:], wholes[1:], strict=True))
        print(
            f"{megabytes:g} MB, {arguments.saves} saves: {whole:.3f} s in all, of which"
            f" the call {call:.3f} s and the manifest {part:.3f} s: {part / whole:.1%}"
            f" ({shares[0]:.1%} to {shares[-1]:.1%}); a restore {restore:.3f} s, of"
            f" which verification {verify:.3f} s"
        )


if __name__ == "__main__":
    main()
