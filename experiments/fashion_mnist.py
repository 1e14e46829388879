"""VICReg on Fashion-MNIST with a narrow ResNet: about 20 minutes on two CPU cores.

jemjax data prepare idx PATH_OF_THE_IDX_FILES --name fashion_mnist
python experiments/fashion_mnist.py

Measured figures are in experiments/README.md.
"""

from _run import run

from jemjax.methods import VICReg
from jemjax.training.config.options import OptimizerOptions, PretrainConfig

CONFIG = PretrainConfig(
    method=VICReg(projector=(512, 512, 512)),
    data="tfds:fashion_mnist",
    backbone="resnet-narrow",
    batch_size=128,
    steps=3600,
    optimizer=OptimizerOptions(
        name="adamw", learning_rate=6e-3, weight_decay=1e-4, warmup_epochs=0.5
    ),
)

if __name__ == "__main__":
    run(CONFIG)
