"""SwAV: predict the cluster of one view from another, with clusters of equal size.

Collapse to one cluster is prevented by the assignment: Sinkhorn-Knopp gives each
prototype an equal share of the batch, whatever the scores are. From nearly equal scores
a step widens their spread: the assignments answer to differences at epsilon, which is
sharper than the temperature of the prediction that follows them. If all embeddings are
the same, no balanced assignment can tell them apart, and the loss is
logsumexp(s / T) - mean(s) / T of their scores s: ln K once those are equal too.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, 2020, SwAV (arXiv:2006.09882).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jemjax.augment import ViewRecipe, swav_imagenet, swav_small
from jemjax.losses.clustering import assign, swapped_cross_entropy
from jemjax.methods.base import (
    SMALL_IMAGE,
    Defaults,
    Method,
    Optimization,
    Target,
    perplexity_of_clusters,
    queue_problems,
    small_images,
)
from jemjax.models import MLPHead, Prototypes, normalize_rows


@dataclasses.dataclass(frozen=True)
class SwAV(Method):
    """SwAV's hyper-parameters, with the published defaults for a batch of 256."""

    name: ClassVar[str] = "swav"
    collapse_hint: ClassVar[str] = (
        "sharpen the assignments (--epsilon 0.03, or less), take fewer --num-"
        "prototypes than there are images in a batch and its queue, or lower "
        "--optimizer.learning-rate"
    )
    views_together: ClassVar[bool] = True
    recall_axes: ClassVar[Mapping[str, int]] = {"queue_scores": 1}

    target: Target = "stop-gradient"
    num_prototypes: int | None = None
    """number of clusters"""
    temperature: float = 0.1
    """of the predicted clusters"""
    epsilon: float | None = None
    """of the assigned clusters: the smaller, the sharper"""
    num_iterations: int = 3
    """of Sinkhorn-Knopp, each of which balances the clusters"""
    queue_length: int | None = None
    """earlier embeddings that are assigned with the batch, a multiple of it; 0: none"""
    queue_start: int | None = None
    """epochs before the queue is used"""
    freeze_prototypes: float = 1.0
    """epochs in which the prototypes are not trained"""
    local_views: int | None = None
    """number of small views beside the two large ones"""

    # What are the views of an image? Two large crops, and small ones of small parts.
    def views(self, image_size: int) -> ViewRecipe:
        """The published multi-crop, or two views of small images."""
        assert self.local_views is not None
        if image_size <= SMALL_IMAGE:
            return swav_small(image_size, num_local=self.local_views)
        return swav_imagenet(image_size, num_local=self.local_views)

    # What embeds a view? A projector, and the cosine to each prototype.
    def make_projector(self, widths: tuple[int, ...]) -> nn.Module:
        """Linear, BatchNorm, ReLU, Linear."""
        return MLPHead(widths)

    def make_prototypes(self) -> nn.Module:
        """Unit vectors; normalizing them has no gradient, as published."""
        assert self.num_prototypes is not None
        return Prototypes(self.num_prototypes, normalization="straight-through")

    def constrain(self, params):
        """The prototypes are brought back to unit length after each update."""
        kernel = normalize_rows(params["prototypes"]["kernel"])
        return {**params, "prototypes": {**params["prototypes"], "kernel": kernel}}

    def frozen_epochs(self):
        """The prototypes stand still at first."""
        return {"prototypes": self.freeze_prototypes}

    # What is the other branch? The same network, as a constant: its scores are balanced
    # over the batch to assignments.

    # What compares the branches? The two large views' assignments, and every other
    # view's prediction of them.
    def loss(self, online, target=None, memory=None, *, axis_name=None):
        """The mean cross-entropy over the pairs, with soft assignments."""
        memory, epsilon = memory or {}, self.epsilon
        assert epsilon is not None
        scores = jnp.stack(online)  # (V, N, K)
        balanced = jnp.stack((target or online)[:2])  # (2, N, K)

        def assignments(queue_scores):
            return assign(
                balanced,
                queue_scores,
                epsilon=epsilon,
                num_iterations=self.num_iterations,
                axis_name=axis_name,
            )

        if "queue_scores" in memory:
            assigned = lax.cond(
                memory["queue_is_used"],
                lambda: assignments(memory["queue_scores"]),
                lambda: assignments(None),
            )
        else:
            assigned = assignments(None)
        loss = swapped_cross_entropy(
            scores, assigned, temperature=self.temperature, axis_name=axis_name
        )
        return loss, {"prototypes": perplexity_of_clusters(scores[0], axis_name)}

    def collapsed_loss(self, batch_size, width):
        """The loss is ln K: every cluster is as likely."""
        return math.log(self.num_prototypes or 1)

    # What does the loss remember? The embeddings of the last batches, of each large
    # view, scored by the present prototypes.
    def init_loss_state(self, key, outputs):
        """Zeros, by which it is seen how much of the queue is filled."""
        assert self.queue_length is not None
        if not self.queue_length:
            return {}
        width = outputs.embedding.shape[1]
        return {"queue": jnp.zeros((2, self.queue_length, width), jnp.float32)}

    def recall(self, loss_state, progress, scores):
        """The queue's scores, and whether it is full, so that they count."""
        if not loss_state:
            return {}
        queue = loss_state["queue"]
        return {
            "queue_scores": scores(queue),
            "queue_is_used": jnp.any(queue[:, -1] != 0),
        }

    def remember(self, loss_state, progress, online, target):
        """New embeddings come first, and the oldest fall out at the end."""
        if not loss_state:
            return {}
        assert self.queue_start is not None
        queue = loss_state["queue"]
        new = jnp.stack([normalize_rows(outputs.embedding) for outputs in target[:2]])
        moved = jnp.concatenate([new, queue[:, : -new.shape[1]]], axis=1)  # (2, L, D)
        return {"queue": jnp.where(progress.epoch >= self.queue_start, moved, queue)}

    def problems(self, batch_size):
        """What is wrong with the fields' values, each in a sentence."""
        problems = super().problems(batch_size)
        return problems + queue_problems(self.queue_length, batch_size)

    def defaults(self, image_size: int) -> Defaults:
        """200 epochs of ResNet-50 with LARC, or a network that laptops train."""
        if image_size <= SMALL_IMAGE:
            return small_images(
                {
                    "projector": (512, 128),
                    "num_prototypes": 100,  # fewer than a batch, which they share
                    "queue_length": 1920,
                    "queue_start": 2,
                    "local_views": 0,
                    # At 0.05 a short run stays at ln K, where clusters are all alike.
                    "epsilon": 0.03,
                }
            )
        return Defaults(
            backbone="resnet50",
            batch_size=256,
            epochs=200,
            optimization=Optimization(
                "larc", 0.6, 1e-6, 0.0, 1e-3, schedule="linspace"
            ),
            hyper={
                "projector": (2048, 128),
                "num_prototypes": 3000,
                "queue_length": 3840,
                "queue_start": 15,
                "local_views": 6,
                "epsilon": 0.05,
            },
        )
