"""What a network makes of images, for measurements: batch by batch, compiled once."""

import collections
import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from jemjax.augment import ViewRecipe, evaluation_view
from jemjax.data import Source, spread
from jemjax.methods import Method
from jemjax.training.step.sharding import batch_sharding, replicated
from jemjax.training.step.state import TrainState

BATCH_SIZE = 512
# Threads that decode images, each a batch ahead.
READERS = 4
# Embeddings that are kept for the figures of collapse, at most.
KEPT_EMBEDDINGS = 10_000


class EvalSet(NamedTuple):
    """Which images a measurement uses: the neighbors, and those that are asked about.

    They are read batch by batch when they are embedded, so that a large set of large
    images need not fit in memory.
    """

    train: Source
    train_indices: np.ndarray  # (N,)
    test: Source
    test_indices: np.ndarray  # (M,)
    num_classes: int  # 0 where there are no labels to predict


class Features(NamedTuple):
    """What is made of n images; what an embedder does not make is None."""

    features: np.ndarray  # (n, F), what is kept of a network
    embedding: np.ndarray | None = None  # (n, D), what its loss sees
    cluster: np.ndarray | None = None  # (n,) the prototype that an image falls in


Embed = Callable[[np.ndarray], Features]


class EmbeddedSplit(NamedTuple):
    """What is made of one split's images, with their labels."""

    made: Features
    labels: np.ndarray  # (n,)


class EmbeddedSet(NamedTuple):
    """What is made of a measurement's images."""

    train: EmbeddedSplit
    test: EmbeddedSplit
    num_classes: int  # 0 where there are no labels to predict


def choose_examples(train: Source, test: Source, limit: int) -> EvalSet:
    """At most `limit` images of each of the two, evenly spread."""
    return EvalSet(
        train,
        spread(len(train), limit),
        test,
        spread(len(test), limit),
        train.num_classes if test.num_classes else 0,
    )


def embed_examples(examples: EvalSet, embed: Embed) -> EmbeddedSet:
    """Applies a function of (n, H, W, C) uint8 images to all images.

    Embeddings, which may be wide, are kept of a part of the test images only, evenly
    spread.
    """

    def embedded(source, indices, kept):
        parts, labels = [], []
        for batch in _read_ahead(source, indices):
            made = embed(batch["image"])
            if made.embedding is not None:
                made = made._replace(embedding=made.embedding[kept])
            parts.append(made)
            labels.append(batch["label"])
        made = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        return EmbeddedSplit(made, np.concatenate(labels))

    stride = math.ceil(len(examples.test_indices) / KEPT_EMBEDDINGS)
    return EmbeddedSet(
        embedded(examples.train, examples.train_indices, slice(0)),
        embedded(examples.test, examples.test_indices, slice(None, None, stride)),
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


class Embedder:
    """A method's network as measurements use it.

    Images are seen whole, in compiled batches of one size, in evaluation mode: nothing
    of the state changes.
    """

    def __init__(
        self, method: Method, network: nn.Module, recipe: ViewRecipe, mesh: Mesh
    ):
        prototypes: Any = method.make_prototypes()
        self.num_prototypes: int = prototypes.num_prototypes if prototypes else 0
        self._method, self._mesh = method, mesh
        self._batch_size = math.ceil(BATCH_SIZE / mesh.size) * mesh.size

        # Whole on each device, so that each of several hosts can read them.
        @functools.partial(jax.jit, out_shardings=replicated(mesh))
        def outputs(variables, loss_state, images):
            made: Any = network.apply(
                variables, evaluation_view(images, recipe), train=False, predict=False
            )
            if not prototypes:
                return made.features, made.embedding
            scores = method.cluster_scores(made.target, loss_state)
            return made.features, made.embedding, scores

        self._compiled = outputs

    def embed(self, state: TrainState, images: np.ndarray) -> Features:
        """Makes features, embeddings and clusters.

        Args:
            state: of the run.
            images: (n, H, W, C) uint8, at most a batch.
        """
        features, embedding, *scores = self._outputs(state, images)
        return Features(features, embedding, *[np.argmax(s, axis=1) for s in scores])

    def scores(self, state: TrainState, images: np.ndarray) -> np.ndarray:
        """(n, H, W, C) uint8 images, any number -> (n, K) scores by the prototypes."""
        starts = range(0, len(images), self._batch_size)
        parts = [images[start : start + self._batch_size] for start in starts]
        return np.concatenate([self._outputs(state, part)[2] for part in parts])

    def _outputs(self, state: TrainState, images: np.ndarray) -> list[np.ndarray]:
        missing = self._batch_size - len(images)
        padded = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        made = self._compiled(
            state.measured(self._method),
            state.loss_state,
            # Each of several hosts has all images, and gives its devices theirs.
            jax.make_array_from_callback(
                padded.shape, batch_sharding(self._mesh), padded.__getitem__
            ),
        )
        return [np.asarray(array)[: len(images)] for array in made]


def make_pixels(recipe: ViewRecipe) -> Embed:
    """A function (n, H, W, C) uint8 images -> (n, pixels): what there is to beat.

    The images as they reach the network, those above 32 x 32 pixels resized to that.
    """
    view = recipe.views[0]
    small = dataclasses.replace(view, size=min(view.size, 32))
    as_seen = jax.jit(lambda images: evaluation_view(images, ViewRecipe((small,))))
    return lambda images: Features(np.asarray(as_seen(images)).reshape(len(images), -1))
