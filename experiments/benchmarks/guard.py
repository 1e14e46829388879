"""What it costs that a step which is not finite changes nothing.

    python experiments/benchmarks/guard.py

Two programs of the same step, one of them without the guard, take turns on the CPU: so
many steps of the one, then of the other, many times. Printed are the medians.
"""

import argparse
import statistics
import time
import unittest.mock

from jemjax.runtime import tune_cpu

tune_cpu()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jemjax.data import open_data  # noqa: E402
from jemjax.methods import METHODS  # noqa: E402
from jemjax.training.config.options import PretrainConfig  # noqa: E402
from jemjax.training.config.resolve import resolve  # noqa: E402
from jemjax.training.run.setup import build  # noqa: E402
from jemjax.training.step import update  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["vicreg", "dino", "swav"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print("method      with the guard  without  ratio")
    for name in options.methods:
        compare(name, options.rounds, options.steps)


def compare(name: str, rounds: int, steps: int) -> None:
    source = open_data("digits")
    config = resolve(PretrainConfig(METHODS[name]()), source)
    run = build(config, source)
    images = source.gather(np.arange(config.batch_size))["image"]
    images = run.images({"image": images})
    programs = {}
    for guarded in (True, False):
        programs[guarded] = compile_step(run, images, guarded), run.init()
    seconds = {True: [], False: []}
    for number in range(rounds + 1):
        for guarded, (step, state) in programs.items():
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = step(state, images)
            jax.block_until_ready((state.params, metrics))
            if number:  # the first is a warm-up
                seconds[guarded].append((time.perf_counter() - began) / steps)
            programs[guarded] = step, state
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    with_it, without = (1e3 * statistics.median(seconds[g]) for g in (True, False))
    ratio = statistics.median(ratios)
    print(f"{name:<12}{with_it:11.2f} ms {without:5.2f} ms  {ratio:.3f}", flush=True)


def compile_step(run, images, guarded: bool):
    """The compiled step; without the guard, each is said to be finite."""
    if guarded:
        return run.step.lower(run.init(), images).compile()

    def unguarded(state, images):
        # A constant, as is `all_finite`: of the guard XLA leaves nothing.
        skipped = state.skipped._replace(in_a_row=jnp.zeros((), jnp.int32))
        return run.step.__wrapped__(state.replace(skipped=skipped), images)

    with unittest.mock.patch.object(update, "all_finite", lambda _: np.True_):
        step = jax.jit(unguarded, donate_argnums=0)
        return step.lower(run.init(), images).compile()


if __name__ == "__main__":
    main()
