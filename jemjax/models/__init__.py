"""Networks, as Flax modules: backbones, and the heads between them and the loss."""

from jemjax.models.heads import MLPHead, expander
from jemjax.models.network import JointEmbedding
from jemjax.models.resnet import (
    BACKBONES,
    ResNet,
    create_backbone,
    resnet18,
    resnet34,
    resnet50,
    resnet_narrow,
)

__all__ = [
    "BACKBONES",
    "JointEmbedding",
    "MLPHead",
    "ResNet",
    "create_backbone",
    "expander",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet_narrow",
]
