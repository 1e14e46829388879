"""data2vec: from a masked image, predict what a slow copy makes of the whole.

There is one view, of which the online branch sees a part. What is predicted are not
pixels but the mean of the target's last layers at the masked patches, each of which
has seen the whole image.

Nothing in the loss prevents collapse: constant targets are predicted without error, and
from nearly equal outputs a step does not widen their spread. What keeps the targets
apart is outside: they are normalized, so that they cannot shrink; position embeddings
make patches differ from the start; and the moving average lags behind.

Baevski, Hsu, Xu, Babu, Gu, Auli, 2022, data2vec (arXiv:2202.03555).
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn

from jemjax import losses
from jemjax.augment import ViewRecipe, data2vec_imagenet, data2vec_small
from jemjax.methods.base import (
    SMALL_IMAGE,
    Defaults,
    Method,
    Optimization,
    Target,
    small_images,
)
from jemjax.models import MaskedPrediction, MLPHead

Normalization = Literal["layer", "instance", "none"]


@dataclasses.dataclass(frozen=True)
class Data2Vec(Method):
    """data2vec's hyper-parameters, with the defaults published for images."""

    name: ClassVar[str] = "data2vec"
    collapse_hint: ClassVar[str] = (
        "raise --target-momentum, predict more of the last layers (--top-layers), or "
        "lower --optimizer.learning-rate"
    )
    average_statistics: ClassVar[bool] = True
    # The class token has no loss, so it says nothing: patches are averaged instead.
    pooling: ClassVar[Literal["class", "mean"]] = "mean"

    target: Target = "momentum"
    target_schedule: Literal["cosine", "linear"] = "linear"
    top_layers: int | None = None
    """the target is the mean of so many of the last layers"""
    layer_normalization: Normalization = "layer"
    """of each layer before the mean: over dimensions, over patches, or none"""
    final_normalization: Normalization = "layer"
    """of the mean"""
    beta: float = 2.0
    """where the smooth L1 loss turns from a square to a line; 0: squares"""

    # What are the views of an image? One, of which blocks of patches are masked.
    def views(self, image_size: int) -> ViewRecipe:
        """One view with weak changes, 60 % of it masked by blocks."""
        if image_size <= SMALL_IMAGE:
            return data2vec_small(image_size)
        return data2vec_imagenet(image_size)

    # What embeds a view? The backbone, patch by patch; there is no projector, since the
    # backbone's own layers are what is predicted. The predictor is a linear layer.
    def make_predictor(self, widths: tuple[int, ...], backbone: nn.Module) -> nn.Module:
        """Linear, with GELU layers before it if there are any."""
        return MLPHead(
            widths, hidden_norm=False, activation="gelu", kernel_init="truncated_normal"
        )

    def network(self, backbone: nn.Module) -> nn.Module:
        """The backbone's patches, each with its prediction."""
        assert self.predictor is not None and self.top_layers is not None
        predictor = None
        if self.predictor != "none":
            width = backbone.num_features  # type: ignore[attr-defined]
            predictor = self.make_predictor((*self.predictor, width), backbone)
        return MaskedPrediction(backbone, predictor, self.top_layers)

    # What is the other branch? A moving average of the whole backbone, which sees the
    # whole view.

    # What compares the branches? The distance at the masked patches.
    def loss(self, online, target=None, memory=None, *, axis_name=None):
        """The mean smooth L1 over the masked patches and the dimensions."""
        if target is None:
            raise ValueError("target: got None, expected the layers of the whole view")
        if any(prediction.mask is None for prediction in online):
            raise ValueError(
                "mask: got none, expected one: what is masked is predicted"
            )
        total = 0.0
        for prediction, layers in zip(online, target, strict=True):
            targets = losses.data2vec_target(
                jnp.moveaxis(layers, 1, 0),  # (L, N, T, D)
                layer_normalization=_or_none(self.layer_normalization),
                final_normalization=_or_none(self.final_normalization),
                stop_gradient=self.stop_gradient,
            )
            total = total + losses.smooth_l1(
                prediction.tokens,
                targets,
                beta=self.beta,
                mask=prediction.mask,
                stop_gradient=self.stop_gradient,
                axis_name=axis_name,
            )
        return total / len(online), {}

    def collapsed_loss(self, batch_size, width):
        """0: what the target says of every patch is predicted without error."""
        return 0.0

    def problems(self, batch_size: int) -> list[str]:
        """What is wrong with the fields' values, each in a sentence."""
        problems = super().problems(batch_size)
        if self.top_layers is not None and self.top_layers < 1:
            problems.append(f"--top-layers: got {self.top_layers}, expected at least 1")
        if self.projector not in (None, "none"):
            problems.append(
                "--projector: data2vec predicts the backbone's own layers, so there is"
                " no place for one: leave it out"
            )
        return problems

    def defaults(self, image_size: int) -> Defaults:
        """800 epochs of ViT-B/16 with AdamW, or a network that laptops train."""
        if image_size <= SMALL_IMAGE:
            return small_images(
                {
                    "predictor": (),
                    "top_layers": 3,
                    "target_momentum": 0.99,
                    "final_target_momentum": 0.999,
                },
                backbone="vit-narrow",
            )
        return Defaults(
            backbone="vit-base",
            batch_size=2048,
            epochs=800,
            drop_path=0.25,
            layer_scale=1e-4,
            optimization=Optimization(
                "adamw", 2.5e-4, 0.05, 10.0, 0.0, clip_norm=3.0, clip_each=False
            ),
            hyper={
                "predictor": (),
                "top_layers": 6,
                "target_momentum": 0.9998,
                "final_target_momentum": 0.9998,
            },
        )


def _or_none(normalization: Normalization) -> Literal["layer", "instance"] | None:
    return None if normalization == "none" else normalization
