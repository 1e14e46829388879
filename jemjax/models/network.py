"""A backbone and the head behind it, as one module."""

import jax
from flax import linen as nn


class JointEmbedding(nn.Module):
    """Embeds views: the backbone gives features, the projector the loss's embeddings.

    Attributes:
        backbone: (N, H, W, C) images -> (N, features).
        projector: (N, features) -> (N, D).
    """

    backbone: nn.Module
    projector: nn.Module

    def __call__(
        self, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """(N, H, W, C) images -> (N, features) features, (N, D) embeddings."""
        features = self.backbone(images, train=train)
        return features, self.projector(features, train=train)

    def features(self, images: jax.Array) -> jax.Array:
        """(N, H, W, C) images -> (N, features), in evaluation mode: what is kept."""
        return self.backbone(images, train=False)
