"""Losses that distill a teacher's distribution over K outputs: DINO, and its parts.

What keeps them from collapsing is on the teacher's side: a lower temperature sharpens
its distributions, and a center, the moving average of its logits, evens them out.

The student's log-probabilities are never formed. With the targets of all teacher views
summed first, a student view z needs only its log-sum-exp and one inner product,
sum_g CE(q_g, z) = G lse(z) - <sum_g q_g, z>, so the number of local views does not
multiply the number of teacher views.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jemjax.losses.checks import check_arrays, check_flag, check_number
from jemjax.losses.collectives import AxisName, batch_mean

Scalar = float | jax.Array


def cross_entropy(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
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
        ValueError: for wrong shapes, dtypes or hyper-parameters, and a global batch
            below 2.

    References:
        Hinton, Vinyals, Dean, 2015, Distilling the Knowledge in a Neural Network
        (arXiv:1503.02531).
    """
    student, teacher = check_arrays(
        axis_name,
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
    return batch_mean(_entropy(student, targets, 1, student_temperature), axis_name)


def dino(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    center: jax.Array,
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
            than teacher views or than 2, and a global batch below 2.

    References:
        Caron et al., 2021, DINO (arXiv:2104.14294).
    """
    student, teacher, center = check_arrays(
        axis_name,
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
    teacher = teacher - lax.stop_gradient(center)
    targets = _softmax(teacher, teacher_temperature)  # (G, N, K)
    # Of each view the other views' targets: added, not subtracted from those of all the
    # views, since logits can be large enough to show the rounding of a difference.
    others = jnp.zeros_like(targets)
    for shift in range(1, teacher_views):
        others = others + jnp.roll(targets, shift, axis=0)
    pairs = teacher_views * (views - 1)
    entropy = jnp.sum(
        _entropy(
            student[:teacher_views], others, teacher_views - 1, student_temperature
        ),
        axis=0,
    )  # (N,)
    if views > teacher_views:
        every = others[0] + targets[0]  # (N, K)
        local = _entropy(
            student[teacher_views:], every, teacher_views, student_temperature
        )
        entropy = entropy + jnp.sum(local, axis=0)
    return batch_mean(entropy / pairs, axis_name)


def update_center(
    center: jax.Array,
    teacher_logits: jax.Array,
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
    momentum = check_number("momentum", momentum, maximum=1.0, dtype=center.dtype)
    center, teacher = lax.stop_gradient((center, teacher))
    teacher = jnp.sum(teacher * (1.0 / teacher.shape[0]), axis=0)  # (N, K)
    mean = batch_mean(teacher, axis_name)  # (K,)
    return momentum * center + (1.0 - momentum) * mean


def _softmax(logits, temperature):
    """Probabilities along the last axis, NaN where a logit is not finite."""
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exponentials = jnp.exp((logits - largest) / temperature)
    # A logit of -inf would be a probability of 0, and so be hidden.
    exponentials = jnp.where(jnp.isfinite(logits), exponentials, jnp.nan)
    return exponentials / jnp.sum(exponentials, axis=-1, keepdims=True)


def _entropy(logits, targets, total, temperature):
    """-<targets, log softmax(logits / temperature)>: (..., N, K) -> (..., N).

    `targets` are nonnegative, of the sum `total` along the last axis. That sum is what
    lets the logits be shifted by their largest, which bounds both parts below.
    """
    largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - largest
    log_sum = jnp.log(jnp.sum(jnp.exp(shifted / temperature), axis=-1))
    # Divided last: a quotient may overflow, and with a target of 0 become NaN.
    return total * log_sum - jnp.sum(targets * shifted, axis=-1) / temperature
