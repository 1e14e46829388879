"""A run, from its configuration to its results."""

import contextlib
import functools
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

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
    stop,
)
from jemjax.training.process.signals import Signals
from jemjax.training.reporting.display import Display
from jemjax.training.reporting.loss_watch import LossWatch
from jemjax.training.reporting.metrics_file import MetricsFile, read_metrics
from jemjax.training.reporting.timing import StepClock, describe
from jemjax.training.run.duration import as_begun, with_steps_that_fit
from jemjax.training.run.embedder import (
    Embedder,
    EvalSet,
    choose_examples,
    embed_examples,
)
from jemjax.training.run.header import header
from jemjax.training.run.inputs import check_test, open_first, open_part, read
from jemjax.training.run.protocols import measure, measure_collapse, measure_knn
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


def pretrain(config: PretrainConfig, display: Display | None = None) -> dict[str, Any]:
    """Trains a network and measures what it learned.

    Args:
        config: the run; what is None is chosen by the method and the data.
        display: where progress is shown.

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
        run = build(config, source)
        run.check()
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
                examples = choose_examples(source, test, config.eval_examples)
                embedder = Embedder(config.method, run.network, run.recipe, run.mesh)
                monitor = functools.partial(_monitor, embedder, examples, run.init())
                run = with_steps_that_fit(given, run, source, monitor, display.say)
            config, about = run.config, describe_run(run.config, source)
        with all_hosts():
            if is_first():
                if config.overwrite:
                    empty_folder(folder)
                if not (folder / "config.toml").exists():
                    write_config(config, folder)
        display.header(f"jemjax {config.method.name}", header(run, source, test))
        signals = held.enter_context(Signals())
        held.enter_context(explaining_memory(config))
        return _run(run, source, test, folder, about, display, signals, began)


def _run(
    run: Setup,
    source: Source,
    test: Source,
    folder: Path,
    about: dict[str, Any],
    display: Display,
    signals: Signals,
    began: float,
) -> dict[str, Any]:
    """Training, and what it led to."""
    config = run.config
    assert config.steps
    state = untrained = run.init()
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
        embedder = Embedder(config.method, run.network, run.recipe, run.mesh)
        seconds = _train(
            run, source, test, state, embedder, checkpoints, display, folder, signals
        )
        final = checkpoints.restore(untrained)
        if final is None or int(final.step) != config.steps:
            raise CheckpointError(
                f"{folder}: the final checkpoint is not as it was written; mend the"
                " disk, and continue with --resume"
            )

    end_on_sigterm()  # all is saved
    examples = choose_examples(source, test, config.final_examples)
    measured = signals.interruptibly(
        lambda: measure(
            final,
            untrained,
            examples,
            embedder,
            run.recipe,
            folder / "clusters.csv",
            display.say,
        )
    )
    if measured is None:
        _stop(signals, config, "after the last step, which is saved")
    figures = (measured["collapse"], measured["embedding_collapse"])
    if seconds["loss_collapse"] or any(each["collapse"] for each in figures):
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
    run: Setup,
    source: Source,
    test: Source,
    state: TrainState,
    embedder: Embedder,
    checkpoints: Checkpoints,
    display: Display,
    folder: Path,
    signals: Signals,
) -> dict[str, Any]:
    """The loop: state after `steps` steps is in `checkpoints` when it returns."""
    config, total, batch_size = run.config, run.config.steps, run.config.batch_size
    assert total and batch_size
    first = int(state.step)
    past = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    past = [row for row in past if row["step"] <= first]
    watch = LossWatch(run.collapsed_loss(), total, past)
    if first >= total:
        seconds = {"loss_collapse": watch.verdict()}
        if past:
            seconds["images_per_second"] = past[-1]["images_per_second"]
        return seconds
    monitor = choose_examples(source, test, config.eval_examples)
    with all_hosts():
        metrics_file = MetricsFile(
            folder / "metrics.jsonl" if is_first() else None, first + 1, display.say
        )
    stream = run.batches(source, first)
    skipping = SkippedSteps(run.config, folder, state, display.say, checkpoints.wait)
    shown: dict[str, float] = {}
    explain_collapse = functools.cache(  # once
        lambda: display.say(f"  {advice(config.method)}")
    )
    training = 0.0  # seconds in steps, without compilation and measurements
    mark, marked, counted = time.monotonic(), first, 0
    clock = StepClock()
    display.start(total, first)
    try:
        images = signals.interruptibly(lambda: run.images(next(stream)))
        if images is None:
            _stop(signals, config, f"after step {first}, no other was taken")
        for step in range(first + 1, total + 1):
            assert images is not None  # else the run is stopped below
            state, metrics = run.step(state, images)
            clock.started(metrics["loss"])
            checkpoints.check()
            if step < total:  # the next batch is loaded while the devices work
                images = signals.interruptibly(lambda: run.images(next(stream)))
            if step % config.log_every == 0 or step in (first + 1, total):
                row = {name: float(value) for name, value in metrics.items()}
                skipped = skipping.report_skipped(step, state)
                now = time.monotonic()
                rate = (step - marked) * batch_size / (now - mark)
                if marked > first:  # the first interval holds the compilation
                    training += now - mark
                    counted += step - marked
                mark, marked = now, step
                row = {
                    "step": step,
                    **row,
                    "learning_rate": float(run.schedule(step - skipped - 1)),
                    "skipped_steps": skipped,
                    "images_per_second": round(rate, 1),
                }
                if source.unreadable:
                    row["unreadable_images"] = len(source.unreadable)
                if sentence := watch.logged(step, row["loss"]):
                    display.say(f"step {step}: collapse, {sentence}")
                    explain_collapse()
                metrics_file.write(row)
                shown = {
                    "loss": row["loss"],
                    **{name: row[name] for name in _terms(metrics)},
                    "lr": row["learning_rate"],
                    "std": row["embedding_std"],
                    "images/s": rate,
                } | {k: v for k, v in shown.items() if k == "kNN"}
                display.step(step, total, shown)
            if _due(step, config.eval_every) and step < total:
                with clock.spent("measuring"):
                    row = signals.interruptibly(
                        lambda state=state: _monitor(embedder, monitor, state)
                    )
                if row is not None:
                    for sentence in row.get("collapse", ()):
                        display.say(f"step {step}: collapse, {sentence}")
                    if "collapse" in row:
                        explain_collapse()
                    shown |= {"kNN": row["knn"]} if "knn" in row else {}
                    metrics_file.write({"step": step, **row})
                mark, marked = time.monotonic(), step
            stopping = checkpoints.preempted(step) or signals.stopping
            if stopping or step == total or _due(step, config.checkpoint_every):
                skipping.report_skipped(step, state)
                skipping.require_finite(step, state)
                with clock.spent("saving"):
                    checkpoints.save(step, state, last=stopping or step == total)
            if stopping:
                _stop(signals, config, f"after step {step}, which is saved")
    finally:
        display.stop()
        metrics_file.close()
        stream.close()
        spent = clock.stop()
    if spent:
        display.say(f"time after the first step: {describe(spent)}")
    rate = counted * batch_size / training if training else 0.0
    return {
        "loss_collapse": watch.verdict(),
        "images_per_second": round(rate, 1),
        "training_seconds": round(training, 1),
        "seconds_after_first_step": {k: round(v, 2) for k, v in spent.items()},
    }


def advice(method: Method) -> str:
    """What to change where a run of this method collapses, in sentences."""
    return (
        f"for {method.name}: {method.collapse_hint}. For any method: a longer warm-up"
        " (--optimizer.warmup-epochs), weaker views (--views.no-jitter, for one),"
        " images that are not nearly all alike. In the first steps a collapse may pass"
    )


def _monitor(embedder: Embedder, examples: EvalSet, state: TrainState):
    """What a row of metrics tells of a measurement during the run."""
    embedded = embed_examples(examples, functools.partial(embedder.embed, state))
    assert embedded.test.made.embedding is not None
    figures = measure_collapse(embedded.test.made.embedding)
    row: dict[str, Any] = {"effective_rank": figures["effective_rank"]}
    if examples.num_classes:
        row["knn"] = measure_knn(embedded)
    if figures["collapse"]:
        row["collapse"] = figures["collapse"]
    return row


def _stop(signals: Signals, config: PretrainConfig, where: str) -> NoReturn:
    """Ends a run because of a signal, once what is being saved is saved."""
    command = ["jemjax", "pretrain", config.method.name, "--config"]
    command += [str(Path(config.output or "") / "config.toml"), "--resume"]
    command += ["--multihost"] if jax.process_count() > 1 else []
    command += [] if config.fallback else ["--no-fallback"]
    if config.allow_change:
        command += ["--allow-change", *config.allow_change]
    stop(
        f"stopped by {signals.name} {where}; it continues with:\n"
        f"  {shlex.join(command)}",
        signals.exit_code,
    )


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0


def _terms(metrics) -> list[str]:
    others = ("loss", "embedding_std", "gradient_norm")
    return [name for name in metrics if name not in others]
