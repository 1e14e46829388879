"""VICReg on ImageNet-1k as published for 100 epochs: ResNet-50, batch 512, LARS.

jemjax data prepare folder PATH --name my_imagenet   # or read the folder as it is
python experiments/imagenet.py --data folder:PATH    # with PATH/train and PATH/val

The published linear accuracy is 68.6 % after 100 epochs and 73.2 % after 1000 (batch
2048, learning rate 0.2). This recipe needs accelerators, and has not been run here;
docs/tpu.md runs it on a TPU slice.
"""

from _run import run

from jemjax.methods import VICReg
from jemjax.training.config.options import OptimizerOptions, PretrainConfig

CONFIG = PretrainConfig(
    method=VICReg(projector=(8192, 8192, 8192)),
    data="tfds:imagenet2012",
    backbone="resnet50",
    image_size=224,
    batch_size=512,
    epochs=100,
    compute_dtype="bfloat16",
    workers=8,
    optimizer=OptimizerOptions(
        name="lars",
        learning_rate=0.3,
        weight_decay=1e-6,
        warmup_epochs=10,
        final_fraction=1e-3,
    ),
)

if __name__ == "__main__":
    run(CONFIG)
