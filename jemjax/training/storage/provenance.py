"""What a run is, kept with its checkpoints, and compared when it is resumed."""

import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
import orbax.checkpoint

from jemjax import __version__
from jemjax.data import Source
from jemjax.errors import CheckpointDamaged, UserError
from jemjax.methods import METHODS
from jemjax.training.config.file import from_toml, method_name_of, to_toml
from jemjax.training.config.options import PretrainConfig
from jemjax.training.storage import manifest
from jemjax.training.storage.files import replacing
from jemjax.training.storage.folder import writing

# How a run was started, not what it is.
COMMAND = {
    "resume": False,
    "overwrite": False,
    "multihost": False,
    "fallback": True,
    "allow_change": (),
    "minutes": None,
}

# What may differ between a run and its continuation: nothing that changes its numbers.
FREE = {
    "output",
    "log_every",
    "eval_every",
    "eval_examples",
    "final_examples",
    "checkpoint_every",
    "eval_data",
    "data_dir",
    "max_skipped",
    "workers",
    "load_timeout",
    "fsdp",
    # Where the images lie; which they are, the fingerprint tells.
    "data",
}
# What changes the numbers from here on, and is told; all else is refused.
WARNED = {
    "steps",
    "epochs",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.final_weight_decay",
    "devices",
}


def describe_run(config: PretrainConfig, source: Source) -> dict[str, Any]:
    """What a run is: its configuration, data, versions and devices, by dotted key."""
    return {
        **flatten(config),
        "data_sha256": source.fingerprint(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **{f"versions.{name}": value for name, value in versions().items()},
    }


def flatten(config: PretrainConfig) -> dict[str, Any]:
    """The configuration by dotted key, as its file has it, without `COMMAND`."""
    config = dataclasses.replace(config, **COMMAND)
    return _flat(tomllib.loads(to_toml(config)))


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in COMMAND:
            flat[prefix + name] = value
    return flat


def versions() -> dict[str, str]:
    """Of the packages on which a run's numbers depend."""
    return {
        "jemjax": __version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "orbax": orbax.checkpoint.__version__,
        "numpy": np.__version__,
    }


def compare(folder: Path, now: Mapping[str, Any], allowed: Iterable[str]) -> list[str]:
    """Compares a run with the one that its folder holds, key by key.

    Args:
        folder: of the run that is resumed.
        now: what the continuation is (`describe_run`).
        allowed: keys, or tables of keys, that may differ though they change what the
            run is.

    Returns:
        The differences that are allowed and change numbers, a line each.

    Raises:
        UserError: naming every difference that is not allowed.
    """
    allowed = [key.replace("-", "_") for key in allowed]
    before = _describe_folder(folder)
    free = FREE
    if "data_sha256" not in before:  # no checkpoint, so no more than its file
        before = {**now, **before}
        free = FREE - {"data"}
    known = {*now, *before}
    for key in allowed:
        if not any(_covers(key, name) for name in known):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"--allow-change {key}: there is no such setting{hint}")
    told, refused = [], []
    for key in sorted(known):
        if before.get(key) == now.get(key) or key in free:
            continue
        line = f"{key}: {_show(before.get(key))} there, {_show(now.get(key))} now"
        harmless = key in WARNED or key.startswith("versions.")
        if harmless or any(_covers(name, key) for name in allowed):
            told.append(line)
        else:
            refused.append(line)
    if refused:
        keys = sorted(line.partition(":")[0] for line in refused)
        raise UserError(
            f"--resume: {folder} holds a run with other settings:\n"
            + "".join(f"  {line}\n" for line in refused)
            + "give the same settings, choose another --output, or go on with other"
            f" numbers by --allow-change {' '.join(keys)}"
        )
    step = max(manifest.saved_steps(folder / "checkpoints"), default=0)
    if now["steps"] < step:
        raise UserError(
            f"--steps: got {now['steps']}, but the run in {folder} has done {step}"
        )
    return told


def _covers(key: str, name: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _describe_folder(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint says of the run; its file, where there is none."""
    checkpoints = folder / "checkpoints"
    for step in reversed(manifest.saved_steps(checkpoints)):
        try:
            return manifest.read_manifest(checkpoints / str(step)).about
        except (CheckpointDamaged, OSError):
            continue  # it is told when it would be restored
    path = folder / "config.toml"
    try:
        return _flat(tomllib.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def compare_folder(
    config: PretrainConfig,
    folder: Path,
    about: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Compares this run with the one that the folder holds, if that goes on."""
    if (folder / "config.toml").exists() and not config.overwrite:
        differences = compare(folder, about, config.allow_change)
        if differences:
            say(f"WARNING: {folder} was begun otherwise; other numbers follow:")
        for line in differences:
            say(f"  {line}")


def write_config(config: PretrainConfig, folder: Path) -> None:
    """Writes config.toml, unless it says this already."""
    path, text = folder / "config.toml", to_toml(dataclasses.replace(config, **COMMAND))
    with writing(folder):
        if path.exists() and path.read_bytes() == text.encode():
            return
        with replacing(path) as file:
            file.write(text)


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
    config = from_toml(path, PretrainConfig(method=METHODS[name]()))
    _check_complete(config, path)
    return config


def _check_complete(config: PretrainConfig, path: Path) -> None:
    """Refuses a file of an earlier version, which lacks what a method now needs."""
    size, batch_size = config.image_size, config.batch_size
    if not size or not batch_size:  # not written by a run, which resolves them
        return
    resolved = config.method.resolve(size, batch_size, batch_size)
    for field in dataclasses.fields(resolved):
        if getattr(config.method, field.name) is None:
            needed = getattr(resolved, field.name)
            if needed is not None:
                raise UserError(
                    f"{path}: lacks method.{field.name}, which this version needs; add"
                    f" it as the run was begun (now it would be {needed!r}), or use the"
                    " version that began the run"
                )
