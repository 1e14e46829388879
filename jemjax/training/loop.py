"""A run, from its configuration to its results."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jemjax.augment import ViewRecipe
from jemjax.data import Crop, Source, batches, in_memory, open_data
from jemjax.errors import CheckpointError, DataError, UserError
from jemjax.methods import METHODS, Optimization
from jemjax.runtime import (
    idle_accelerator,
    make_deterministic,
    quick_compilation,
    settings,
)
from jemjax.training.checkpoints import Checkpoints, fingerprint
from jemjax.training.config import (
    PretrainConfig,
    crops_of,
    describe_data,
    describe_views,
    from_toml,
    method_name_of,
    problems_without_data,
    resolve,
    to_toml,
)
from jemjax.training.features import (
    Embedder,
    Examples,
    choose_examples,
    embed_examples,
)
from jemjax.training.hosts import (
    HOSTS_NAME,
    connect,
    end_on_sigterm,
    is_first,
    require_equal,
    require_shared,
    stop,
    together,
)
from jemjax.training.lock import LOCK_NAME, locked
from jemjax.training.measure import measure, measure_collapse, measure_knn
from jemjax.training.mesh import (
    batch_sharding,
    make_mesh,
    shaped,
    state_sharding,
    to_devices,
)
from jemjax.training.metrics import (
    Display,
    MetricsFile,
    read_metrics,
    replacing,
    write_json,
)
from jemjax.training.optimizers import make_optimizer
from jemjax.training.resuming import COMMAND, compare, describe_run, versions
from jemjax.training.signals import Signals
from jemjax.training.skipped import SkippedSteps
from jemjax.training.state import TrainState, init_state
from jemjax.training.step import Images, Step, make_train_step
from jemjax.training.timing import StepClock, describe

# Said once, where a collapse is seen.
CAUSES = (
    "often it comes from a learning rate that is too high, or a warm-up too short"
    " (--optimizer.learning-rate, --optimizer.warmup-epochs); a part that prevents it"
    " being weak or off (the weights of VICReg's terms, --predictor, --target, the"
    " temperatures and the center of DINO, epsilon and the queue of SwAV); a small"
    " --batch-size; views too different to have anything in common (--views); images"
    " that are nearly all alike. In the first steps it may pass"
)


class Run(NamedTuple):
    """What a configuration stands for, built."""

    config: PretrainConfig
    mesh: Mesh
    network: nn.Module
    recipe: ViewRecipe
    optimizer: optax.GradientTransformation
    schedule: Callable[[ArrayLike], jax.Array]
    step: Step
    image_shape: tuple[int, int, int]
    crops: tuple[Crop, ...]
    """what the loader makes of images of several sizes; else it gives the images"""
    steps_per_epoch: float

    def init(self) -> TrainState:
        """The state before the first step, on the devices."""
        state, _ = self.shapes()
        init = jax.jit(
            self._init,
            out_shardings=jax.tree.map(lambda x: x.sharding, state),
            compiler_options=quick_compilation(),
        )
        return init(jax.random.key(self.config.seed))

    def _init(self, key: jax.Array) -> TrainState:
        size = self.config.image_size
        view = jnp.zeros((2, size, size, self.image_shape[2]), jnp.float32)
        return init_state(key, self.config.method, self.network, self.optimizer, view)

    def shapes(self) -> tuple[TrainState, Any]:
        """What a step is given: shapes, dtypes and shardings; nothing is computed."""

        def images(height, width):
            return jax.ShapeDtypeStruct(
                (self.config.batch_size, height, width, self.image_shape[2]),
                jnp.uint8,
                sharding=batch_sharding(self.mesh),
            )

        crops = tuple(images(crop.size, crop.size) for crop in self.crops)
        state = jax.eval_shape(self._init, jax.random.key(0))
        state = shaped(state, state_sharding(state, self.mesh))
        return state, crops or images(*self.image_shape[:2])

    def images(self, batch: dict[str, Any]) -> Images:
        """What a step is given of a loader's batch, on the devices."""
        return to_devices(batch["views" if self.crops else "image"], self.mesh)

    def check(self) -> None:
        """Traces a step, in which what makes no sense is refused with the reason."""
        try:
            jax.eval_shape(self.step, *self.shapes())
        except ValueError as error:  # argument, got, expected
            raise UserError(f"{self.config.method.name}: {error}") from error


def build(config: PretrainConfig, source: Source, mesh: Mesh | None = None) -> Run:
    """Builds network, views and optimizer of a resolved configuration."""
    assert config.batch_size and config.steps
    try:
        mesh = mesh or make_mesh(fsdp=config.fsdp)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    method = config.method
    try:
        network = config.network()
        recipe = config.recipe()
        steps_per_epoch = len(source) / config.batch_size
        options = dataclasses.asdict(config.optimizer)
        options["clip_norm"] = options["clip_norm"] or None
        optimizer, schedule = make_optimizer(
            Optimization(**options),
            batch_size=config.batch_size,
            total_steps=config.steps,
            steps_per_epoch=steps_per_epoch,
            constant_rate=method.constant_rate,
            frozen=method.frozen,
            frozen_for={
                name: round(epochs * steps_per_epoch)
                for name, epochs in method.frozen_epochs().items()
            },
        )
        step = make_train_step(
            method,
            network,
            recipe,
            optimizer,
            mesh,
            steps_per_epoch=steps_per_epoch,
            total_steps=config.steps,
            accumulate=config.accumulate,
            max_skipped=config.max_skipped,
        )
    except ValueError as error:  # argument, got, expected
        raise UserError(f"{method.name}: {error}") from error
    return Run(
        config,
        mesh,
        network,
        recipe,
        optimizer,
        schedule,
        step,
        source.image_shape,
        crops_of(recipe, source),
        steps_per_epoch,
    )


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
    with together():
        source = _open_first(config)
        config = resolve(config, source, num_devices=jax.device_count())
        assert config.steps and config.batch_size and config.output
        test = _open(config.eval_data or config.data, "test", config)
        _check_test(config, source, test)
        run = build(config, source)
        run.check()
    require_equal(to_toml(config), "--multihost: not all hosts have the same settings")
    folder = Path(config.output)
    about = describe_run(config, source)
    require_equal(about["data_sha256"], f"--data {config.data}: differs between hosts")
    with contextlib.ExitStack() as held:
        with together():
            if is_first():
                _check_folder(config, folder)
                held.enter_context(_made(folder))
                held.enter_context(locked(folder))
                _compare_folder(config, folder, about, display)
        require_shared(folder)
        # All that can be refused is: images are decoded now.
        with together(), explaining_memory(config):
            source, test = _read(source, display), _read(test, display)
        with together():
            if is_first():
                if config.overwrite:
                    _empty_folder(folder)
                if not (folder / "config.toml").exists():
                    _write_config(config, folder)
        display.header(f"jemjax {config.method.name}", _header(run, source, test))
        signals = held.enter_context(Signals())
        held.enter_context(explaining_memory(config))
        return _run(run, source, test, folder, about, display, signals, began)


def _run(
    run: Run,
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
    with together():
        checkpoints = Checkpoints(
            folder, about=about, fallback=config.fallback, say=display.say
        )
    with checkpoints:
        restored = checkpoints.restore(state)
        with together():
            if is_first():  # what a resumed run has changed, now that its state fits
                _write_config(config, folder)
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
    with together():
        if is_first():
            write_json(folder / "results.json", results)
    display.results(results)
    if source.name == "digits":
        display.say("(digits are centered and of one size, so raw pixels are strong)")
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


def open_source(
    name: str, split: Literal["train", "test"], config: PretrainConfig, display: Display
) -> Source:
    """The images of a run's split, in memory if they fit."""
    return _read(_open(name, split, config), display)


def _open_first(config: PretrainConfig) -> Source:
    """The training data; an error lists what else is wrong with the configuration."""
    try:
        return _open(config.data, "train", config)
    except DataError as error:
        problems = dict.fromkeys([*problems_without_data(config), str(error)])
        if len(problems) == 1:
            raise
        raise UserError("\n".join(problems)) from error


def _open(name: str, split: Literal["train", "test"], config: PretrainConfig) -> Source:
    return open_data(
        name, split=split, data_dir=config.data_dir, reading=config.reading
    )


def _read(source: Source, display: Display) -> Source:
    return in_memory(source, progress=display.reading(source.name))


def _train(
    run: Run,
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
    if first >= total:
        past = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
        return {"images_per_second": past[-1]["images_per_second"]} if past else {}
    monitor = choose_examples(source, test, config.eval_examples)
    with together():
        metrics_file = MetricsFile(
            folder / "metrics.jsonl" if is_first() else None, first + 1, display.say
        )
    stream = batches(
        source,
        batch_size=batch_size,
        seed=config.seed,
        step=first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.workers,
        crops=run.crops,
        timeout=config.load_timeout,
    )
    skipping = SkippedSteps(run.config, folder, state, display.say)
    shown: dict[str, float] = {}
    collapsed = False
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
                skipped = skipping.heed(step, state)
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
                    if "collapse" in row and not collapsed:
                        collapsed = True
                        display.say(f"  {CAUSES}")
                    shown |= {"kNN": row["knn"]} if "knn" in row else {}
                    metrics_file.write({"step": step, **row})
                mark, marked = time.monotonic(), step
            stopping = checkpoints.preempted(step) or signals.stopping
            if stopping or step == total or _due(step, config.checkpoint_every):
                skipping.heed(step, state)
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
        "images_per_second": round(rate, 1),
        "training_seconds": round(training, 1),
        "seconds_after_first_step": {k: round(v, 2) for k, v in spent.items()},
    }


def _monitor(embedder: Embedder, examples: Examples, state: TrainState):
    """What a row of metrics tells of a measurement during the run."""
    embedded = embed_examples(examples, functools.partial(embedder.embed, state))
    assert embedded.test.embedding is not None
    figures = measure_collapse(embedded.test.embedding)
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


# What a run that was killed before it had its configuration may have left.
_BEFORE_A_RUN = {LOCK_NAME, HOSTS_NAME, "config.tmp"}


def _check_folder(config: PretrainConfig, folder: Path) -> None:
    """Refuses a folder that is not a run's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file, expected a folder")
    used = (folder / "config.toml").exists()
    if not used and folder.exists() and {*os.listdir(folder)} - _BEFORE_A_RUN:
        raise UserError(
            f"--output {folder}: holds files that are not of a run; choose another"
            " folder"
        )
    if used and not (config.overwrite or config.resume):
        raise UserError(
            f"--output {folder}: holds a run; continue it with --resume, delete it"
            " with --overwrite, or choose another folder"
        )


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder, which goes again if it was made here and nothing stays in it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            for path in missing:
                path.rmdir()


def _empty_folder(folder: Path) -> None:
    with _writing(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink()


def _compare_folder(
    config: PretrainConfig, folder: Path, about: dict[str, Any], display: Display
) -> None:
    """Compares this run with the one that the folder holds, if that goes on."""
    if (folder / "config.toml").exists() and not config.overwrite:
        differences = compare(folder, about, config.allow_change)
        if differences:
            display.say(f"WARNING: {folder} was begun otherwise; other numbers follow:")
        for line in differences:
            display.say(f"  {line}")


def _write_config(config: PretrainConfig, folder: Path) -> None:
    """Writes config.toml, unless it says this already."""
    path, text = folder / "config.toml", to_toml(dataclasses.replace(config, **COMMAND))
    with _writing(folder):
        if path.exists() and path.read_bytes() == text.encode():
            return
        with replacing(path) as file:
            file.write(text)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror}); choose another"
            " folder"
        ) from error


def load_config(folder: Path) -> PretrainConfig:
    """The configuration of the run in a folder."""
    path = folder / "config.toml"
    if not path.exists():
        raise UserError(f"{folder}: holds no run (no config.toml)")
    name = method_name_of(path)
    if name not in METHODS:
        raise UserError(
            f"{path}: unknown method {name!r}, expected {', '.join(METHODS)}"
        )
    return from_toml(path, PretrainConfig(method=METHODS[name]()))


def evaluate(
    folder: Path,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    data_dir: str | None = None,
    multihost: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Measures the newest checkpoint of a run, on its own data or on other.

    Args:
        folder: the run.
        data: labelled images that are the neighbors; unless given, the run's.
        eval_data: of which the test part is asked about; unless given, `data`.
        data_dir: where prepared data sets are; unless given, as in the run.
        multihost: whether several hosts do it, each of which calls this.
        display: where progress is shown.

    Returns:
        The figures, which are also written to `evaluation.json` in the folder.

    Raises:
        UserError: where there is no run or no checkpoint, or other data do not fit.
    """
    connect(multihost)
    end_on_sigterm()
    display = display or Display(quiet=not is_first())
    with together():
        config = load_config(folder)
        if data_dir is not None:
            config = dataclasses.replace(config, data_dir=data_dir)
        same = data is None and eval_data is None
        eval_data = eval_data or data or config.eval_data or config.data
        data = data or config.data
        source = _open(data, "train", config)
        test = _open(eval_data, "test", config)
        _check_test(
            dataclasses.replace(config, data=data, eval_data=eval_data), source, test
        )
        # Sharded as in the run, as far as the devices here allow it.
        fsdp = math.gcd(config.fsdp, jax.device_count())
        run = build(dataclasses.replace(config, fsdp=fsdp), source)
        source, test = _read(source, display), _read(test, display)
    untrained = run.init()
    with Checkpoints(folder, writable=False, say=display.say) as checkpoints:
        state = checkpoints.restore(untrained)
    if state is None:
        raise CheckpointError(f"{folder}: holds no checkpoint yet")
    display.say(f"{folder}: step {int(state.step)} of {config.steps}")
    results = {
        "data": data,
        "eval_data": eval_data,
        "step": int(state.step),
        **measure(
            state,
            untrained,
            choose_examples(source, test, config.final_examples),
            Embedder(config.method, run.network, run.recipe, run.mesh),
            run.recipe,
            folder / "evaluation_clusters.csv",
            display.say,
        ),
    }
    with together():
        if is_first():
            write_json(folder / "evaluation.json", results)
    display.results(results)
    if not same:
        display.say(f"measured on {data} and {eval_data}, not on the run's own data")
    return results


def _check_test(config: PretrainConfig, source: Source, test: Source) -> None:
    if test.image_shape[2] != source.image_shape[2]:
        raise UserError(
            f"--eval-data {config.eval_data}: its images have {test.image_shape[2]}"
            f" channels, those of {config.data} have {source.image_shape[2]}"
        )
    for name, part in ((config.data, source), (config.eval_data, test)):
        if part.num_classes and part[0]["label"] < 0:
            raise UserError(f"{name}: its images have classes, but no labels")
    if source.num_classes and not test.num_classes:
        raise UserError(
            f"--eval-data {config.eval_data}: its images have no labels, as those of"
            f" {config.data} have; give it the same class folders"
        )
    if test.num_classes and source.num_classes:
        pairs = itertools.zip_longest(test.class_names, source.class_names)
        for label, (there, here) in enumerate(pairs):
            if there != here:
                raise UserError(
                    f"--eval-data {config.eval_data}: its class {label} of"
                    f" {test.num_classes} is {there or 'none'}, that of {config.data},"
                    f" which has {source.num_classes}, is {here or 'none'}; both need"
                    " the same classes in the same order"
                )


def _count_unreadable(source: Source, test: Source) -> str:
    """As far as they were found: all of those in memory, of others what was read."""
    return f"{len(source.unreadable):,} images, {len(test.unreadable):,} test images"


def _header(run: Run, source: Source, test: Source):
    config = run.config
    assert config.steps
    yield "data", describe_data(config, source)
    yield "measured on", f"{config.eval_data}: {len(test):,} test images"
    size = config.image_size
    assert size
    small = source.survey.smaller_than(size) if source.survey else 0
    if source.survey and small:
        yield (
            "",
            f"{small:,} of {source.survey.looked_at:,} images are smaller than {size}"
            " pixels, and are enlarged",
        )
    if source.unreadable or test.unreadable:
        yield "", f"unreadable and replaced: {_count_unreadable(source, test)}"
    yield "network", f"{config.backbone} at {size} x {size}, {config.compute_dtype}"
    yield from describe_views(run.recipe, source)
    options = config.optimizer
    yield (
        "training",
        f"{config.steps:,} steps of {config.batch_size} images ({config.epochs:g}"
        f" epochs), {options.name}, learning rate {run.schedule(config.steps // 2):.2g}"
        f" at half-time",
    )
    devices = run.mesh.devices.flatten()
    hosts = jax.process_count()
    yield (
        "devices",
        f"{len(devices)} x {devices[0].device_kind}"
        + (f" of {hosts} hosts" if hosts > 1 else "")
        + (f", parameters sharded over {config.fsdp}" if config.fsdp > 1 else "")
        + (f", batches in {config.accumulate} parts" if config.accumulate > 1 else ""),
    )
    if idle := idle_accelerator():
        yield "", idle
    yield "settings", settings()
    yield "output", str(config.output)
