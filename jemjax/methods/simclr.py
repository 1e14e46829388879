"""SimCLR: two views of an image attract, and everything else in the batch repels.

Collapse is prevented by the negatives: equal embeddings have the loss 2 ln(2N - 1), and
from nearly equal ones a step widens their spread, since the softmax pushes each
embedding away from the mean of all others and toward its partner only.

Chen, Kornblith, Norouzi, Hinton, 2020, SimCLR (arXiv:2002.05709).
"""

import dataclasses
import math
from typing import ClassVar

from flax import linen as nn

from jemjax import losses
from jemjax.augment import ViewRecipe, simclr_imagenet, simclr_small
from jemjax.methods.base import (
    SMALL_IMAGE,
    Defaults,
    Method,
    Optimization,
    both_ways,
    small_images,
)
from jemjax.models import MLPHead


@dataclasses.dataclass(frozen=True)
class SimCLR(Method):
    """SimCLR's hyper-parameters, with the published defaults."""

    name: ClassVar[str] = "simclr"
    collapse_hint: ClassVar[str] = (
        "lower --temperature or --optimizer.learning-rate, or raise --batch-size: "
        "each image needs negatives"
    )
    views_together: ClassVar[bool] = True

    temperature: float | None = None
    """of the softmax over the batch"""

    # What are the views of an image? Two, drawn alike, with strong changes of color.
    def views(self, image_size: int) -> ViewRecipe:
        """The published pair, or its CIFAR form at half the strength, without blur."""
        if image_size <= SMALL_IMAGE:
            return simclr_small(image_size)
        return simclr_imagenet(image_size)

    # What embeds a view? A projector that ends in a normalization without offset.
    def make_projector(self, widths: tuple[int, ...]) -> nn.Module:
        """Linear without bias and BatchNorm, ReLU between them."""
        return MLPHead(
            widths, hidden_bias=False, output_bias=False, output_norm="scale"
        )

    # What is the other branch? The same network with the same weights, and gradients
    # through both. What compares the branches? This loss, which remembers nothing.
    def loss(self, online, target=None, memory=None, *, axis_name=None):
        """The sum of the two views' means, as in the official code: twice NT-Xent."""
        temperature = self.temperature
        assert temperature is not None
        mean = both_ways(
            lambda x, y: losses.nt_xent(
                x, y, temperature=temperature, axis_name=axis_name
            ),
            online,
            target,
        )
        return 2.0 * mean, {}

    def collapsed_loss(self, batch_size, width):
        """2 ln(2N - 1): the partner is as near as all others."""
        return 2 * math.log(2 * batch_size - 1)

    def defaults(self, image_size: int) -> Defaults:
        """1000 epochs of ResNet-50 with LARS, or a network that laptops train."""
        if image_size <= SMALL_IMAGE:
            return small_images({"projector": (512, 512, 128), "temperature": 0.5})
        return Defaults(
            backbone="resnet50",
            batch_size=4096,
            epochs=1000,
            optimization=Optimization("lars-simclr", 0.3, 1e-4, 10.0, 0.0),
            hyper={"projector": (2048, 2048, 128), "temperature": 0.1},
        )
