import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax.evaluation import few_labels, knn, knn_accuracy, knn_predict


@pytest.mark.parametrize("temperature", [0.07, 0.2])
@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_equals_the_official_votes(golden, k, temperature):
    z = golden("knn_dino")
    options = {
        "k": k,
        "temperature": temperature,
        "num_classes": int(z["num_classes"]),
    }
    votes = knn_predict(z["train"], z["ytrain"], z["test"], **options)
    suffix = f"k{k}_T{temperature}"
    np.testing.assert_allclose(votes, z[f"votes_{suffix}"], rtol=1e-5)
    np.testing.assert_array_equal(votes.argmax(1), z[f"pred_{suffix}"])
    accuracy = knn_accuracy(z["train"], z["ytrain"], z["test"], z["ytest"], **options)
    np.testing.assert_allclose(100 * accuracy, z[f"top1_{suffix}"], rtol=1e-6)


def test_equals_the_official_votes_in_double_precision(golden):
    z = golden("knn_dino")
    with jax.enable_x64(True):
        votes = knn_predict(
            z["train"].astype(np.float64),
            z["ytrain"],
            z["test"].astype(np.float64),
            num_classes=int(z["num_classes"]),
        )
        # The features of the file have unit length in float32 only.
        np.testing.assert_allclose(votes, z["votes_k20_T0.07"], rtol=5e-6)


def test_chunks_do_not_change_the_votes(golden, monkeypatch):
    z = golden("knn_dino")
    arrays = z["train"], z["ytrain"], z["test"][:23]
    whole = knn_predict(*arrays, k=7, num_classes=7)
    # Chunks of 5 queries, and 3 that remain.
    monkeypatch.setattr(knn, "_MAX_COSINES", 5 * len(z["train"]))
    jax.clear_caches()
    chunked = knn_predict(*arrays, k=7, num_classes=7)
    np.testing.assert_allclose(chunked, whole, rtol=1e-5)


def test_the_length_of_an_embedding_does_not_count(golden):
    z = golden("knn_dino")
    expected = knn_predict(z["train"], z["ytrain"], z["test"], num_classes=7)
    scale = 10.0 ** np.linspace(-30, 30, len(z["train"]), dtype=np.float32)[:, None]
    got = knn_predict(z["train"] * scale, z["ytrain"], 1e25 * z["test"], num_classes=7)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_is_computed_in_float32(golden, dtype):
    z = golden("knn_dino")
    train, test = jnp.asarray(z["train"], dtype), jnp.asarray(z["test"], dtype)
    got = knn_predict(train, z["ytrain"], test, num_classes=7)
    expected = knn_predict(
        train.astype(jnp.float32),
        z["ytrain"],
        test.astype(jnp.float32),
        num_classes=7,
    )
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


def test_rows_of_zeros_give_finite_votes():
    train = np.zeros((4, 3), np.float32)
    votes = knn_predict(
        train, [0, 0, 1, 2], np.zeros((2, 3), np.float32), k=4, num_classes=3
    )
    np.testing.assert_array_equal(votes, [[2, 1, 1], [2, 1, 1]])


def test_what_is_not_finite_is_not_hidden():
    train, labels = np.eye(3, dtype=np.float32), np.arange(3)
    test = train.copy()
    test[1, 1] = np.nan
    assert np.isnan(knn_accuracy(train, labels, test, labels, k=1, num_classes=3))
    assert knn_accuracy(train, labels, train, labels, k=1, num_classes=3) == 1.0


def test_it_works_inside_jit():
    train, labels = np.eye(3, dtype=np.float32), np.arange(3)

    @jax.jit
    def predict(train, labels, embeddings):
        return knn_predict(train, labels, embeddings, k=1, num_classes=3).argmax(1)

    np.testing.assert_array_equal(predict(train, labels, train[::-1]), [2, 1, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: got 0, expected 1 to 4"),
        ({"k": 5}, "k: got 5, expected 1 to 4"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": 0.01}, "temperature: got 0.01.*overflow"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"num_classes": 0}, "num_classes: got 0"),
        ({"num_classes": 3}, "train_labels: got 0 to 3, expected 0 to.* 2"),
        ({"train_labels": np.arange(3)}, "train_labels: got"),
        ({"train_labels": np.zeros(4, np.float32)}, "train_labels: got float32"),
        ({"train_labels": np.arange(4) - 1}, "train_labels: got -1"),
        ({"embeddings": np.zeros((2, 3), np.float32)}, r"embeddings: got shape \(2, 3"),
        ({"embeddings": np.zeros((2, 4), np.int32)}, "embeddings: got dtype int32"),
        ({"embeddings": np.zeros(4, np.float32)}, r"embeddings: got shape \(4,\)"),
        ({"train_embeddings": np.zeros((0, 4), np.float32)}, "train_embeddings: got"),
    ],
)
def test_refusals(change, message):
    good = {
        "train_embeddings": np.eye(4, dtype=np.float32),
        "train_labels": np.arange(4),
        "embeddings": np.eye(4, dtype=np.float32),
        "k": 2,
        "num_classes": 4,
    }
    with pytest.raises(ValueError, match=message):
        knn_predict(**{**good, **change})


def test_few_labels_draws_the_same_number_of_each_class():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    chosen = few_labels(labels, 10, seed=3)
    assert len(np.unique(chosen)) == 50
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [10] * 5)
    np.testing.assert_array_equal(chosen, few_labels(labels, 10, seed=3))
    assert (chosen != few_labels(labels, 10, seed=4)).any()


def test_few_labels_takes_all_of_a_small_class():
    np.testing.assert_array_equal(few_labels([0, 1, 0, 0, 2], 4, seed=0), range(5))


def test_few_labels_leaves_out_what_has_no_label():
    np.testing.assert_array_equal(few_labels([-1, 3, -1, -2, 3], 5, seed=0), [1, 4])
    assert len(few_labels([-1, -1], 5, seed=0)) == 0


@pytest.mark.parametrize(("labels", "per_class"), [([0.5], 1), ([[0]], 1), ([0, 1], 0)])
def test_few_labels_refusals(labels, per_class):
    with pytest.raises(ValueError, match="got"):
        few_labels(labels, per_class, seed=0)
