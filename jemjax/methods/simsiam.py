"""SimSiam: BYOL without the moving average; the target is the network itself, stopped.

The loss is as blind to collapse as BYOL's: a constant embedding has the smallest
value, -1, and from nearly equal embeddings a step does not widen their spread. It does
not collapse because no gradient flows into the target: the predictor then learns the
mean over views of an image, and the network follows it, as two alternating problems.
With `--target shared` gradients flow through both, and the embeddings collapse: not to
a point, which the projector's last normalization rules out, but to a line.

Chen, He, 2021, SimSiam (arXiv:2011.10566).
"""

import dataclasses
from typing import ClassVar

from flax import linen as nn

from jemjax import losses
from jemjax.augment import ViewRecipe, moco_imagenet, moco_small
from jemjax.methods.base import (
    SMALL_IMAGE,
    Defaults,
    Method,
    Optimization,
    Target,
    both_ways,
    small_images,
)
from jemjax.models import MLPHead


@dataclasses.dataclass(frozen=True)
class SimSiam(Method):
    """SimSiam's hyper-parameters, with the published defaults."""

    name: ClassVar[str] = "simsiam"
    collapse_hint: ClassVar[str] = (
        "keep --predictor and --target stop-gradient, or lower --optimizer.learning-"
        "rate"
    )
    # The predictor keeps its learning rate, so that it stays ahead of what it predicts.
    constant_rate: ClassVar[tuple[str, ...]] = ("predictor",)

    target: Target = "stop-gradient"

    # What are the views of an image? MoCo v2's symmetric pair.
    def views(self, image_size: int) -> ViewRecipe:
        """Two views drawn alike, each blurred half of the time."""
        return (
            moco_small(image_size)
            if image_size <= SMALL_IMAGE
            else moco_imagenet(image_size)
        )

    # What embeds a view? A projector that ends in a plain normalization, so that no
    # dimension is constant over a batch, and a predictor with a bottleneck.
    def make_projector(self, widths: tuple[int, ...]) -> nn.Module:
        """Linear, BatchNorm, ReLU, and a last Linear and BatchNorm without affine."""
        return MLPHead(
            widths, hidden_bias=False, output_bias=False, output_norm="plain"
        )

    def make_predictor(self, widths: tuple[int, ...], backbone: nn.Module) -> nn.Module:
        """Linear, BatchNorm, ReLU, Linear with bias."""
        return MLPHead(widths, hidden_bias=False)

    # What is the other branch? The same network, as a constant.

    # What compares the branches? This loss, which remembers nothing.
    def loss(self, online, target=None, memory=None, *, axis_name=None):
        """The mean of both directions of the negative cosine: in [-1, 1]."""
        return both_ways(
            lambda prediction, projection: losses.negative_cosine(
                prediction,
                projection,
                stop_gradient=self.stop_gradient,
                axis_name=axis_name,
            ),
            online,
            target,
        ), {}

    def collapsed_loss(self, batch_size, width):
        """-1: a constant predicts a constant."""
        return -1.0

    def defaults(self, image_size: int) -> Defaults:
        """100 epochs of ResNet-50 with SGD, or a network that laptops train."""
        if image_size <= SMALL_IMAGE:
            return small_images({"projector": (512, 512, 512), "predictor": (128,)})
        return Defaults(
            backbone="resnet50",
            batch_size=512,
            epochs=100,
            optimization=Optimization(
                "sgd", 0.05, 1e-4, 0.0, 0.0, schedule="epochs", decay_all=True
            ),
            hyper={"projector": (2048, 2048, 2048), "predictor": (512,)},
        )
