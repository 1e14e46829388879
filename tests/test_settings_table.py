"""The table of functions by settings is whole, and a fixed part of it holds."""

import inspect
import itertools
import pathlib
import re

import jax
import pytest
from settings_table import SETTINGS, cases, check, reason

from jemjax import augment, evaluation, losses, targets

CASES = cases()
ROOT = pathlib.Path(__file__).parent
TABLES = [
    ROOT / name
    for name in (
        "settings_table.py",
        "losses/table.py",
        "augment/table.py",
        "evaluation/table.py",
    )
]


def _part():
    """Two functions of each setting, by turns; those of whole views take seconds."""
    turn = itertools.count()
    for setting in SETTINGS:
        names = [
            name
            for name, case in CASES.items()
            if not (case.host or "views" in name or reason(name, case, setting))
        ]
        for _ in range(2):
            yield names[7 * next(turn) % len(names)], setting


PART = sorted(set(_part()))
NO_ARRAYS = {"num_kept_patches"}


@pytest.fixture(autouse=True)
def no_promotion_of_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def _public_functions(room):
    """Those that see arrays: recipes are functions of a size."""
    for name in getattr(room, "__all__", vars(room)):
        value = getattr(room, name)
        if inspect.isclass(value) or not callable(value) or name in NO_ARRAYS:
            continue
        if not value.__module__.startswith(room.__name__) or name.startswith("_"):
            continue
        if inspect.signature(value).return_annotation is not augment.ViewRecipe:
            yield name


def test_every_public_function_is_in_the_table():
    text = "".join(path.read_text() for path in TABLES)
    for room in (losses, evaluation, targets, augment):
        names = list(_public_functions(room))
        assert len(names) >= 5
        missing = [name for name in names if not re.search(rf"\.{name}\b", text)]
        assert not missing, room.__name__


def test_the_part_has_every_setting():
    assert {setting for _, setting in PART} == set(SETTINGS)


@pytest.mark.parametrize(("name", "setting"), PART)
def test_a_part_of_the_table(name, setting):
    check(CASES[name], setting)
