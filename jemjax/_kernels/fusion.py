"""What XLA is kept from computing more than once."""

from typing import TypeVar

import jax
from jax import lax

Arrays = TypeVar("Arrays")  # an array, or a tuple of them


def materialize(arrays: Arrays) -> Arrays:
    """Has arrays computed once, although what follows reads them several times.

    Gray needs each channel of a pixel, and each channel then needs gray: left to fuse
    a chain of such operations, XLA computes the first again for every use in the last.
    """
    return lax.optimization_barrier(arrays)


def computed_once(x: jax.Array) -> jax.Array:
    """On CPUs, XLA would compute x anew inside of each of its uses."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
