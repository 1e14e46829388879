"""`config.toml`: a configuration, and the name of its method."""

from pathlib import Path

from jemjax.errors import UserError
from jemjax.training.config import toml
from jemjax.training.config.options import PretrainConfig


def to_toml(config: PretrainConfig) -> str:
    """The configuration as TOML, the method by its name."""
    return toml.write(config, method_name=config.method.name)


def from_toml(path: Path, default: PretrainConfig) -> PretrainConfig:
    """`default` with the values that a TOML file gives, checked by name and type.

    Args:
        path: the file.
        default: what holds where the file says nothing.

    Returns:
        The configuration.

    Raises:
        UserError: for a file that cannot be read, unknown keys and wrong types.
    """
    values = toml.read(path)
    name = values.pop("method_name", default.method.name)
    if name != default.method.name:
        raise UserError(
            f"--config {path}: it configures the method {name}, but the command"
            f" names {default.method.name}"
        )
    config, problems = toml.fill(default, values)
    if problems:
        raise UserError("\n".join(f"--config {path}: {text}" for text in problems))
    return config


def method_name_of(path: Path) -> str:
    """The method that a run's `config.toml` names."""
    return str(toml.read(path).get("method_name", ""))
