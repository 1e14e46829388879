"""How good a representation is, by the protocols of `evaluation`."""

import csv
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jemjax.augment import ViewRecipe
from jemjax.evaluation import (
    alpha_req,
    cluster_accuracy,
    effective_rank,
    few_label_cluster_accuracy,
    few_labels,
    knn_accuracy,
    linear_probe,
    name_collapse,
    normalized_mutual_information,
    normalized_std,
    prototype_usage,
    rankme,
)
from jemjax.training.process.distributed import all_hosts, is_first
from jemjax.training.run.embedder import (
    EmbeddedSet,
    Embedder,
    EvalSet,
    embed_examples,
    make_pixels,
)
from jemjax.training.step.state import TrainState
from jemjax.training.storage.files import replacing

# Labelled images a class where labels are few.
FEW_LABELS = 10
# Draws of them over which the accuracy is averaged.
FEW_LABEL_DRAWS = 5
# Scores of labelled images by prototypes that are held at once: 128 MB.
MAX_SCORES = 2**25
# Enough for the accuracy to settle, also for the thousands of pixels of raw images.
PROBE_ITERATIONS = 100


def measure_knn(embedded: EmbeddedSet) -> float:
    """Accuracy of weighted kNN."""
    train, test, num_classes = embedded
    return knn_accuracy(
        train.made.features,
        train.labels,
        test.made.features,
        test.labels,
        k=min(20, len(train.labels)),
        num_classes=num_classes,
    )


def measure_protocols(embedded: EmbeddedSet) -> dict[str, float]:
    """Every protocol of features that needs labels."""
    train, test, num_classes = embedded
    few = []
    for draw in range(FEW_LABEL_DRAWS):
        chosen = few_labels(train.labels, FEW_LABELS, seed=draw)
        few.append(
            knn_accuracy(
                train.made.features[chosen],
                train.labels[chosen],
                test.made.features,
                test.labels,
                k=min(10, len(chosen)),
                num_classes=num_classes,
            )
        )
    probe = linear_probe(
        train.made.features,
        train.labels,
        test.made.features,
        test.labels,
        num_classes=num_classes,
        max_iterations=PROBE_ITERATIONS,
    )
    return {
        "knn": measure_knn(embedded),
        "knn_10_labels": float(np.mean(few)),
        "linear": float(probe.accuracy),
    }


def measure_clusters(
    embedded: EmbeddedSet,
    examples: EvalSet,
    num_prototypes: int,
    scores: Callable[[np.ndarray], np.ndarray],
) -> dict[str, float]:
    """How clusters of the test images agree with labels, and how many are used.

    Args:
        embedded: with clusters.
        examples: that were embedded.
        num_prototypes: K.
        scores: (n, H, W, C) images -> (n, K) scores, of images with labels.
    """
    clusters, labels = embedded.test.made.cluster, embedded.test.labels
    assert clusters is not None
    usage = prototype_usage(clusters, num_prototypes)
    figures = {
        "prototypes": num_prototypes,
        "used_prototypes": usage.used,
        "perplexity": usage.perplexity,
    }
    if not embedded.num_classes:
        return figures
    fit = MAX_SCORES // (num_prototypes * embedded.num_classes)
    per_class = min(FEW_LABELS, max(1, fit))
    few = []
    for draw in range(FEW_LABEL_DRAWS):
        chosen = few_labels(embedded.train.labels, per_class, draw)
        images = examples.train.gather(examples.train_indices[chosen])["image"]
        few.append(
            few_label_cluster_accuracy(
                scores(images), embedded.train.labels[chosen], clusters, labels
            )
        )
    return {
        **figures,
        "normalized_mutual_information": normalized_mutual_information(
            clusters, labels
        ),
        "hungarian_accuracy": cluster_accuracy(clusters, labels),
        "labels_per_class": per_class,
        "few_label_accuracy": float(np.mean(few)),
    }


def measure_collapse(embeddings: np.ndarray) -> dict[str, Any]:
    """The figures of (N, D) embeddings that show collapse, and which one they show."""
    sample = jnp.asarray(embeddings[:: math.ceil(len(embeddings) / 10_000)])
    spread, rank = float(normalized_std(sample)), float(effective_rank(sample))
    dimension = sample.shape[1]
    return {
        "normalized_std": spread,
        "ideal_normalized_std": 1 / math.sqrt(dimension),
        "effective_rank": rank,
        "rankme": float(rankme(sample)),
        "alpha_req": float(alpha_req(sample)),
        "collapse": name_collapse(
            normalized_std=spread, effective_rank=rank, dimension=dimension
        ),
    }


def measure(
    trained: TrainState,
    untrained: TrainState,
    examples: EvalSet,
    embedder: Embedder,
    recipe: ViewRecipe,
    clusters: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The final figures, by protocol: of the trained network and what it is beside.

    That is the network as it began, and raw pixels.

    Args:
        trained: the state of the run.
        untrained: the same, as it began.
        examples: what to measure on.
        embedder: the network.
        recipe: how images reach it.
        clusters: the file for the prototype of each test image, if there are any.
        say: where progress is told.

    Returns:
        What `results.json` holds of it.
    """
    embedders = {
        "trained": functools.partial(embedder.embed, trained),
        "untrained": functools.partial(embedder.embed, untrained),
        "pixels": make_pixels(recipe),
    }
    results: dict[str, Any] = {}
    for name, embed in embedders.items():
        if not examples.num_classes and name != "trained":
            continue
        say(f"measuring: {name}")
        embedded = embed_examples(examples, embed)
        if name == "trained":
            assert embedded.test.made.embedding is not None
            results["collapse"] = measure_collapse(embedded.test.made.features)
            results["embedding_collapse"] = measure_collapse(
                embedded.test.made.embedding
            )
            if embedder.num_prototypes:
                with all_hosts():
                    if is_first():
                        _write_clusters(clusters, embedded, examples)
                results["clusters"] = measure_clusters(
                    embedded,
                    examples,
                    embedder.num_prototypes,
                    functools.partial(embedder.scores, trained),
                )
        if examples.num_classes:
            for protocol, figure in measure_protocols(embedded).items():
                results.setdefault(protocol, {})[name] = figure
    return results


def _write_clusters(path: Path, embedded: EmbeddedSet, examples: EvalSet) -> None:
    """Which prototype each test image falls in, by its number in the data."""
    assert embedded.test.made.cluster is not None
    names = examples.test.class_names
    with replacing(path) as file:
        writer = csv.writer(file)
        writer.writerow(("image", "prototype", "label"))
        for index, cluster, label in zip(
            examples.test_indices,
            embedded.test.made.cluster,
            embedded.test.labels,
            strict=True,
        ):
            name = names[label] if label >= 0 else ""
            # A spreadsheet would compute what begins like a formula.
            quoted = f"'{name}" if name.startswith(("=", "+", "-", "@")) else name
            writer.writerow((index, cluster, quoted))
