"""Weighted nearest neighbors: how far labels agree with distances."""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jemjax.evaluation.collapse import normalize_rows
from jemjax.evaluation.inputs import (
    Scalar,
    Whole,
    check_count,
    check_embeddings,
    check_labelled,
    check_number,
    is_known,
    on_host,
    whole,
)

# Cosines held at once: 128 MB of float32.
_MAX_COSINES = 2**25


def accuracy(scores: jax.Array, labels: jax.Array) -> Any:
    """Share of rows of (N, C) scores that are largest at their label; NaN for NaN.

    A Python float, or a scalar where the scores or the labels are traced.
    """
    share = _accuracy(scores, labels)
    return share if isinstance(share, Tracer) else float(jax.device_get(share))


@jax.jit
def _accuracy(scores, labels):
    correct = (jnp.argmax(scores, axis=1) == labels).astype(float)
    return jnp.mean(jnp.where(jnp.isnan(scores).any(axis=1), jnp.nan, correct))


def knn_predict(
    train_embeddings: ArrayLike,
    train_labels: ArrayLike,
    embeddings: ArrayLike,
    *,
    k: Whole = 20,
    temperature: Scalar = 0.07,
    num_classes: Whole,
) -> jax.Array:
    """Votes of the k nearest neighbors by cosine, for each class.

    votes_c = sum over the k nearest n with label c of exp(cos(z, z_n) / temperature)

    All embeddings are L2-normalized here. A row of zeros has cosine 0 with every other.
    Memory is bounded: embeddings are asked about in compiled chunks.

    Args:
        train_embeddings: (N, D), N known.
        train_labels: (N,) integers in [0, num_classes).
        embeddings: (M, D) to classify, one after the other where `jax.export` leaves M
            open.
        k: number of neighbors, 1 to N.
        temperature: > 0; not so low that a vote overflows (0.012 is possible). A
            scalar array, traced or not, is not checked.
        num_classes: C >= 1.

    Returns:
        (M, C) votes: the prediction is the largest.

    Raises:
        ValueError: for shapes, dtypes, labels or numbers other than these.

    References:
        Wu, Xiong, Yu, Lin, 2018 (arXiv:1805.01978); Caron et al., 2021, DINO
        (arXiv:2104.14294).
    """
    train, labels = check_labelled("train", train_embeddings, train_labels, num_classes)
    queries = check_embeddings("embeddings", embeddings)
    if queries.shape[1] != train.shape[1]:
        raise ValueError(
            f"embeddings: got shape {queries.shape}, expected (M, {train.shape[1]}) as"
            " train_embeddings"
        )
    neighbors = check_count("k", k, 0)
    if not 1 <= neighbors <= len(train):
        raise ValueError(
            f"k: got {k}, expected 1 to {len(train)}, the number of train_embeddings"
        )
    largest = math.log(float(jnp.finfo(jnp.float32).max) / neighbors)
    if isinstance(temperature, numbers.Real) and not temperature * largest > 1:
        raise ValueError(
            f"temperature: got {temperature}, expected a finite number >"
            f" {1 / largest:.4f}, below which k = {neighbors} votes overflow"
        )
    return _votes(
        train,
        labels,
        queries,
        check_number("temperature", temperature, train.dtype),
        k=neighbors,
        num_classes=check_count("num_classes", num_classes),
    )


@functools.partial(jax.jit, static_argnames=("k", "num_classes"))
def _votes(train, labels, queries, temperature, *, k, num_classes):
    train, labels, queries = whole(train), whole(labels), whole(queries)
    train, queries = normalize_rows(train), normalize_rows(queries)

    def votes(query):  # (D,) -> (C,)
        cosines = jnp.matmul(train, query, precision=lax.Precision.HIGHEST)  # (N,)
        nearest, rows = lax.top_k(cosines, k)  # (k,)
        weights = jnp.exp(nearest / temperature)
        classes = jax.nn.one_hot(labels[rows], num_classes, dtype=train.dtype)  # (k, C)
        return jnp.matmul(weights, classes, precision=lax.Precision.HIGHEST)

    if not is_known(queries.shape[0]):
        return lax.map(votes, queries)
    chunk = max(1, min(len(queries), _MAX_COSINES // len(train)))
    return lax.map(votes, queries, batch_size=chunk)


def knn_accuracy(
    train_embeddings: ArrayLike,
    train_labels: ArrayLike,
    test_embeddings: ArrayLike,
    test_labels: ArrayLike,
    *,
    k: Whole = 20,
    temperature: Scalar = 0.07,
    num_classes: Whole,
) -> Any:
    """Accuracy of `knn_predict`.

    Args:
        train_embeddings: (N, D), N known.
        train_labels: (N,) integers in [0, num_classes).
        test_embeddings: (M, D), M known.
        test_labels: (M,) integers in [0, num_classes).
        k: number of neighbors, 1 to N.
        temperature: > 0.
        num_classes: >= 1.

    Returns:
        A number in [0, 1]; NaN if an embedding is not finite. Inside `jit` a scalar.

    Raises:
        ValueError: for shapes, dtypes, labels or numbers other than these.
    """
    test, labels = check_labelled("test", test_embeddings, test_labels, num_classes)
    votes = knn_predict(
        train_embeddings,
        train_labels,
        test,
        k=k,
        temperature=temperature,
        num_classes=num_classes,
    )
    return accuracy(votes, labels)


def few_labels(labels: ArrayLike, per_class: Whole, seed: Whole) -> np.ndarray:
    """Draws examples of each class: what few labels would be.

    Args:
        labels: (N,) integers; the negative ones mean that there is no label.
        per_class: how many of each class, >= 1; all of a class that has fewer.
        seed: of the draw: the same seed gives the same examples.

    Returns:
        Ascending indices into `labels`.

    Raises:
        ValueError: for labels that are not a vector of integers, or `per_class` < 1.
    """
    values = on_host("labels", labels)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"labels: got {values.dtype} of shape {values.shape}, expected integers of"
            " shape (N,)"
        )
    per_class = check_count("per_class", per_class)
    shuffled = np.random.default_rng(seed).permutation(len(values))
    chosen = [
        shuffled[values[shuffled] == label][:per_class]
        for label in np.unique(values[values >= 0])
    ]
    return np.sort(np.concatenate(chosen)) if chosen else shuffled[:0]
