"""VICReg: variance, invariance and covariance, and nothing asymmetric.

Collapse to a constant is prevented by asking that every dimension vary over the batch,
and informational collapse by asking that no two dimensions vary together.

From nearly equal embeddings a step widens their spread: the hinge on the standard
deviation pushes each embedding away from the batch's mean, with a force that does not
vanish until the spread is below sqrt(eps).

Bardes, Ponce, LeCun, 2022, VICReg (arXiv:2105.04906).
"""

import dataclasses
from typing import ClassVar

from flax import linen as nn

from jemjax import losses
from jemjax.augment import ViewRecipe, vicreg_imagenet, vicreg_small
from jemjax.losses.checks import check_number
from jemjax.methods.base import (
    SMALL_IMAGE,
    Defaults,
    Method,
    Optimization,
    both_ways,
    small_images,
)
from jemjax.models import expander


@dataclasses.dataclass(frozen=True)
class VICReg(Method):
    """VICReg's hyper-parameters, with the published defaults."""

    name: ClassVar[str] = "vicreg"
    collapse_hint: ClassVar[str] = (
        "raise --variance-weight, lower --optimizer.learning-rate, or see more images "
        "a step (--batch-size): the variance of a small batch says little"
    )

    invariance_weight: float = 25.0
    """weight of the mean squared distance between views"""
    variance_weight: float = 25.0
    """weight of the hinge on each dimension's standard deviation"""
    covariance_weight: float = 1.0
    """weight of the squared covariances between dimensions"""
    gamma: float = 1.0
    """standard deviation that the hinge asks for"""
    eps: float = 1e-4
    """added to the variance before its root"""

    # What are the views of an image? Two crops with color changes, drawn alike.
    def views(self, image_size: int) -> ViewRecipe:
        """BYOL's asymmetric pair, or the published CIFAR form."""
        if image_size <= SMALL_IMAGE:
            return vicreg_small(image_size)
        return vicreg_imagenet(image_size)

    # What embeds a view? The backbone, then an expander to many dimensions, in which
    # decorrelation also removes dependencies that are not linear in the features.
    def make_projector(self, widths: tuple[int, ...]) -> nn.Module:
        """The expander: Linear, BatchNorm, ReLU, and a last Linear without bias."""
        return expander(widths)

    # What is the other branch? The same network with the same weights, and gradients
    # through both. What compares the branches? This loss, which remembers nothing.
    def loss(self, online, target=None, memory=None, *, axis_name=None):
        """25 invariance + 25 variance + 1 covariance, with the published weights."""
        for name in ("invariance_weight", "variance_weight", "covariance_weight"):
            check_number(name, getattr(self, name))
        terms = both_ways(
            lambda x, y: losses.vicreg_terms(
                x, y, gamma=self.gamma, eps=self.eps, axis_name=axis_name
            ),
            online,
            target,
        )
        loss = (
            self.invariance_weight * terms.invariance
            + self.variance_weight * terms.variance
            + self.covariance_weight * terms.covariance
        )
        return loss, terms._asdict()

    def collapsed_loss(self, batch_size, width):
        """Its variance term's largest value: no dimension varies."""
        return self.variance_weight * max(0.0, self.gamma - self.eps**0.5)

    def defaults(self, image_size: int) -> Defaults:
        """100 epochs of ResNet-50 with LARS, or a network that laptops train."""
        if image_size <= SMALL_IMAGE:
            return small_images({"projector": (512, 512, 512)})
        return Defaults(
            backbone="resnet50",
            batch_size=512,
            epochs=100,
            optimization=Optimization("lars", 0.3, 1e-6, 10.0, 1e-3),
            hyper={"projector": (8192, 8192, 8192)},
        )
