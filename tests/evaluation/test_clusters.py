import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from jemjax.evaluation import (
    cluster_accuracy,
    few_label_cluster_accuracy,
    label_clusters,
    normalized_mutual_information,
    prototype_usage,
)

AGREEMENTS = [cluster_accuracy, normalized_mutual_information]

pairs = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40
).map(lambda rows: tuple(np.array(rows).T))


def accuracy_by_trial(assignments, labels):
    # Every one-to-one map of six clusters to four labels, and two that name nothing.
    names = np.array(list(itertools.permutations(range(6))))  # (720, 6)
    return (names[:, assignments] == labels).mean(axis=1).max()


def scores_at(clusters, num_prototypes, score=1.0):
    return score * np.eye(num_prototypes, dtype=np.float32)[np.asarray(clusters)]


def test_accuracy_by_hand():
    # Cluster 7 is named 2 (3 right), cluster 0 is named 5 (1 right), cluster 4 nothing.
    assignments = np.array([7, 7, 7, 7, 0, 0, 4])
    labels = np.array([2, 2, 2, 5, 2, 5, 2])
    np.testing.assert_allclose(cluster_accuracy(assignments, labels), 4 / 7)


@settings(max_examples=100)
@given(pairs)
def test_accuracy_is_that_of_the_best_naming(pair):
    np.testing.assert_allclose(cluster_accuracy(*pair), accuracy_by_trial(*pair))


@settings(max_examples=100)
@given(pairs)
def test_mutual_information_equals_scikit_learn(pair):
    assignments, labels = pair
    np.testing.assert_allclose(
        normalized_mutual_information(assignments, labels),
        normalized_mutual_info_score(labels, assignments),
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("assignments", "labels"),
    [
        ([3, 3], [5, 5]),
        ([3, 3], [0, 1]),
        ([0, 1], [5, 5]),
        ([4], [2]),
        ([0, 1, 2], [0, 1, 2]),
        ([0, 1, 0, 1], [0, 0, 1, 1]),
        ([0, 1, 2, 3], [0, 0, 1, 1]),
    ],
)
def test_mutual_information_at_the_edges(assignments, labels):
    np.testing.assert_allclose(
        normalized_mutual_information(assignments, labels),
        normalized_mutual_info_score(labels, assignments),
        atol=1e-9,
    )


@settings(max_examples=50)
@given(pair=pairs, seed=st.integers(0, 2**31))
def test_the_numbers_of_clusters_and_the_order_of_examples_do_not_count(pair, seed):
    assignments, labels = pair
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    names = generator.permutation(1000)
    for agreement in AGREEMENTS:
        got = agreement(names[assignments][order], labels[order])
        np.testing.assert_allclose(got, agreement(assignments, labels), atol=1e-9)
        assert 0 <= got <= 1


@settings(max_examples=50)
@given(pairs)
def test_clusters_that_are_the_labels_agree(pair):
    _, labels = pair
    assert cluster_accuracy(labels + 3, labels) == 1.0
    np.testing.assert_allclose(normalized_mutual_information(labels + 3, labels), 1)


def test_clusters_of_noise_agree_as_chance_does():
    generator = np.random.default_rng(0)
    assignments, labels = generator.integers(0, 10, (2, 20_000))
    assert 0.1 < cluster_accuracy(assignments, labels) < 0.12
    assert normalized_mutual_information(assignments, labels) < 0.01


@pytest.mark.parametrize("agreement", AGREEMENTS)
@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64, jnp.asarray])
def test_integers_of_every_kind(agreement, kind):
    assignments, labels = [1, 1, 0, 2], [0, 0, 1, 1]
    expected = agreement(assignments, labels)
    got = agreement(kind(assignments), kind(labels))
    assert type(got) is float and got == expected


@pytest.mark.parametrize("agreement", AGREEMENTS)
@pytest.mark.parametrize(
    ("assignments", "labels", "message"),
    [
        ([0, 1], [0, 1, 2], r"labels: got shape \(3,\), expected \(2,\)"),
        ([0, 1], [0.0, 1.0], "labels: got float64"),
        ([0, 1], [0, -1], "labels: got -1, expected integers >= 0"),
        ([-3, 1], [0, 1], "assignments: got -3"),
        ([[0, 1]], [0, 1], r"assignments: got int64 of shape \(1, 2\)"),
        (np.zeros(0, np.int32), np.zeros(0, np.int32), "assignments: got int32"),
    ],
)
def test_refusals(agreement, assignments, labels, message):
    with pytest.raises(ValueError, match=message):
        agreement(assignments, labels)


def test_prototypes_in_use():
    used, perplexity = prototype_usage([4, 1, 4, 1, 1, 4, 7, 7], 10)
    shares = np.array([3, 3, 2]) / 8
    assert used == 3
    np.testing.assert_allclose(perplexity, np.exp(-np.sum(shares * np.log(shares))))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_perplexity_of_even_use_is_the_number_used(count):
    used, perplexity = prototype_usage(np.tile(np.arange(count), 5), 8)
    assert used == count
    np.testing.assert_allclose(perplexity, count)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_the_bounds_of_usage(assignments):
    used, perplexity = prototype_usage(assignments, 10)
    assert 1 <= used <= min(10, len(assignments))
    assert 1 - 1e-9 <= perplexity <= used + 1e-9


def test_usage_refuses_other_prototypes():
    with pytest.raises(ValueError, match="assignments: got 3, expected < num_proto"):
        prototype_usage([0, 3], 3)
    with pytest.raises(ValueError, match="num_prototypes: got 0"):
        prototype_usage([0, 3], 0)


def test_clusters_are_named_by_the_majority_of_their_examples():
    scores = scores_at([0, 0, 0, 2, 2, 2, 1], 3)
    np.testing.assert_array_equal(
        label_clusters(scores, [7, 7, 4, 4, 4, 7, 9], temperature=0.05), [7, 9, 4]
    )


def test_votes_by_hand():
    scores = np.array([[0.3, 0.0, 0.1], [0.2, 0.1, 0.6], [0.1, 0.4, 0.9]])
    weights = np.exp(scores / 0.2)
    weights /= weights.sum(axis=1, keepdims=True)
    votes = np.stack([weights[:2].sum(axis=0), weights[2]])
    np.testing.assert_array_equal(
        label_clusters(scores, [3, 3, 8], temperature=0.2),
        np.array([3, 8])[votes.argmax(axis=0)],
    )


@pytest.mark.parametrize("score", [1.0, 1e4])
def test_a_cluster_without_examples_is_named_by_the_nearest(score):
    # No example is in cluster 1, and those of label 6 are nearer to it.
    scores = score * np.array([[1.0, 0.2, 0.0], [0.0, 0.5, 1.0], [1.0, 0.1, 0.0]])
    np.testing.assert_array_equal(label_clusters(scores, [5, 6, 5]), [5, 6, 6])


def test_few_labels_name_clusters_for_the_rest():
    clusters = np.repeat(np.arange(4), 10)
    labels = np.array([1, 0, 1, 2])[clusters]
    labels[::10] = 3
    scores = scores_at(clusters, 4)
    few = np.array([1, 11, 21, 31])
    accuracy = few_label_cluster_accuracy(scores[few], labels[few], clusters, labels)
    assert type(accuracy) is float
    np.testing.assert_allclose(accuracy, 0.9)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_prototypes_does_not_count(seed):
    generator = np.random.default_rng(seed)
    few, rest = generator.normal(size=(12, 7)), generator.normal(size=(30, 7))
    few_labels, labels = generator.integers(0, 3, 12), generator.integers(0, 3, 30)
    order = generator.permutation(7)
    nearest, reordered = rest.argmax(axis=1), rest[:, order].argmax(axis=1)
    expected = few_label_cluster_accuracy(few, few_labels, nearest, labels)
    got = few_label_cluster_accuracy(few[:, order], few_labels, reordered, labels)
    assert got == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_scores_of_every_dtype(dtype):
    clusters = jnp.array([0, 1, 2, 1])
    scores = jnp.asarray(scores_at(clusters, 3), dtype)
    labels = jnp.array([2, 0, 1, 0])
    assert few_label_cluster_accuracy(scores, labels, clusters, labels) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labelled_scores": np.eye(3, dtype=int)}, "scores: got int64"),
        ({"labelled_scores": np.ones(3)}, r"scores: got float64 of shape \(3,\)"),
        ({"labelled_scores": np.full((3, 3), np.nan)}, "scores: got NaN or infinity"),
        ({"labelled_labels": [0, 1]}, r"labels: got shape \(2,\), expected \(3,\)"),
        ({"labelled_labels": [0, 1, -1]}, "labels: got -1"),
        ({"test_assignments": [0, 1, 3]}, "test_assignments: got shape .* up to 3"),
        ({"test_assignments": [0.5, 1, 2]}, "test_assignments: got float64"),
        ({"test_labels": [0, 1]}, r"got shape \(3,\) up to 2, expected \(2,\)"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
    ],
)
def test_few_label_refusals(change, message):
    good = {
        "labelled_scores": np.eye(3),
        "labelled_labels": [0, 1, 2],
        "test_assignments": [0, 1, 2],
        "test_labels": [0, 1, 2],
    }
    with pytest.raises(ValueError, match=message):
        few_label_cluster_accuracy(**{**good, **change})
