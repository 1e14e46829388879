"""What the user leaves open is chosen, from method and data."""

import dataclasses
import math

from jemjax.data import Source
from jemjax.errors import UserError
from jemjax.methods import Optimization
from jemjax.methods.base import SMALL_IMAGE
from jemjax.training.config.options import (
    OptimizerOptions,
    PretrainConfig,
    ViewOptions,
)
from jemjax.training.config.problems import find_problems


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
    defaults = config.method.defaults(image_size)
    batch_size = config.batch_size
    if batch_size is None:
        batch_size = defaults.batch_size
    method = config.method.resolve(image_size, max(batch_size, 1), len(source))
    steps = config.steps
    if steps is None:
        epochs = defaults.epochs if config.epochs is None else config.epochs
        if not 0 < epochs < math.inf:  # which is told below
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
    published = defaults.optimization
    if backbone.startswith("vit") and defaults.transformer:
        published = defaults.transformer
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
        optimizer=_resolve_optimizer(config.optimizer, published),
    )
    problems = find_problems(config, resolved, published.name, len(source), num_devices)
    if problems:
        raise UserError("\n".join(problems))
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


def _resolve_views(options: ViewOptions, source: Source) -> ViewOptions:
    flip, crop_scale = options.flip, options.crop_scale
    if flip is None:
        flip = source.defaults.flip
    if crop_scale is None:
        crop_scale = source.defaults.crop_scale
    return dataclasses.replace(options, flip=flip, crop_scale=crop_scale)


def _resolve_optimizer(
    options: OptimizerOptions, published: Optimization
) -> OptimizerOptions:
    given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    if given.get("name", published.name) != published.name:
        # What else was published belongs to the other optimizer.
        published = Optimization(
            published.name, 0.0, 0.0, published.warmup_epochs, published.final_fraction
        )
    return OptimizerOptions(**{**dataclasses.asdict(published), **given})
