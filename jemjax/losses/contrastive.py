"""Losses that tell an image's two views from other images: NT-Xent and InfoNCE.

Under `axis_name` every shard compares its own rows with those of the global batch,
which are gathered: N x N_global cosines a shard, not N_global x N_global.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jemjax.losses import numerics
from jemjax.losses.checks import (
    check_arrays,
    check_embeddings,
    check_flag,
    check_number,
)
from jemjax.losses.collectives import (
    AxisName,
    as_number,
    batch_mean,
    first_row,
    gather,
    is_known,
    is_local,
    psum,
    row_products,
)

Scalar = ArrayLike  # a number, or a traced scalar

# From this temperature on no exp((cos - 1) / T) vanishes, whatever the cosine, and no
# quotient of two sums of them overflows.
_WARM = 0.03

# Cosines with a queue that are computed at once, in a CPU's cache: 4 MiB in float32.
_BLOCK = 2**20


def nt_xent(
    x: ArrayLike,
    y: ArrayLike,
    *,
    temperature: Scalar = 0.1,
    axis_name: AxisName = None,
) -> jax.Array:
    """SimCLR's NT-Xent: each embedding finds its other view among the whole batch.

    1/(2N) sum over the 2N rows a of [x; y] of
        -log(exp(cos(a, a+) / T) / sum_{b != a} exp(cos(a, b) / T)),

    with a+ the other view of a. SimCLR's code is twice this: it adds the means over
    either view's rows. Identical embeddings of all images have the value ln(2N - 1).
    Rows shorter than 1e-6 (1e-3 for float16) are not normalized to 1 but stay shorter:
    the cosine with a row of zeros is 0.

    Args:
        x: (N, D) embeddings of the first views.
        y: (N, D) embeddings of the second views of the same images.
        temperature: T > 0.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar >= 0, float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and a global batch
            below 2.

    References:
        Chen, Kornblith, Norouzi, Hinton, 2020, SimCLR (arXiv:2002.05709), equation 1.
    """
    rows = check_embeddings(axis_name, x=x, y=y)
    temperature = check_number(
        "temperature", temperature, exclusive=True, dtype=rows[0].dtype
    )
    u = numerics.normalize_rows(rows[0], jnp.result_type(x))
    v = numerics.normalize_rows(rows[1], jnp.result_type(y))
    if _warm(temperature):
        return _warm_nt_xent(u, v, temperature, axis_name)
    keys, count = _stacked(u, v, axis_name)  # (2N_global, D)
    first = _own_columns(u, 2 * count, axis_name)  # (N, 2N_global)
    second = jnp.roll(first, count, axis=1)

    def of_anchors(anchors, itself, other):
        cosines = row_products(anchors, keys)  # (N, 2N_global)
        positive = _entry(cosines, other)
        return _negative_log_share(positive, cosines, temperature, itself)

    both = of_anchors(u, first, second) + of_anchors(v, second, first)  # (N,)
    return batch_mean(0.5 * both, axis_name)


def info_nce(
    query: ArrayLike,
    key: ArrayLike,
    queue: ArrayLike | None = None,
    *,
    temperature: Scalar = 0.2,
    stop_gradient: bool = True,
    axis_name: AxisName = None,
) -> jax.Array:
    """MoCo's InfoNCE: each query finds its key among a queue's, or the batch's.

    -1/N sum_n log(exp(cos(q_n, k_n) / T) / sum_k exp(cos(q_n, k) / T)),

    with k over k_n and the queue (MoCo v1, v2), or over the batch's keys (MoCo v3).
    MoCo v3's code is 2 T times this, added over the two directions. Identical
    embeddings of all images have the value ln(1 + Q), or ln N without a queue.
    Queries and keys shorter than 1e-6 (1e-3 for float16) are not normalized to 1 but
    stay shorter: the cosine with a row of zeros is 0.

    A long queue is read in blocks, of which the cosines fit into a CPU's cache; all at
    once where the partitioner may have sharded the batch, and where `jax.export` leaves
    N open.

    Args:
        query: (N, D) embeddings of one view.
        key: (N, D) embeddings of the other view.
        queue: (Q, D) earlier keys of unit length, a constant, whole on every shard.
        temperature: T > 0.
        stop_gradient: whether the keys are constants.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar >= 0, float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, an empty batch, and,
            without a queue, a global batch below 2.

    References:
        He, Fan, Wu, Xie, Girshick, 2019, MoCo (arXiv:1911.05722), equation 1.
        Chen, Xie, He, 2021, MoCo v3 (arXiv:2104.02057), equation 1.
    """
    arrays = {"query": (query, "ND"), "key": (key, "ND")}
    if queue is not None:
        arrays["queue"] = (queue, "QD")
    min_batch = 2 if queue is None else 1  # whose other keys are the negatives
    q, k, *_ = check_arrays(axis_name, min_batch, **arrays)
    temperature = check_number(
        "temperature", temperature, exclusive=True, dtype=q.dtype
    )
    if check_flag("stop_gradient", stop_gradient):
        k = lax.stop_gradient(k)
    q = numerics.normalize_rows(q, jnp.result_type(query))
    k = numerics.normalize_rows(k, jnp.result_type(key))
    if queue is not None:
        positive = jnp.sum(q * k, axis=1)  # (N,)
        earlier = gather(lax.stop_gradient(jnp.asarray(queue)), None)
        temperature = jnp.asarray(temperature, q.dtype)
        whole = not is_local(q, axis_name) or not is_known(q.shape[0])
        block_size = len(earlier) if whole else max(1, _BLOCK // len(q))
        losses = jax.nn.softplus(
            _log_others_over_own(q, positive, earlier, temperature, block_size)
        )
    else:
        cosines = row_products(q, gather(k, axis_name))  # (N, N_global)
        own = _own_columns(q, cosines.shape[1], axis_name)
        losses = _negative_log_share(_entry(cosines, own), cosines, temperature)
    return batch_mean(losses, axis_name)


def _warm(temperature):
    """Whether one shift, of 1 / temperature, is right for the exponents of all rows."""
    return isinstance(temperature, float) and temperature >= _WARM


# With one shift for all the rows exp is symmetric, as the cosines are: it is computed
# once for an anchor and for its part in the others, and one product has both.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _warm_nt_xent(u, v, temperature, axis_name):
    """`nt_xent` of rows of unit length."""
    value, _ = _value_and_gradients(u, v, temperature, axis_name)
    return value


@_warm_nt_xent.defjvp
def _warm_nt_xent_jvp(temperature, axis_name, primals, tangents):
    u, v = primals
    value, gradients = _value_and_gradients(u, v, temperature, axis_name)
    of_u, of_v = (
        jnp.sum(gradient * change)
        for gradient, change in zip(gradients(), tangents, strict=True)
    )
    return value, psum(of_u + of_v, axis_name)


def _value_and_gradients(u, v, temperature, axis_name):
    """The value of `_warm_nt_xent`, and a function for its gradients."""
    keys, count = _stacked(u, v, axis_name)  # (2N_global, D)
    own = _own_columns(u, count, axis_name)  # (N, N_global)
    own = jnp.concatenate([own, own], axis=1)  # of an anchor and of its other view
    negatives = [
        jnp.where(own, 0.0, jnp.exp((row_products(anchors, keys) - 1.0) / temperature))
        for anchors in (u, v)
    ]  # (N, 2N_global)
    positive = jnp.exp((jnp.sum(u * v, axis=1) - 1.0) / temperature)  # (N,)
    sums = [jnp.sum(negative, axis=1) for negative in negatives]
    # Of what is apart from the positive, so that little is not lost beside it.
    losses = [jnp.log1p(of_others / positive) for of_others in sums]
    value = batch_mean(0.5 * (losses[0] + losses[1]), axis_name)

    def gradients():
        weights = [(1.0 / (positive + of_others))[:, None] for of_others in sums]
        of_keys, _ = _stacked(weights[0], weights[1], axis_name)  # (2N_global, 1)
        pull = weights[0] * sums[0][:, None] + weights[1] * sums[1][:, None]  # (N, 1)
        scale = 0.5 / (as_number(count, u.dtype) * temperature)
        return [
            scale * (row_products(e * (weight + of_keys.T), keys.T) - pull * other)
            for e, weight, other in zip(negatives, weights, (v, u), strict=True)
        ]

    return value, gradients


# The softmax over the queue is never formed: its mean key is all that derivatives need.
@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _log_others_over_own(q, positive, queue, temperature, block_size):
    """log(sum_m exp(<q, queue_m> / T) / exp(positive / T)): (N,)."""
    value, _ = _log_others_and_mean_key(q, positive, queue, temperature, block_size)
    return value


@_log_others_over_own.defjvp
def _log_others_over_own_jvp(block_size, primals, tangents):
    q, positive, queue, temperature = primals
    q_dot, positive_dot, _, temperature_dot = tangents  # the queue is a constant
    value, mean_key = _log_others_and_mean_key(
        q, positive, queue, temperature, block_size
    )
    of_cosines = jnp.sum(mean_key * q_dot, axis=1) - positive_dot
    difference = positive - jnp.sum(mean_key * q, axis=1)
    of_temperature = difference * (temperature_dot / temperature)
    return value, (of_cosines + of_temperature) / temperature


# Compiled by itself, or each call outside of `jit` would compile the loop anew.
@functools.partial(jax.jit, static_argnames="block_size")
def _log_others_and_mean_key(q, positive, queue, temperature, block_size):
    """The value of `_log_others_over_own`, and the softmax's mean of the keys, (N, D).

    The queue is read as it is given, a block at a time, of which alone there is a copy
    in float32.
    """

    def of_block(first, size):
        keys = lax.dynamic_slice_in_dim(queue, first, size).astype(q.dtype)
        cosines = row_products(q, keys)  # (N, size)
        # A product of -inf would be a share of 0, and so be hidden.
        cosines = jnp.where(jnp.isfinite(cosines), cosines, jnp.nan)
        # Shifted by the largest, the sum is at least 1, however long the queue's rows.
        largest = lax.stop_gradient(jnp.max(cosines, axis=1))
        shares = jnp.exp((cosines - largest[:, None]) / temperature)
        total = jnp.sum(shares, axis=1)
        return largest, total, row_products(shares / total[:, None], keys.T)

    def add(before, first):
        largest, total, mean_key = before
        block_largest, block_total, block_mean_key = of_block(first, block_size)
        top = jnp.maximum(largest, block_largest)
        total = total * jnp.exp((largest - top) / temperature)
        block_total = block_total * jnp.exp((block_largest - top) / temperature)
        sum_of_both = total + block_total
        share, block_share = total / sum_of_both, block_total / sum_of_both
        mean_key = share[:, None] * mean_key + block_share[:, None] * block_mean_key
        return (top, sum_of_both, mean_key), None

    # The first block has what is left over.
    size = len(queue)
    first_size = (size - 1) % block_size + 1
    before = of_block(0, first_size)
    if first_size < size:
        firsts = jnp.arange(first_size, size, block_size, dtype=jnp.int32)
        before, _ = lax.scan(add, before, firsts)
    top, total, mean_key = before
    return jnp.log(total) + (top - positive) / temperature, mean_key


def _stacked(u, v, axis_name):
    """Both views' rows of the global batch, (2N_global, D), and N_global."""
    both = gather(jnp.concatenate([u, v], axis=1), axis_name)  # (N_global, 2D)
    return jnp.concatenate(jnp.split(both, 2, axis=1)), both.shape[0]


def _own_columns(x, columns, axis_name):
    """Where the rows of a shard are among those of the global batch: (N, columns)."""
    rows = first_row(x, axis_name) + jnp.arange(x.shape[0], dtype=jnp.int32)
    return jnp.arange(columns, dtype=jnp.int32)[None] == rows[:, None]


def _entry(cosines, where):
    """The one entry of each row: (N, M), (N, M) -> (N,)."""
    # Not computed another way, which would round differently: the positive would not
    # be a part of the sum, and the loss could become negative.
    return jnp.sum(jnp.where(where, cosines, 0.0), axis=1)


def _negative_log_share(positive, cosines, temperature, excluded=False):
    """-log(exp(positive / T) / sum_m exp(cosines_m / T)): (N,), (N, M) -> (N,).

    The sum is without the `excluded`.
    """
    # Shifted by the largest, the sum is at least 1 at any temperature.
    lowest = float(jnp.finfo(cosines.dtype).min)
    others = jnp.where(excluded, lowest, lax.stop_gradient(cosines))
    largest = jnp.max(others, axis=1)
    # Zero, because the lowest number would make the temperature's gradient NaN.
    shifted = jnp.where(excluded, 0.0, cosines - largest[:, None]) / temperature
    shares = jnp.sum(jnp.where(excluded, 0.0, jnp.exp(shifted)), axis=1)
    return (largest - positive) / temperature + jnp.log(shares)
