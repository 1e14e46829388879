"""How good a representation is: frozen features, by the protocols of `evaluation`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from jemjax.augment import ViewRecipe, evaluation_view
from jemjax.data import Source, load_arrays
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

# Draws of the 10 labels a class over which the accuracy is averaged.
FEW_LABEL_DRAWS = 5
# Enough for the accuracy to settle, also for the thousands of pixels of raw images.
PROBE_ITERATIONS = 100


class Examples(NamedTuple):
    """Labelled images in memory: the neighbors, and those that are asked about."""

    train_images: np.ndarray  # (N, H, W, C) uint8
    train_labels: np.ndarray  # (N,)
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def load_examples(train: Source, test: Source, limit: int) -> Examples:
    """At most `limit` images of each of the two, evenly spread."""
    return Examples(
        *load_arrays(train, limit=limit),
        *load_arrays(test, limit=limit),
        num_classes=train.num_classes,
    )


def make_features(
    network: nn.Module, recipe: ViewRecipe, mesh: Mesh, batch_size: int = 512
) -> Callable[[TrainState, np.ndarray], np.ndarray]:
    """A function (state, (N, H, W, C) uint8 images) -> (N, features) float32.

    Images are seen whole, in compiled batches of one size, by the backbone in
    evaluation mode: nothing of the state changes.
    """
    batch_size = math.ceil(batch_size / mesh.size) * mesh.size

    @jax.jit
    def features_of_batch(params, batch_stats, images):
        return network.apply(
            {"params": params, "batch_stats": batch_stats},
            evaluation_view(images, recipe),
            method="features",
        )

    def features(state: TrainState, images: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            missing = batch_size - len(batch)
            padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
            part = features_of_batch(
                state.params, state.batch_stats, to_devices(padded, mesh)
            )
            parts.append(np.asarray(part)[: len(batch)])
        return np.concatenate(parts)

    return features


def pixels(images: np.ndarray, recipe: ViewRecipe) -> np.ndarray:
    """The images as they reach the network, as vectors: what there is to beat."""
    view = jax.jit(lambda batch: evaluation_view(batch, recipe))
    parts = [
        np.asarray(view(images[start : start + 4096]))
        for start in range(0, len(images), 4096)
    ]
    return np.concatenate(parts).reshape(len(images), -1)


def measure_knn(train, test, examples: Examples) -> float:
    """Weighted kNN accuracy of embeddings (N, D) of the examples' images."""
    return knn_accuracy(
        train,
        examples.train_labels,
        test,
        examples.test_labels,
        k=min(20, len(train)),
        num_classes=examples.num_classes,
    )


def measure_protocols(train, test, examples: Examples) -> dict[str, float]:
    """Every protocol that needs labels, for embeddings of the examples' images."""
    labels, test_labels = examples.train_labels, examples.test_labels
    figures = {"knn": measure_knn(train, test, examples)}
    few = []
    for draw in range(FEW_LABEL_DRAWS):
        chosen = few_labels(labels, 10, seed=draw)
        few.append(
            knn_accuracy(
                train[chosen],
                labels[chosen],
                test,
                test_labels,
                k=min(10, len(chosen)),
                num_classes=examples.num_classes,
            )
        )
    figures["knn_10_labels"] = float(np.mean(few))
    figures["linear"] = float(
        linear_probe(
            train,
            labels,
            test,
            test_labels,
            num_classes=examples.num_classes,
            max_iterations=PROBE_ITERATIONS,
        ).accuracy
    )
    return figures


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
    embedders = {
        "trained": lambda images: features(trained, images),
        "untrained": lambda images: features(untrained, images),
        "pixels": lambda images: pixels(images, recipe),
    }
    results: dict[str, Any] = {}
    for name, embed in embedders.items():
        say(f"measuring: {name}")
        train, test = embed(examples.train_images), embed(examples.test_images)
        if name == "trained":
            results["collapse"] = measure_collapse(test)
        if examples.num_classes:
            figures = measure_protocols(train, test, examples)
            for protocol, figure in figures.items():
                results.setdefault(protocol, {})[name] = figure
    return results
