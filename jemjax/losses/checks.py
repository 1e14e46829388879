"""What is refused at trace time: argument, got, expected."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jemjax.losses.collectives import AxisName, axis_size, is_known


def check_arrays(
    axis_name: AxisName = None, min_batch: int = 2, **arrays: tuple[Any, str]
) -> list[jax.Array]:
    """Checks arrays against each other by their axes, and brings them to float32.

    Args:
        axis_name: the axis over which the batch, "N", is sharded.
        min_batch: the smallest global batch that the loss is defined for.
        **arrays: by the argument's name, an array and its axes, one letter each, as in
            `scores=(scores, "VNK"), center=(center, "K")`. A letter is one size.

    Returns:
        The arrays in float32 (float64 where one of them is float64).

    Raises:
        ValueError: for another rank, one letter with two sizes, an empty axis, a dtype
            that is not real floating point of 16 bits or more, or a global batch below
            `min_batch`.
    """
    sizes, first = {}, {}
    for name, (array, axes) in arrays.items():
        symbols = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise ValueError(
                f"{name}: got {type(array).__name__}, expected an array of shape"
                f" {symbols}"
            )
        shape = tuple(array.shape)
        if len(shape) != len(axes):
            raise ValueError(f"{name}: got shape {shape}, expected {symbols}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name}: got dtype {array.dtype}, expected a floating-point dtype"
            )
        # A gradient has its array's dtype, and float8 ends at 448.
        if jnp.finfo(array.dtype).bits < 16:
            raise ValueError(
                f"{name}: got dtype {array.dtype}, expected one of 16 bits or more"
            )
        for axis, size in zip(axes, shape, strict=True):
            if size != sizes.setdefault(axis, size):
                expected = tuple(
                    sizes.get(a, s) for a, s in zip(axes, shape, strict=True)
                )
                raise ValueError(
                    f"{name}: got shape {shape}, expected {expected}, with {axis} as in"
                    f" {first[axis]}"
                )
            first.setdefault(axis, name)
            if is_known(size) and size < 1 and axis != "N":
                raise ValueError(f"{name}: got shape {shape}, expected {axis} >= 1")
    batch = sizes.get("N", min_batch) * axis_size(axis_name)
    if is_known(batch) and batch < min_batch:
        raise ValueError(
            f"{first['N']}: got a global batch of {batch}, expected at least"
            f" {min_batch} example{'s' if min_batch > 1 else ''}"
        )
    # Only as JAX arrays do NumPy's float64 become float32 where x64 is off.
    values = [jnp.asarray(array) for array, _ in arrays.values()]
    double = any(value.dtype == jnp.float64 for value in values)
    dtype = jnp.float64 if double else jnp.float32
    return [value.astype(dtype) for value in values]


def check_embeddings(
    axis_name: AxisName = None, min_batch: int = 2, **arrays: Any
) -> list[jax.Array]:
    """`check_arrays` for arrays that are all of one shape (N, D)."""
    described = {name: (array, "ND") for name, array in arrays.items()}
    return check_arrays(axis_name, min_batch, **described)


def check_flag(name: str, value: Any) -> bool:
    """Checks an argument that chooses between two programs: True or False.

    Args:
        name: the argument's name.
        value: what was given.

    Returns:
        `value`.

    Raises:
        ValueError: for anything else, a traced boolean too.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected True or False")
    return value


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float = 0.0,
    maximum: float = math.inf,
    exclusive: bool = False,
    dtype: Any = None,
) -> Any:
    """Checks a hyper-parameter: a finite Python number, or a traced scalar.

    Args:
        name: the argument's name.
        value: what was given.
        minimum: the smallest value allowed.
        maximum: the largest value allowed.
        exclusive: whether `minimum` itself is refused.
        dtype: that of the arrays it is computed with, or None. A traced scalar is cast
            to it, and a number > 0 becomes no smaller than its smallest normal one,
            below which it would be zero.

    Returns:
        A Python float, or the traced scalar.

    Raises:
        ValueError: for a Python number out of range, or what is not a scalar.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        below = number <= minimum if exclusive else number < minimum
        if not math.isfinite(number) or below or number > maximum:
            relation = ">" if exclusive else ">="
            limit = "" if maximum == math.inf else f" and <= {maximum:g}"
            raise ValueError(
                f"{name}: got {value}, expected a finite number {relation} {minimum:g}"
                f"{limit}"
            )
        if dtype is not None and number > 0:
            number = max(number, float(jnp.finfo(dtype).tiny))
        return number
    if getattr(value, "shape", None) != ():
        raise ValueError(f"{name}: got {value!r}, expected a number or a traced scalar")
    value = jnp.asarray(value)
    return value if dtype is None else value.astype(dtype)
