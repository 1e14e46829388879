import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from jemjax.evaluation import linear_probe


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    train, test = order[:1400], order[1400:]
    images = data.data.astype(np.float32)
    return images[train], data.target[train], images[test], data.target[test]


@pytest.mark.parametrize("l2", [1e-2, 1e-3])
def test_equals_logistic_regression(digits, l2):
    train, labels, test, truth = digits
    probe = linear_probe(*digits, l2=l2)
    mean, std = train.mean(0), train.std(0)
    std[std == 0] = 1
    reference = LogisticRegression(C=1 / (l2 * len(train)), tol=1e-6, max_iter=3000)
    reference.fit((train - mean) / std, labels)
    score = reference.score((test - mean) / std, truth)
    assert abs(probe.accuracy - score) <= 0.005
    logits = test @ np.asarray(probe.weights) + np.asarray(probe.bias)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    np.testing.assert_allclose(
        probabilities, reference.predict_proba((test - mean) / std), atol=0.02
    )
    np.testing.assert_allclose((logits.argmax(1) == truth).mean(), probe.accuracy)


def test_offset_and_scale_of_a_feature_do_not_count(digits):
    train, labels, test, truth = digits
    factors = 10.0 ** np.linspace(-3, 3, train.shape[1], dtype=np.float32)
    moved = linear_probe(train * factors + 5, labels, test * factors + 5, truth)
    assert abs(moved.accuracy - linear_probe(*digits).accuracy) <= 0.01


def test_the_same_every_time(digits):
    first, second = linear_probe(*digits), linear_probe(*digits)
    assert first.accuracy == second.accuracy
    np.testing.assert_array_equal(first.weights, second.weights)


def test_constant_embeddings_predict_the_most_frequent_class():
    train = np.full((10, 3), 0.1, np.float32)
    labels = np.array([0] * 4 + [1] * 6)
    probe = linear_probe(train, labels, train, labels)
    assert probe.accuracy == pytest.approx(0.6)
    np.testing.assert_array_equal(probe.weights, 0)
    np.testing.assert_allclose(probe.bias[1] - probe.bias[0], np.log(6 / 4), rtol=1e-3)


def test_classes_without_examples_and_few_examples():
    train = np.eye(3, dtype=np.float32)
    labels = np.array([0, 2, 4])
    probe = linear_probe(train, labels, train, labels, num_classes=7)
    assert probe.weights.shape == (3, 7)
    assert probe.accuracy == 1.0
    assert jnp.isfinite(probe.bias).all()


def test_what_is_not_finite_is_not_hidden():
    train, labels = np.eye(3, dtype=np.float32), np.arange(3)
    bad = train.copy()
    bad[0, 0] = np.nan
    assert np.isnan(linear_probe(bad, labels, train, labels).accuracy)
    assert np.isnan(linear_probe(train, labels, bad, labels).accuracy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l2": -1.0}, "l2: got -1.0"),
        ({"l2": float("inf")}, "l2: got inf"),
        ({"max_iterations": 0}, "max_iterations: got 0"),
        ({"num_classes": 2}, "train_labels: got 0 to 2"),
        ({"test_labels": np.array([0, 1, 3])}, "test_labels: got 0 to 3"),
        ({"train_labels": np.arange(2)}, "train_labels: got"),
        ({"train_labels": np.zeros(3)}, "train_labels: got float64"),
        ({"test_embeddings": np.eye(3, 2, dtype=np.float32)}, "test_embeddings: got"),
        ({"train_embeddings": np.eye(3, dtype=np.int32)}, "train_embeddings: got"),
    ],
)
def test_refusals(change, message):
    good = {
        "train_embeddings": np.eye(3, dtype=np.float32),
        "train_labels": np.arange(3),
        "test_embeddings": np.eye(3, dtype=np.float32),
        "test_labels": np.arange(3),
    }
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**good, **change})
