"""A step once more, to find where its numbers stop being finite."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jemjax.data import batches
from jemjax.errors import UserError
from jemjax.runtime import quick_compilation
from jemjax.training.config.problems import batch_problem
from jemjax.training.reporting.display import Display
from jemjax.training.run.inputs import open_source
from jemjax.training.run.setup import Setup, rebuild
from jemjax.training.step.branch import Images
from jemjax.training.step.loss import make_loss
from jemjax.training.step.state import TrainState
from jemjax.training.storage.checkpoints import Checkpoints
from jemjax.training.storage.provenance import load_config
from jemjax.training.storage.skipped_steps import FOLDER, skipped_step

# Of those that are not finite, so many are shown.
SHOWN = 8


class Finding(NamedTuple):
    """An array that is not finite."""

    name: str
    bad: int  # how many of its numbers are not
    size: int


def replay(
    folder: Path,
    *,
    step: int | None = None,
    data_dir: str | None = None,
    display: Display | None = None,
) -> list[Finding]:
    """Computes a step of a run once more, and says what in it is not finite.

    Args:
        folder: the run.
        step: its number, counted from 1; unless given, the one that the run kept.
        data_dir: where prepared data sets are; unless given, as in the run.
        display: where it is told.

    Returns:
        Every array that is not finite, in the order in which they are computed.

    Raises:
        UserError: if there is no such run or step.
    """
    display = display or Display()
    config = load_config(folder)
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=data_dir)
    number = skipped_step(folder) if step is None else step
    if number is None:
        raise UserError(
            f"{folder}: no step was skipped; name one with --step, to see whether all"
            " of it is finite"
        )
    if not (config.steps and 1 <= number <= config.steps):
        raise UserError(f"--step: got {number}, expected 1 to {config.steps}")
    assert config.batch_size
    problem = batch_problem(config.batch_size, jax.device_count(), config.accumulate)
    if problem:
        raise UserError(
            f"{folder}: {problem}: use as many as the run did, or others that divide it"
        )
    source = open_source(config.data, "train", config, display)
    setup = rebuild(config, source)
    state, before = _nearest(setup, folder, number - 1, display.say)
    display.say(
        f"step {number} of {folder}: from the state after step {before},"
        f" {number - 1 - before} steps are taken again first"
    )
    stream = batches(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        step=before,
        workers=config.workers,
        crops=setup.crops,
    )
    try:
        for _ in range(number - 1 - before):
            state, _ = setup.step(state, setup.images(next(stream)))
        images = setup.images(next(stream))
    finally:
        stream.close()
    findings = find(setup, state, images)
    skipped = int(state.skipped.steps)
    state, metrics = setup.step(state, images)
    again = int(state.skipped.steps) > skipped
    display.say(
        f"loss {float(metrics['loss']):g}, norm of the gradient"
        f" {float(metrics['gradient_norm']):g}: the step is"
        f" {'skipped' if again else 'taken'}"
    )
    if findings:
        display.say("not finite, in the order in which they are computed:")
    for name, bad, size in findings[:SHOWN]:
        display.say(f"  {name}: {bad:,} of {size:,} numbers")
    if len(findings) > SHOWN:
        display.say(f"  and {len(findings) - SHOWN} more")
    if not findings and again:
        display.say(
            "all numbers are finite here, but the sum of the gradient's squares is"
            " not: the gradient is too large"
        )
    elif not findings:
        display.say(
            "all numbers are finite: if the run skipped this step, it saw other data,"
            " other software, or a fault of the machine"
        )
    return findings


def _nearest(
    setup: Setup, folder: Path, step: int, say: Callable[[str], None]
) -> tuple[TrainState, int]:
    """The last saved state that is not after a step, or that at the beginning."""
    state, found = setup.init(), 0
    for place in (folder, folder / FOLDER):
        if (place / "checkpoints").is_dir():
            with Checkpoints(place, writable=False, say=say) as checkpoints:
                saved = checkpoints.restore(state, until=step)
            if saved is not None and int(saved.step) > found:
                state, found = saved, int(saved.step)
    return state, found


def find(setup: Setup, state: TrainState, images: Images) -> list[Finding]:
    """What is not finite in a step: state, views, layers, terms, loss and gradient.

    Args:
        setup: of the run whose step it is.
        state: before the step.
        images: what the step is given.

    Returns:
        The arrays that are not, in the order in which they are computed.
    """
    names, sizes, counts = [], [], []

    def watch(name: str, tree: Any) -> None:
        for path, leaf in jax.tree.leaves_with_path(tree):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                names.append(f"{name} {where}".strip())
                sizes.append(leaf.size)
                counts.append(jnp.sum(~jnp.isfinite(leaf)))

    def layer(following, arguments, keywords, context):
        made = following(*arguments, **keywords)
        path = "/".join(context.module.path) or "network"
        called = "" if context.method_name == "__call__" else f".{context.method_name}"
        watch(f"layer {path}{called}", made)
        return made

    config = setup.config
    assert config.batch_size and config.steps
    losses = [
        make_loss(
            config.method,
            setup.network,
            setup.recipe,
            setup.mesh,
            steps_per_epoch=setup.steps_per_epoch,
            total_steps=config.steps,
            accumulate=config.accumulate,
            watch=watching,
        )
        for watching in (watch, None)
    ]

    @jax.jit(compiler_options=quick_compilation())
    def compute(state: TrainState, images: Images):
        watch("before the step,", state)
        with nn.intercept_methods(layer):
            _, (_, _, statistics) = losses[0](state.params, state, images)
        gradient = jax.grad(losses[1], has_aux=True)(state.params, state, images)[0]
        watch("gradient", gradient)
        watch("batch statistics", statistics)
        return counts

    found = jax.device_get(compute(state, images))
    return [
        Finding(name, int(bad), size)
        for name, size, bad in zip(names, sizes, found, strict=True)
        if bad
    ]
