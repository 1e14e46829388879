"""Dataclasses as TOML: which keys and types a file may have is what they say."""

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w

from jemjax.errors import UserError, printable

T = TypeVar("T")


def write(value: Any, **first: Any) -> str:
    """A dataclass as TOML, those within it as tables.

    Fields that are None are left out, since TOML has no such value.

    Args:
        value: the dataclass.
        **first: keys above its own.
    """

    def table(value: Any) -> Any:
        items = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
        }
        return {
            name: table(item) if dataclasses.is_dataclass(item) else item
            for name, item in items.items()
            if item is not None
        }

    return tomli_w.dumps({**first, **table(value)})


def fill(default: T, values: dict[str, Any]) -> tuple[T, list[str]]:
    """`default` with the values that a file gives, checked by name and type.

    Args:
        default: a dataclass, which holds where the file says nothing.
        values: of the file.

    Returns:
        The dataclass, and a sentence for each unknown key and wrong type.
    """
    problems: list[str] = []
    filled = _merge(default, values, "", problems, _paths(default))
    return filled, problems


def read(path: Path) -> dict[str, Any]:
    """The values of a file.

    Raises:
        UserError: for a file that cannot be read, or is not TOML.
    """
    where = f"--config {printable(path)}"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{where}: is not TOML ({reason}), expected lines such as"
            " batch_size = 256, and [optimizer] above those of a part"
        ) from error


def _paths(default: Any, prefix: str = "") -> list[str]:
    """Every key of a file, with those of the tables around it."""
    paths = []
    for field in dataclasses.fields(default):
        value, path = getattr(default, field.name), prefix + field.name
        paths.append(path)
        if dataclasses.is_dataclass(value):
            paths += _paths(value, f"{path}.")
    return paths


def _merge(
    default: Any,
    values: dict[str, Any],
    prefix: str,
    problems: list[str],
    paths: list[str],
) -> Any:
    hints = typing.get_type_hints(type(default))
    names = [field.name for field in dataclasses.fields(default)]
    changes = {}
    for name, value in values.items():
        path = prefix + name
        if name not in names:
            problems.append(f"unknown key {printable(path)}{_nearest(path, paths)}")
        elif dataclasses.is_dataclass(getattr(default, name)):
            if isinstance(value, dict):
                changes[name] = _merge(
                    getattr(default, name), value, f"{path}.", problems, paths
                )
            else:
                problems.append(f"{path}: got {value!r}, expected a table [{path}]")
        elif _fits(value, hints[name]):
            changes[name] = tuple(value) if isinstance(value, list) else value
        else:
            problems.append(f"{path}: got {value!r}, expected {_expected(hints[name])}")
    return dataclasses.replace(default, **changes)


def _nearest(path: str, paths: list[str]) -> str:
    """A hint at the key that is meant: in the same table, or, so called, in another."""
    name = path.rpartition(".")[2].replace("-", "_")
    so_called = [p for p in paths if p.rpartition(".")[2] == name]
    near = so_called or difflib.get_close_matches(path, paths, n=1)
    if not near:
        last = {p.rpartition(".")[2]: p for p in paths}
        near = [last[n] for n in difflib.get_close_matches(name, last, n=1)]
    return f": did you mean {near[0]}?" if near else ""


def _expected(hint: Any) -> str:
    """A type in the words of somebody who writes a file."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _expected(arguments[0])
    if origin in (typing.Union, types.UnionType):
        options = [_expected(a) for a in arguments if a is not type(None)]
        return " or ".join(options)
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list [...], each {_expected(arguments[0])}"
        return f"a list of {len(arguments)}, each {_expected(arguments[0])}"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: 'text in quotes ("...")',
    }
    return words.get(hint, str(getattr(hint, "__name__", hint)))


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, list):
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
