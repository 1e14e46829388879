"""Residual networks, the backbones of the published results, and a narrow one.

He, Zhang, Ren, Sun, 2016, Deep residual learning (arXiv:1512.03385), with the stride of
a bottleneck on its 3 x 3 convolution. The last normalization of each block starts at
zero (Goyal et al., 2017, arXiv:1706.02677), which suits deep networks and long runs;
the narrow network has three blocks, which have to work from the first step on.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jemjax._kernels.winograd import convolve

Stem = Literal["imagenet", "small", "patch"]

# Two-pass statistics: the one-pass variance loses its digits where the mean is large.
BatchNorm = functools.partial(
    nn.BatchNorm,
    momentum=0.9,
    epsilon=1e-5,
    use_fast_variance=False,
    force_float32_reductions=True,
)
Convolution = functools.partial(
    nn.Conv,
    use_bias=False,
    conv_general_dilated=convolve,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
)


def _last_scale(zero_init: bool) -> nn.initializers.Initializer:
    """Of a block's last normalization: with zeros a block begins as its shortcut."""
    return nn.initializers.zeros if zero_init else nn.initializers.ones


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    width: int
    stride: int
    dtype: Any
    zero_init: bool = True
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, H / stride, W / stride, width)."""
        convolution = functools.partial(Convolution, dtype=self.dtype)
        norm = functools.partial(
            BatchNorm, use_running_average=not train, dtype=self.dtype
        )
        y = convolution(self.width, (3, 3), self.stride, padding=1)(x)
        y = nn.relu(norm()(y))
        y = convolution(self.width, (3, 3), padding=1)(y)
        y = norm(scale_init=_last_scale(self.zero_init))(y)
        if x.shape != y.shape:
            x = norm()(convolution(self.width, (1, 1), self.stride, padding=0)(x))
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; output 4 times as wide."""

    width: int
    stride: int
    dtype: Any
    zero_init: bool = True
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, H / stride, W / stride, 4 width)."""
        convolution = functools.partial(Convolution, dtype=self.dtype)
        norm = functools.partial(
            BatchNorm, use_running_average=not train, dtype=self.dtype
        )
        y = nn.relu(norm()(convolution(self.width, (1, 1), padding=0)(x)))
        y = convolution(self.width, (3, 3), self.stride, padding=1)(y)
        y = nn.relu(norm()(y))
        y = convolution(4 * self.width, (1, 1), padding=0)(y)
        y = norm(scale_init=_last_scale(self.zero_init))(y)
        if x.shape != y.shape:
            x = norm()(convolution(4 * self.width, (1, 1), self.stride, padding=0)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network without its classifier.

    Attributes:
        stage_sizes: number of blocks of each stage; every stage after the first halves
            the resolution and doubles the width.
        block: `BasicBlock` or `Bottleneck`.
        width: of the first stage.
        stem: what comes before the stages. "imagenet": 7 x 7 convolution of stride 2
            and max pooling; "small": 3 x 3 convolution of stride 1; "patch":
            convolution of 2 x 2 patches, which halves the resolution at once.
        zero_init: whether each block begins as its shortcut.
        dtype: of the activations; parameters and statistics are float32.
    """

    stage_sizes: tuple[int, ...]
    block: Callable[..., nn.Module]
    width: int = 64
    stem: Stem = "imagenet"
    zero_init: bool = True
    dtype: Any = jnp.float32

    @property
    def num_features(self) -> int:
        """Width of the output."""
        last = self.width * 2 ** (len(self.stage_sizes) - 1)
        return last * self.block.expansion  # type: ignore[attr-defined]

    def grid(self, image_size: int) -> int:
        """Positions in a row, and in a column, of the output for such images."""
        size = image_size // 2 if self.stem == "patch" else image_size
        stride = 2 ** (len(self.stage_sizes) - 1) * (
            4 if self.stem == "imagenet" else 1
        )
        return -(-size // stride)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) normalized images -> (N, num_features) float32 features."""
        x = self._positions(images, train)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))  # (N, num_features)

    def tokens(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """The output before its mean, as a transformer's tokens and its only layer.

        Args:
            images: (N, H, W, C) normalized images.
            train: whether normalization uses the batch's statistics.

        Returns:
            (N, T, num_features) float32, one for each position, and the same as
            (1, N, T, num_features).
        """
        x = self._positions(images, train).astype(jnp.float32)
        x = x.reshape(len(x), -1, x.shape[-1])  # (N, T, num_features)
        return x, x[None]

    @nn.compact
    def _positions(self, images: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, grid, grid, num_features)."""
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images: got {images.dtype} of shape {images.shape}, expected floating"
                " point of shape (N, H, W, C)"
            )
        x = images.astype(self.dtype)
        convolution = functools.partial(Convolution, dtype=self.dtype)
        if self.stem == "imagenet":
            x = convolution(self.width, (7, 7), 2, padding=3)(x)
        elif self.stem == "small":
            x = convolution(self.width, (3, 3), padding=1)(x)
        elif self.stem == "patch":
            x = convolution(self.width, (2, 2), 2, padding=0)(x)
        else:
            raise ValueError(
                f'stem: got {self.stem!r}, expected "imagenet", "small" or "patch"'
            )
        x = nn.relu(BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
        if self.stem == "imagenet":
            padding: Any = ((1, 1), (1, 1))  # flax allows it but declares a string
            x = nn.max_pool(x, (3, 3), (2, 2), padding=padding)
        for stage, blocks in enumerate(self.stage_sizes):
            for index in range(blocks):
                x = self.block(
                    width=self.width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    zero_init=self.zero_init,
                    dtype=self.dtype,
                )(x, train=train)
        return x


resnet18 = functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
resnet34 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
resnet50 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck)
# Trains in minutes on two cores: half the resolution at once, and one block a stage.
resnet_narrow = functools.partial(
    ResNet,
    stage_sizes=(1, 1, 1),
    block=BasicBlock,
    width=32,
    stem="patch",
    zero_init=False,
)
