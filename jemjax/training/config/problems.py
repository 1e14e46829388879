"""Everything that can be wrong with a configuration, in one list."""

import dataclasses
import math
from collections.abc import Iterator

from jemjax.errors import printable
from jemjax.methods import Optimization
from jemjax.training.config.options import PretrainConfig
from jemjax.training.config.parts import make_network, make_recipe


def find_problems(
    given: PretrainConfig,
    resolved: PretrainConfig,
    published_optimizer: str,
    examples: int,
    num_devices: int,
) -> list[str]:
    """What is wrong with a run's settings.

    Args:
        given: as the user gave them.
        resolved: with what was chosen.
        published_optimizer: the name of the one that the method publishes.
        examples: of the training data.
        num_devices: over which a batch is divided.

    Returns:
        A sentence for each problem, in the order of the checks, each once.
    """
    found = [
        *problems_without_data(given),
        *_problems_of_another_optimizer(given, published_optimizer),
        *_problems_with_data(given, resolved, examples, num_devices),
        *resolved.method.problems(resolved.batch_size or 1),
        *_problems_of_parts(resolved),
    ]
    return list(dict.fromkeys(found))


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


def _problems_of_another_optimizer(
    given: PretrainConfig, published: str
) -> Iterator[str]:
    """What an optimizer needs that is not the one that the method publishes."""
    options = given.optimizer
    if options.name in (None, published):
        return
    names = ("learning_rate", "weight_decay")
    missing = [name for name in names if getattr(options, name) is None]
    if missing:
        flags = " and ".join(f"--optimizer.{_flag(name)}" for name in missing)
        yield (
            f"--optimizer.name {options.name} needs {flags} too: the defaults are"
            " those of the method's own optimizer"
        )


def _problems_with_data(
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
    if config.fsdp > 0 and num_devices % config.fsdp:
        yield (
            f"--fsdp: got {config.fsdp}, expected a divisor of the {num_devices}"
            " devices"
        )
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


def _problems_of_parts(config: PretrainConfig) -> Iterator[str]:
    """What network and views say of the values they are made of."""
    if config.image_size is None or config.image_size < 1:
        return
    for make in (make_recipe, make_network):
        try:
            make(config)
        except ValueError as error:  # argument, got, expected
            yield f"{config.method.name}: {error}"


def _flag(name: str) -> str:
    return name.replace("_", "-")
