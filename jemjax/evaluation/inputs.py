"""What comes in: embeddings, labels and numbers. What is wrong is refused by name."""

import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard
from jax.typing import ArrayLike

Whole = int | np.integer  # Python's or NumPy's
Scalar = float | np.floating | np.integer | np.ndarray | jax.Array


def check_embeddings(name: str, embeddings: ArrayLike) -> jax.Array:
    """Checks that embeddings are real and (N, D), and brings them to float32.

    Args:
        name: of the argument, for the message.
        embeddings: what was given.

    Returns:
        (N, D) float32, or float64 where it was given.

    Raises:
        ValueError: for another rank, no rows, no columns, or another kind of dtype.
    """
    array = jnp.asarray(embeddings)
    if array.ndim != 2 or any(is_known(size) and size < 1 for size in array.shape):
        raise ValueError(
            f"{name}: got shape {array.shape}, expected (N, D) with N, D >= 1"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name}: got dtype {array.dtype}, expected a floating-point dtype"
        )
    return array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)


def is_known(size: Any) -> bool:
    """Whether a size is a number; `jax.export` may leave it open, as a symbol."""
    return isinstance(size, int)


def check_known(name: str, embeddings: jax.Array) -> None:
    """Refuses a number of rows that `jax.export` leaves open.

    Raises:
        ValueError: for a symbol.
    """
    if not is_known(embeddings.shape[0]):
        raise ValueError(
            f"{name}: got shape {embeddings.shape}, expected a known number of rows:"
            " neighbors, labels and singular values are of that many"
        )


def check_labelled(
    name: str, embeddings: ArrayLike, labels: ArrayLike, num_classes: Whole
) -> tuple[jax.Array, jax.Array]:
    """Checks embeddings and their labels against each other.

    Args:
        name: "train" or "test", for the message.
        embeddings: (N, D).
        labels: (N,) integers in [0, num_classes).
        num_classes: >= 1.

    Returns:
        (N, D) float32 (or float64) embeddings, (N,) int32 labels.

    Raises:
        ValueError: for shapes, dtypes or labels other than these. The range of traced
            labels is not checked.
    """
    rows = check_embeddings(f"{name}_embeddings", embeddings)
    check_known(f"{name}_embeddings", rows)
    num_classes = check_count("num_classes", num_classes)
    traced = isinstance(labels, Tracer)
    values: Any = labels if traced else on_host(f"{name}_labels", labels)
    if values.shape != rows.shape[:1] or not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(
            f"{name}_labels: got {values.dtype} of shape {values.shape}, expected"
            f" integers of shape {rows.shape[:1]}"
        )
    if traced:
        return rows, values.astype(jnp.int32)
    if not 0 <= values.min() <= values.max() < num_classes:
        raise ValueError(
            f"{name}_labels: got {values.min()} to {values.max()}, expected 0 to"
            f" num_classes - 1 = {num_classes - 1}"
        )
    return rows, jax.device_put(values.astype(np.int32))


def check_number(name: str, value: Any, dtype: Any, *, open_low: bool = False) -> Any:
    """Checks a finite number >= 0; arrays, traced or not, pass unchecked.

    Args:
        name: the argument's name.
        value: what was given.
        dtype: that of the embeddings.
        open_low: whether 0 itself is refused.

    Returns:
        A scalar of this dtype on the device: of one type whatever was given, so that
        what is compiled for it is compiled once.

    Raises:
        ValueError: for a number out of range, or what is not a scalar.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not math.isfinite(value) or value < 0 or (open_low and value == 0):
            relation = ">" if open_low else ">="
            raise ValueError(
                f"{name}: got {value}, expected a finite number {relation} 0"
            )
        return jax.device_put(np.asarray(value, dtype))
    if getattr(value, "shape", None) != ():
        raise ValueError(f"{name}: got {value!r}, expected a number or a scalar array")
    return jnp.asarray(value).astype(dtype)


def check_count(name: str, value: Any, low: int = 1) -> int:
    """Checks an integer >= `low` that is known at trace time.

    Raises:
        ValueError: for another number, or a traced one.
    """
    try:
        count = operator.index(value)
    except TypeError:  # of floats and of traced integers
        count = None
    if count is None or count < low:
        raise ValueError(
            f"{name}: got {value}, expected >= {low}, an integer that is not traced"
        )
    return count


def on_host(name: str, values: ArrayLike) -> np.ndarray:
    """The NumPy array of an argument whose values decide what is computed.

    Raises:
        ValueError: for a traced array, which has no values yet.
    """
    if isinstance(values, Tracer):
        raise ValueError(
            f"{name}: got {values.aval.str_short()}, which is traced, expected an array"
            " with values: call this outside of jit, grad and vmap"
        )
    return np.asarray(jax.device_get(values))


def whole(array: jax.Array) -> jax.Array:
    """Gives every device of an Explicit mesh all rows; elsewhere changes nothing.

    Singular values and neighbors need all rows at once, and there JAX leaves it to the
    program to say so.
    """
    mesh = jax.typeof(array).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return array
    return reshard(array, NamedSharding(mesh, PartitionSpec()))
