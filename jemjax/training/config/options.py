"""What a run does, as the user gives it: dataclasses only."""

import dataclasses
from typing import Annotated, Literal

import tyro

from jemjax.data import Reading
from jemjax.methods import Method


@dataclasses.dataclass(frozen=True)
class ViewOptions:
    """Parts of the method's views, each of which can be switched off."""

    crop: bool = True
    """random resized crops (off: the whole image, resized)"""
    flip: tyro.conf.DisallowNone[bool | None] = None
    """random mirror images; unless given: on, but for digits, whose mirror images are
    other signs"""
    jitter: bool = True
    """random brightness, contrast, saturation and hue"""
    grayscale: bool = True
    """random removal of color"""
    blur: bool = True
    """random Gaussian blur"""
    solarize: bool = True
    """random inversion of bright pixels"""
    crop_scale: tuple[float, float] | None = None
    """smallest and largest area of a crop, as a share of the image; unless given, the
    method's, and for digits 0.4 1.0; local views keep their own"""
    color: Literal["faithful", "fused"] | None = None
    """fused: jitter and grayscale as one matrix an image, in torchvision's arithmetic,
    which is fast, and clipped once; faithful: step by step; unless given, as the method
    publishes it"""
    mask: Literal["none", "random", "block", "drop"] | None = None
    """hide patches from the online branch: scattered ones, or blocks; drop: scattered
    ones are left out, of transformers; none: hide nothing; unless given, as the method
    publishes it"""
    mask_ratio: float | tuple[float, float] | None = None
    """share of the patches that are hidden; of blocks also two, between which each
    image draws its own; unless given, the method's, or 0.6, and 0.75 where they are
    dropped"""


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """How the parameters are updated; unless given, as the method publishes it."""

    name: Literal["lars", "lars-simclr", "larc", "sgd", "adamw"] | None = None
    """the optimizer"""
    learning_rate: float | None = None
    """peak, for a batch of 256; it grows in proportion to the batch"""
    weight_decay: float | None = None
    """of weights"""
    final_weight_decay: float | None = None
    """where the weight decay's cosine ends; unless given, it is constant"""
    decay_all: bool | None = None
    """whether biases and normalization parameters are decayed too"""
    momentum: float | None = None
    """of lars, larc and sgd"""
    b2: float | None = None
    """of adamw, the decay of squared gradients"""
    schedule: Literal["cosine", "linspace", "epochs"] | None = None
    """cosine, linspace (with the end points of SwAV's and DINO's code), or epochs (a
    cosine that changes once an epoch)"""
    warmup_epochs: float | None = None
    """linear warm-up"""
    warmup_start: float | None = None
    """of the peak, where the warm-up starts"""
    final_fraction: float | None = None
    """of the peak, where the cosine ends"""
    bias_rate: float | None = None
    """of the learning rate, for biases and normalization parameters"""
    clip_norm: float | None = None
    """largest norm of a gradient; 0: any"""
    clip_each: bool | None = None
    """whether each parameter's gradient is clipped by itself, or all together"""


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """What the steps of a run are fed: everything that its views depend on."""

    method: Annotated[Method, tyro.conf.arg(name="")]
    """the method and its hyper-parameters, on the command line without a prefix"""
    data: str = "digits"
    """digits (built in), folder:PATH or tfds:NAME"""
    data_dir: str | None = None
    """where prepared TensorFlow Datasets are"""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = Reading()
    """how image files are read"""
    backbone: str | None = None
    """resnet18, resnet34, resnet50, resnet-narrow, vit-tiny, vit-small, vit-base or
    vit-narrow; unless given, by method and image size"""
    patch_size: int | None = None
    """of a transformer, in pixels; unless given, by image size"""
    image_size: int | None = None
    """height and width of a view in pixels; unless given, the images' own up to 64,
    else 224"""
    batch_size: int | None = None
    """images a step, over all devices"""
    seed: int = 0
    """of parameters, order of the data, and views"""
    views: ViewOptions = ViewOptions()


@dataclasses.dataclass(frozen=True)
class PretrainConfig(InputConfig):
    """One run. Fields that are None are chosen by `resolve`, from method and data."""

    eval_data: str | None = None
    """data of which the test part is used to measure; unless given, that of --data"""
    output: str | None = None
    """folder of the run; unless given, runs/METHOD-DATA"""
    drop_path: float | None = None
    """of a transformer, the share of blocks' branches that the online branch drops"""
    layer_scale: float | None = None
    """of a transformer, the factor that each block's branches start with, if any"""
    steps: int | None = None
    """number of steps, instead of --epochs"""
    epochs: float | None = None
    """passes over the data"""
    minutes: float | None = None
    """minutes that the training should take here, instead of --steps: some steps are
    timed first, the number that fits is written into config.toml, and a resumed run
    keeps it; reading the data, compiling and the final measurements come on top"""
    eval_every: int | None = None
    """steps between measurements with kNN; unless given, a tenth of the run; 0: only
    at the end"""
    eval_examples: int = 5000
    """training images that are neighbors in measurements during the run"""
    final_examples: int = 100_000
    """training images that the final measurements use at most"""
    checkpoint_every: int | None = None
    """steps between checkpoints; unless given, as eval_every; 0: only at the end"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the network's activations; losses, parameters and statistics are float32"""
    max_skipped: int = 5
    """steps in a row that are skipped, since loss or gradient is not finite, before the
    run is stopped"""
    deterministic: bool = False
    """the same bytes on GPUs each time, at the cost of speed; CPUs need it not"""
    workers: int = 0
    """processes that load images; 0: threads of this one"""
    load_timeout: float = 600.0
    """seconds after which a batch that does not come stops the run"""
    accumulate: int = 1
    """parts in which the network sees a batch one after the other, to save memory; the
    loss is still that of the whole batch, but BatchNorm sees the parts"""
    fsdp: int = 1
    """devices over which parameters, targets and the optimizer's state are sharded"""
    multihost: bool = False
    """one run on several hosts, each of which is given the same command and sees the
    same output folder; Cloud TPU, Slurm and Open MPI tell who they are, elsewhere
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID do"""
    resume: bool = False
    """continue if the output folder holds a run, else start"""
    overwrite: bool = False
    """delete a run that the output folder holds"""
    allow_change: tuple[str, ...] = ()
    """settings that may differ from those of the run that is resumed, though other
    numbers follow, such as batch_size, views or data_sha256"""
    fallback: bool = True
    """resume from the checkpoint before where the newest is damaged (off: stop with
    exit code 5)"""
    optimizer: OptimizerOptions = OptimizerOptions()
