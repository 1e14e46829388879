"""What equal images teach, in jemjax and in PyTorch with lightly's losses.

python experiments/benchmarks/learning.py --data folder:PATH --method vicreg \
    --steps 361 --seeds 3 --peers PEERS/bin/python
python experiments/benchmarks/learning.py --data folder:PATH --method simclr \
    --minutes 4 --against HEAD~20 --peers PEERS/bin/python

Both train the same network with the same heads, views, batch size, optimizer and
schedule on the same images; what jemjax resolves a configuration to is what the peer
is told. Each initializes its layers as it does by itself. Features of whole images, as
the network began and as it ended, are measured by the same functions. `--minutes` gives
each contender the steps that it takes in that time. README.md here says how to make the
peers' environment.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import harness
import numpy as np
import tyro

PEER = Path(__file__).with_name("learning_peer.py")
ROOT = Path(__file__).parents[2]
TIMED_STEPS = 60  # that say how many fit into --minutes
METHODS = (
    "vicreg",
    "barlow-twins",
    "swav",
    "byol",
    "simsiam",
    "dino",
    "simclr",
    "moco",
)
Name = Literal[METHODS]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained, on what, and for how long."""

    data: str
    """Training data, as of `jemjax pretrain`: images of one square size."""
    method: Name = "vicreg"
    """The method, one of those that lightly has a loss of."""
    steps: int = 361
    """Steps of each run."""
    minutes: float | None = None
    """Minutes of each run, instead of --steps."""
    seeds: int = 3
    """Runs of each contender, with the seeds 0, 1, 2, ..."""
    first_seed: int = 0
    """The first seed."""
    against: str | None = None
    """An earlier state of jemjax, as git names it, that runs beside them."""
    backbone: str = "resnet-narrow"
    """A residual network by its name."""
    batch_size: int = 128
    """Images a step."""
    config: Path | None = None
    """A TOML file as of `jemjax pretrain --config`, which holds for all contenders."""
    peers: Path | None = None
    """Interpreter of the peers' environment; without it only jemjax runs."""
    examples: int = 10_000
    """Neighbors, and test images, of the measurements at most."""
    output: Path | None = None
    """Folder in which results.md and results.json are written."""


def arguments(options: Options, seed: int, steps: int) -> list[str]:
    """Those of `jemjax pretrain`."""
    given = ["--config", str(options.config)] if options.config else []
    return [
        *given,
        f"--data={options.data}",
        f"--backbone={options.backbone}",
        f"--batch-size={options.batch_size}",
        f"--final-examples={options.examples}",
        f"--steps={steps}",
        f"--seed={seed}",
        "--eval-every=0",
        "--checkpoint-every=0",
    ]


def run_jemjax(source: Path, options: Options, seed: int, steps: int) -> dict[str, Any]:
    """A run of jemjax's command line, of the checkout in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jemjax.cli", "pretrain", options.method]
        command += [*arguments(options, seed, steps), f"--output={folder}/run"]
        finished = subprocess.run(
            command,
            cwd=source,
            env={**os.environ, "PYTHONPATH": str(source)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if finished.returncode:
            *_, last = ["no message", *finished.stdout.strip().splitlines()]
            raise harness.Failed(last)
        results = json.loads(Path(folder, "run", "results.json").read_text())
    return {
        "steps": steps,
        "images_per_second": results["images_per_second"],
        "training_seconds": results["training_seconds"],
        "knn": results["knn"]["trained"],
        "knn_untrained": results["knn"]["untrained"],
        "linear": results["linear"]["trained"],
        "linear_untrained": results["linear"]["untrained"],
    }


class Peer:
    """PyTorch, which is given the images that jemjax reads."""

    def __init__(self, options: Options, folder: Path):
        from jemjax.data import in_memory, spread
        from jemjax.training.run.inputs import open_part

        assert options.peers is not None
        self.options, self.folder = options, folder
        config = self._config(0, 1)
        self.train = in_memory(open_part(config.data, "train", config))
        test = in_memory(open_part(config.data, "test", config))
        height, width, _ = self.train.image_shape
        if self.train.sizes_differ or height != width:
            raise harness.Failed("expected images of one square size")
        parts = []
        for source in (self.train, test):
            indices = spread(len(source), options.examples)
            parts.append(source.gather(indices))
        self.labels = [part["label"] for part in parts]
        everything = self.train.gather(np.arange(len(self.train)))["image"]
        measured = np.concatenate([part["image"] for part in parts])
        self.arrays = folder / "images.npz"
        np.savez(self.arrays, train=everything, measured=measured)

    def _config(self, seed: int, steps: int):
        from jemjax.methods import METHODS
        from jemjax.training.config.file import from_toml
        from jemjax.training.config.options import PretrainConfig

        default = PretrainConfig(method=METHODS[self.options.method]())
        if self.options.config is not None:
            default = from_toml(self.options.config, default)
        given = arguments(self.options, seed, steps)
        given = given[2:] if self.options.config else given
        return tyro.cli(PretrainConfig, default=default, args=given)

    def spec(self, seed: int, steps: int) -> dict[str, Any]:
        """What a run of jemjax with these options does, in numbers and names."""
        import jax

        from jemjax.methods import Progress
        from jemjax.models import ResNet
        from jemjax.training.config.resolve import resolve
        from jemjax.training.run.setup import build

        config = resolve(self._config(seed, steps), self.train)
        run = build(config, self.train)
        method, network, options = config.method, run.network, config.optimizer
        backbone: Any = network.backbone  # type: ignore[attr-defined]
        if not isinstance(backbone, ResNet):
            raise harness.Failed(f"backbone: got {config.backbone}, expected a ResNet")
        self._refuse(config, run.recipe)
        rates = jax.vmap(run.schedule)(np.arange(steps))
        momenta = None
        if method.target == "momentum":
            momenta = jax.vmap(
                lambda step: method.momentum(Progress(step, run.steps_per_epoch, steps))
            )(np.arange(steps)).tolist()
        prototypes: Any = method.make_prototypes()
        return {
            "method": config.method.name,
            "hyper": dataclasses.asdict(method),
            "seed": seed,
            "batch_size": config.batch_size,
            "steps_per_epoch": max(1, round(run.steps_per_epoch)),
            "backbone": {
                "stages": backbone.stage_sizes,
                "block": backbone.block.__name__,  # type: ignore[attr-defined]
                "width": backbone.width,
                "stem": backbone.stem,
                "zero_init": backbone.zero_init,
                "channels": self.train.image_shape[2],
            },
            "projector": _head(network.projector),  # type: ignore[attr-defined]
            "predictor": _head(network.predictor),  # type: ignore[attr-defined]
            "prototypes": prototypes.num_prototypes if prototypes else None,
            "views": [dataclasses.asdict(view) for view in run.recipe.views],
            "online_views": method.online_views or list(range(len(run.recipe.views))),
            "target_views": method.target_views or list(range(run.recipe.num_global)),
            "views_together": method.views_together,
            "own_target_init": method.own_target_init,
            "measured": method.measured,
            "momenta": momenta,
            "learning_rates": rates.tolist(),
            "peak_rate": (options.learning_rate or 0.0)
            * (config.batch_size or 0)
            / 256,
            "weight_decay": options.weight_decay,
            "decay_all": options.decay_all,
            "b2": options.b2,
            "clip_norm": options.clip_norm or None,
            "clip_each": options.clip_each,
            "constant_rate": method.constant_rate,
            "frozen_steps": {
                name: round(epochs * run.steps_per_epoch)
                for name, epochs in method.frozen_epochs().items()
            },
        }

    def _refuse(self, config: Any, recipe: Any) -> None:
        """What jemjax would do, and the peer would not."""
        usual, optimizer = type(config.method)(), config.optimizer
        wanted = {
            "image_size": (config.image_size, self.train.image_shape[0]),
            "compute_dtype": (config.compute_dtype, "float32"),
            "accumulate": (config.accumulate, 1),
            "views.mask": (recipe.mask, None),
            "optimizer.name": (optimizer.name, "adamw"),
            "optimizer.final_weight_decay": (optimizer.final_weight_decay, None),
            "optimizer.bias_rate": (optimizer.bias_rate, 1.0),
        }
        for view in recipe.views:
            wanted["views.color"] = (view.color, "faithful")
            wanted["views' arithmetic"] = (view.arithmetic, "torchvision")
        for name in (
            "target",
            "learn_last_scale",
            "warmup_teacher_epochs",
            "gamma",
            "eps",
        ):
            if hasattr(usual, name):
                value = getattr(config.method, name)
                wanted[f"method.{name}"] = (value, getattr(usual, name))
        if config.method.name == "swav" and not config.method.queue_length:
            wanted["method.queue_length"] = (0, "some")
        for name, (got, expected) in wanted.items():
            if got != expected:
                raise harness.Failed(
                    f"{name}: got {got}, expected {expected}: the peer has no other"
                )

    def run(self, seed: int, steps: int, timed: bool = False) -> dict[str, Any]:
        """A training in the peers' environment, and its measurements."""
        from jemjax.training.run.embedder import EmbeddedSet, EmbeddedSplit, Features
        from jemjax.training.run.protocols import measure_knn, measure_linear

        spec = self.spec(seed, steps)
        if timed:
            spec["timed_steps"] = steps
        path, output = self.folder / "spec.json", self.folder / "trained"
        environment = {**os.environ, **harness.ALLOCATOR}  # jemjax sets its own alike
        path.write_text(json.dumps(spec))
        finished = subprocess.run(
            [str(self.options.peers), str(PEER), str(path), str(self.arrays), output],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={k: v for k, v in environment.items() if k != "PYTHONPATH"},
        )
        if finished.returncode:
            *_, last = ["no message", *finished.stdout.strip().splitlines()]
            raise harness.Failed(last)
        figures = json.loads(output.with_suffix(".json").read_text())
        row = {"steps": steps} | {
            k: figures[k] for k in ("images_per_second", "training_seconds")
        }
        if timed:
            return row
        train_labels, test_labels = self.labels
        with np.load(output.with_suffix(".npz")) as file:
            for name, suffix in (("trained", ""), ("untrained", "_untrained")):
                train, test = np.split(file[name], [len(train_labels)])
                embedded = EmbeddedSet(
                    EmbeddedSplit(Features(train), train_labels),
                    EmbeddedSplit(Features(test), test_labels),
                    self.train.num_classes,
                )
                row[f"knn{suffix}"] = measure_knn(embedded)
                row[f"linear{suffix}"] = measure_linear(embedded)
        return row


def _head(head: Any) -> dict[str, Any] | None:
    """What an `MLPHead` is made of."""
    if head is None:
        return None
    names = (
        "widths",
        "hidden_bias",
        "output_bias",
        "hidden_norm",
        "output_norm",
        "activation",
        "kernel_init",
    )
    return {name: getattr(head, name) for name in names}


def table(options: Options, rows: dict[str, list[dict[str, Any]]]) -> str:
    """Means and spreads as Markdown."""
    lines = [
        "| | steps | images/s | training | kNN | untrained | linear | untrained |",
        "|" + "---|" * 8,
    ]
    for name, of_name in rows.items():
        if not of_name:
            continue
        figures = [
            _figure([row[key] for row in of_name])
            for key in ("knn", "knn_untrained", "linear", "linear_untrained")
        ]
        cells = [
            name,
            f"{statistics.mean(row['steps'] for row in of_name):,.0f}",
            f"{statistics.mean(row['images_per_second'] for row in of_name):,.0f}",
            f"{statistics.mean(row['training_seconds'] for row in of_name):,.0f} s",
            *figures,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    length = f"{options.minutes:g} minutes" if options.minutes else "equal steps"
    count = max((len(of_name) for of_name in rows.values()), default=0)
    title = (
        f"{options.method}, {options.backbone}, batch {options.batch_size}, {length},"
        f" {count} seeds: mean, and least to largest"
    )
    return "\n".join([title, "", *lines])


def _figure(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def main(options: Options) -> None:
    """Trains the contenders in turns, and prints the table after each seed."""
    kind, _, path = options.data.partition(":")
    if kind == "folder":  # an earlier state runs in a folder of its own
        data = f"folder:{Path(path).expanduser().absolute()}"
        options = dataclasses.replace(options, data=data)
    if options.config is not None:
        options = dataclasses.replace(options, config=options.config.absolute())
    with contextlib.ExitStack() as stack:
        contenders: dict[str, Any] = {
            "jemjax": lambda seed, steps, timed: run_jemjax(ROOT, options, seed, steps)
        }
        if options.against:
            before = stack.enter_context(harness.checkout(options.against))
            contenders[f"jemjax {options.against}"] = lambda seed, steps, timed: (
                run_jemjax(before, options, seed, steps)
            )
        if options.peers:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            peer = Peer(options, folder)
            contenders["PyTorch, lightly"] = peer.run
        steps = dict.fromkeys(contenders, options.steps)
        if options.minutes:
            for name, run in contenders.items():
                rate = run(0, TIMED_STEPS, True)["images_per_second"]
                steps[name] = round(60 * options.minutes * rate / options.batch_size)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        about = harness.machine()
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for name, run in contenders.items():
                row = {"seed": seed, **run(seed, steps[name], False)}
                rows[name].append(row)
                print(f"{name}: {json.dumps(row)}", file=sys.stderr, flush=True)
            if options.output:
                options.output.mkdir(parents=True, exist_ok=True)
                text = table(options, rows)
                (options.output / "results.md").write_text(text + "\n")
                everything = json.dumps({**about, "runs": rows}, indent=1)
                (options.output / "results.json").write_text(everything + "\n")
            print(table(options, rows) + "\n", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except harness.Failed as failure:
        sys.exit(f"learning: {failure}")
