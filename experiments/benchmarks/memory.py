"""What a device holds for a training step, by the devices, fsdp and accumulate.

    python experiments/benchmarks/memory.py [METHOD] [options]

The step is compiled for virtual CPU devices, not run; the bytes are those that XLA
plans for one of them: `state` stays from step to step, `temporary` is used within one.
XLA plans otherwise for a TPU or GPU, so take the ratios, not the megabytes.
"""

from jemjax.runtime import quick_compilation, tune_cpu

tune_cpu()  # before jax starts

import dataclasses  # noqa: E402
import itertools  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

from jemjax.cli import reporting_errors  # noqa: E402
from jemjax.data.sources import ArraySource  # noqa: E402
from jemjax.methods import METHODS  # noqa: E402
from jemjax.training.config.options import PretrainConfig  # noqa: E402
from jemjax.training.config.resolve import resolve  # noqa: E402
from jemjax.training.run.setup import build  # noqa: E402
from jemjax.training.step.sharding import make_mesh  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Options:
    """Which step is compiled, and for what."""

    method: Annotated[str, tyro.conf.Positional] = "dino"
    """one of jemjax's methods"""
    backbone: str = "vit-small"
    """as of jemjax pretrain"""
    image_size: int = 64
    """height and width in pixels"""
    batch_size: int = 256
    """images a step, over all devices"""
    devices: tuple[int, ...] = (8,)
    """numbers of devices"""
    fsdp: tuple[int, ...] = (1, 2, 4, 8)
    """over how many devices the state is sharded"""
    accumulate: tuple[int, ...] = (1, 2, 4, 8)
    """in how many parts a batch is seen"""
    output: Path | None = None
    """file to which the table is written, too"""


def table(options: Options) -> list[str]:
    """The rows of a Markdown table, printed while they are made."""
    rows = []

    def say(row):
        rows.append(row)
        print(row, flush=True)

    size, batch_size = options.image_size, options.batch_size
    images = np.zeros((batch_size, size, size, 3), np.uint8)
    source = ArraySource(images, name="zeros")
    say(
        f"{options.method}, {options.backbone}, {batch_size} images of {size} x {size}:"
        " MB on each device, as XLA plans them for CPUs\n"
    )
    say("| devices | fsdp | accumulate | state and batch | temporary |")
    say("|---|---|---|---|---|")
    for devices, fsdp, accumulate in itertools.product(
        options.devices, options.fsdp, options.accumulate
    ):
        alone = fsdp == options.fsdp[0] or accumulate == options.accumulate[0]
        if devices % fsdp or batch_size % (devices * accumulate) or not alone:
            continue
        config = resolve(
            PretrainConfig(
                METHODS[options.method](),
                backbone=options.backbone,
                batch_size=batch_size,
                steps=100,
                accumulate=accumulate,
            ),
            source,
        )
        run = build(config, source, make_mesh(devices, fsdp=fsdp))
        lowered = run.step.lower(*run.shapes())
        compiled = lowered.compile(compiler_options=quick_compilation())
        memory = compiled.memory_analysis()
        held, used = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        say(
            f"| {devices} | {fsdp} | {accumulate} | {held / 1e6:,.1f}"
            f" | {used / 1e6:,.1f} |"
        )
    return rows


def main() -> None:
    """Prints the table."""
    options = tyro.cli(Options, description=__doc__)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    with reporting_errors():
        rows = table(options)
    if options.output:
        options.output.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
