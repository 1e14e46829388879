"""The questions that every joint-embedding method answers, and nothing else.

1. What are the views of an image?   `views`: a recipe, masks included.
2. What embeds a view?               the backbone, then `make_projector`,
                                     `make_predictor` and `make_prototypes`.
3. What is the other branch?         `target`: the same network with gradients, without
                                     them, or a moving average of it.
4. What compares the branches?       `loss`, a function of embeddings.
5. What does the loss remember?      `init_loss_state`, `recall` and `remember`.

A method is a frozen dataclass of its hyper-parameters. A field that is None is one of
which the published value depends on the size of the images: `resolve` fills it in.
Each answer can be exchanged for another method's, where that makes sense.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jemjax.augment import ViewRecipe
from jemjax.losses.collectives import AxisName, batch_size, batch_sum
from jemjax.models import JointEmbedding, MLPHead, Outputs
from jemjax.targets import cosine, linear

# Images up to this size are trained with a method's small-image form.
SMALL_IMAGE = 64

Target = Literal["shared", "stop-gradient", "momentum"]
Widths = tuple[int, ...] | Literal["none"] | None
Terms = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How the parameters are updated."""

    name: Literal["lars", "lars-simclr", "larc", "sgd", "adamw"]
    """the optimizer"""
    learning_rate: float
    """peak, for a batch of 256; it grows in proportion to the batch"""
    weight_decay: float
    """of weights"""
    warmup_epochs: float
    """linear warm-up"""
    final_fraction: float
    """of the peak, where the cosine ends"""
    momentum: float = 0.9
    """of lars, larc and sgd"""
    schedule: Literal["cosine", "linspace", "epochs"] = "cosine"
    """cosine; linspace: with the end points of SwAV's and DINO's code; epochs: a cosine
    that changes once an epoch, without warm-up"""
    warmup_start: float = 0.0
    """of the peak, where the warm-up starts"""
    final_weight_decay: float | None = None
    """where the weight decay's cosine ends; unless given, it is constant"""
    decay_all: bool = False
    """whether biases and normalization parameters are decayed too"""
    bias_rate: float = 1.0
    """of the learning rate, for biases and normalization parameters"""
    clip_norm: float | None = None
    """largest norm of a gradient"""
    clip_each: bool = True
    """whether each parameter's gradient is clipped by itself, or all together"""
    b2: float = 0.999
    """of adamw, the decay of squared gradients"""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How a method is trained where the user does not say otherwise."""

    backbone: str
    batch_size: int
    epochs: float
    optimization: Optimization
    transformer: Optimization | None = None
    """in place of `optimization` where the backbone is a transformer"""
    minimum_steps: int = 1
    """a small data set is passed more often than `epochs` times to take so many"""
    drop_path: float = 0.0
    """of transformers, stochastic depth of the online branch"""
    layer_scale: float | None = None
    """of transformers, the factor that each block's branches start with, if any"""
    hyper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """the method's fields that depend on the size of the images"""


def small_images(hyper: Mapping[str, Any], **changes: Any) -> Defaults:
    """The form of a method that two CPU cores train in minutes, on images up to 64.

    A narrow network sees many images in little time, for which AdamW needs no tuning;
    the published recipes for CIFAR train ResNet-18 for 1,000 epochs. Transformers
    collapse at a residual network's learning rate, and need their gradients clipped.

    Args:
        hyper: the method's fields that depend on the size of the images.
        **changes: other values of `Defaults`.
    """
    values = {
        "backbone": "resnet-narrow",
        "batch_size": 128,
        "epochs": 12,
        "minimum_steps": 2000,
        "optimization": Optimization("adamw", 6e-3, 1e-4, 0.5, 1e-3),
        "transformer": Optimization(
            "adamw", 2e-3, 0.05, 0.5, 1e-3, clip_norm=3.0, clip_each=False
        ),
    }
    return Defaults(hyper=hyper, **{**values, **changes})


class Progress(NamedTuple):
    """How far a run is."""

    step: jax.Array
    """steps taken before this one, a traced integer"""
    steps_per_epoch: float
    total_steps: int

    @property
    def epoch(self) -> jax.Array:
        """Epochs completed, a traced integer; the last step of one may be in two."""
        # Rounded as the steps are counted: an epoch is a whole number of steps.
        return self.step // max(1, round(self.steps_per_epoch))


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A method: a frozen dataclass of its hyper-parameters with the five answers."""

    name: ClassVar[str]
    # Views of one size pass the backbone as one batch, and all of them the heads: they
    # share batch statistics.
    views_together: ClassVar[bool] = False
    # Numbers of the views that each branch sees; None: all, or all of the first's size.
    online_views: ClassVar[tuple[int, ...] | None] = None
    target_views: ClassVar[tuple[int, ...] | None] = None
    # A moving-average target starts from parameters of its own, not from a copy.
    own_target_init: ClassVar[bool] = False
    # The target's batch statistics are averages too, not those of what it sees.
    average_statistics: ClassVar[bool] = False
    # The branch of which the features are the result.
    measured: ClassVar[Literal["online", "target"]] = "online"
    # What a transformer's features are.
    pooling: ClassVar[Literal["class", "mean"]] = "class"
    # Modules of which the learning rate stays at its peak, and paths never trained.
    constant_rate: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    # Of `recall`'s arrays that are sharded like the batch, the axis; others are whole.
    recall_axes: ClassVar[Mapping[str, int]] = {}
    # What to change, in a clause, where a run of this method collapses.
    collapse_hint: ClassVar[str] = "lower --optimizer.learning-rate"

    target: Target = "shared"
    """the other branch: the same network, the same network as a constant, or a moving
    average of it"""
    target_momentum: float | None = None
    """of a moving average, at the start"""
    final_target_momentum: float | None = None
    """of a moving average, at the end"""
    target_schedule: Literal["cosine", "linear"] = "cosine"
    """from the first momentum to the last"""
    projector: Widths = None
    """widths of the projector's (or expander's) layers behind the backbone, or none"""
    predictor: Widths = None
    """widths of the predictor's hidden layers, in the online branch only, or none"""

    # What are the views of an image?
    @abc.abstractmethod
    def views(self, image_size: int) -> ViewRecipe:
        """The recipe of the views."""

    # What embeds a view? The backbone, then these.
    def make_projector(self, widths: tuple[int, ...]) -> nn.Module:
        """(N, features) -> (N, widths[-1])."""
        return MLPHead(widths, output_bias=False)

    def make_predictor(self, widths: tuple[int, ...], backbone: nn.Module) -> nn.Module:
        """(N, D) -> (N, widths[-1] = D)."""
        return MLPHead(widths, output_bias=False)

    def make_prototypes(self) -> nn.Module | None:
        """(N, D) -> (N, K) scores, where the branches are compared by clusters."""
        return None

    def network(self, backbone: nn.Module) -> nn.Module:
        """The whole of it, which makes `Outputs` of a view."""
        width, projector, predictor = backbone.num_features, None, None  # type: ignore[attr-defined]
        assert self.projector is not None and self.predictor is not None
        if self.projector != "none":
            projector = self.make_projector(self.projector)
            width = self.projector[-1]
        if self.predictor != "none":
            predictor = self.make_predictor((*self.predictor, width), backbone)
        return JointEmbedding(backbone, projector, predictor, self.make_prototypes())

    # What is the other branch?
    @property
    def stop_gradient(self) -> bool:
        """Whether the target side is a constant."""
        return self.target != "shared"

    def momentum(self, progress: Progress) -> jax.Array:
        """The moving average's momentum after the update of this step."""
        first, last = self.target_momentum, self.final_target_momentum
        assert first is not None and last is not None
        schedule = cosine if self.target_schedule == "cosine" else linear
        return schedule(first, last, progress.total_steps)(progress.step)

    # What compares the branches?
    @abc.abstractmethod
    def loss(
        self,
        online: tuple[Any, ...],
        target: tuple[Any, ...] | None = None,
        memory: Mapping[str, jax.Array] | None = None,
        *,
        axis_name: AxisName = None,
    ) -> tuple[jax.Array, Terms]:
        """The loss, and what is logged beside it.

        Args:
            online: of each view that the online branch sees, what it is compared by:
                (N, D) predictions, or (N, K) scores of prototypes.
            target: the same of the target branch; None where both branches are one
                and the same: shared weights, no predictor, no mask.
            memory: what `recall` gives.
            axis_name: the mapped axis (or axes) over which the batch is sharded.
        """

    def collapsed_loss(self, batch_size: int, width: int) -> float | None:
        """The loss where all images have the same embedding; None: no known value.

        Args:
            batch_size: N.
            width: D, of the embeddings.
        """
        return None

    def cluster_scores(
        self, scores: jax.Array, loss_state: Mapping[str, jax.Array]
    ) -> jax.Array:
        """(N, K) scores -> those of which the largest is an image's cluster."""
        return scores

    # What does the loss remember? Nothing, unless a method says otherwise.
    def init_loss_state(self, key: jax.Array, outputs: Outputs) -> dict[str, jax.Array]:
        """What is remembered before the first step, float32; `outputs` gives shapes."""
        return {}

    def recall(
        self,
        loss_state: dict[str, jax.Array],
        progress: Progress,
        scores: Callable[[jax.Array], jax.Array],
    ) -> dict[str, jax.Array]:
        """What the loss is given of it, at this time: the third argument of `loss`.

        Args:
            loss_state: what is remembered.
            progress: how far the run is.
            scores: (..., D) embeddings -> (..., K) scores by the present prototypes.
        """
        return loss_state

    def remember(
        self,
        loss_state: dict[str, jax.Array],
        progress: Progress,
        online: tuple[Outputs, ...],
        target: tuple[Outputs, ...],
    ) -> dict[str, jax.Array]:
        """What is remembered after this step, of the whole batch's outputs."""
        return loss_state

    def constrain(self, params: Any) -> Any:
        """The parameters after an update, brought back to where they may be."""
        return params

    def frozen_epochs(self) -> Mapping[str, float]:
        """Modules that are not trained in the first epochs, with how many."""
        return {}

    # How is it trained?
    @abc.abstractmethod
    def defaults(self, image_size: int) -> Defaults:
        """The published settings, or their small-image form."""

    def resolve(self, image_size: int, batch_size: int, examples: int) -> Self:
        """The method with every field that is None filled in for these data.

        A queue is at most as long as the data, of which it would hold copies, and a
        multiple of the batch, which replaces a part of it.
        """
        hyper: dict[str, Any] = {"projector": "none", "predictor": "none"}
        hyper |= {"target_momentum": 0.996, "final_target_momentum": 1.0}
        hyper |= self.defaults(image_size).hyper
        if self.target != "momentum":
            hyper = {k: v for k, v in hyper.items() if "target_momentum" not in k}
        missing = {k: v for k, v in hyper.items() if getattr(self, k) is None}
        if missing.get("queue_length"):
            batches = min(missing["queue_length"], examples) // batch_size
            missing["queue_length"] = max(1, batches) * batch_size
        return dataclasses.replace(self, **missing)

    def problems(self, batch_size: int) -> list[str]:
        """What is wrong with the fields' values, each in a sentence."""
        problems = []
        for name in ("target_momentum", "final_target_momentum"):
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if value is not None and self.target != "momentum":
                problems.append(
                    f"{flag}: got {value}, but with --target {self.target} there is no"
                    " moving average"
                )
            elif value is not None and not 0 <= value <= 1:
                problems.append(f"{flag}: got {value}, expected a number in [0, 1]")
            elif value is not None and value < 1 == np.float32(value):
                problems.append(
                    f"{flag}: got {value}, which is 1 in float32: the average would"
                    " never move; expected 1, or at most 0.9999999"
                )
        for name in ("projector", "predictor"):
            widths = getattr(self, name)
            if isinstance(widths, tuple) and any(width < 1 for width in widths):
                problems.append(
                    f"--{name}: got {widths}, expected one positive width a layer, or"
                    " none"
                )
        if self.projector == ():
            problems.append("--projector: got no widths, expected some, or none")
        return problems


def both_ways(
    compare: Callable[[Any, Any], Any],
    online: tuple[Any, ...],
    target: tuple[Any, ...] | None,
) -> Any:
    """Compares each of two views with the other: the mean of the two directions.

    Without a target both branches are one and the same, and of a comparison that is
    symmetric one direction is enough.
    """
    x, y = online
    if target is None:
        return compare(x, y)
    of_x, of_y = target
    return jax.tree.map(lambda a, b: 0.5 * (a + b), compare(x, of_y), compare(y, of_x))


def perplexity_of_clusters(scores: jax.Array, axis_name: AxisName) -> jax.Array:
    """Over how many prototypes a batch is spread: (N, K) -> scalar, 1 if over one.

    exp of the entropy of the shares of examples that are nearest to each prototype.
    """
    nearest = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
    share = batch_sum(nearest, axis_name) / batch_size(scores, axis_name)  # (K,)
    return jnp.exp(-jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0))))


def queue_problems(length: int | None, batch_size: int) -> list[str]:
    """What is wrong with the length of a queue, in a sentence."""
    if length is None or (length >= 0 and length % batch_size == 0):
        return []
    return [
        f"--queue-length: got {length}, expected a multiple of the batch size,"
        f" {batch_size}, which takes the place of as many of its rows"
    ]
