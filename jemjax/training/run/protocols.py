"""How good a representation is: a list of protocols, to which others can be added."""

import abc
import csv
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

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


class Measured(NamedTuple):
    """What a protocol is given."""

    embedded: EmbeddedSet
    """what a network makes of the images"""
    examples: EvalSet
    """the images"""
    num_prototypes: int = 0
    """K, where the method compares its branches by clusters"""
    scores: Callable[[np.ndarray], np.ndarray] | None = None
    """(n, H, W, C) images -> (n, K) scores, where there are prototypes"""
    clusters: Path | None = None
    """the file for the prototype of each test image"""


class Protocol(abc.ABC):
    """A way to measure what a network has learned.

    A subclass with a name and `measure` is enough: `pretrain` and `evaluate` take a
    list of protocols, `(*PROTOCOLS, Mine())`.
    """

    name: str
    """of the figure in `results.json`"""
    compared: ClassVar[bool] = True
    """whether the network as it began and raw pixels are measured beside it"""

    def applies(self, examples: EvalSet, num_prototypes: int) -> bool:
        """Whether there is something to measure; unless overridden, where labels are.

        Args:
            examples: the images.
            num_prototypes: K; 0: the method has none.
        """
        return examples.num_classes > 0

    @abc.abstractmethod
    def measure(self, given: Measured) -> Any:
        """A number, or numbers by name, as JSON holds them."""

    def monitor(self, given: Measured) -> tuple[dict[str, float], list[str]]:
        """What is told during the run, where that is cheap enough; else nothing.

        Returns:
            Figures by name for `metrics.jsonl`, and sentences that name a collapse.
        """
        return {}, []


class Collapse(Protocol):
    """The figures that show collapse, of features or of embeddings."""

    compared = False

    def __init__(self, name: str, of: Literal["features", "embedding"]):
        self.name, self._of = name, of

    def applies(self, examples: EvalSet, num_prototypes: int) -> bool:
        """Labels are not needed."""
        return True

    def measure(self, given: Measured) -> dict[str, Any]:
        """As `measure_collapse`."""
        return measure_collapse(getattr(given.embedded.test.made, self._of))

    def monitor(self, given: Measured) -> tuple[dict[str, float], list[str]]:
        """The rank of the embeddings."""
        if self._of == "features":
            return {}, []
        figures = self.measure(given)
        return {"effective_rank": figures["effective_rank"]}, figures["collapse"]


class Clusters(Protocol):
    """How clusters agree with labels, and how many of them are used."""

    name = "clusters"
    compared = False

    def applies(self, examples: EvalSet, num_prototypes: int) -> bool:
        """Of methods with prototypes; labels are not needed for all of it."""
        return num_prototypes > 0

    def measure(self, given: Measured) -> dict[str, float]:
        """As `measure_clusters`; the prototype of each test image goes into a file."""
        assert given.clusters is not None and given.scores is not None
        with all_hosts():
            if is_first():
                _write_clusters(given.clusters, given.embedded, given.examples)
        return measure_clusters(
            given.embedded, given.examples, given.num_prototypes, given.scores
        )


class KNN(Protocol):
    """Weighted kNN."""

    name = "knn"

    def measure(self, given: Measured) -> float:
        """The accuracy."""
        return measure_knn(given.embedded)

    def monitor(self, given: Measured) -> tuple[dict[str, float], list[str]]:
        """The same, during the run."""
        return {self.name: self.measure(given)}, []


class FewLabels(Protocol):
    """Weighted kNN with few labels."""

    name = "knn_10_labels"

    def measure(self, given: Measured) -> float:
        """The accuracy, averaged over draws of the labelled images."""
        return measure_few_labels(given.embedded)


class LinearProbe(Protocol):
    """Logistic regression on the features."""

    name = "linear"

    def measure(self, given: Measured) -> float:
        """The accuracy."""
        return measure_linear(given.embedded)


# In the order of `results.json`.
PROTOCOLS: tuple[Protocol, ...] = (
    Collapse("collapse", "features"),
    Collapse("embedding_collapse", "embedding"),
    Clusters(),
    KNN(),
    FewLabels(),
    LinearProbe(),
)


def measure(
    trained: TrainState,
    untrained: TrainState,
    examples: EvalSet,
    embedder: Embedder,
    recipe: ViewRecipe,
    protocols: Sequence[Protocol],
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
        protocols: how to measure.
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
    scores = functools.partial(embedder.scores, trained)
    count = embedder.num_prototypes
    results: dict[str, Any] = {}
    for name, embed in embedders.items():
        chosen = [
            protocol
            for protocol in protocols
            if (protocol.compared or name == "trained")
            and protocol.applies(examples, count)
        ]
        if not chosen:
            continue
        say(f"measuring: {name}")
        embedded = embed_examples(examples, embed)
        given = Measured(embedded, examples, count, scores, clusters)
        for protocol in chosen:
            figure = protocol.measure(given)
            if protocol.compared:
                results.setdefault(protocol.name, {})[name] = figure
            else:
                results[protocol.name] = figure
    return results


def monitor(
    state: TrainState,
    examples: EvalSet,
    embedder: Embedder,
    protocols: Sequence[Protocol],
) -> tuple[dict[str, float], list[str]]:
    """What is measured during the run.

    Args:
        state: of the run.
        examples: what to measure on.
        embedder: the network.
        protocols: how to measure.

    Returns:
        Figures by name, and sentences that name a collapse.
    """
    embedded = embed_examples(examples, functools.partial(embedder.embed, state))
    given = Measured(embedded, examples, embedder.num_prototypes)
    figures: dict[str, float] = {}
    collapse: list[str] = []
    for protocol in protocols:
        if protocol.applies(examples, embedder.num_prototypes):
            found, sentences = protocol.monitor(given)
            figures |= found
            collapse += sentences
    return figures, collapse


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


def measure_few_labels(embedded: EmbeddedSet) -> float:
    """Accuracy of weighted kNN with few labels a class, averaged over draws of them."""
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
    return float(np.mean(few))


def measure_linear(embedded: EmbeddedSet) -> float:
    """Accuracy of a linear probe."""
    train, test, num_classes = embedded
    probe = linear_probe(
        train.made.features,
        train.labels,
        test.made.features,
        test.labels,
        num_classes=num_classes,
        max_iterations=PROBE_ITERATIONS,
    )
    return float(probe.accuracy)


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
