"""How far clusters agree with labels that they were made without.

A cluster is the prototype with the highest score. These are functions of NumPy arrays:
they count, which a compiler does no faster.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jemjax.evaluation.inputs import Scalar, Whole, check_count, on_host


class PrototypeUsage(NamedTuple):
    """How many prototypes the examples fall in."""

    used: int  # prototypes with one example or more
    perplexity: float  # exp of the entropy of their shares: used, if all are as large


def cluster_accuracy(assignments: ArrayLike, labels: ArrayLike) -> float:
    """Accuracy of the best one-to-one naming of clusters by labels.

    max over one-to-one maps m of clusters to labels of mean_n [m(cluster_n) = label_n]

    The map is found by the Hungarian method, with all labels: it is the figure of a
    clustering, not of a classifier. Examples of clusters that get no label, because
    there are more clusters than labels, count as wrong.

    Args:
        assignments: (N,) integers >= 0, the cluster of each example.
        labels: (N,) integers >= 0.

    Returns:
        A number in (0, 1].

    Raises:
        ValueError: for other shapes, dtypes or values.
    """
    # An import of a second, which no training step needs.
    from scipy.optimize import linear_sum_assignment

    counts = _counts(assignments, labels)  # (clusters, labels)
    clusters, names = linear_sum_assignment(counts, maximize=True)
    return float(counts[clusters, names].sum() / counts.sum())


def normalized_mutual_information(assignments: ArrayLike, labels: ArrayLike) -> float:
    """Mutual information of clusters and labels over the mean of their entropies.

    I(cluster; label) / ((H(cluster) + H(label)) / 2)

    It is 0 where one is the same for all examples, and 1 where both are. More clusters
    than labels cost less than in `cluster_accuracy`, and chance is not corrected for.

    Args:
        assignments: (N,) integers >= 0, the cluster of each example.
        labels: (N,) integers >= 0.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: for other shapes, dtypes or values.
    """
    counts = _counts(assignments, labels)  # (clusters, labels)
    joint = counts / counts.sum()
    cluster, label = _entropy(joint.sum(axis=1)), _entropy(joint.sum(axis=0))
    if 1 in counts.shape:
        return float(counts.shape == (1, 1))
    information = cluster + label - _entropy(joint)
    return float(np.clip(2 * information / (cluster + label), 0, 1))


def prototype_usage(assignments: ArrayLike, num_prototypes: Whole) -> PrototypeUsage:
    """How many of the prototypes are in use, and how evenly.

    perplexity = exp(-sum_k p_k log p_k),  p_k the share of examples in cluster k

    Args:
        assignments: (N,) integers in [0, num_prototypes).
        num_prototypes: K >= 1.

    Returns:
        `PrototypeUsage`: both from 1, if all examples fall in one, to min(N, K).

    Raises:
        ValueError: for other shapes, dtypes or values.
    """
    num_prototypes = check_count("num_prototypes", num_prototypes)
    values = _integers("assignments", assignments)
    if values.max() >= num_prototypes:
        raise ValueError(
            f"assignments: got {values.max()}, expected < num_prototypes ="
            f" {num_prototypes}"
        )
    counts = np.bincount(values)
    perplexity = math.exp(_entropy(counts / counts.sum()))
    return PrototypeUsage(int(np.count_nonzero(counts)), perplexity)


def label_clusters(
    scores: ArrayLike, labels: ArrayLike, *, temperature: Scalar = 0.1
) -> np.ndarray:
    """Names each cluster by a few labelled examples.

    label_k = argmax_c sum over n with label c of softmax(scores_n / temperature)_k

    Soft votes, because few labels leave most clusters without an example of their own:
    such a cluster is named by the examples that are nearest to it.

    Args:
        scores: (N, K) of the labelled examples by each prototype, such as cosines.
        labels: (N,) integers >= 0.
        temperature: > 0, that of the method's prediction.

    Returns:
        (K,) the label of each cluster, always one of `labels`.

    Raises:
        ValueError: for other shapes, dtypes or values.
    """
    rows = _scores("scores", scores)
    values = _integers("labels", labels)
    if len(values) != len(rows):
        raise ValueError(
            f"labels: got shape {values.shape}, expected ({len(rows)},) as scores"
        )
    temperature = float(on_host("temperature", temperature))
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: got {temperature}, expected a finite number >0")
    logits = rows / temperature
    logits -= logits.max(axis=1, keepdims=True)
    log_votes = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))  # (N, K)
    # Each cluster's votes are relative to its largest: none has only votes of zero.
    votes = np.exp(log_votes - log_votes.max(axis=0))
    names, index = np.unique(values, return_inverse=True)
    sums = np.stack([votes[index == name].sum(axis=0) for name in range(len(names))])
    return names[sums.argmax(axis=0)]  # (C, K) -> (K,)


def few_label_cluster_accuracy(
    labelled_scores: ArrayLike,
    labelled_labels: ArrayLike,
    test_assignments: ArrayLike,
    test_labels: ArrayLike,
    *,
    temperature: Scalar = 0.1,
) -> float:
    """Accuracy of clusters as a classifier that has seen a few labels.

    mean_n [label_k(n) = label_n],  k(n) the cluster of example n,  label_k of
    `label_clusters`

    Args:
        labelled_scores: (N, K) of the labelled examples by each prototype.
        labelled_labels: (N,) integers >= 0.
        test_assignments: (M,) integers in [0, K), the cluster of each example.
        test_labels: (M,) integers >= 0.
        temperature: > 0, of the votes.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: for other shapes, dtypes or values.
    """
    names = label_clusters(labelled_scores, labelled_labels, temperature=temperature)
    clusters = _integers("test_assignments", test_assignments)
    labels = _integers("test_labels", test_labels)
    if len(clusters) != len(labels) or clusters.max() >= len(names):
        raise ValueError(
            f"test_assignments: got shape {clusters.shape} up to {clusters.max()},"
            f" expected ({len(labels)},) as test_labels, up to {len(names) - 1}"
        )
    return float(np.mean(names[clusters] == labels))


def _counts(assignments: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(clusters, labels): examples of each pair, of those numbers that occur."""
    rows = _integers("assignments", assignments)
    columns = _integers("labels", labels)
    if len(rows) != len(columns):
        raise ValueError(
            f"labels: got shape {columns.shape}, expected {rows.shape} as assignments"
        )
    clusters, row = np.unique(rows, return_inverse=True)
    names, column = np.unique(columns, return_inverse=True)
    counts = np.zeros((len(clusters), len(names)), np.int64)
    np.add.at(counts, (row, column), 1)
    return counts


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-np.sum(shares * np.log(shares)))


def _integers(name: str, values: ArrayLike) -> np.ndarray:
    array = on_host(name, values)
    if array.ndim != 1 or len(array) < 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name}: got {array.dtype} of shape {array.shape}, expected integers of"
            " shape (N,) with N >= 1"
        )
    if array.min() < 0:
        raise ValueError(f"{name}: got {array.min()}, expected integers >= 0")
    return array.astype(np.int64)


def _scores(name: str, values: ArrayLike) -> np.ndarray:
    array = on_host(name, values)
    if (
        array.ndim != 2
        or 0 in array.shape
        or not jnp.issubdtype(array.dtype, jnp.floating)
    ):
        raise ValueError(
            f"{name}: got {array.dtype} of shape {array.shape}, expected floating-point"
            " (N, K) with N, K >= 1"
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
    return array
