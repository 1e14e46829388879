"""A backbone and the heads behind it, as one module."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jemjax.augment.masking import fill_masked
from jemjax.models.vit import ViT


class Outputs(NamedTuple):
    """What a network makes of a view, every array with the batch first."""

    features: jax.Array  # (N, features), behind the backbone
    embedding: jax.Array  # (N, D), behind the projector
    prediction: Any  # what the online branch is compared by: (N, D) or (N, K) scores
    target: Any  # what a target branch is compared by: the same without the predictor


class MaskedTokens(NamedTuple):
    """Predictions of patches, and which of them are of masked ones."""

    tokens: jax.Array  # (N, T, D)
    mask: jax.Array | None  # (N, T) bool


class JointEmbedding(nn.Module):
    """Embeds views: backbone, projector, and in the online branch the predictor.

    Attributes:
        backbone: (N, H, W, C) images -> (N, features).
        projector: (N, features) -> (N, D), or None.
        predictor: (N, D) -> (N, D), or None.
        prototypes: (N, D) -> (N, K) scores, or None.
    """

    backbone: nn.Module
    projector: nn.Module | None = None
    predictor: nn.Module | None = None
    prototypes: nn.Module | None = None

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        num_kept: int | None = None,
        drop_keys: jax.Array | None = None,
        predict: bool = True,
    ) -> Outputs:
        """Embeds a view.

        Args:
            images: (N, H, W, C).
            train: whether normalization uses the batch's statistics.
            mask: (N, T) bool, True where a patch is masked. Transformers replace its
                token; other backbones see the mean color there.
            num_kept: drop masked tokens instead, of which this many are left.
            drop_keys: (N,) keys, by which transformers drop branches of their blocks.
            predict: whether this is the online branch, which has the predictor.
        """
        features = self.embed(
            images, train=train, mask=mask, num_kept=num_kept, drop_keys=drop_keys
        )
        return self.heads(features, train=train, predict=predict)

    def heads(self, features: jax.Array, *, train: bool, predict: bool) -> Outputs:
        """(N, features) -> `Outputs`, with the predictor in the online branch."""
        embedding = features.astype(jnp.float32)
        if self.projector is not None:
            embedding = self.projector(features, train=train)
        target = self._scores(embedding)
        prediction = target
        if self.predictor is not None and predict:
            prediction = self._scores(self.predictor(embedding, train=train))
        return Outputs(features, embedding, prediction, target)

    def embed(
        self,
        images: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        num_kept: int | None = None,
        drop_keys: jax.Array | None = None,
    ) -> jax.Array:
        """(N, H, W, C) images -> (N, features), arguments as of `__call__`."""
        if isinstance(self.backbone, ViT):
            return self.backbone(
                images, train=train, mask=mask, num_kept=num_kept, drop_keys=drop_keys
            )
        if num_kept is not None:
            raise ValueError(
                "mask: patches can be left out by transformers only: convolutions need"
                " the whole image, in which masked patches have the mean color"
            )
        return self.backbone(_fill(images, mask), train=train)

    def _scores(self, embedding):
        return embedding if self.prototypes is None else self.prototypes(embedding)

    def scores(self, embedding: jax.Array) -> jax.Array:
        """(N, D) embeddings -> (N, K) scores by the prototypes."""
        return self._scores(embedding)


class MaskedPrediction(nn.Module):
    """Predicts the backbone's last layers, patch by patch, where patches are masked.

    Attributes:
        backbone: has `tokens`, which gives the patches of the output and of each layer.
        predictor: (..., width) -> (..., width), or None.
        top_layers: how many of the last layers are the target, if there are so many.
    """

    backbone: nn.Module
    predictor: nn.Module | None
    top_layers: int

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        num_kept: int | None = None,
        drop_keys: jax.Array | None = None,
        predict: bool = True,
    ) -> Outputs:
        """Embeds a view; arguments as of `JointEmbedding`.

        The prediction is `MaskedTokens`, the target the last layers, (N, L, T, D).
        """
        if num_kept is not None:
            raise ValueError(
                "mask: patches cannot be left out here, since it is they that are"
                " predicted"
            )
        backbone: Any = self.backbone
        if isinstance(backbone, ViT):
            tokens, layers = backbone.tokens(
                images, train=train, mask=mask, drop_keys=drop_keys
            )
        else:
            tokens, layers = backbone.tokens(_fill(images, mask), train=train)
        tokens = tokens.astype(jnp.float32)  # (N, T, D)
        features = jnp.mean(tokens, axis=1)
        if self.predictor is not None and predict:
            tokens = self.predictor(tokens, train=train)
        target = jnp.moveaxis(layers[-self.top_layers :], 0, 1)  # (N, L, T, D)
        return Outputs(features, features, MaskedTokens(tokens, mask), target)


def _fill(images: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return images
    side = math.isqrt(mask.shape[1])
    return fill_masked(images, mask, (side, side))
