"""What comes in: images, numbers and keys. What is wrong is refused at trace time."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

CHANNELS = (1, 3)
# Above what bicubic weights overshoot to, and far below 255.
LARGEST_PIXEL = 1.5

Number = float | np.floating | np.integer  # Python's or NumPy's
Whole = int | np.integer
Array = jax.Array | np.ndarray
Scalar = Number | Array  # a number, or a traced scalar
Range = tuple[Number, Number]
Size = Whole | tuple[Whole, Whole]


def to_floats(images: Any) -> jax.Array:
    """Brings images to float32 in [0, 1]; uint8 is divided by 255.

    Args:
        images: (N, H, W, C), C = 1 or 3, floating point in [0, 1] or uint8.

    Returns:
        (N, H, W, C) float32.

    Raises:
        ValueError: for another rank, number of channels or dtype, or an empty axis.
    """
    if not hasattr(images, "shape") or not hasattr(images, "dtype"):
        raise ValueError(
            f"images: got {type(images).__name__}, expected an array (N, H, W, C)"
        )
    if len(images.shape) != 4 or images.shape[-1] not in CHANNELS:
        raise ValueError(
            f"images: got shape {images.shape}, expected (N, H, W, C) with C = 1 or 3"
        )
    if any(is_whole(size) and size < 1 for size in images.shape):
        raise ValueError(f"images: got shape {images.shape}, expected sizes >= 1")
    scale = 255 if images.dtype == jnp.uint8 else 1
    if scale == 1 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images: got dtype {images.dtype}, expected uint8, or floating point"
            " in [0, 1]"
        )
    return jnp.asarray(images).astype(jnp.float32) / scale


def check_pixels(name: str, images: Any) -> None:
    """Refuses floats that are not in [0, 1], such as 0 to 255; traced ones pass.

    Raises:
        ValueError: for concrete floating-point images above `LARGEST_PIXEL`.
    """
    if isinstance(images, Tracer) or images.dtype == jnp.uint8:
        return
    largest = float(jax.device_get(images.max()))
    if largest > LARGEST_PIXEL:
        raise ValueError(
            f"{name}: got floating point up to {largest:g}, expected values in [0, 1]"
            " (uint8 may go up to 255)"
        )


def rows_as(array: jax.Array, values: jax.Array) -> jax.Array:
    """Lays the rows of values (N, ...) where those of another array (N, ...) lie.

    On Explicit meshes, where JAX does not combine what lies differently. Elsewhere
    values stay as they are.
    """
    rows = sharding_of_rows(array)
    return values if rows is None else reshard(values, rows)


def sharding_of_rows(array: jax.Array) -> NamedSharding | None:
    """How the rows of an array lie on an Explicit mesh; None: on no such mesh."""
    sharding = jax.typeof(array).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))


def at_least_float32(dtype: Any) -> np.dtype:
    """What float32 and this dtype are promoted to, also where promotion is strict."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def check_size(name: str, size: Any) -> tuple[int, int]:
    """Height and width in pixels from one number or a pair, each >= 1."""
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2 or not all(is_whole(side) and side >= 1 for side in pair):
        raise ValueError(f"{name}: got {size!r}, expected one or two integers >= 1")
    return int(pair[0]), int(pair[1])


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False
) -> Any:
    """Checks a finite number in [low, high]; arrays, traced or not, pass unchecked.

    Args:
        name: the argument's name.
        value: what was given.
        low: the smallest value allowed.
        high: the largest value allowed.
        open_low: whether `low` itself is refused.

    Returns:
        A Python float, or a float32 scalar.

    Raises:
        ValueError: for a number out of range, or what is not a scalar.
    """
    if is_number(value):
        below = value <= low if open_low else value < low
        if not math.isfinite(value) or below or value > high:
            left = "(" if open_low else "["
            right = f"{high:g}]" if math.isfinite(high) else "inf)"
            raise ValueError(
                f"{name}: got {value}, expected a number in {left}{low:g}, {right}"
            )
        return float(value)
    if getattr(value, "shape", None) != ():
        raise ValueError(f"{name}: got {value!r}, expected a number or a traced scalar")
    return jnp.asarray(value).astype(jnp.float32)


def check_range(
    name: str, value: Any, *, high: float = math.inf
) -> tuple[float, float]:
    """Checks a pair of Python numbers with 0 < smallest <= largest <= high."""
    valid = (
        isinstance(value, tuple)
        and len(value) == 2
        and all(is_number(bound) and math.isfinite(bound) for bound in value)
        and 0 < value[0] <= value[1] <= high
    )
    if not valid:
        limit = f" <= {high:g}" if math.isfinite(high) else ""
        raise ValueError(
            f"{name}: got {value!r}, expected a tuple 0 < smallest <= largest{limit}"
        )
    return float(value[0]), float(value[1])


def per_example(
    name: str,
    value: Any,
    count: Whole,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
) -> jax.Array:
    """A scalar or (N,) argument in the shape (N or 1, 1, 1, 1), which broadcasts.

    Args:
        name: the argument's name.
        value: a number, checked against [low, high], or an array () or (N,).
        count: N, the number of images.
        low: the smallest number allowed.
        high: the largest number allowed.
        open_low: whether `low` itself is refused.

    Returns:
        float32, (N, 1, 1, 1) or (1, 1, 1, 1).

    Raises:
        ValueError: for a number out of range, or another shape.
    """
    shape = getattr(value, "shape", ())
    if shape == ():
        value = check_number(name, value, low, high, open_low=open_low)
    elif shape != (count,):
        raise ValueError(
            f"{name}: got shape {shape}, expected a scalar or ({count},), one for each"
            " image"
        )
    return jnp.asarray(value, jnp.float32).reshape(-1, 1, 1, 1)


def is_number(value: Any) -> bool:
    """Whether a value is known at trace time: a real Python (or NumPy) number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer known at trace time."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def example_keys(key: Any, count: Whole, images: jax.Array | None = None) -> jax.Array:
    """One key for each example, so that no draw depends on the rest of the batch.

    Args:
        key: one key, which is folded with each row's index, or `count` keys; typed,
            or raw uint32.
        count: N, the number of examples.
        images: (N, H, W, C) that the draws are for, and lie as on an Explicit mesh.

    Returns:
        (N,) typed keys.

    Raises:
        ValueError: for what is not a key, or another number of keys.
    """
    dtype = getattr(key, "dtype", None)
    if dtype == jnp.uint32 and key.ndim in (1, 2):
        key = jax.random.wrap_key_data(key)
    elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        got = type(key).__name__ if dtype is None else f"dtype {dtype}"
        raise ValueError(f"key: got {got}, expected a key of jax.random.key")
    if key.ndim == 0:
        rows = jnp.arange(count, dtype=jnp.uint32)
        if images is not None:
            rows = rows_as(images, rows)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    if key.shape != (count,):
        raise ValueError(
            f"key: got shape {key.shape}, expected one key or ({count},), one for each"
            " example"
        )
    return key if images is None else rows_as(images, key)


def uniforms(keys: jax.Array, count: int) -> jax.Array:
    """Numbers in [0, 1) for each example: (N,) keys -> (count, N) float32."""
    draw = jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))
    return draw(keys).T
