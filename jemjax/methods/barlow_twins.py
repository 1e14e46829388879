"""Barlow Twins: the views' cross-correlation matrix is driven to the identity.

Ones on the diagonal make the views agree; zeros off it make each dimension say what the
others do not. Correlations are those of standardized dimensions, so a constant one,
whatever the others are, costs its whole diagonal term.

From nearly equal embeddings a step widens their spread in the directions in which the
two views agree: correlation does not see how small the spread is, but the gradient of
a standardized dimension grows as its spread shrinks, down to sqrt(eps).

Zbontar, Jing, Misra, LeCun, Deny, 2021, Barlow Twins (arXiv:2103.03230).
"""

import dataclasses
from typing import ClassVar

from flax import linen as nn

from jemjax import losses
from jemjax.augment import ViewRecipe, byol_small, vicreg_imagenet
from jemjax.losses.checks import check_number
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
class BarlowTwins(Method):
    """Barlow Twins' hyper-parameters, with the published defaults."""

    name: ClassVar[str] = "barlow-twins"
    collapse_hint: ClassVar[str] = (
        "lower --optimizer.learning-rate, or raise --batch-size: the correlations of "
        "a small batch are noise"
    )

    off_diagonal_weight: float = 0.0051
    """weight of the squared correlations between dimensions"""
    eps: float = 1e-5
    """added to the variance when dimensions are standardized"""

    # What are the views of an image? The pair that VICReg has too.
    def views(self, image_size: int) -> ViewRecipe:
        """BYOL's asymmetric pair, or the published CIFAR form."""
        if image_size <= SMALL_IMAGE:
            return byol_small(image_size)
        return vicreg_imagenet(image_size)

    # What embeds a view? A wide projector without biases.
    def make_projector(self, widths: tuple[int, ...]) -> nn.Module:
        """Linear, BatchNorm, ReLU, and a last Linear; the loss standardizes itself."""
        return MLPHead(widths, hidden_bias=False, output_bias=False)

    # What is the other branch? The same network with the same weights, and gradients
    # through both. What compares the branches? This loss, which remembers nothing.
    def loss(self, online, target=None, memory=None, *, axis_name=None):
        """The plain sum over the matrix, without a division by D, as published."""
        check_number("off_diagonal_weight", self.off_diagonal_weight)
        terms = both_ways(
            lambda x, y: losses.barlow_twins_terms(
                x, y, eps=self.eps, axis_name=axis_name
            ),
            online,
            target,
        )
        loss = terms.on_diagonal + self.off_diagonal_weight * terms.off_diagonal
        return loss, terms._asdict()

    def collapsed_loss(self, batch_size, width):
        """D: no dimension of one view is correlated with itself in the other."""
        return float(width)

    def defaults(self, image_size: int) -> Defaults:
        """1000 epochs of ResNet-50 with LARS, biases at a rate of their own."""
        if image_size <= SMALL_IMAGE:
            return small_images({"projector": (512, 512, 512)})
        return Defaults(
            backbone="resnet50",
            batch_size=2048,
            epochs=1000,
            optimization=Optimization(
                "lars", 0.2, 1e-6, 10.0, 1e-3, bias_rate=0.0048 / 0.2
            ),
            hyper={"projector": (8192, 8192, 8192)},
        )
