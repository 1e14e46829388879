"""How good a representation is: frozen features, by the protocols of `evaluation`."""

import collections
import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from jemjax.augment import ViewRecipe, evaluation_view
from jemjax.data import Source, spread
from jemjax.evaluation import (
    effective_rank,
    few_labels,
    knn_accuracy,
    linear_probe,
    normalized_std,
    rankme,
)
from jemjax.training.mesh import to_devices
from jemjax.training.state import TrainState

BATCH_SIZE = 512
# Threads that decode images, each a batch ahead.
READERS = 4
# Draws of the 10 labels a class over which the accuracy is averaged.
FEW_LABEL_DRAWS = 5
# Enough for the accuracy to settle, also for the thousands of pixels of raw images.
PROBE_ITERATIONS = 100


class Examples(NamedTuple):
    """Which images a measurement uses: the neighbors, and those that are asked about.

    They are read batch by batch when they are embedded, so that a large set of large
    images need not fit in memory.
    """

    train: Source
    train_indices: np.ndarray  # (N,)
    test: Source
    test_indices: np.ndarray  # (M,)
    num_classes: int  # 0 where there are no labels to predict


class Embedded(NamedTuple):
    """Embeddings of a measurement's images, with their labels."""

    train: np.ndarray  # (N, D)
    train_labels: np.ndarray  # (N,)
    test: np.ndarray  # (M, D)
    test_labels: np.ndarray  # (M,)
    num_classes: int


def choose_examples(train: Source, test: Source, limit: int) -> Examples:
    """At most `limit` images of each of the two, evenly spread."""
    return Examples(
        train,
        spread(len(train), limit),
        test,
        spread(len(test), limit),
        train.num_classes if test.num_classes else 0,
    )


def embed_examples(
    examples: Examples, embed: Callable[[np.ndarray], np.ndarray]
) -> Embedded:
    """Applies a function of (n, H, W, C) uint8 images to all images."""

    def embedded(source, indices):
        parts, labels = [], []
        for batch in _read_ahead(source, indices):
            parts.append(embed(batch["image"]))
            labels.append(batch["label"])
        return np.concatenate(parts), np.concatenate(labels)

    return Embedded(
        *embedded(examples.train, examples.train_indices),
        *embedded(examples.test, examples.test_indices),
        examples.num_classes,
    )


def _read_ahead(source: Source, indices: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Batches in order, of which the next ones are decoded in threads meanwhile."""
    parts = [indices[i : i + BATCH_SIZE] for i in range(0, len(indices), BATCH_SIZE)]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        waiting = collections.deque()
        for part in parts:
            waiting.append(pool.submit(source.gather, part))
            if len(waiting) > READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def make_features(
    network: nn.Module, recipe: ViewRecipe, mesh: Mesh
) -> Callable[[TrainState, np.ndarray], np.ndarray]:
    """A function (state, (n, H, W, C) uint8 images) -> (n, features) float32.

    Images are seen whole, in compiled batches of one size, by the backbone in
    evaluation mode: nothing of the state changes.
    """
    batch_size = math.ceil(BATCH_SIZE / mesh.size) * mesh.size

    @jax.jit
    def features_of_batch(params, batch_stats, images):
        return network.apply(
            {"params": params, "batch_stats": batch_stats},
            evaluation_view(images, recipe),
            method="features",
        )

    def features(state: TrainState, images: np.ndarray) -> np.ndarray:
        missing = batch_size - len(images)
        padded = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        embedded = features_of_batch(
            state.params, state.batch_stats, to_devices(padded, mesh)
        )
        return np.asarray(embedded)[: len(images)]

    return features


def make_pixels(recipe: ViewRecipe) -> Callable[[np.ndarray], np.ndarray]:
    """A function (n, H, W, C) uint8 images -> (n, pixels): what there is to beat.

    The images as they reach the network, those above 32 x 32 pixels resized to that.
    """
    view = recipe.views[0]
    small = dataclasses.replace(view, size=min(view.size, 32))
    as_seen = jax.jit(lambda images: evaluation_view(images, ViewRecipe((small,))))
    return lambda images: np.asarray(as_seen(images)).reshape(len(images), -1)


def measure_knn(embedded: Embedded) -> float:
    """Accuracy of weighted kNN."""
    train, train_labels, test, test_labels, num_classes = embedded
    return knn_accuracy(
        train,
        train_labels,
        test,
        test_labels,
        k=min(20, len(train)),
        num_classes=num_classes,
    )


def measure_protocols(embedded: Embedded) -> dict[str, float]:
    """Every protocol that needs labels."""
    train, train_labels, test, test_labels, num_classes = embedded
    few = []
    for draw in range(FEW_LABEL_DRAWS):
        chosen = few_labels(train_labels, 10, seed=draw)
        few.append(
            knn_accuracy(
                train[chosen],
                train_labels[chosen],
                test,
                test_labels,
                k=min(10, len(chosen)),
                num_classes=num_classes,
            )
        )
    probe = linear_probe(
        train,
        train_labels,
        test,
        test_labels,
        num_classes=num_classes,
        max_iterations=PROBE_ITERATIONS,
    )
    return {
        "knn": measure_knn(embedded),
        "knn_10_labels": float(np.mean(few)),
        "linear": float(probe.accuracy),
    }


def measure_collapse(features: np.ndarray) -> dict[str, float]:
    """The figures that show either type of collapse, of (N, D) features."""
    sample = jnp.asarray(features[:: max(1, len(features) // 10_000)])
    return {
        "normalized_std": float(normalized_std(sample)),
        "ideal_normalized_std": 1 / math.sqrt(sample.shape[1]),
        "effective_rank": float(effective_rank(sample)),
        "rankme": float(rankme(sample)),
    }


def measure(
    trained: TrainState,
    untrained: TrainState,
    examples: Examples,
    features: Callable[[TrainState, np.ndarray], np.ndarray],
    recipe: ViewRecipe,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The final figures, by protocol: of the trained network and what it is beside.

    That is the network as it began, and raw pixels.
    """
    pixels = make_pixels(recipe)
    embedders = {
        "trained": lambda images: features(trained, images),
        "untrained": lambda images: features(untrained, images),
        "pixels": pixels,
    }
    results: dict[str, Any] = {}
    for name, embed in embedders.items():
        if not examples.num_classes and name != "trained":
            continue
        say(f"measuring: {name}")
        embedded = embed_examples(examples, embed)
        if name == "trained":
            results["collapse"] = measure_collapse(embedded.test)
        if examples.num_classes:
            for protocol, figure in measure_protocols(embedded).items():
                results.setdefault(protocol, {})[name] = figure
    return results
