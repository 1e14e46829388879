"""The methods, each in a file that is its answers to the same questions.

In the order of the lecture: regularized covariances (`vicreg`, `barlow_twins`),
clusters (`swav`), an asymmetry and nothing else (`byol`, `simsiam`, `dino`,
`data2vec`), and contrast (`simclr`, `moco`, `moco_v3`).
"""

from jemjax.methods.barlow_twins import BarlowTwins
from jemjax.methods.base import Defaults, Method, Optimization, Progress
from jemjax.methods.byol import BYOL
from jemjax.methods.data2vec import Data2Vec
from jemjax.methods.dino import DINO
from jemjax.methods.moco import MoCo
from jemjax.methods.moco_v3 import MoCoV3
from jemjax.methods.simclr import SimCLR
from jemjax.methods.simsiam import SimSiam
from jemjax.methods.swav import SwAV
from jemjax.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        VICReg,
        BarlowTwins,
        SwAV,
        BYOL,
        SimSiam,
        DINO,
        Data2Vec,
        SimCLR,
        MoCo,
        MoCoV3,
    )
}

__all__ = [
    "BYOL",
    "DINO",
    "METHODS",
    "BarlowTwins",
    "Progress",
    "Data2Vec",
    "Defaults",
    "Method",
    "MoCo",
    "MoCoV3",
    "Optimization",
    "SimCLR",
    "SimSiam",
    "SwAV",
    "VICReg",
]
