"""Heads between the backbone and the loss."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jemjax.models.resnet import BatchNorm

# Learnable scale and offset of the normalization behind the last layer.
OUTPUT_NORMS = {
    "affine": {"use_scale": True, "use_bias": True},
    "scale": {"use_scale": True, "use_bias": False},
    "plain": {"use_scale": False, "use_bias": False},
}
ACTIVATIONS = {"relu": nn.relu, "gelu": functools.partial(nn.gelu, approximate=False)}
KERNEL_INITS = {
    # Uniform in +-1 / sqrt(fan_in), as torch begins linear layers: a third of the
    # variance of flax's, so that Adam turns such kernels faster.
    "uniform": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    "truncated_normal": nn.initializers.truncated_normal(0.02),
}


class MLPHead(nn.Module):
    """Linear layers with batch normalization and an activation between them.

    Attributes:
        widths: of the layers, the last one of the output.
        hidden_bias: whether linear layers before the last have a bias.
        output_bias: whether the last linear layer has one.
        hidden_norm: whether batch normalization follows layers before the last.
        output_norm: batch normalization behind the last layer: None, "affine", "scale"
            without offset, or "plain" without scale and offset.
        activation: "relu", or "gelu" with the error function.
        kernel_init: "uniform", torch's, of kernels and biases; or "truncated_normal",
            of kernels with a standard deviation of 0.02, with biases of 0.
    """

    widths: Sequence[int]
    hidden_bias: bool = True
    output_bias: bool = True
    hidden_norm: bool = True
    output_norm: Literal["affine", "scale", "plain"] | None = None
    activation: Literal["relu", "gelu"] = "relu"
    kernel_init: Literal["uniform", "truncated_normal"] = "uniform"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, features) -> (N, widths[-1]) float32."""
        _check_widths(self.widths)
        activation = _choose("activation", self.activation, ACTIVATIONS)
        kernel_init = _choose("kernel_init", self.kernel_init, KERNEL_INITS)

        def linear(x, width, *, use_bias):
            bias_init = nn.initializers.zeros
            if self.kernel_init == "uniform":
                bias_init = _uniform(x.shape[-1] ** -0.5)
            layer = nn.Dense(
                width, use_bias, kernel_init=kernel_init, bias_init=bias_init
            )
            return layer(x)

        norm = functools.partial(BatchNorm, use_running_average=not train)
        x = x.astype(jnp.float32)
        for width in self.widths[:-1]:
            x = linear(x, width, use_bias=self.hidden_bias)
            x = activation(norm()(x) if self.hidden_norm else x)
        x = linear(x, self.widths[-1], use_bias=self.output_bias)
        if self.output_norm is not None:
            x = norm(**_choose("output_norm", self.output_norm, OUTPUT_NORMS))(x)
        return x


def _uniform(limit: float) -> nn.initializers.Initializer:
    """Uniform in +-limit."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class Prototypes(nn.Module):
    """Scores of embeddings: their cosines with learned prototypes of unit length.

    Embeddings are L2-normalized. How prototypes are kept at unit length differs:

    "straight-through": SwAV's. The gradient passes the normalization as if it were not
        there; after each update the step puts `normalize_rows(kernel)` in the place of
        the kernel.
    "weight": DINO's weight normalization, g v / ||v||, differentiated through v.

    Its parameter `kernel` is (K, D), a prototype a row; `scale`, g, is (K, 1).

    Attributes:
        num_prototypes: K.
        normalization: "straight-through" or "weight".
        learn_scale: whether g is a parameter instead of 1; "weight" only.

    References:
        Caron et al., 2020, SwAV (arXiv:2006.09882); Salimans, Kingma, 2016, Weight
        normalization (arXiv:1602.07868); Caron et al., 2021, DINO (arXiv:2104.14294).
    """

    num_prototypes: int
    normalization: Literal["straight-through", "weight"] = "straight-through"
    learn_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, D) embeddings, normalized or not yet -> (N, K) float32 scores."""
        if self.num_prototypes < 1:
            raise ValueError(
                f"num_prototypes: got {self.num_prototypes}, expected at least 1"
            )
        if self.normalization not in ("straight-through", "weight"):
            raise ValueError(
                f"normalization: got {self.normalization!r}, expected"
                ' "straight-through" or "weight"'
            )
        if self.learn_scale and self.normalization != "weight":
            raise ValueError(
                'learn_scale: got True, expected False with "straight-through", where'
                " prototypes have unit length"
            )
        kernel = self.param(
            "kernel", self._init_kernel, (self.num_prototypes, x.shape[-1])
        )
        prototypes = normalize_rows(kernel)  # (K, D)
        if self.normalization == "straight-through":
            # The difference is zero, and its gradient that of the kernel.
            prototypes = lax.stop_gradient(prototypes) + (
                kernel - lax.stop_gradient(kernel)
            )
        scores = normalize_rows(x) @ prototypes.T  # (N, K)
        if self.learn_scale:
            ones = nn.initializers.ones
            scores = scores * self.param("scale", ones, (self.num_prototypes, 1))[:, 0]
        return scores

    def _init_kernel(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        # Uniform in +-1 / sqrt(D), published for both: the length of v, about 0.58,
        # says how fast weight normalization turns it.
        kernel = jax.random.uniform(key, shape, minval=-1, maxval=1) / shape[1] ** 0.5
        return normalize_rows(kernel) if self.normalization != "weight" else kernel


def normalize_rows(x: jax.Array) -> jax.Array:
    """Divides each row by its length: x / ||x||.

    Rows shorter than about 1e-6 come out shorter than 1, and zero as zero, with a
    gradient that is finite; rows up to the largest float32 come out right.

    Args:
        x: (..., D) embeddings, or the kernel of `Prototypes`, floating point.

    Returns:
        (..., D) float32.
    """
    x = x.astype(jnp.float32)
    # The result does not depend on this scale, so it is a constant.
    scale = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.maximum(scale, 1e-6)
    # At least 1 but for those short rows, to which alone the bound then applies.
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squares, 0.5))


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
    _check_widths(widths)
    return MLPHead(tuple(widths), output_bias=False)


def _check_widths(widths: Sequence[int]) -> None:
    if not widths or min(widths) < 1:
        raise ValueError(
            f"widths: got {tuple(widths)}, expected one positive width a layer"
        )


def _choose(name: str, value: str, choices: dict[str, Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
    return choices[value]
