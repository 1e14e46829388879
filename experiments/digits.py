"""VICReg on scikit-learn's handwritten digits: 8 x 8 pixels, 1,442 training images.

python experiments/digits.py

It is what `jemjax pretrain vicreg` does without further options. Digits are not
flipped, since their mirror images are other signs.
"""

from _run import run

from jemjax.methods import VICReg
from jemjax.training.config.options import PretrainConfig

CONFIG = PretrainConfig(method=VICReg(), data="digits")

if __name__ == "__main__":
    run(CONFIG)
