"""Weighted nearest neighbors: how far labels agree with distances."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jemjax.evaluation.collapse import check_embeddings, normalize_rows

# Cosines held at once: 128 MB of float32.
_MAX_COSINES = 2**25


def check_labelled(
    name: str, embeddings: ArrayLike, labels: ArrayLike, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Checks embeddings and their labels against each other.

    Args:
        name: "train" or "test", for the message.
        embeddings: (N, D).
        labels: (N,) integers in [0, num_classes).
        num_classes: >= 1.

    Returns:
        (N, D) float32 (or float64) embeddings, (N,) int32 labels.

    Raises:
        ValueError: for shapes, dtypes or labels other than these. The range of traced
            labels is not checked.
    """
    rows = check_embeddings(f"{name}_embeddings", embeddings)
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}, expected >= 1")
    concrete = not isinstance(labels, Tracer)
    values = np.asarray(labels) if concrete else jnp.asarray(labels)
    if values.shape != rows.shape[:1] or not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(
            f"{name}_labels: got {values.dtype} of shape {values.shape}, expected"
            f" integers of shape {rows.shape[:1]}"
        )
    if concrete and not 0 <= values.min() <= values.max() < num_classes:
        raise ValueError(
            f"{name}_labels: got {values.min()} to {values.max()}, expected 0 to"
            f" num_classes - 1 = {num_classes - 1}"
        )
    return rows, jnp.asarray(values, jnp.int32)


def accuracy(scores: jax.Array, labels: jax.Array) -> float:
    """Share of rows of (N, C) scores that are largest at their label; NaN for NaN."""
    correct = jnp.argmax(scores, axis=1) == labels
    return float(jnp.mean(jnp.where(jnp.isnan(scores).any(axis=1), jnp.nan, correct)))


def knn_predict(
    train_embeddings: ArrayLike,
    train_labels: ArrayLike,
    embeddings: ArrayLike,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int,
) -> jax.Array:
    """Votes of the k nearest neighbors by cosine, for each class.

    votes_c = sum over the k nearest n with label c of exp(cos(z, z_n) / temperature)

    All embeddings are L2-normalized here. A row of zeros has cosine 0 with every other.
    Memory is bounded: embeddings are asked about in compiled chunks.

    Args:
        train_embeddings: (N, D).
        train_labels: (N,) integers in [0, num_classes).
        embeddings: (M, D) to classify.
        k: number of neighbors, 1 to N.
        temperature: > 0; not so low that a vote overflows (0.012 is possible).
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
    if not 1 <= k <= len(train):
        raise ValueError(
            f"k: got {k}, expected 1 to {len(train)}, the number of train_embeddings"
        )
    largest = math.log(float(jnp.finfo(jnp.float32).max) / k)
    if not (math.isfinite(temperature) and temperature * largest > 1):
        raise ValueError(
            f"temperature: got {temperature}, expected a finite number >"
            f" {1 / largest:.4f}, below which k = {k} votes overflow"
        )
    return _votes(train, labels, queries, temperature, k=k, num_classes=num_classes)


@functools.partial(jax.jit, static_argnames=("k", "num_classes"))
def _votes(train, labels, queries, temperature, *, k, num_classes):
    train, queries = normalize_rows(train), normalize_rows(queries)

    def votes(query):  # (D,) -> (C,)
        cosines = jnp.matmul(train, query, precision=lax.Precision.HIGHEST)  # (N,)
        nearest, rows = lax.top_k(cosines, k)  # (k,)
        weights = jnp.exp(nearest / temperature)
        classes = jax.nn.one_hot(labels[rows], num_classes, dtype=train.dtype)  # (k, C)
        return jnp.matmul(weights, classes, precision=lax.Precision.HIGHEST)

    chunk = max(1, min(len(queries), _MAX_COSINES // len(train)))
    return lax.map(votes, queries, batch_size=chunk)


def knn_accuracy(
    train_embeddings: ArrayLike,
    train_labels: ArrayLike,
    test_embeddings: ArrayLike,
    test_labels: ArrayLike,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int,
) -> float:
    """Accuracy of `knn_predict`.

    Args:
        train_embeddings: (N, D).
        train_labels: (N,) integers in [0, num_classes).
        test_embeddings: (M, D).
        test_labels: (M,) integers in [0, num_classes).
        k: number of neighbors, 1 to N.
        temperature: > 0.
        num_classes: >= 1.

    Returns:
        A number in [0, 1]; NaN if an embedding is not finite.

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


def few_labels(labels: ArrayLike, per_class: int, seed: int) -> np.ndarray:
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
    values = np.asarray(labels)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"labels: got {values.dtype} of shape {values.shape}, expected integers of"
            " shape (N,)"
        )
    if per_class < 1:
        raise ValueError(f"per_class: got {per_class}, expected >= 1")
    shuffled = np.random.default_rng(seed).permutation(len(values))
    chosen = [
        shuffled[values[shuffled] == label][:per_class]
        for label in np.unique(values[values >= 0])
    ]
    return np.sort(np.concatenate(chosen)) if chosen else shuffled[:0]
