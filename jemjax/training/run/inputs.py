"""The images of a run: opened, compared with one another, decoded if they fit."""

import itertools
from typing import Literal

from jemjax.data import Source, in_memory, open_data
from jemjax.errors import DataError, UserError
from jemjax.training.config.options import PretrainConfig
from jemjax.training.config.problems import problems_without_data
from jemjax.training.reporting.display import Display


def open_source(
    name: str, split: Literal["train", "test"], config: PretrainConfig, display: Display
) -> Source:
    """The images of a run's split, in memory if they fit."""
    return read(open_part(name, split, config), display)


def open_first(config: PretrainConfig) -> Source:
    """The training data; an error lists what else is wrong with the configuration."""
    try:
        return open_part(config.data, "train", config)
    except DataError as error:
        problems = dict.fromkeys([*problems_without_data(config), str(error)])
        if len(problems) == 1:
            raise
        raise UserError("\n".join(problems)) from error


def open_part(
    name: str, split: Literal["train", "test"], config: PretrainConfig
) -> Source:
    """One split of a run's data; nothing but headers is read."""
    return open_data(
        name, split=split, data_dir=config.data_dir, reading=config.reading
    )


def read(source: Source, display: Display) -> Source:
    """The images, decoded into memory if they fit."""
    return in_memory(source, progress=display.reading(source.name))


def check_test(config: PretrainConfig, source: Source, test: Source) -> None:
    """Refuses test images that are not like those of training, or that lack labels.

    Raises:
        UserError: naming what differs.
    """
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
