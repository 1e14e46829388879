"""What is refused at trace time: argument, got, expected."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jemjax.losses.collectives import AxisName, axis_size


def check_embeddings(
    axis_name: AxisName = None, min_batch: int = 2, **arrays: Any
) -> list[jax.Array]:
    """Checks arrays of shape (N, D) against each other, and brings them to float32.

    Args:
        axis_name: the axis over which the batch is sharded.
        min_batch: the smallest global batch that the loss is defined for.
        **arrays: arrays by the argument's name, all of one shape.

    Returns:
        The arrays in float32 (float64 where one of them is float64).

    Raises:
        ValueError: for a rank other than 2, different shapes, no features, a dtype
            that is not real floating point, or a global batch below `min_batch`.
    """
    first, expected = None, None
    for name, array in arrays.items():
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise ValueError(
                f"{name}: got {type(array).__name__}, expected an array of shape (N, D)"
            )
        if len(array.shape) != 2:
            raise ValueError(f"{name}: got shape {array.shape}, expected (N, D)")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name}: got dtype {array.dtype}, expected a floating-point dtype"
            )
        if expected is None:
            first, expected = name, array.shape
        elif array.shape != expected:
            raise ValueError(
                f"{name}: got shape {array.shape}, expected {expected}, the shape of"
                f" {first}"
            )
    assert expected is not None
    rows, features = expected
    if features < 1:
        raise ValueError(f"{first}: got shape {expected}, expected D >= 1")
    if rows * axis_size(axis_name) < min_batch:
        raise ValueError(
            f"{first}: got a global batch of {rows * axis_size(axis_name)},"
            f" expected at least {min_batch} examples"
        )
    dtype = jnp.float32
    for array in arrays.values():
        dtype = jnp.promote_types(dtype, array.dtype)
    return [jnp.asarray(array).astype(dtype) for array in arrays.values()]


def check_number(
    name: str, value: Any, *, minimum: float = 0.0, exclusive: bool = False
) -> Any:
    """Checks a hyper-parameter: a finite Python number, or a traced scalar as it is.

    Args:
        name: the argument's name.
        value: what was given.
        minimum: the smallest value allowed.
        exclusive: whether `minimum` itself is refused.

    Returns:
        A Python float, or the traced scalar.

    Raises:
        ValueError: for a Python number out of range, or what is not a scalar.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        below = number <= minimum if exclusive else number < minimum
        if not math.isfinite(number) or below:
            relation = ">" if exclusive else ">="
            raise ValueError(
                f"{name}: got {value}, expected a finite number {relation} {minimum:g}"
            )
        return number
    if getattr(value, "shape", None) != ():
        raise ValueError(f"{name}: got {value!r}, expected a number or a traced scalar")
    return value
