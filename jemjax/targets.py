"""Schedules: functions of the step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def warmup_cosine(
    *, peak: float, warmup_steps: int, total_steps: int, final: float
) -> Callable[[ArrayLike], jax.Array]:
    """Linear warm-up from 0, then half a cosine.

    step < W:  peak step / W
    else:      final + (peak - final) (1 + cos(pi (step - W) / (T - W))) / 2

    Args:
        peak: value at `warmup_steps`, >= 0.
        warmup_steps: W >= 0.
        total_steps: T > W; from there on the value is `final`.
        final: value at the end, >= 0.

    Returns:
        A function of the step (an integer, or a traced one), float32.

    Raises:
        ValueError: for numbers out of range.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps: got {warmup_steps}, expected 0 <= warmup_steps <"
            f" total_steps = {total_steps}"
        )
    if not (peak >= 0 and final >= 0):
        raise ValueError(f"peak, final: got {peak}, {final}, expected numbers >= 0")

    def schedule(step: ArrayLike) -> jax.Array:
        # A step is an integer: dividing it in the default dtype keeps x64 exact.
        step = jnp.asarray(step)
        warmup = peak * step / max(warmup_steps, 1)
        left = jnp.clip((total_steps - step) / (total_steps - warmup_steps), 0, 1)
        # (1 + cos(pi (1 - left))) / 2, in the form that keeps its digits near the end.
        cosine = final + (peak - final) * jnp.square(jnp.sin(0.5 * jnp.pi * left))
        return jnp.where(step < warmup_steps, warmup, cosine)

    return schedule
