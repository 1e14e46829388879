"""Moving averages of pytrees, and schedules: functions of the step.

A schedule maps a step, counted from 0 (an integer, or a traced one), to a value in
float32, or float64 under x64. Its value at a step is that with which the step is taken.
"""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jemjax.losses.checks import check_number

Schedule = Callable[[ArrayLike], jax.Array]
Number = float | np.floating | np.integer  # Python's or NumPy's
Scalar = Number | np.ndarray | jax.Array  # a number, or a traced scalar
Whole = int | np.integer


def moving_average(target: Any, online: Any, momentum: Scalar) -> Any:
    """Moves the target's leaves a little towards the online ones.

    momentum target + (1 - momentum) online

    It is computed and kept in float32 whatever the type of the parameters: in bfloat16
    a step of 1/1000 of the distance would be rounded away. To start from the online
    parameters, `moving_average(online, online, 0)` is their float32 copy.

    Args:
        target: a pytree of floating-point arrays.
        online: a pytree of the same structure and shapes.
        momentum: in [0, 1]; a number, or a traced scalar (unchecked).

    Returns:
        The new target: float32 leaves, float64 where the target's are.

    Raises:
        ValueError: for different trees or shapes, leaves that are not real floating
            point (there is no average of counters and keys), and a momentum outside
            [0, 1], or below 1 that is 1 in the dtype of a leaf, which would never move.

    References:
        He, Fan, Wu, Xie, Girshick, 2020, MoCo (arXiv:1911.05722), equation 2.
    """
    momentum = check_number("momentum", momentum, maximum=1.0)
    structure, other = jax.tree.structure(target), jax.tree.structure(online)
    if structure != other:
        different = sorted(_paths(target) ^ _paths(online))
        where = f"a tree that differs at {different[0]}" if different else f"{other}"
        wanted = "that of the target" if different else f"{structure}"
        raise ValueError(f"online: got {where}, expected {wanted}")
    left = 1 - momentum

    def average(path, old, new):
        old, new = jnp.asarray(old), jnp.asarray(new)
        for name, leaf in (("target", old), ("online", new)):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"{name}, {_name(path)}: got {leaf.dtype}, expected floating point"
                )
        if old.shape != new.shape:
            raise ValueError(
                f"online, {_name(path)}: got shape {new.shape}, expected {old.shape}"
            )
        dtype = jnp.dtype(jnp.float64 if old.dtype == jnp.float64 else jnp.float32)
        if isinstance(momentum, float) and momentum < 1 == dtype.type(momentum):
            raise ValueError(
                f"momentum: got {momentum}, expected 1 or a number that {dtype} tells"
                " from it"
            )
        kept = jnp.asarray(momentum, dtype) * old.astype(dtype)
        return kept + jnp.asarray(left, dtype) * new.astype(dtype)

    return jax.tree_util.tree_map_with_path(average, target, online)


def linear(start: Scalar, end: Scalar, total_steps: Scalar) -> Schedule:
    """A straight line from `start`, then constant.

    start + (end - start) min(step / T, 1)

    The end is reached at step T. Where n values include both ends, as numpy.linspace
    does (DINO's teacher temperature over its first n epochs), T is n - 1. This is the
    momentum of data2vec.

    Args:
        start: value at step 0, >= 0.
        end: value from step T on, >= 0.
        total_steps: T >= 0; with 0 the value is always `end`.

    Returns:
        A function of the step.

    Raises:
        ValueError: for numbers out of range.
    """
    start, end = check_number("start", start), check_number("end", end)
    total_steps = check_number("total_steps", total_steps)
    known = isinstance(total_steps, float)
    length = max(total_steps, 1.0) if known else jnp.maximum(total_steps, 1)

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        with _steps_become_floats():
            share = step / length
            started = step < total_steps
        return jnp.where(started, start + (end - start) * share, end)

    return schedule


def cosine(start: Scalar, end: Scalar, total_steps: Scalar) -> Schedule:
    """Half a cosine from `start`, then constant.

    end + (start - end) (1 + cos(pi min(step / T, 1))) / 2

    The end is reached at step T, which a run of T steps does not take: its last step is
    T - 1. This is the momentum of BYOL, DINO and MoCo v3, DINO's weight decay, and with
    `per_epoch` the learning rate of SimSiam and MoCo v2.

    Args:
        start: value at step 0, >= 0.
        end: value from step T on, >= 0.
        total_steps: T > 0.

    Returns:
        A function of the step.

    Raises:
        ValueError: for numbers out of range.
    """
    start, end = check_number("start", start), check_number("end", end)
    total_steps = check_number("total_steps", total_steps, exclusive=True)

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        with _steps_become_floats():
            left = jnp.clip((total_steps - step) / total_steps, 0, 1)
        # (1 + cos(pi (1 - left))) / 2, in the form that keeps its digits near the end.
        share = jnp.square(jnp.sin(0.5 * jnp.pi * left))
        # It is one already; the types of NumPy's numbers do not say so.
        return jnp.asarray(end + (start - end) * share)

    return schedule


def warmup_cosine(
    *,
    peak: Scalar,
    warmup_steps: Whole,
    total_steps: Whole,
    final: Scalar,
    start: Scalar = 0.0,
    inclusive: bool = False,
) -> Schedule:
    """Linear warm-up, then half a cosine.

    step < W:  start + (peak - start) step / W    (inclusive: step / (W - 1))
    else:      final + (peak - final) (1 + cos(pi (step - W) / (T - W))) / 2

    The peak is reached at step W. With `inclusive` it is reached at W - 1 and stays for
    two steps: the numpy.linspace of SwAV and DINO, where the others (VICReg, Barlow
    Twins, BYOL, SimCLR, MoCo v3) have step / W.

    Args:
        peak: value at `warmup_steps`, >= 0.
        warmup_steps: W >= 0.
        total_steps: T > W; from there on the value is `final`.
        final: value at the end, >= 0.
        start: value at step 0 of a warm-up, >= 0.
        inclusive: whether the last step of the warm-up has the peak already.

    Returns:
        A function of the step.

    Raises:
        ValueError: for numbers out of range.
    """
    traced = isinstance(warmup_steps, Tracer) or isinstance(total_steps, Tracer)
    if traced or not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps: got {warmup_steps}, expected 0 <= warmup_steps <"
            f" total_steps = {total_steps}, neither of them traced"
        )
    peak, final = check_number("peak", peak), check_number("final", final)
    warmup = linear(start, peak, max(warmup_steps - inclusive, 0))
    decay = cosine(peak, final, total_steps - warmup_steps)

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        return jnp.where(step < warmup_steps, warmup(step), decay(step - warmup_steps))

    return schedule


def per_epoch(schedule: Schedule, steps_per_epoch: Whole) -> Schedule:
    """A schedule of the epoch as one of the step: it changes once an epoch.

    schedule(floor(step / steps_per_epoch))

    Args:
        schedule: a function of the epoch, counted from 0.
        steps_per_epoch: >= 1.

    Returns:
        A function of the step.

    Raises:
        ValueError: for fewer than 1 step an epoch.
    """
    if not (isinstance(steps_per_epoch, numbers.Integral) and steps_per_epoch >= 1):
        raise ValueError(
            f"steps_per_epoch: got {steps_per_epoch!r}, expected an integer >= 1"
        )
    # Whole numbers are divided: a rounded quotient could fall into another epoch.
    return lambda step: schedule(jnp.asarray(step) // steps_per_epoch)


def _steps_become_floats():
    """Divides integers also where dtypes are promoted strictly.

    The quotient is in the default dtype, which keeps x64 exact, and a weak type, as
    that of Python numbers, so that it leaves the dtype of what it is multiplied with.
    """
    return jax.numpy_dtype_promotion("standard")


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/") or "the only leaf"


def _paths(tree):
    return {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
