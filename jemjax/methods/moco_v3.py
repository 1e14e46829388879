"""MoCo v3: contrast within the batch, with a predictor and a moving-average target.

The negatives are the other images' keys of the same batch, so there is no queue, and
the loss is that of both directions. As in SimCLR a step from nearly equal embeddings
widens their spread, and equal ones have the loss 4 T ln N.

Chen, Xie, He, 2021, MoCo v3 (arXiv:2104.02057).
"""

import dataclasses
import math
from typing import ClassVar

from flax import linen as nn

from jemjax import losses
from jemjax.augment import ViewRecipe, byol_small, mocov3_imagenet
from jemjax.methods.base import (
    SMALL_IMAGE,
    Defaults,
    Method,
    Optimization,
    Progress,
    Target,
    both_ways,
    small_images,
)
from jemjax.models import MLPHead, ViT


@dataclasses.dataclass(frozen=True)
class MoCoV3(Method):
    """MoCo v3's hyper-parameters, with the published defaults."""

    name: ClassVar[str] = "moco-v3"
    collapse_hint: ClassVar[str] = (
        "lower --optimizer.learning-rate, or raise --batch-size: each image needs "
        "negatives"
    )
    # A transformer's patches are embedded by the random projection it starts with,
    # which makes its training stable.
    frozen: ClassVar[tuple[str, ...]] = ("backbone/patch_embedding",)

    target: Target = "momentum"
    temperature: float = 0.2
    """of the softmax over the batch; published for ResNets: 1"""

    # What are the views of an image? BYOL's asymmetric pair.
    def views(self, image_size: int) -> ViewRecipe:
        """One view is always blurred, the other sometimes solarized."""
        if image_size <= SMALL_IMAGE:
            return byol_small(image_size)
        return mocov3_imagenet(image_size, smallest_crop=0.08)

    # What embeds a view? Projector and predictor without biases, each ending in a plain
    # normalization.
    def make_projector(self, widths: tuple[int, ...]) -> nn.Module:
        """Linear and BatchNorm, ReLU between them; the last norm without affine."""
        return MLPHead(
            widths, hidden_bias=False, output_bias=False, output_norm="plain"
        )

    def make_predictor(self, widths: tuple[int, ...], backbone: nn.Module) -> nn.Module:
        """As the projector, but for convolutional networks without the last norm."""
        return MLPHead(
            widths,
            hidden_bias=False,
            output_bias=False,
            output_norm="plain" if isinstance(backbone, ViT) else None,
        )

    # What is the other branch? A moving average, with momentum from 0.99 to 1, which is
    # updated before it is used: with the next step's momentum after this one.
    def momentum(self, progress: Progress):
        """The momentum of the step that follows."""
        return super().momentum(progress._replace(step=progress.step + 1))

    # What compares the branches? This loss, which remembers nothing.
    def loss(self, online, target=None, memory=None, *, axis_name=None):
        """2 T times InfoNCE, summed over both directions, as published."""
        mean = both_ways(
            lambda query, key: losses.info_nce(
                query,
                key,
                temperature=self.temperature,
                stop_gradient=self.stop_gradient,
                axis_name=axis_name,
            ),
            online,
            # A query and a key play different parts, also where both are one branch.
            target or online,
        )
        return 4.0 * self.temperature * mean, {}

    def collapsed_loss(self, batch_size, width):
        """4 T ln N: the key is as near as all others of the batch."""
        return 4 * self.temperature * math.log(batch_size)

    def defaults(self, image_size: int) -> Defaults:
        """300 epochs of ViT-S/16 with AdamW, or a network that laptops train."""
        if image_size <= SMALL_IMAGE:
            return small_images(
                {
                    "projector": (512, 128),
                    "predictor": (512,),
                    "target_momentum": 0.99,
                }
            )
        return Defaults(
            backbone="vit-small",
            batch_size=4096,
            epochs=300,
            optimization=Optimization("adamw", 1.5e-4, 0.1, 40.0, 0.0, decay_all=True),
            hyper={
                "projector": (4096, 4096, 256),
                "predictor": (4096,),
                "target_momentum": 0.99,
            },
        )
