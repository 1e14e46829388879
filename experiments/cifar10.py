"""VICReg on CIFAR-10 with a narrow ResNet: about 20 minutes on two CPU cores.

python experiments/cifar10.py --data folder:PATH   # train/CLASS/*.jpg, test/CLASS/*.jpg
python experiments/cifar10.py                      # the prepared set tfds:cifar10

Measured figures are in experiments/README.md. A small batch takes many steps in the
time, which matters more here than a good estimate of the covariance.
"""

from _run import run

from jemjax.methods import VICReg
from jemjax.training.config import OptimizerOptions, PretrainConfig

CONFIG = PretrainConfig(
    method=VICReg(expander=(1024, 1024, 1024)),
    data="tfds:cifar10",
    backbone="resnet-narrow",
    batch_size=128,
    steps=1650,
    optimizer=OptimizerOptions(name="adamw", learning_rate=3e-3, weight_decay=1e-4),
)

if __name__ == "__main__":
    run(CONFIG)
