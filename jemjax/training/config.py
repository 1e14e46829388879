"""What a run does: flags over file over the method's defaults for the data."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tomli_w
import tyro
from flax import linen as nn

from jemjax.augment import MaskRecipe, ViewRecipe
from jemjax.data import Crop, Reading, Source
from jemjax.errors import UserError, printable
from jemjax.methods import Method, Optimization
from jemjax.methods.base import SMALL_IMAGE
from jemjax.models import create_backbone

# Of 8 x 8 pixels, a smaller part no longer tells one digit from another.
DIGITS_CROP_SCALE = (0.4, 1.0)


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

    def apply(self, recipe: ViewRecipe) -> ViewRecipe:
        """The recipe with these options."""
        if self.crop_scale is not None:
            scale = tuple(self.crop_scale)
            views = [
                dataclasses.replace(view, crop_scale=scale)
                for view in recipe.views[: recipe.num_global]
            ]
            views += recipe.views[recipe.num_global :]
            recipe = dataclasses.replace(recipe, views=tuple(views))
        if self.color is not None:
            whose = {"arithmetic": "torchvision"} if self.color == "fused" else {}
            views = tuple(
                dataclasses.replace(view, color=self.color, **whose)
                for view in recipe.views
            )
            recipe = dataclasses.replace(recipe, views=views)
        if self.mask == "none":
            recipe = dataclasses.replace(recipe, mask=None)
        elif self.mask is not None:
            ratio = {"drop": 0.75}.get(self.mask, 0.6)
            recipe = dataclasses.replace(recipe, mask=MaskRecipe(self.mask, ratio))
        if self.mask_ratio is not None:
            if recipe.mask is None:
                raise ValueError(
                    f"mask_ratio: got {self.mask_ratio} where nothing is masked,"
                    " expected --views.mask too"
                )
            mask = dataclasses.replace(recipe.mask, ratio=self.mask_ratio)
            recipe = dataclasses.replace(recipe, mask=mask)
        for part in ("crop", "flip", "jitter", "grayscale", "blur", "solarize"):
            if getattr(self, part) is False:
                recipe = recipe.without(part)
        return recipe


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

    def network(self) -> nn.Module:
        """The network, of a resolved configuration; raises ValueError."""
        assert self.image_size and self.backbone
        backbone = create_backbone(
            self.backbone,
            image_size=self.image_size,
            dtype=jnp.dtype(self.compute_dtype),
            patch_size=self.patch_size,
            drop_path=self.drop_path or 0.0,
            pooling=self.method.pooling,
            layer_scale=self.layer_scale,
        )
        return self.method.network(backbone)

    def recipe(self) -> ViewRecipe:
        """The views, of a resolved configuration; raises ValueError."""
        assert self.image_size
        return self.views.apply(self.method.views(self.image_size))


def resolve(
    config: PretrainConfig, source: Source, *, num_devices: int = 1
) -> PretrainConfig:
    """Fills in every field that is None, and checks the whole.

    Args:
        config: as the user gave it.
        source: the opened training data.
        num_devices: over which a batch is divided.

    Returns:
        The configuration of the run, with no choice left open.

    Raises:
        UserError: listing every problem.
    """
    shortest = min(source.image_shape[:2])
    image_size = config.image_size
    if image_size is None:
        image_size = shortest if shortest <= SMALL_IMAGE else 224
    problems = list(problems_without_data(config))
    defaults = config.method.defaults(image_size)
    batch_size = config.batch_size
    if batch_size is None:
        batch_size = defaults.batch_size
    method = config.method.resolve(image_size, max(batch_size, 1), len(source))
    steps = config.steps
    if steps is None:
        epochs = defaults.epochs if config.epochs is None else config.epochs
        if not 0 < epochs < math.inf:
            problems.append(f"--epochs: got {epochs}, expected a positive number")
            epochs = 1
        steps = math.ceil(epochs * len(source) / max(batch_size, 1))
        if config.epochs is None:
            steps = max(steps, defaults.minimum_steps)
    backbone = config.backbone or defaults.backbone
    drop_path = config.drop_path
    if drop_path is None:
        drop_path = defaults.drop_path if backbone.startswith("vit") else 0.0
    layer_scale = config.layer_scale
    if layer_scale is None and backbone.startswith("vit"):
        layer_scale = defaults.layer_scale
    optimization = defaults.optimization
    if backbone.startswith("vit") and defaults.transformer:
        optimization = defaults.transformer
    tenth = max(1, steps // 10)
    eval_every = tenth if config.eval_every is None else config.eval_every
    checkpoint_every = config.checkpoint_every
    resolved = dataclasses.replace(
        config,
        method=method,
        output=config.output or default_output(config),
        eval_data=config.eval_data or config.data,
        backbone=backbone,
        drop_path=drop_path,
        layer_scale=layer_scale,
        image_size=image_size,
        steps=steps,
        epochs=round(steps * batch_size / len(source), 3),
        batch_size=batch_size,
        eval_every=eval_every,
        checkpoint_every=(eval_every or tenth)
        if checkpoint_every is None
        else checkpoint_every,
        views=_resolve_views(config.views, source),
        optimizer=_resolve_optimizer(config.optimizer, optimization, problems),
    )
    problems += _problems(config, resolved, len(source), num_devices)
    problems += resolved.method.problems(resolved.batch_size or 1)
    problems += _problems_of_parts(resolved)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return resolved


def with_given_length(config: PretrainConfig, default: PretrainConfig):
    """A length of the run that the user gives takes the place of a file's or recipe's.

    Args:
        config: with what the user gave.
        default: without.
    """
    lengths = ("steps", "epochs", "minutes")
    given = [n for n in lengths if getattr(config, n) != getattr(default, n)]
    others = {name: None for name in lengths if name not in given}
    return dataclasses.replace(config, **others) if given else config


def default_output(config: PretrainConfig) -> str:
    """The folder of a run that is given none."""
    name = config.data.split(":")[-1].rstrip("/").split("/")[-1]
    return f"runs/{config.method.name}-{name}"


def _problems_of_parts(config: PretrainConfig) -> Iterator[str]:
    """What network and views say of the values they are made of."""
    if config.image_size is None or config.image_size < 1:
        return
    for part in (config.recipe, config.network):
        try:
            part()
        except ValueError as error:  # argument, got, expected
            yield f"{config.method.name}: {error}"


def _resolve_views(options: ViewOptions, source: Source) -> ViewOptions:
    digits = source.name == "digits"
    flip, crop_scale = options.flip, options.crop_scale
    if flip is None:
        flip = not digits
    if crop_scale is None and digits:
        crop_scale = DIGITS_CROP_SCALE
    return dataclasses.replace(options, flip=flip, crop_scale=crop_scale)


def _resolve_optimizer(
    options: OptimizerOptions, published: Optimization, problems: list[str]
) -> OptimizerOptions:
    given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    if given.get("name", published.name) != published.name:
        # What else was published belongs to the other optimizer.
        published = Optimization(
            published.name, 0.0, 0.0, published.warmup_epochs, published.final_fraction
        )
        missing = [n for n in ("learning_rate", "weight_decay") if n not in given]
        if missing:
            flags = " and ".join(f"--optimizer.{_flag(name)}" for name in missing)
            problems.append(
                f"--optimizer.name {given['name']} needs {flags} too: the defaults are"
                " those of the method's own optimizer"
            )
    return OptimizerOptions(**{**dataclasses.asdict(published), **given})


def problems_without_data(config: PretrainConfig) -> Iterator[str]:
    """What is wrong whatever the data are, each in a sentence."""
    yield from config.reading.problems()
    for name in ("data", "eval_data", "data_dir", "output"):
        value = getattr(config, name)
        if value is not None and any("\ud800" <= c <= "\udfff" for c in value):
            yield (
                f"--{_flag(name)}: got {printable(value)}, which is not UTF-8, expected"
                " a name that a text file can hold; make a link of such a name"
            )
    # 0 means something for some; what is None is chosen later.
    least = dict.fromkeys(
        "steps batch_size image_size eval_examples final_examples log_every accumulate"
        " fsdp patch_size max_skipped".split(),
        1,
    ) | dict.fromkeys("eval_every checkpoint_every workers seed".split(), 0)
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            yield f"--{_flag(name)}: got {value}, expected at least {bound}"
    if config.seed >= 2**32:
        yield f"--seed: got {config.seed}, expected less than 2^32"
    for name in ("epochs", "minutes"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            yield f"--{name}: got {value}, expected a positive number"
    if config.minutes is not None and (config.steps, config.epochs) != (None, None):
        yield "--minutes excludes --steps and --epochs: give one of them"
    if not 0 < config.load_timeout < math.inf:
        yield f"--load-timeout: got {config.load_timeout}, expected a positive number"
    if config.batch_size == 1:
        yield "--batch-size: got 1, expected at least 2: the loss needs a spread"
    if config.resume and config.overwrite:
        yield "--resume and --overwrite exclude each other: give one of them"


def _problems(
    given: PretrainConfig, config: PretrainConfig, examples: int, num_devices: int
) -> Iterator[str]:
    # A run's own file has both, and they agree.
    if given.steps is not None and given.epochs not in (None, config.epochs):
        yield "--steps and --epochs exclude each other: give one of them"
    options = Optimization(**dataclasses.asdict(config.optimizer))
    if not 0 <= options.momentum < 1:
        yield (
            f"--optimizer.momentum: got {options.momentum}, expected at least 0 and"
            " less than 1"
        )
    if config.batch_size is not None and config.batch_size > examples:
        yield (
            f"--batch-size: got {config.batch_size}, but {config.data} has only"
            f" {examples} images: choose {examples} or fewer"
        )
    elif config.batch_size is not None and config.accumulate > 0:
        problem = batch_problem(config.batch_size, num_devices, config.accumulate)
        if problem:
            yield problem
    if options.schedule == "epochs" and options.warmup_epochs:
        yield (
            f"--optimizer.warmup-epochs: got {options.warmup_epochs}, expected 0 with"
            " --optimizer.schedule epochs"
        )
    for name, value in dataclasses.asdict(options).items():
        number = isinstance(value, int | float) and name != "momentum"
        if number and not 0 <= value < math.inf:
            yield (
                f"--optimizer.{_flag(name)}: got {value}, expected a finite number >= 0"
            )


def batch_problem(batch_size: int, num_devices: int, accumulate: int) -> str | None:
    """What is wrong with dividing a batch, in a sentence."""
    if batch_size % (num_devices * accumulate) == 0:
        return None
    factor = f" x {accumulate} of --accumulate" if accumulate > 1 else ""
    return (
        f"--batch-size: got {batch_size}, expected a multiple of the {num_devices}"
        f" devices{factor}"
    )


def crops_of(recipe: ViewRecipe, source: Source) -> tuple[Crop, ...]:
    """What the loader makes of images of several sizes; else it gives the images."""
    return tuple(
        Crop(view.size, view.crop_scale, view.crop_ratio, view.interpolation)
        for view in recipe.views
        if source.sizes_differ
    )


def describe_data(config: InputConfig, source: Source) -> str:
    """The data in a line, for people."""
    height, width, channels = source.image_shape
    shape = f"{height} x {width} x {channels}"
    if source.sizes_differ:
        shape = f"several sizes, measured at {shape}"
    classes = f"{source.num_classes} classes" if source.num_classes else "no labels"
    return f"{config.data}: {len(source):,} images of {shape}, {classes}"


def describe_views(recipe: ViewRecipe, source: Source) -> Iterator[tuple[str, str]]:
    """The views in lines, for people, the first with a name."""
    for number, line in enumerate(str(recipe).splitlines()):
        yield ("views" if number == 0 else ""), line
    if source.sizes_differ:
        yield "", "crops made by the loader, of full images; the rest on the device"


def _flag(name: str) -> str:
    return name.replace("_", "-")


def to_toml(config: PretrainConfig) -> str:
    """The configuration as TOML, the method by its name.

    Fields that are None are left out, since TOML has no such value.
    """

    def table(value: Any) -> Any:
        items = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
        }
        return {
            name: table(item) if dataclasses.is_dataclass(item) else item
            for name, item in items.items()
            if item is not None
        }

    return tomli_w.dumps({"method_name": config.method.name, **table(config)})


def from_toml(path: Path, default: PretrainConfig) -> PretrainConfig:
    """`default` with the values that a TOML file gives, checked by name and type.

    Args:
        path: the file.
        default: what holds where the file says nothing.

    Returns:
        The configuration.

    Raises:
        UserError: for a file that cannot be read, unknown keys and wrong types.
    """
    values = _read_toml(path)
    name = values.pop("method_name", default.method.name)
    if name != default.method.name:
        raise UserError(
            f"--config {path}: it configures the method {name}, but the command"
            f" names {default.method.name}"
        )
    problems: list[str] = []
    config = _merge(default, values, "", problems, _paths(default))
    if problems:
        raise UserError("\n".join(f"--config {path}: {text}" for text in problems))
    return config


def method_name_of(path: Path) -> str:
    """The method that a run's `config.toml` names."""
    return str(_read_toml(path).get("method_name", ""))


def _read_toml(path: Path) -> dict[str, Any]:
    where = f"--config {printable(path)}"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{where}: is not TOML ({reason}), expected lines such as"
            " batch_size = 256, and [optimizer] above those of a part"
        ) from error


def _paths(default: Any, prefix: str = "") -> list[str]:
    """Every key of a file, with those of the tables around it."""
    paths = []
    for field in dataclasses.fields(default):
        value, path = getattr(default, field.name), prefix + field.name
        paths.append(path)
        if dataclasses.is_dataclass(value):
            paths += _paths(value, f"{path}.")
    return paths


def _merge(
    default: Any,
    values: dict[str, Any],
    prefix: str,
    problems: list[str],
    paths: list[str],
) -> Any:
    hints = typing.get_type_hints(type(default))
    names = [field.name for field in dataclasses.fields(default)]
    changes = {}
    for name, value in values.items():
        path = prefix + name
        if name not in names:
            problems.append(f"unknown key {printable(path)}{_nearest(path, paths)}")
        elif dataclasses.is_dataclass(getattr(default, name)):
            if isinstance(value, dict):
                changes[name] = _merge(
                    getattr(default, name), value, f"{path}.", problems, paths
                )
            else:
                problems.append(f"{path}: got {value!r}, expected a table [{path}]")
        elif _fits(value, hints[name]):
            changes[name] = tuple(value) if isinstance(value, list) else value
        else:
            problems.append(f"{path}: got {value!r}, expected {_expected(hints[name])}")
    return dataclasses.replace(default, **changes)


def _nearest(path: str, paths: list[str]) -> str:
    """A hint at the key that is meant: in the same table, or, so called, in another."""
    name = path.rpartition(".")[2].replace("-", "_")
    so_called = [p for p in paths if p.rpartition(".")[2] == name]
    near = so_called or difflib.get_close_matches(path, paths, n=1)
    if not near:
        last = {p.rpartition(".")[2]: p for p in paths}
        near = [last[n] for n in difflib.get_close_matches(name, last, n=1)]
    return f": did you mean {near[0]}?" if near else ""


def _expected(hint: Any) -> str:
    """A type in the words of somebody who writes a file."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _expected(arguments[0])
    if origin in (typing.Union, types.UnionType):
        options = [_expected(a) for a in arguments if a is not type(None)]
        return " or ".join(options)
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list [...], each {_expected(arguments[0])}"
        return f"a list of {len(arguments)}, each {_expected(arguments[0])}"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: 'text in quotes ("...")',
    }
    return words.get(hint, str(getattr(hint, "__name__", hint)))


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, list):
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
