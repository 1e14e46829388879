"""A run, from its configuration to its results."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jemjax.data import Source
from jemjax.errors import CheckpointError, UserError
from jemjax.methods import Method
from jemjax.runtime import make_deterministic
from jemjax.training.config.file import to_toml
from jemjax.training.config.options import PretrainConfig
from jemjax.training.config.resolve import resolve
from jemjax.training.process.distributed import (
    all_hosts,
    connect,
    end_on_sigterm,
    is_first,
    require_equal,
    require_shared,
)
from jemjax.training.process.signals import Signals
from jemjax.training.reporting.display import Display
from jemjax.training.reporting.loss_watch import LossWatch
from jemjax.training.reporting.metrics_file import MetricsFile, read_metrics
from jemjax.training.reporting.reporter import Reporter
from jemjax.training.reporting.timing import StepClock, Throughput, describe
from jemjax.training.run.duration import as_begun, with_steps_that_fit
from jemjax.training.run.embedder import Embedder, choose_examples
from jemjax.training.run.header import header
from jemjax.training.run.inputs import check_test, open_first, open_part, read
from jemjax.training.run.loop import Loop, Monitored, stop_by_signal
from jemjax.training.run.protocols import PROTOCOLS, Protocol, measure, monitor
from jemjax.training.run.setup import Setup, build
from jemjax.training.step.state import TrainState
from jemjax.training.storage.checkpoints import Checkpoints, fingerprint
from jemjax.training.storage.files import write_json
from jemjax.training.storage.folder import (
    HOSTS_NAME,
    check_folder,
    empty_folder,
    locked,
    made,
)
from jemjax.training.storage.provenance import (
    compare_folder,
    describe_run,
    versions,
    write_config,
)
from jemjax.training.storage.skipped_steps import SkippedSteps


def pretrain(
    config: PretrainConfig,
    display: Display | None = None,
    *,
    protocols: Sequence[Protocol] = PROTOCOLS,
) -> dict[str, Any]:
    """Trains a network and measures what it learned.

    Args:
        config: the run; what is None is chosen by the method and the data.
        display: where progress is shown.
        protocols: how to measure, in the order of `results.json`.

    Returns:
        What `results.json` holds.

    Raises:
        UserError: for a configuration, data or an output folder that cannot be used.
    """
    began = time.monotonic()
    if config.deterministic:
        make_deterministic()
    connect(config.multihost)
    display = display or Display(quiet=not is_first())
    with all_hosts():
        source = open_first(config)
        given = config = as_begun(config, display.say)
        config = resolve(config, source, num_devices=jax.device_count())
        assert config.steps and config.batch_size and config.output
        test = open_part(config.eval_data or config.data, "test", config)
        check_test(config, source, test)
        setup = build(config, source)
        setup.check()
    require_equal(to_toml(config), "--multihost: not all hosts have the same settings")
    folder = Path(config.output)
    about = describe_run(config, source)
    require_equal(about["data_sha256"], f"--data {config.data}: differs between hosts")
    with contextlib.ExitStack() as held:
        with all_hosts():
            if is_first():
                check_folder(folder, resume=config.resume, overwrite=config.overwrite)
                held.enter_context(made(folder))
                held.enter_context(locked(folder))
                compare_folder(config, folder, about, display.say)
        require_shared(folder / HOSTS_NAME)
        # All that can be refused is: images are decoded now.
        with all_hosts(), explaining_memory(config):
            source, test = read(source, display), read(test, display)
        if given.minutes:
            with explaining_memory(config):
                setup = _fitted(given, setup, source, test, protocols, display)
            config, about = setup.config, describe_run(setup.config, source)
        with all_hosts():
            if is_first():
                if config.overwrite:
                    empty_folder(folder)
                if not (folder / "config.toml").exists():
                    write_config(config, folder)
        display.header(f"jemjax {config.method.name}", header(setup, source, test))
        signals = held.enter_context(Signals())
        held.enter_context(explaining_memory(config))
        return _run(
            setup, source, test, protocols, folder, about, display, signals, began
        )


def _fitted(
    given: PretrainConfig,
    setup: Setup,
    source: Source,
    test: Source,
    protocols: Sequence[Protocol],
    display: Display,
) -> Setup:
    """The run with as many steps as fit into its minutes."""
    config = setup.config
    examples = choose_examples(source, test, config.eval_examples)
    embedder = Embedder(config.method, setup.network, setup.recipe, setup.mesh)
    measured = functools.partial(monitor, setup.init(), examples, embedder, protocols)
    return with_steps_that_fit(given, setup, source, measured, display.say)


def _run(
    setup: Setup,
    source: Source,
    test: Source,
    protocols: Sequence[Protocol],
    folder: Path,
    about: dict[str, Any],
    display: Display,
    signals: Signals,
    began: float,
) -> dict[str, Any]:
    """Training, and what it led to."""
    config = setup.config
    assert config.steps
    state = untrained = setup.init()
    with all_hosts():
        checkpoints = Checkpoints(
            folder, about=about, fallback=config.fallback, say=display.say
        )
    with checkpoints:
        restored = checkpoints.restore(state)
        with all_hosts():
            if is_first():  # what a resumed run has changed, now that its state fits
                write_config(config, folder)
        if restored is not None:
            state = restored
            display.say(f"resumed after step {int(state.step)}")
        if state is untrained:
            untrained = jax.tree.map(jnp.copy, state)  # the step's donation frees state
        embedder = Embedder(config.method, setup.network, setup.recipe, setup.mesh)
        examples = choose_examples(source, test, config.eval_examples)
        seconds = _train(
            setup,
            source,
            state,
            lambda state: monitor(state, examples, embedder, protocols),
            checkpoints,
            display,
            folder,
            signals,
        )
        final = checkpoints.restore(untrained)
        if final is None or int(final.step) != config.steps:
            raise CheckpointError(
                f"{folder}: the final checkpoint is not as it was written; mend the"
                " disk, and continue with --resume"
            )

    end_on_sigterm()  # all is saved
    examples_at_end = choose_examples(source, test, config.final_examples)
    measured = signals.interruptibly(
        lambda: measure(
            final,
            untrained,
            examples_at_end,
            embedder,
            setup.recipe,
            protocols,
            folder / "clusters.csv",
            display.say,
        )
    )
    if measured is None:
        stop_by_signal(signals, config, "after the last step, which is saved")
    figures = [measured.get(name) for name in ("collapse", "embedding_collapse")]
    if seconds["loss_collapse"] or any(each["collapse"] for each in figures if each):
        measured["advice"] = advice(config.method)
    results = {
        "method": config.method.name,
        "data": config.data,
        **measured,
        "steps": config.steps,
        **seconds,
        "unreadable_images": len(source.unreadable),
        "unreadable_test_images": len(test.unreadable),
        "total_seconds": round(time.monotonic() - began, 1),
        "state_sha256": fingerprint(final),
        "versions": versions(),
    }
    with all_hosts():
        if is_first():
            write_json(folder / "results.json", results)
    display.results(results)
    if source.defaults.remark:
        display.say(f"({source.defaults.remark})")
    display.say(f"written to {folder / 'results.json'}")
    return results


@contextlib.contextmanager
def explaining_memory(config: PretrainConfig) -> Iterator[None]:
    """Says what can be done where a device or a host has no memory left.

    Raises:
        UserError: in place of XLA's error, or Python's.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, jax.errors.JaxRuntimeError) and (
            "RESOURCE_EXHAUSTED" not in reason
        ):
            raise
        raise UserError(
            f"out of memory with --batch-size {config.batch_size} in --accumulate"
            f" {config.accumulate} parts, --image-size {config.image_size} and"
            f" --backbone {config.backbone} ({reason or 'of the host'}): give one of"
            " these:\n"
            "  --accumulate, with more parts: the same loss, each part's activations"
            " in turn\n"
            "  --batch-size, with fewer images\n"
            "  --image-size or --backbone, with smaller ones"
        ) from error


def _train(
    setup: Setup,
    source: Source,
    state: TrainState,
    measured: Callable[[TrainState], Monitored],
    checkpoints: Checkpoints,
    display: Display,
    folder: Path,
    signals: Signals,
) -> dict[str, Any]:
    """Takes the steps that are left, if any are; what `results.json` says of them."""
    config = setup.config
    total, batch_size = config.steps, config.batch_size
    assert total and batch_size
    first, path = int(state.step), folder / "metrics.jsonl"
    past = [row for row in read_metrics(path) if "loss" in row and row["step"] <= first]
    watch = LossWatch(setup.collapsed_loss(), total, past)
    if first >= total:
        rate = {"images_per_second": past[-1]["images_per_second"]} if past else {}
        return {"loss_collapse": watch.verdict(), **rate}
    with all_hosts():
        file = MetricsFile(path if is_first() else None, first + 1, display.say)
    reporter = Reporter(file, display, watch, total, advice(config.method))
    stream = setup.batches(source, first)
    skipping = SkippedSteps(config, folder, state, display.say, checkpoints.wait)
    throughput, clock = Throughput(batch_size, first), StepClock()
    reporter.start(first)
    try:
        Loop(
            setup=setup,
            source=source,
            stream=stream,
            monitor=measured,
            reporter=reporter,
            throughput=throughput,
            clock=clock,
            checkpoints=checkpoints,
            skipping=skipping,
            signals=signals,
        ).run(state)
    finally:
        reporter.close()
        stream.close()
        spent = clock.stop()
    if spent:
        display.say(f"time after the first step: {describe(spent)}")
    return {
        "loss_collapse": watch.verdict(),
        "images_per_second": round(throughput.mean, 1),
        "training_seconds": round(throughput.seconds, 1),
        "seconds_after_first_step": {k: round(v, 2) for k, v in spent.items()},
    }


def advice(method: Method) -> str:
    """What to change where a run of this method collapses, in sentences."""
    return (
        f"for {method.name}: {method.collapse_hint}. For any method: a longer warm-up"
        " (--optimizer.warmup-epochs), weaker views (--views.no-jitter, for one),"
        " images that are not nearly all alike. In the first steps a collapse may pass"
    )
