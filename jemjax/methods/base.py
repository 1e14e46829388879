"""The questions that every joint-embedding method answers, and nothing else."""

import abc
import dataclasses
from typing import ClassVar

import jax
from flax import linen as nn

from jemjax.augment import ViewRecipe
from jemjax.losses.collectives import AxisName

# Images up to this size are trained with a method's small-image form.
SMALL_IMAGE = 64


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How the parameters are updated."""

    name: str
    """lars, sgd or adamw"""
    learning_rate: float
    """peak, for a batch of 256; it grows in proportion to the batch"""
    weight_decay: float
    """of weights; biases and normalization parameters have none"""
    warmup_epochs: float
    """linear, from 0"""
    final_fraction: float
    """of the peak, where the cosine ends"""
    momentum: float = 0.9
    """of lars and sgd"""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How a method is trained where the user does not say otherwise."""

    backbone: str
    batch_size: int
    epochs: float
    optimization: Optimization
    minimum_steps: int = 1
    """a small data set is passed more often than `epochs` times to take so many"""


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A method: a frozen dataclass of its hyper-parameters with these answers."""

    name: ClassVar[str]

    @abc.abstractmethod
    def views(self, image_size: int) -> ViewRecipe:
        """What are the views of an image?"""

    @abc.abstractmethod
    def projector(self, image_size: int) -> nn.Module:
        """What embeds a view, behind the backbone?"""

    @abc.abstractmethod
    def loss(
        self, embeddings: tuple[jax.Array, ...], *, axis_name: AxisName = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What compares the branches? The loss, and its unweighted terms to log."""

    @abc.abstractmethod
    def defaults(self, image_size: int) -> Defaults:
        """How is it trained? The published settings, or their small-image form."""
