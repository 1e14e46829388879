"""What the user leaves open is chosen, from method and data, and all is checked."""

import dataclasses
import math
from collections.abc import Iterator

from jemjax.data import Source
from jemjax.errors import UserError, printable
from jemjax.methods import Optimization
from jemjax.methods.base import SMALL_IMAGE
from jemjax.training.config.options import (
    OptimizerOptions,
    PretrainConfig,
    ViewOptions,
)

# Of 8 x 8 pixels, a smaller part no longer tells one digit from another.
DIGITS_CROP_SCALE = (0.4, 1.0)


def resolve(
    config: PretrainConfig, source: Source, *, num_devices: int = 1
) -> PretrainConfig:
    """Fills in every field that is None, and checks the whole.

    Args:
        config: as the user gave it.
        source: the opened training data.
        num_devices: over which a batch is divided.

    Returns:
        The configuration of the run, with no choice left open.

    Raises:
        UserError: listing every problem.
    """
    shortest = min(source.image_shape[:2])
    image_size = config.image_size
    if image_size is None:
        image_size = shortest if shortest <= SMALL_IMAGE else 224
    problems = list(problems_without_data(config))
    defaults = config.method.defaults(image_size)
    batch_size = config.batch_size
    if batch_size is None:
        batch_size = defaults.batch_size
    method = config.method.resolve(image_size, max(batch_size, 1), len(source))
    steps = config.steps
    if steps is None:
        epochs = defaults.epochs if config.epochs is None else config.epochs
        if not 0 < epochs < math.inf:
            problems.append(f"--epochs: got {epochs}, expected a positive number")
            epochs = 1
        steps = math.ceil(epochs * len(source) / max(batch_size, 1))
        if config.epochs is None:
            steps = max(steps, defaults.minimum_steps)
    backbone = config.backbone or defaults.backbone
    drop_path = config.drop_path
    if drop_path is None:
        drop_path = defaults.drop_path if backbone.startswith("vit") else 0.0
    layer_scale = config.layer_scale
    if layer_scale is None and backbone.startswith("vit"):
        layer_scale = defaults.layer_scale
    optimization = defaults.optimization
    if backbone.startswith("vit") and defaults.transformer:
        optimization = defaults.transformer
    tenth = max(1, steps // 10)
    eval_every = tenth if config.eval_every is None else config.eval_every
    checkpoint_every = config.checkpoint_every
    resolved = dataclasses.replace(
        config,
        method=method,
        output=config.output or default_output(config),
        eval_data=config.eval_data or config.data,
        backbone=backbone,
        drop_path=drop_path,
        layer_scale=layer_scale,
        image_size=image_size,
        steps=steps,
        epochs=round(steps * batch_size / len(source), 3),
        batch_size=batch_size,
        eval_every=eval_every,
        checkpoint_every=(eval_every or tenth)
        if checkpoint_every is None
        else checkpoint_every,
        views=_resolve_views(config.views, source),
        optimizer=_resolve_optimizer(config.optimizer, optimization, problems),
    )
    problems += _problems(config, resolved, len(source), num_devices)
    problems += resolved.method.problems(resolved.batch_size or 1)
    problems += _problems_of_parts(resolved)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return resolved


def with_given_length(config: PretrainConfig, default: PretrainConfig):
    """A length of the run that the user gives takes the place of a file's or recipe's.

    Args:
        config: with what the user gave.
        default: without.
    """
    lengths = ("steps", "epochs", "minutes")
    given = [n for n in lengths if getattr(config, n) != getattr(default, n)]
    others = {name: None for name in lengths if name not in given}
    return dataclasses.replace(config, **others) if given else config


def default_output(config: PretrainConfig) -> str:
    """The folder of a run that is given none."""
    name = config.data.split(":")[-1].rstrip("/").split("/")[-1]
    return f"runs/{config.method.name}-{name}"


def _problems_of_parts(config: PretrainConfig) -> Iterator[str]:
    """What network and views say of the values they are made of."""
    if config.image_size is None or config.image_size < 1:
        return
    for part in (config.recipe, config.network):
        try:
            part()
        except ValueError as error:  # argument, got, expected
            yield f"{config.method.name}: {error}"


def _resolve_views(options: ViewOptions, source: Source) -> ViewOptions:
    digits = source.name == "digits"
    flip, crop_scale = options.flip, options.crop_scale
    if flip is None:
        flip = not digits
    if crop_scale is None and digits:
        crop_scale = DIGITS_CROP_SCALE
    return dataclasses.replace(options, flip=flip, crop_scale=crop_scale)


def _resolve_optimizer(
    options: OptimizerOptions, published: Optimization, problems: list[str]
) -> OptimizerOptions:
    given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    if given.get("name", published.name) != published.name:
        # What else was published belongs to the other optimizer.
        published = Optimization(
            published.name, 0.0, 0.0, published.warmup_epochs, published.final_fraction
        )
        missing = [n for n in ("learning_rate", "weight_decay") if n not in given]
        if missing:
            flags = " and ".join(f"--optimizer.{_flag(name)}" for name in missing)
            problems.append(
                f"--optimizer.name {given['name']} needs {flags} too: the defaults are"
                " those of the method's own optimizer"
            )
    return OptimizerOptions(**{**dataclasses.asdict(published), **given})


def problems_without_data(config: PretrainConfig) -> Iterator[str]:
    """What is wrong whatever the data are, each in a sentence."""
    yield from config.reading.problems()
    for name in ("data", "eval_data", "data_dir", "output"):
        value = getattr(config, name)
        if value is not None and any("\ud800" <= c <= "\udfff" for c in value):
            yield (
                f"--{_flag(name)}: got {printable(value)}, which is not UTF-8, expected"
                " a name that a text file can hold; make a link of such a name"
            )
    # 0 means something for some; what is None is chosen later.
    least = dict.fromkeys(
        "steps batch_size image_size eval_examples final_examples log_every accumulate"
        " fsdp patch_size max_skipped".split(),
        1,
    ) | dict.fromkeys("eval_every checkpoint_every workers seed".split(), 0)
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            yield f"--{_flag(name)}: got {value}, expected at least {bound}"
    if config.seed >= 2**32:
        yield f"--seed: got {config.seed}, expected less than 2^32"
    for name in ("epochs", "minutes"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            yield f"--{name}: got {value}, expected a positive number"
    if config.minutes is not None and (config.steps, config.epochs) != (None, None):
        yield "--minutes excludes --steps and --epochs: give one of them"
    if not 0 < config.load_timeout < math.inf:
        yield f"--load-timeout: got {config.load_timeout}, expected a positive number"
    if config.batch_size == 1:
        yield "--batch-size: got 1, expected at least 2: the loss needs a spread"
    if config.resume and config.overwrite:
        yield "--resume and --overwrite exclude each other: give one of them"


def _problems(
    given: PretrainConfig, config: PretrainConfig, examples: int, num_devices: int
) -> Iterator[str]:
    # A run's own file has both, and they agree.
    if given.steps is not None and given.epochs not in (None, config.epochs):
        yield "--steps and --epochs exclude each other: give one of them"
    options = Optimization(**dataclasses.asdict(config.optimizer))
    if not 0 <= options.momentum < 1:
        yield (
            f"--optimizer.momentum: got {options.momentum}, expected at least 0 and"
            " less than 1"
        )
    if config.batch_size is not None and config.batch_size > examples:
        yield (
            f"--batch-size: got {config.batch_size}, but {config.data} has only"
            f" {examples} images: choose {examples} or fewer"
        )
    elif config.batch_size is not None and config.accumulate > 0:
        problem = batch_problem(config.batch_size, num_devices, config.accumulate)
        if problem:
            yield problem
    if options.schedule == "epochs" and options.warmup_epochs:
        yield (
            f"--optimizer.warmup-epochs: got {options.warmup_epochs}, expected 0 with"
            " --optimizer.schedule epochs"
        )
    for name, value in dataclasses.asdict(options).items():
        number = isinstance(value, int | float) and name != "momentum"
        if number and not 0 <= value < math.inf:
            yield (
                f"--optimizer.{_flag(name)}: got {value}, expected a finite number >= 0"
            )


def batch_problem(batch_size: int, num_devices: int, accumulate: int) -> str | None:
    """What is wrong with dividing a batch, in a sentence."""
    if batch_size % (num_devices * accumulate) == 0:
        return None
    factor = f" x {accumulate} of --accumulate" if accumulate > 1 else ""
    return (
        f"--batch-size: got {batch_size}, expected a multiple of the {num_devices}"
        f" devices{factor}"
    )


def _flag(name: str) -> str:
    return name.replace("_", "-")
