"""Losses that prevent collapse by balanced clusters: Sinkhorn's assignments and SwAV.

The assignments of a batch to K prototypes are soft labels, and every prototype gets
its equal share of them. So the labels of a collapsed network say nothing, and a
network that predicts the label of one view from another has to tell images apart.
"""

import functools
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jemjax.losses.checks import check_arrays, check_number
from jemjax.losses.collectives import (
    AxisName,
    as_number,
    batch_mean,
    batch_size,
    feature_gram,
    pmax,
)
from jemjax.losses.distillation import cross_entropy_of_views

Scalar = ArrayLike  # a number, or a traced scalar
Whole = int | np.integer  # Python's or NumPy's


def sinkhorn(
    scores: ArrayLike,
    *,
    epsilon: Scalar = 0.05,
    num_iterations: Whole = 3,
    axis_name: AxisName = None,
) -> jax.Array:
    """Soft assignments of a batch to prototypes that all get an equal share of it.

    q_nk = u_n exp(scores_nk / epsilon) v_k, from u = 1 by repeating
        v_k = (N / K) / sum_n u_n exp(scores_nk / epsilon)   the shares are N / K
        u_n = 1 / sum_k exp(scores_nk / epsilon) v_k         the rows sum to one

    Rows sum to one, to rounding, and shares are N / K in the limit. Without iterations
    it is the row softmax of scores / epsilon, which tends to K-means' nearest prototype
    for epsilon -> 0; for epsilon -> infinity every assignment is uniform. For N < K no
    assignment can be one-hot: each row is spread over at least K / N prototypes.

    Each iteration is two products of a matrix and a vector where the range of all the
    scores / epsilon lets exp neither overflow nor vanish, and is computed from
    logarithms, at several times the cost, where it does not: the result is finite for
    all finite scores. Over an axis it sends K numbers an iteration, twice as many from
    logarithms, and never the scores.

    Args:
        scores: (N, K) similarities of examples to prototypes, cosines in SwAV; float16,
            bfloat16, float32 or float64.
        epsilon: > 0, how soft the assignments are, in units of the scores.
        num_iterations: >= 0, a Python int.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        (N, K) assignments of this shard's rows, float32 (float64 for float64 input).
        They are differentiable: a loss that takes them for labels stops the gradient.

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters.

    References:
        Cuturi, 2013, Sinkhorn distances (arXiv:1306.0895).
        Caron et al., 2020, SwAV (arXiv:2006.09882), section 3.1.
    """
    check_arrays(axis_name, min_batch=1, scores=(scores, "NK"))
    epsilon, num_iterations = _check_sinkhorn(epsilon, num_iterations)
    scores = jnp.asarray(scores)
    epsilon = _of_one_type(epsilon, scores)
    return _assignments(scores, 0, epsilon, num_iterations, axis_name)


def assign(
    scores: ArrayLike,
    queue_scores: ArrayLike | None = None,
    *,
    epsilon: Scalar = 0.05,
    num_iterations: Whole = 3,
    axis_name: AxisName = None,
) -> jax.Array:
    """The `sinkhorn` assignments of several views, each balanced together with a queue.

    q_i = the rows of scores_i in sinkhorn([queue_scores_i; scores_i])

    Args:
        scores: (A, N, K) scores of the views to assign.
        queue_scores: (A, Q, K) scores of earlier examples for each of the views, of
            this shard where the batch is sharded, or None.
        epsilon: > 0, as in `sinkhorn`.
        num_iterations: >= 0, as in `sinkhorn`.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        (A, N, K) assignments, float32 (float64 for float64 input), differentiable.

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters.

    References:
        Caron et al., 2020, SwAV (arXiv:2006.09882), sections 3.1 and 4.1.
    """
    epsilon, num_iterations = _check_sinkhorn(epsilon, num_iterations)
    arrays = {"scores": (scores, "ANK")}
    if queue_scores is not None:
        arrays["queue_scores"] = (queue_scores, "AQK")
    scores, *queue = _as_given(check_arrays(axis_name, min_batch=1, **arrays), arrays)
    rows = jnp.concatenate([*queue, scores], axis=1)  # (A, Q + N, K)
    epsilon = _of_one_type(epsilon, rows)
    queue_length = rows.shape[1] - scores.shape[1]
    # One view after another, because `vmap` would compute both of `_assignments` forms.
    return jnp.stack(
        [
            _assignments(view, queue_length, epsilon, num_iterations, axis_name)
            for view in rows
        ]
    )


def swapped_cross_entropy(
    scores: ArrayLike,
    assignments: ArrayLike,
    *,
    temperature: Scalar = 0.1,
    axis_name: AxisName = None,
) -> jax.Array:
    """How badly each view predicts the assignments of all the other views.

    1/A sum_i 1/(V - 1) sum_{v != i} mean_n [-sum_k q_ink log softmax_k(scores_vn / T)]

    Args:
        scores: (V, N, K) scores of all the views.
        assignments: (A, N, K) assignments q of the first A <= V views.
        temperature: > 0, T of the predictions, in units of the scores.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar >= 0, float32 (float64 for float64 input), with gradients for both
        arguments.

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and V < 2.

    References:
        Caron et al., 2020, SwAV (arXiv:2006.09882), equations 1, 2 and 6.
    """
    _, assignments = check_arrays(
        axis_name,
        min_batch=1,
        scores=(scores, "VNK"),
        assignments=(assignments, "ANK"),
    )
    temperature = check_number(
        "temperature", temperature, exclusive=True, dtype=assignments.dtype
    )
    scores = jnp.asarray(scores)
    views, assigned = scores.shape[0], assignments.shape[0]
    if views < max(2, assigned):
        raise ValueError(
            f"scores: got {views} views, expected at least 2 and the {assigned} of"
            " assignments"
        )
    return cross_entropy_of_views(scores, assignments, temperature, axis_name)


def swav(
    scores: ArrayLike,
    *,
    queue_scores: ArrayLike | None = None,
    num_assigned: Whole = 2,
    temperature: Scalar = 0.1,
    epsilon: Scalar = 0.05,
    num_iterations: Whole = 3,
    axis_name: AxisName = None,
) -> jax.Array:
    """SwAV: from each view of an image, predict the clusters of its other views.

    1/A sum_{i < A} 1/(V - 1) sum_{v != i} mean_n [-sum_k q_ink log softmax_k(s_vn / T)]
    with q_i the `sinkhorn` assignments of view i, which get no gradient.

    It does not collapse because every prototype is assigned its equal share of the
    batch: when all rows of scores are one row s, all assignments are uniform (with an
    iteration, and without a queue), whatever the scores, and the loss is
    logsumexp(s / T) - mean(s) / T >= ln K, which is ln K when all the scores are equal.
    Fewer examples than prototypes cannot fill them: give such a batch a queue of
    earlier examples.

    This is the published mean over the predictions of every view from every other. The
    lecture writes the sum of the two cross-entropies of two views, which is twice that,
    and calls q one-hot; these are soft, as in the official code.

    As in `dino`, the gradient of large scores is computed block by block of examples,
    and all at once in float16, where the partitioner may have sharded the batch, and
    where `jax.export` leaves N open.

    Args:
        scores: (V, N, K) cosines of the embeddings of V views to K prototypes, the
            views to assign first (SwAV's large crops).
        queue_scores: (A, Q, K) scores of earlier examples, those of this shard where
            the batch is sharded, which share the prototypes with the batch; or None.
        num_assigned: A, between 1 and V: how many views are assigned.
        temperature: > 0, T of the predictions.
        epsilon: > 0, how soft the assignments are.
        num_iterations: >= 0, of `sinkhorn`.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar >= 0, float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and V < 2.

    References:
        Caron et al., 2020, SwAV (arXiv:2006.09882), equations 1 to 6.
    """
    arrays = {"scores": (scores, "VNK")}
    if queue_scores is not None:
        arrays["queue_scores"] = (queue_scores, "AQK")
    scores, *queue = _as_given(check_arrays(axis_name, min_batch=1, **arrays), arrays)
    if scores.shape[0] < 2:
        raise ValueError(f"scores: got shape {scores.shape}, expected V >= 2")
    num_assigned = _check_integer("num_assigned", num_assigned, 1, scores.shape[0])
    if queue and queue[0].shape[0] != num_assigned:
        raise ValueError(
            f"queue_scores: got {queue[0].shape[0]} views, expected num_assigned ="
            f" {num_assigned}"
        )
    epsilon, num_iterations = _check_sinkhorn(epsilon, num_iterations)
    # The arguments, not the result, are cut off: nothing is kept for a backward pass.
    fixed, queue, epsilon = lax.stop_gradient((scores[:num_assigned], queue, epsilon))
    assignments = assign(
        fixed,
        *queue,
        epsilon=epsilon,
        num_iterations=num_iterations,
        axis_name=axis_name,
    )
    return swapped_cross_entropy(
        scores, assignments, temperature=temperature, axis_name=axis_name
    )


def _of_one_type(epsilon, scores):
    """The scalar in the dtype of the computation: the program is then compiled once."""
    narrow = jnp.finfo(scores.dtype).bits < 32
    return jnp.asarray(epsilon, jnp.float32 if narrow else scores.dtype)


# Compiled, because a call outside `jit` would otherwise compile its branches each time.
@functools.partial(jax.jit, static_argnames=("skip", "num_iterations", "axis_name"))
def _assignments(scores, skip, epsilon, num_iterations, axis_name):
    """The assignments of the rows after the first `skip`: (N, K) -> (N - skip, K).

    Scores of fewer digits than float32 are converted where they are read.
    """
    dtype = jnp.finfo(epsilon.dtype)
    extremes = jnp.stack([jnp.max(scores), -jnp.min(scores)]).astype(dtype.dtype)
    extremes = pmax(extremes, axis_name)
    # In eighths, no difference or potential of finite scores overflows.
    high, negative_low = 0.125 * extremes
    epsilon = jnp.maximum(0.125 * epsilon, dtype.tiny)
    # With potentials of up to 1.5 times the range of the exponents, neither they nor
    # the gradients leave the dtype's exponents.
    limit = 0.5 * math.log(float(dtype.max))
    options = {"skip": skip, "num_iterations": num_iterations, "axis_name": axis_name}
    # One choice for all the shards, which exchange sums inside each of the branches.
    return lax.cond(
        (high + negative_low) / epsilon <= limit,
        functools.partial(_by_scaling, bound=0.5 * limit + 1.0, **options),
        functools.partial(_by_logarithms, **options),
        scores,
        0.5 * (high - negative_low),
        epsilon,
    )


def _by_scaling(scores, shift, epsilon, *, skip, num_iterations, axis_name, bound):
    exponents = (0.125 * scores.astype(shift.dtype) - shift) / epsilon
    # The bound acts only where `vmap` computes this branch for scores that are not
    # meant for it: its result is not used then, but must be finite.
    kernel = jnp.exp(jnp.clip(exponents, -bound, bound))  # (N, K)
    count = as_number(batch_size(kernel, axis_name), kernel.dtype)

    def prototypes(rows):  # (N,) -> (K,)
        sums = feature_gram(rows[:, None], kernel, axis_name)[0]
        return _reciprocal(sums / count)

    def row_sums(kernel, columns):  # (n, K), (K,) -> (n,)
        return jnp.matmul(kernel, columns, precision=lax.Precision.HIGHEST)

    def iterate(_, rows):  # (N,) -> (N,)
        return _reciprocal(row_sums(kernel, prototypes(rows)) / kernel.shape[1])

    columns = jnp.ones(kernel.shape[1], kernel.dtype)
    if num_iterations > 0:
        # Of a sum, which an Explicit mesh places as the loop's results; a column of
        # scores whose prototypes are sharded cannot be cut out there.
        rows = jnp.ones_like(jnp.sum(kernel, axis=1))
        rows = lax.fori_loop(0, num_iterations - 1, iterate, rows)
        columns = prototypes(rows)
    plan = kernel[skip:]
    return plan * columns[None] * _reciprocal(row_sums(plan, columns))[:, None]


def _reciprocal(x):
    # 1 / x, of which the derivative would square x and so leave the range of exponents.
    return jnp.exp(-jnp.log(x))


def _by_logarithms(scores, shift, epsilon, *, skip, num_iterations, axis_name):
    scores = 0.125 * scores.astype(shift.dtype) - shift

    # The potentials are epsilon log u and epsilon log v, in units of the scores. The
    # largest exponent is subtracted before the division by epsilon, so that the others
    # may become minus infinity, which exp takes, but none NaN.
    def prototypes(rows):  # (N,) -> (K,)
        moved = scores + rows[:, None]
        largest = pmax(jnp.max(moved, axis=0), axis_name)
        mean = batch_mean(jnp.exp((moved - largest[None]) / epsilon), axis_name)
        return -(largest + epsilon * jnp.log(mean))

    def iterate(_, rows):  # (N,) -> (N,)
        moved = scores + prototypes(rows)[None]
        largest = lax.stop_gradient(jnp.max(moved, axis=1))
        mean = jnp.mean(jnp.exp((moved - largest[:, None]) / epsilon), axis=1)
        return -(largest + epsilon * jnp.log(mean))

    plan = scores[skip:]
    if num_iterations > 0:
        rows = jnp.zeros_like(jnp.sum(scores, axis=1))  # as in `_by_scaling`
        rows = lax.fori_loop(0, num_iterations - 1, iterate, rows)
        plan = plan + prototypes(rows)[None]
    largest = lax.stop_gradient(jnp.max(plan, axis=1, keepdims=True))
    return jax.nn.softmax((plan - largest) / epsilon, axis=1)


def _as_given(checked, arrays):
    """Arrays without their conversion, if they are of one dtype; it comes later."""
    given = [jnp.asarray(array) for array, _ in arrays.values()]
    return given if len({array.dtype for array in given}) == 1 else checked


def _check_integer(name, value, minimum, maximum=None):
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if value >= minimum and (maximum is None or value <= maximum):
            return int(value)
    expected = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
    raise ValueError(f"{name}: got {value!r}, expected an int {expected}")


def _check_sinkhorn(epsilon, num_iterations):
    return (
        check_number("epsilon", epsilon, exclusive=True),
        _check_integer("num_iterations", num_iterations, 0),
    )
