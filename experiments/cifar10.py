"""VICReg on CIFAR-10 with a narrow ResNet: about 20 minutes on two CPU cores.

python experiments/cifar10.py --data folder:PATH   # train/CLASS/*.jpg, test/CLASS/*.jpg
python experiments/cifar10.py                      # the prepared set tfds:cifar10

Measured figures are in experiments/README.md. The network is small and the batch is
too: in so short a time the number of images and steps counts for most.
"""

from _run import run

from jemjax.methods import VICReg
from jemjax.training.config.options import OptimizerOptions, PretrainConfig

CONFIG = PretrainConfig(
    method=VICReg(projector=(512, 512, 512)),
    data="tfds:cifar10",
    backbone="resnet-narrow",
    batch_size=128,
    steps=4700,
    optimizer=OptimizerOptions(
        name="adamw", learning_rate=6e-3, weight_decay=1e-4, warmup_epochs=0.5
    ),
)

if __name__ == "__main__":
    run(CONFIG)
