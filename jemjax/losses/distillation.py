"""Losses that distill a teacher's distribution over K outputs: DINO, and its parts.

What keeps them from collapsing is on the teacher's side: a lower temperature sharpens
its distributions, and a center, the moving average of its logits, evens them out.

The student's log-probabilities are never formed. With the targets of all teacher views
summed first, a student view z needs only its log-sum-exp and one inner product,
sum_g CE(q_g, z) = G lse(z) - <sum_g q_g, z>, so the number of local views does not
multiply the number of teacher views.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jemjax.losses.checks import check_arrays, check_flag, check_number
from jemjax.losses.collectives import (
    AxisName,
    as_number,
    axis_size,
    batch_mean,
    is_known,
    is_local,
    psum,
)

Scalar = ArrayLike  # a number, or a traced scalar

# Numbers of the logits whose gradient is computed at once: 8 MiB in float32.
_BLOCK = 2**21


def cross_entropy(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    student_temperature: Scalar = 0.1,
    teacher_temperature: Scalar = 0.04,
    stop_gradient: bool = True,
    axis_name: AxisName = None,
) -> jax.Array:
    """Cross-entropy of two distributions, each with its temperature.

    -1/N sum_n <softmax(teacher_n / teacher_temperature),
                log softmax(student_n / student_temperature)>

    Equal logits of all the outputs have the value ln K.

    Args:
        student_logits: (N, K).
        teacher_logits: (N, K).
        student_temperature: > 0.
        teacher_temperature: > 0.
        stop_gradient: whether the teacher's logits and temperature are constants.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar >= 0, float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and an empty batch.

    References:
        Hinton, Vinyals, Dean, 2015, Distilling the Knowledge in a Neural Network
        (arXiv:1503.02531).
    """
    student, teacher = check_arrays(
        axis_name,
        min_batch=1,
        student_logits=(student_logits, "NK"),
        teacher_logits=(teacher_logits, "NK"),
    )
    student_temperature = check_number(
        "student_temperature", student_temperature, exclusive=True, dtype=student.dtype
    )
    teacher_temperature = check_number(
        "teacher_temperature", teacher_temperature, exclusive=True, dtype=student.dtype
    )
    if check_flag("stop_gradient", stop_gradient):
        teacher, teacher_temperature = lax.stop_gradient((teacher, teacher_temperature))
    targets = _softmax(teacher, teacher_temperature)
    return batch_mean(_entropy(student, targets, student_temperature), axis_name)


def dino(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    center: ArrayLike,
    *,
    student_temperature: Scalar = 0.1,
    teacher_temperature: Scalar = 0.04,
    stop_gradient: bool = True,
    axis_name: AxisName = None,
) -> jax.Array:
    """DINO: each view of the student predicts the teacher's other global views.

    The mean, over all pairs of a student view v and a teacher view g != v, of
    -1/N sum_n <softmax((teacher_gn - center) / teacher_temperature),
                log softmax(student_vn / student_temperature)>

    View v of the student and view v of the teacher are the same crop: the global views
    come first, and the student's local views after them. The center is that before the
    update by this batch (`update_center`). Equal logits of all the outputs have the
    value ln K; a student and a teacher that always choose one same output have 0.

    The gradient of large logits is computed block by block of examples, in their place;
    all at once in float16, where the partitioner may have sharded the batch, and where
    `jax.export` leaves N open.

    Args:
        student_logits: (V, N, K), V >= 2.
        teacher_logits: (G, N, K), G <= V.
        center: (K,), a constant, whole on every shard.
        student_temperature: > 0.
        teacher_temperature: > 0.
        stop_gradient: whether the teacher's logits and temperature are constants.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar >= 0, float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, fewer student views
            than teacher views or than 2, and an empty batch.

    References:
        Caron et al., 2021, DINO (arXiv:2104.14294).
    """
    student, teacher, center = check_arrays(
        axis_name,
        min_batch=1,
        student_logits=(student_logits, "VNK"),
        teacher_logits=(teacher_logits, "GNK"),
        center=(center, "K"),
    )
    student_temperature = check_number(
        "student_temperature", student_temperature, exclusive=True, dtype=student.dtype
    )
    teacher_temperature = check_number(
        "teacher_temperature", teacher_temperature, exclusive=True, dtype=student.dtype
    )
    views, teacher_views = student.shape[0], teacher.shape[0]
    if views < max(2, teacher_views):
        raise ValueError(
            f"student_logits: got {views} views, expected at least 2 and the"
            f" {teacher_views} of teacher_logits"
        )
    if check_flag("stop_gradient", stop_gradient):
        teacher, teacher_temperature = lax.stop_gradient((teacher, teacher_temperature))
    teacher = teacher - lax.stop_gradient(center)[None, None]
    targets = _softmax(teacher, teacher_temperature)  # (G, N, K)
    logits = jnp.asarray(student_logits)  # read as given: bfloat16 is not copied
    return cross_entropy_of_views(logits, targets, student_temperature, axis_name)


def cross_entropy_of_views(
    logits: jax.Array, targets: jax.Array, temperature: Scalar, axis_name: AxisName
) -> jax.Array:
    """How badly each view predicts the targets of the other views, DINO's and SwAV's.

    1/A sum_i 1/(V - 1) sum_{v != i} mean_n [-sum_k q_ink log softmax_k(z_vn / T)]

    Args:
        logits: (V, N, K) of all the views z, V >= 2.
        targets: (A, N, K) distributions q for the first A <= V views, float32 or 64.
        temperature: T > 0, checked.
        axis_name: the axis over which the batch is sharded.

    Returns:
        A scalar of the targets' dtype, with gradients for all that have one.
    """
    temperature = jnp.asarray(temperature, targets.dtype)
    # float16 is not cut either: a block's gradient is rounded before the loss scale
    # reaches it.
    whole = not is_local(logits, axis_name) or logits.dtype == jnp.float16
    together = logits.shape[1] if whole else _rows_together(logits.shape)
    shards = axis_size(axis_name)
    total = _sum_over_views(logits, targets, temperature, shards, together)
    return psum(total, axis_name)


def _weight(logits, targets, shards):
    """Of each view of each row in the mean."""
    pairs = targets.shape[0] * (logits.shape[0] - 1)
    return 1.0 / as_number(pairs * logits.shape[1] * shards, targets.dtype)


def _rows_together(shape):
    """The rows of a block, of at most `_BLOCK` numbers; all if none divides well."""
    views, rows, outputs = shape
    if not is_known(rows):
        return rows
    fitting = max(1, _BLOCK // (views * outputs))
    most = max(n for n in range(1, min(rows, fitting) + 1) if rows % n == 0)
    return most if 8 * most >= min(rows, fitting) else rows


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _sum_over_views(logits, targets, temperature, shards, together):
    """This shard's part of the mean cross-entropy of all pairs of views and rows."""
    del together
    values = _of_parts(_entropy, logits, targets, temperature)
    return _weight(logits, targets, shards) * sum(map(jnp.sum, values))


@functools.partial(_sum_over_views.defjvp, symbolic_zeros=True)
def _sum_over_views_jvp(shards, together, primals, tangents):
    """For the logits alone, the gradient is made block by block of rows in their place.

    A block stays in a CPU's cache, and no softmax of all the views is kept.
    """
    logits, targets, temperature = primals
    varied = _varied(tangents)
    if varied != [0] or together == logits.shape[1]:
        plain = functools.partial(_sum_over_views.fun, shards=shards, together=together)
        return _jvp_of(plain, varied, primals, tangents)

    gradient, total = _in_blocks(logits, targets, temperature, shards, together)
    change = gradient.astype(targets.dtype) * tangents[0].astype(targets.dtype)
    return total, jnp.sum(change)


# Compiled by itself, or each call outside of `jit` would compile the loop anew.
@functools.partial(jax.jit, static_argnames=("shards", "together"))
def _in_blocks(logits, targets, temperature, shards, together):
    """The gradient of `_sum_over_views` for the logits, and its value."""
    weight = _weight(logits, targets, shards)

    def replace(array, first):
        own, target = (
            lax.dynamic_slice_in_dim(of, first, together, axis=1)
            for of in (array, targets)
        )
        total, gradients = _sum_and_gradient(own, target, temperature)
        gradient = (weight * jnp.concatenate(gradients)).astype(array.dtype)
        array = lax.dynamic_update_slice_in_dim(array, gradient, first, axis=1)
        return array, weight * total

    starts = jnp.arange(0, logits.shape[1], together, dtype=jnp.int32)
    gradient, totals = lax.scan(replace, logits, starts)
    return gradient, jnp.sum(totals)


def _sum_and_gradient(logits, targets, temperature):
    """The cross-entropies of all pairs, and their gradient in parts to concatenate."""
    parts = _of_parts(_entropy_and_gradient, logits, targets, temperature)
    values, gradients = zip(*parts, strict=True)
    return sum(map(jnp.sum, values)), gradients


def _of_parts(function, logits, targets, temperature):
    """What a function has of the A views with targets, and of the views without."""
    logits, assigned = logits.astype(targets.dtype), targets.shape[0]
    others, every = _targets_of_others(targets)
    parts = [function(logits[:assigned], others, temperature)]
    if logits.shape[0] > assigned:
        parts.append(function(logits[assigned:], every[None], temperature))
    return parts


def _targets_of_others(targets):
    """What each of the A views has to predict, (A, N, K), and what all others, (N, K).

    The targets of the other views are added up, not subtracted from those of all the
    views: logits can be large enough to show the rounding of a difference.
    """
    others = jnp.zeros_like(targets)
    for shift in range(1, targets.shape[0]):
        others = others + jnp.roll(targets, shift, axis=0)
    return others, others[0] + targets[0]


def update_center(
    center: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    momentum: Scalar = 0.9,
    axis_name: AxisName = None,
) -> jax.Array:
    """DINO's center after a batch: the moving average of the teacher's raw logits.

    momentum * center + (1 - momentum) * mean over G and N of teacher_logits

    Args:
        center: (K,), whole on every shard.
        teacher_logits: (G, N, K).
        momentum: in [0, 1].
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        (K,), float32 (float64 for float64 input), the same on every shard, without
        gradient.

    Raises:
        ValueError: for wrong shapes, dtypes or momentum.

    References:
        Caron et al., 2021, DINO (arXiv:2104.14294), equation 4.
    """
    center, teacher = check_arrays(
        axis_name,
        min_batch=1,
        center=(center, "K"),
        teacher_logits=(teacher_logits, "GNK"),
    )
    kept = check_number("momentum", momentum, maximum=1.0, dtype=center.dtype)
    center, teacher = lax.stop_gradient((center, teacher))
    teacher = jnp.sum(teacher * (1.0 / teacher.shape[0]), axis=0)  # (N, K)
    mean = batch_mean(teacher, axis_name)  # (K,)
    return kept * center + (1.0 - kept) * mean


def _softmax(logits, temperature):
    """Probabilities along the last axis, NaN where a logit is not finite."""
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exponentials = jnp.exp((logits - largest) / temperature)
    # A logit of -inf would be a probability of 0, and so be hidden.
    exponentials = jnp.where(jnp.isfinite(logits), exponentials, jnp.nan)
    return exponentials / jnp.sum(exponentials, axis=-1, keepdims=True)


@jax.custom_jvp
def _entropy(logits, targets, temperature):
    """-<targets, log softmax(logits / temperature)>: (..., N, K) -> (..., N)."""
    value, _ = _entropy_and_gradient(logits, targets, temperature)
    return value


@functools.partial(_entropy.defjvp, symbolic_zeros=True)
def _entropy_jvp(primals, tangents):
    """Written out, the logits' gradient is exactly 0 where both sides are certain."""
    value, gradient = _entropy_and_gradient(*primals)
    varied, changes = _varied(tangents), []
    if 0 in varied:
        changes.append(jnp.sum(gradient * tangents[0], axis=-1))
        varied.remove(0)
    if varied:
        changes.append(_jvp_of(_entropy.fun, varied, primals, tangents)[1])
    return value, sum(changes[1:], changes[0])


def _varied(tangents):
    """The numbers of the arguments that have a derivative."""
    return [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]


def _jvp_of(function, varied, primals, tangents):
    """`jax.jvp` of a function for some of its arguments.

    Zeros made here as tangents of the others would not be known to vary over a mesh's
    axes, as the others do.
    """

    def of_varied(*changed):
        arrays = list(primals)
        for index, array in zip(varied, changed, strict=True):
            arrays[index] = array
        return function(*arrays)

    return jax.jvp(
        of_varied, [primals[i] for i in varied], [tangents[i] for i in varied]
    )


def _entropy_and_gradient(logits, targets, temperature):
    """`_entropy`, and its gradient for the logits, for targets >= 0."""
    # Shifted by the largest, both parts of the value are bounded below.
    total = jnp.sum(targets, axis=-1, keepdims=True)
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - largest
    exponentials = jnp.exp(shifted / temperature)
    normalizer = jnp.sum(exponentials, axis=-1, keepdims=True)
    # Divided last: a quotient may overflow, and with a target of 0 become NaN.
    value = total[..., 0] * jnp.log(normalizer[..., 0])
    value = value - jnp.sum(targets * shifted, axis=-1) / temperature
    gradient = (total / normalizer * exponentials - targets) / temperature
    return value, gradient
