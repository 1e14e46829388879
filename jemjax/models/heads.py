"""Heads between the backbone and the loss."""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jemjax.models.resnet import BatchNorm


class MLPHead(nn.Module):
    """Linear layers with batch normalization and ReLU between them.

    Attributes:
        widths: of the layers, the last one of the output.
        hidden_bias: whether linear layers before the last have a bias.
        output_bias: whether the last linear layer has one.
        output_norm: batch normalization behind the last layer: None, "affine", or
            "plain" without scale and offset.
    """

    widths: Sequence[int]
    hidden_bias: bool = True
    output_bias: bool = True
    output_norm: Literal["affine", "plain"] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, features) -> (N, widths[-1]) float32."""
        x = x.astype(jnp.float32)
        norm = functools.partial(BatchNorm, use_running_average=not train)
        for width in self.widths[:-1]:
            x = nn.relu(norm()(nn.Dense(width, use_bias=self.hidden_bias)(x)))
        x = nn.Dense(self.widths[-1], use_bias=self.output_bias)(x)
        if self.output_norm is not None:
            affine = self.output_norm == "affine"
            x = norm(use_bias=affine, use_scale=affine)(x)
        return x


def expander(widths: Sequence[int]) -> MLPHead:
    """VICReg's expander: biases before each normalization, none on the output.

    Args:
        widths: of its layers; published: 8192, 8192, 8192.

    Returns:
        A module (N, features) -> (N, widths[-1]).

    Raises:
        ValueError: for no layers, or a width below 1.

    References:
        Bardes, Ponce, LeCun, 2022, VICReg (arXiv:2105.04906).
    """
    if not widths or min(widths) < 1:
        raise ValueError(
            f"widths: got {tuple(widths)}, expected one positive width a layer"
        )
    return MLPHead(tuple(widths), output_bias=False)
