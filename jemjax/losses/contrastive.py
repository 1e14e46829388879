"""Losses that tell an image's two views from other images: NT-Xent and InfoNCE.

Under `axis_name` every shard compares its own rows with those of the global batch,
which are gathered: N x N_global cosines a shard, not N_global x N_global.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jemjax.losses import numerics
from jemjax.losses.checks import (
    check_arrays,
    check_embeddings,
    check_flag,
    check_number,
)
from jemjax.losses.collectives import (
    AxisName,
    batch_mean,
    first_row,
    gather,
    row_products,
)

Scalar = float | jax.Array


def nt_xent(
    x: jax.Array,
    y: jax.Array,
    *,
    temperature: Scalar = 0.1,
    axis_name: AxisName = None,
) -> jax.Array:
    """SimCLR's NT-Xent: each embedding finds its other view among the whole batch.

    1/(2N) sum over the 2N rows a of [x; y] of
        -log(exp(cos(a, a+) / T) / sum_{b != a} exp(cos(a, b) / T)),

    with a+ the other view of a. SimCLR's code is twice this: it adds the means over
    either view's rows. Identical embeddings of all images have the value ln(2N - 1).

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
    u = numerics.normalize_rows(rows[0], x.dtype)
    v = numerics.normalize_rows(rows[1], y.dtype)
    both = gather(jnp.concatenate([u, v], axis=1), axis_name)  # (N_global, 2D)
    keys = jnp.concatenate(jnp.split(both, 2, axis=1))  # (2N_global, D)
    first = _own_columns(u, keys.shape[0], axis_name)  # (N, 2N_global)
    second = jnp.roll(first, both.shape[0], axis=1)

    def of_anchors(anchors, itself, other):
        cosines = row_products(anchors, keys)  # (N, 2N_global)
        positive = _entry(cosines, other)
        return _negative_log_share(positive, cosines, temperature, itself)

    both = of_anchors(u, first, second) + of_anchors(v, second, first)  # (N,)
    return batch_mean(0.5 * both, axis_name)


def info_nce(
    query: jax.Array,
    key: jax.Array,
    queue: jax.Array | None = None,
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
        ValueError: for wrong shapes, dtypes or hyper-parameters, and a global batch
            below 2.

    References:
        He, Fan, Wu, Xie, Girshick, 2019, MoCo (arXiv:1911.05722), equation 1.
        Chen, Xie, He, 2021, MoCo v3 (arXiv:2104.02057), equation 1.
    """
    arrays = {"query": (query, "ND"), "key": (key, "ND")}
    if queue is not None:
        arrays["queue"] = (queue, "QD")
    q, k, *queues = check_arrays(axis_name, min_batch=2, **arrays)
    temperature = check_number(
        "temperature", temperature, exclusive=True, dtype=q.dtype
    )
    if check_flag("stop_gradient", stop_gradient):
        k = lax.stop_gradient(k)
    q = numerics.normalize_rows(q, query.dtype)
    k = numerics.normalize_rows(k, key.dtype)
    if queues:
        positive = jnp.sum(q * k, axis=1)  # (N,)
        earlier = gather(lax.stop_gradient(queues[0]), None)
        cosines = row_products(q, earlier)  # (N, Q)
        # A product of -inf would be a share of 0, and so be hidden.
        cosines = jnp.where(jnp.isfinite(cosines), cosines, jnp.nan)
        cosines = jnp.concatenate([positive[:, None], cosines], axis=1)  # (N, 1 + Q)
    else:
        cosines = row_products(q, gather(k, axis_name))  # (N, N_global)
        own = _own_columns(q, cosines.shape[1], axis_name)
        positive = _entry(cosines, own)
    return batch_mean(_negative_log_share(positive, cosines, temperature), axis_name)


def _own_columns(x, columns, axis_name):
    """Where the rows of a shard are among those of the global batch: (N, columns)."""
    rows = first_row(x, axis_name) + jnp.arange(x.shape[0], dtype=jnp.int32)
    return jnp.arange(columns, dtype=jnp.int32) == rows[:, None]


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
    others = jnp.where(excluded, -jnp.inf, lax.stop_gradient(cosines))
    largest = jnp.max(others, axis=1)
    # Zero, because minus infinity would make the temperature's gradient NaN.
    shifted = jnp.where(excluded, 0.0, cosines - largest[:, None]) / temperature
    shares = jnp.where(excluded, 0.0, jnp.exp(shifted))
    return (largest - positive) / temperature + jnp.log(jnp.sum(shares, axis=1))
