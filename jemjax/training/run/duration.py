"""How many steps a run takes that is to last some minutes."""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jemjax.data import Source
from jemjax.errors import UserError
from jemjax.training.config.options import PretrainConfig
from jemjax.training.config.resolve import default_output, resolve
from jemjax.training.process.distributed import broadcast_from_first, is_first
from jemjax.training.run.setup import Setup, build
from jemjax.training.storage.provenance import load_config

# Steps that are taken before any is timed: the first compiles, and batches that were
# made meanwhile are used up.
WARM_UP = 2 + min(16, os.cpu_count() or 1)
# After so many steps the clock is read; the time is enough from so many seconds on.
TURNS, SECONDS = (5, 10, 20, 40, 80, 160), 8.0


def as_begun(config: PretrainConfig, say: Callable[[str], None]) -> PretrainConfig:
    """A run that is resumed keeps the number of steps that was chosen for it."""
    if not (config.minutes and config.resume) or config.steps or config.epochs:
        return config
    folder, begun = Path(config.output or default_output(config)), 0
    if is_first() and (folder / "config.toml").exists():
        with contextlib.suppress(UserError):  # which is told when the run is resumed
            begun = load_config(folder).steps or 0
    begun = int(broadcast_from_first(str(begun)))
    if not begun:
        return config
    say(
        f"--minutes {config.minutes:g}: {folder} was begun with {begun:,} steps, and"
        " goes on with them"
    )
    return dataclasses.replace(config, minutes=None, steps=begun)


def with_steps_that_fit(
    config: PretrainConfig,
    setup: Setup,
    source: Source,
    monitor: Callable[[], object],
    say: Callable[[str], None],
) -> Setup:
    """Times steps and a measurement, and builds the run of as many as fit.

    Args:
        config: as the user gave it, with `minutes`.
        setup: built from it, with another number of steps.
        source: the training data, as the steps will read them.
        monitor: measures as it is done during the run.
        say: is told what was chosen.

    Returns:
        The run with its number of steps; of several hosts the first one chooses.
    """
    assert config.minutes
    per_step = _seconds_of_a_step(setup, source)
    seconds = 60 * config.minutes
    told, every = f"a step takes {per_step:.3g} s here", config.eval_every
    if every != 0:
        monitor()  # compiles
        began = time.monotonic()
        monitor()
        measuring = time.monotonic() - began
        told += f", a measurement {measuring:.3g} s"
        if every:
            per_step += measuring / every
        elif 9 * measuring < seconds / 2:  # it measures after each tenth but the last
            seconds -= 9 * measuring
        else:
            told += ", for which time comes on top (--eval-every 0 leaves them out)"
    steps = int(broadcast_from_first(str(max(1, round(seconds / per_step)))))
    say(f"--minutes {config.minutes:g}: {told}, so {steps:,} steps")
    chosen = dataclasses.replace(config, minutes=None, steps=steps)
    return build(resolve(chosen, source, num_devices=jax.device_count()), source)


def _seconds_of_a_step(setup: Setup, source: Source) -> float:
    """Of real batches, as the loop takes them, from a state that is then dropped."""
    stream = setup.batches(source)
    try:
        state = setup.init()
        images = setup.images(next(stream))
        began = 0.0
        for step in itertools.count():
            if step == WARM_UP:
                jax.block_until_ready(state)
                began = time.monotonic()
            state, _ = setup.step(state, images)
            images = setup.images(next(stream))
            taken = step + 1 - WARM_UP
            if taken in TURNS:
                jax.block_until_ready(state)
                seconds = time.monotonic() - began
                # Hosts take a step together, so all of them take as many.
                enough = str(seconds >= SECONDS or taken == TURNS[-1])
                if broadcast_from_first(enough) == "True":
                    return seconds / taken
    finally:
        stream.close()
    raise AssertionError("unreachable")
