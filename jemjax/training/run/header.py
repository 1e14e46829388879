"""What a run says before it begins."""

from collections.abc import Iterator

import jax

from jemjax.augment import ViewRecipe
from jemjax.data import Source
from jemjax.runtime import idle_accelerator, settings
from jemjax.training.config.options import InputConfig
from jemjax.training.run.setup import Setup


def _count_unreadable(source: Source, test: Source) -> str:
    """As far as they were found: all of those in memory, of others what was read."""
    return f"{len(source.unreadable):,} images, {len(test.unreadable):,} test images"


def header(setup: Setup, source: Source, test: Source) -> Iterator[tuple[str, str]]:
    """What a run is made of, as names and texts."""
    config = setup.config
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
    yield from describe_views(setup.recipe, source)
    options = config.optimizer
    rate = setup.schedule(config.steps // 2)
    yield (
        "training",
        f"{config.steps:,} steps of {config.batch_size} images ({config.epochs:g}"
        f" epochs), {options.name}, learning rate {rate:.2g}"
        f" at half-time",
    )
    devices = setup.mesh.devices.flatten()
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


def describe_data(config: InputConfig, source: Source) -> str:
    """The data in a line, for people."""
    height, width, channels = source.image_shape
    shape = f"{height} x {width} x {channels}"
    if source.sizes_differ:
        shape = f"several sizes, measured at {shape}"
    classes = f"{source.num_classes} classes" if source.num_classes else "no labels"
    return f"{config.data}: {len(source):,} images of {shape}, {classes}"


def describe_views(recipe: ViewRecipe, source: Source) -> Iterator[tuple[str, str]]:
    """The views in lines, for people, the first with a name."""
    for number, line in enumerate(str(recipe).splitlines()):
        yield ("views" if number == 0 else ""), line
    if source.sizes_differ:
        yield "", "crops made by the loader, of full images; the rest on the device"
