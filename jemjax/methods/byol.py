"""BYOL: predict what a slow copy of yourself says of the other view.

Nothing in the loss prevents collapse: a constant embedding has the smallest value, 0.
From nearly equal embeddings a step does not widen their spread; each prediction moves
toward its target, and no embedding is pushed from another's. What keeps the spread is
outside of the loss: the target is a moving average that lags behind, so a constant has
to be learned from targets that are not yet constant, and the predictor, with its batch
normalization, has time to learn what they have in common.

Grill, Strub, Altché et al., 2020, BYOL (arXiv:2006.07733).
"""

import dataclasses
from typing import ClassVar

from jemjax import losses
from jemjax.augment import ViewRecipe, byol_imagenet, byol_small
from jemjax.methods.base import (
    SMALL_IMAGE,
    Defaults,
    Method,
    Optimization,
    Target,
    both_ways,
    small_images,
)


@dataclasses.dataclass(frozen=True)
class BYOL(Method):
    """BYOL's hyper-parameters, with the published defaults."""

    name: ClassVar[str] = "byol"
    collapse_hint: ClassVar[str] = (
        "keep --predictor and --target momentum, raise --target-momentum, or lower "
        "--optimizer.learning-rate"
    )
    own_target_init: ClassVar[bool] = True

    target: Target = "momentum"

    # What are the views of an image? Its own asymmetric pair.
    def views(self, image_size: int) -> ViewRecipe:
        """One view is always blurred, the other sometimes solarized."""
        if image_size <= SMALL_IMAGE:
            return byol_small(image_size)
        return byol_imagenet(image_size)

    # What embeds a view? Projector and predictor are of one kind, that of every method:
    # Linear, BatchNorm, ReLU, Linear without bias. The predictor is asymmetric: only
    # the online branch has it.

    # What is the other branch? A moving average of the parameters, with momentum from
    # 0.996 to 1 in a cosine, and with batch statistics of its own.

    # What compares the branches? This loss, which remembers nothing.
    def loss(self, online, target=None, memory=None, *, axis_name=None):
        """The sum of both directions, each 2 - 2 cos: in [0, 8], not halved."""
        mean = both_ways(
            lambda prediction, projection: losses.byol(
                prediction,
                projection,
                stop_gradient=self.stop_gradient,
                axis_name=axis_name,
            ),
            online,
            target,
        )
        return 2.0 * mean, {}

    def collapsed_loss(self, batch_size, width):
        """0: a constant predicts a constant."""
        return 0.0

    def defaults(self, image_size: int) -> Defaults:
        """1000 epochs of ResNet-50 with LARS, or a network that laptops train."""
        if image_size <= SMALL_IMAGE:
            return small_images(
                {
                    "projector": (1024, 256),
                    "predictor": (1024,),
                    "target_momentum": 0.99,
                }
            )
        return Defaults(
            backbone="resnet50",
            batch_size=4096,
            epochs=1000,
            optimization=Optimization("lars", 0.2, 1.5e-6, 10.0, 0.0),
            hyper={
                "projector": (4096, 256),
                "predictor": (4096,),
                "target_momentum": 0.996,
            },
        )
