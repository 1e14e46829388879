"""Networks, as Flax modules: backbones, and the heads between them and the loss."""

from jemjax.models.backbones import BACKBONES, create_backbone
from jemjax.models.heads import MLPHead, Prototypes, expander, normalize_rows
from jemjax.models.network import (
    JointEmbedding,
    MaskedPrediction,
    MaskedTokens,
    Outputs,
)
from jemjax.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet_narrow,
)
from jemjax.models.vit import ViT, vit_base, vit_narrow, vit_small, vit_tiny

__all__ = [
    "BACKBONES",
    "JointEmbedding",
    "MLPHead",
    "MaskedPrediction",
    "MaskedTokens",
    "Outputs",
    "Prototypes",
    "ResNet",
    "ViT",
    "create_backbone",
    "expander",
    "normalize_rows",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet_narrow",
    "vit_base",
    "vit_narrow",
    "vit_small",
    "vit_tiny",
]
