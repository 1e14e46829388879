"""MoCo v2: contrast with a long queue of keys, which a slow copy of the network made.

Collapse is prevented by the negatives, as in SimCLR: equal embeddings have the loss
ln(1 + queue length), and a step from nearly equal ones pushes each query away from the
mean of the queue, so their spread widens. The queue makes the number of negatives
independent of the batch; the moving average keeps its keys, of many past steps,
consistent with one another.

Keys of one batch share their batch statistics with the queries, which those of the
queue do not. The official code hides that by shuffling examples between devices, each
of which normalizes its own; here statistics are those of the global batch, so no
example of a batch is recognized by its device's, and nothing is shuffled.

Chen, Fan, Girshick, He, 2020, MoCo v2 (arXiv:2003.04297); He et al., 2020
(arXiv:1911.05722).
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jemjax import losses
from jemjax.augment import ViewRecipe, moco_imagenet, moco_small
from jemjax.methods.base import (
    SMALL_IMAGE,
    Defaults,
    Method,
    Optimization,
    Target,
    queue_problems,
    small_images,
)
from jemjax.models import MLPHead, normalize_rows


@dataclasses.dataclass(frozen=True)
class MoCo(Method):
    """MoCo v2's hyper-parameters, with the published defaults."""

    name: ClassVar[str] = "moco"
    collapse_hint: ClassVar[str] = (
        "lower --temperature or --optimizer.learning-rate; or raise --target-momentum,"
        " so that the keys of the queue stay consistent; or normalize the projector"
        " with --head-norm batch"
    )
    # The first view is the query, the second the key.
    online_views: ClassVar[tuple[int, ...]] = (0,)
    target_views: ClassVar[tuple[int, ...]] = (1,)

    target: Target = "momentum"
    temperature: float = 0.2
    """of the softmax over the queue"""
    queue_length: int | None = None
    """keys that are remembered, a multiple of the batch"""
    head_norm: Literal["batch", "none"] | None = None
    """normalization after the projector's hidden layer"""

    # What are the views of an image? Two, drawn alike.
    def views(self, image_size: int) -> ViewRecipe:
        """MoCo v2's symmetric pair, or its CIFAR form without blur."""
        if image_size <= SMALL_IMAGE:
            return moco_small(image_size)
        return moco_imagenet(image_size)

    # What embeds a view? A projector of two layers, as published without normalization.
    # Without it features that have much in common, as a transformer's do at first,
    # would leave all keys of the queue in one direction.
    def make_projector(self, widths: tuple[int, ...]) -> nn.Module:
        """Linear, maybe BatchNorm, ReLU, Linear."""
        assert self.head_norm is not None
        return MLPHead(widths, hidden_norm=self.head_norm == "batch")

    # What is the other branch? A moving average, of constant momentum.

    # What compares the branches? The query's key against those of the queue.
    def loss(self, online, target=None, memory=None, *, axis_name=None):
        """Cross-entropy of the key among all keys of the queue."""
        assert memory is not None and target is not None
        (query,), (key,) = online, target
        return losses.info_nce(
            query,
            key,
            memory["queue"],
            temperature=self.temperature,
            stop_gradient=self.stop_gradient,
            axis_name=axis_name,
        ), {}

    def collapsed_loss(self, batch_size, width):
        """ln(1 + queue length): the key is as near as all others."""
        return math.log(1 + (self.queue_length or 0))

    # What does the loss remember? The last keys, overwritten from the oldest on.
    def init_loss_state(self, key, outputs):
        """Random keys of unit length."""
        assert self.queue_length is not None
        shape = (self.queue_length, outputs.embedding.shape[1])
        return {"queue": normalize_rows(jax.random.normal(key, shape, jnp.float32))}

    def remember(self, loss_state, progress, online, target):
        """The batch's keys take the place of the oldest."""
        keys = normalize_rows(target[0].target.astype(jnp.float32))
        queue, count = loss_state["queue"], keys.shape[0]
        start = progress.step % (queue.shape[0] // count) * count
        return {"queue": lax.dynamic_update_slice_in_dim(queue, keys, start, axis=0)}

    def problems(self, batch_size):
        """What is wrong with the fields' values, each in a sentence."""
        problems = super().problems(batch_size)
        if self.queue_length == 0:
            problems.append(
                "--queue-length: got 0, expected some; moco-v3 has no queue"
            )
        return problems + queue_problems(self.queue_length, batch_size)

    def resolve(self, image_size, batch_size, examples):
        """A momentum that is given alone is constant, as the published one."""
        method = self
        if self.final_target_momentum is None and self.target_momentum is not None:
            method = dataclasses.replace(
                self, final_target_momentum=self.target_momentum
            )
        return super(MoCo, method).resolve(image_size, batch_size, examples)

    def defaults(self, image_size: int) -> Defaults:
        """200 epochs of ResNet-50 with SGD, or a network that laptops train."""
        if image_size <= SMALL_IMAGE:
            return small_images(
                {
                    "projector": (512, 128),
                    "queue_length": 4096,
                    "head_norm": "batch",
                    "target_momentum": 0.99,
                    "final_target_momentum": 0.99,
                }
            )
        return Defaults(
            backbone="resnet50",
            batch_size=256,
            epochs=200,
            optimization=Optimization(
                "sgd", 0.03, 1e-4, 0.0, 0.0, schedule="epochs", decay_all=True
            ),
            hyper={
                "projector": (2048, 128),
                "queue_length": 65536,
                "head_norm": "none",
                "target_momentum": 0.999,
                "final_target_momentum": 0.999,
            },
        )
