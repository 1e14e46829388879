"""DINO: match the sharpened, centered opinion of a slow copy of yourself.

Two ways to collapse are held in balance outside of the gradient. Centering subtracts
the mean of the teacher's logits, so that no output wins everywhere, but alone it leads
to a uniform output; sharpening, a teacher temperature below the student's, prevents
that, but alone leads to one output. From nearly equal logits a step widens their
spread: the teacher's low temperature magnifies the differences that the student
follows.

Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin, 2021, DINO (arXiv:2104.14294).
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn

from jemjax import losses
from jemjax.augment import ViewRecipe, dino_imagenet, dino_small
from jemjax.methods.base import (
    SMALL_IMAGE,
    Defaults,
    Method,
    Optimization,
    Target,
    perplexity_of_clusters,
    small_images,
)
from jemjax.models import MLPHead, Prototypes
from jemjax.targets import linear


@dataclasses.dataclass(frozen=True)
class DINO(Method):
    """DINO's hyper-parameters, with the published defaults."""

    name: ClassVar[str] = "dino"
    collapse_hint: ClassVar[str] = (
        "normalize the head (--head-norm batch), lower --optimizer.learning-rate, "
        "train the last layer from the start (--freeze-last-layer 0), or sharpen the "
        "target (--teacher-temperature 0.02)"
    )
    views_together: ClassVar[bool] = True
    measured: ClassVar[Literal["online", "target"]] = "target"

    target: Target = "momentum"
    num_prototypes: int | None = None
    """number of outputs"""
    student_temperature: float = 0.1
    """of the online branch"""
    teacher_temperature: float = 0.04
    """of the target, after its warm-up"""
    warmup_teacher_temperature: float = 0.04
    """of the target, at the start"""
    warmup_teacher_epochs: int = 0
    """epochs in which it rises, linearly"""
    center_momentum: float = 0.9
    """of the mean that is subtracted from the target's logits"""
    head_norm: Literal["batch", "none"] | None = None
    """normalization after the head's hidden layers"""
    learn_last_scale: bool = False
    """whether the last layer's rows have a trained length, instead of 1"""
    freeze_last_layer: float = 1.0
    """epochs in which the last layer is not trained"""
    local_views: int | None = None
    """number of small views beside the two large ones, which the target sees"""

    # What are the views of an image? Two large crops, and small ones of small parts.
    def views(self, image_size: int) -> ViewRecipe:
        """The published multi-crop, or two views of small images."""
        assert self.local_views is not None
        if image_size <= SMALL_IMAGE:
            return dino_small(image_size, num_local=self.local_views)
        return dino_imagenet(image_size, num_local=self.local_views)

    # What embeds a view? A head, of which the last layer is the cosine to each output's
    # unit vector. For photographs it has no batch normalization.
    def make_projector(self, widths: tuple[int, ...]) -> nn.Module:
        """Linear, maybe BatchNorm, and GELU, twice, and a Linear bottleneck."""
        assert self.head_norm is not None
        return MLPHead(
            widths,
            hidden_norm=self.head_norm == "batch",
            activation="gelu",
            # The published kernels are so small that, behind narrow features, the
            # normalization's eps outweighs what tells images apart.
            kernel_init="uniform" if self.head_norm == "batch" else "truncated_normal",
        )

    def make_prototypes(self) -> nn.Module:
        """The weight-normalized last layer."""
        assert self.num_prototypes is not None
        return Prototypes(
            self.num_prototypes,
            normalization="weight",
            learn_scale=self.learn_last_scale,
        )

    def frozen_epochs(self):
        """The last layer stands still at first."""
        return {"prototypes": self.freeze_last_layer}

    # What is the other branch? A moving average that sees the large views, with
    # momentum from 0.996 to 1 in a cosine.

    # What compares the branches? The cross-entropy of every view with each other large
    # view's target.
    def loss(self, online, target=None, memory=None, *, axis_name=None):
        """The mean over all pairs of different views; the center is that before it."""
        memory = memory or {}
        student = jnp.stack(online)  # (V, N, K)
        teacher = jnp.stack(target or online)  # (G, N, K)
        center = memory.get("center", jnp.zeros(student.shape[-1], jnp.float32))
        loss = losses.dino(
            student,
            teacher,
            center,
            student_temperature=self.student_temperature,
            teacher_temperature=memory.get(
                "teacher_temperature", self.teacher_temperature
            ),
            stop_gradient=self.stop_gradient,
            axis_name=axis_name,
        )
        return loss, {"prototypes": perplexity_of_clusters(student[0], axis_name)}

    def collapsed_loss(self, batch_size, width):
        """The loss is ln K: the centered target says the same of every output."""
        return math.log(self.num_prototypes or 1)

    def cluster_scores(self, scores, loss_state):
        """An image's cluster is the target's largest output, which is centered."""
        return scores - loss_state["center"]

    # What does the loss remember? The mean of the target's logits.
    def init_loss_state(self, key, outputs):
        """A center of zeros."""
        return {"center": jnp.zeros(outputs.target.shape[-1], jnp.float32)}

    def recall(self, loss_state, progress, scores):
        """The center, and the temperature of this epoch."""
        temperature = linear(
            self.warmup_teacher_temperature,
            self.teacher_temperature,
            max(1, self.warmup_teacher_epochs - 1),
        )(progress.epoch)
        if self.warmup_teacher_epochs == 0:
            temperature = jnp.asarray(self.teacher_temperature, jnp.float32)
        return {**loss_state, "teacher_temperature": temperature}

    def remember(self, loss_state, progress, online, target):
        """The center moves toward the mean of this batch."""
        logits = jnp.stack([outputs.target for outputs in target])  # (G, N, K)
        return {
            "center": losses.update_center(
                loss_state["center"], logits, momentum=self.center_momentum
            )
        }

    def problems(self, batch_size):
        """What is wrong with the fields' values, each in a sentence."""
        problems = super().problems(batch_size)
        for name in ("student", "teacher", "warmup_teacher"):
            value = getattr(self, f"{name}_temperature")
            if not 0 < value < float("inf"):
                problems.append(
                    f"--{name.replace('_', '-')}-temperature: got {value}, expected a"
                    " finite number > 0"
                )
        if self.warmup_teacher_epochs < 0:
            problems.append(
                f"--warmup-teacher-epochs: got {self.warmup_teacher_epochs}, expected"
                " at least 0"
            )
        return problems

    def defaults(self, image_size: int) -> Defaults:
        """100 epochs of ViT-S/16 with AdamW, or a network that laptops train."""
        if image_size <= SMALL_IMAGE:
            return small_images(
                {
                    "projector": (512, 512, 128),
                    "num_prototypes": 1024,
                    "head_norm": "batch",
                    "target_momentum": 0.99,
                    "local_views": 0,
                },
                # The published rate, and a warm-up: at four times the rate a
                # transformer follows its target to uniform outputs.
                transformer=Optimization("adamw", 5e-4, 0.04, 4.0, 1e-3, clip_norm=3.0),
            )
        return Defaults(
            backbone="vit-small",
            batch_size=1024,
            epochs=100,
            drop_path=0.1,
            optimization=Optimization(
                "adamw",
                5e-4,
                0.04,
                10.0,
                1e-6 / (5e-4 * 1024 / 256),
                schedule="linspace",
                final_weight_decay=0.4,
                clip_norm=3.0,
            ),
            hyper={
                "projector": (2048, 2048, 256),
                "num_prototypes": 65536,
                "head_norm": "none",
                "target_momentum": 0.996,
                "local_views": 8,
            },
        )
