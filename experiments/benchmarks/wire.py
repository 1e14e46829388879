"""What every loss sends between devices, read from the program that XLA compiles.

python experiments/benchmarks/wire.py
python experiments/benchmarks/wire.py --batch 4096 --width 8192 --devices 64

Nothing is run: the programs of value and gradient are compiled for virtual devices of
the CPU. They hold what one device sends to the others. XLA merges small collectives in
another way on GPUs and TPUs, which was not looked at. A table is in README.md here.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import tyro

from jemjax import losses, wire
from jemjax.losses import covariance

FORMS = ("all_to_all", "gather", "sum")
TOKENS = 4  # of an example, in smooth_l1
QUEUE = 4096  # earlier keys, in info_nce


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile: the sizes are the pairs of a batch and a width."""

    batch: tuple[int, ...] = (256, 256, 2048)
    """examples of the global batch, of each size"""
    width: tuple[int, ...] = (2048, 512, 256)
    """columns of the embeddings, the scores or the logits, of each size"""
    devices: int = 8
    """over how many the batch is sharded"""
    output: Path | None = None
    """folder in which wire.md and wire.json are written"""


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class Case(NamedTuple):
    """A loss, and the global arrays that it is compiled for."""

    name: str
    loss: Callable[..., jax.Array]
    arrays: Sequence[jax.ShapeDtypeStruct]
    batch_axes: int | None | Sequence[int | None] = 0
    gradients: bool = True

    def traffic(self, devices: int) -> list[wire.Collective]:
        """Its collectives."""
        return wire.loss_traffic(
            self.loss,
            *self.arrays,
            devices=devices,
            batch_axes=self.batch_axes,
            gradients=self.gradients,
        )


def covariance_cases(batch: int, width: int) -> list[Case]:
    rows = array(batch, width)
    return [
        Case("vicreg", losses.vicreg, [rows, rows]),
        Case("lecture_energy", losses.lecture_energy, [rows, rows]),
        Case("covariance_penalty", losses.covariance_penalty, [rows]),
        Case("barlow_twins", losses.barlow_twins, [rows, rows]),
    ]


def other_cases(batch: int, width: int) -> list[Case]:
    rows, views, whole = array(batch, width), array(2, batch, width), array(width)
    tokens, queue = array(batch, TOKENS, width), array(QUEUE, width)
    return [
        Case("variance_hinge", losses.variance_hinge, [rows]),
        Case("swav", losses.swav, [views], batch_axes=1),
        Case("dino", losses.dino, [views, views, whole], batch_axes=(1, 1, None)),
        Case(
            "update_center",
            losses.update_center,
            [whole, views],
            batch_axes=(None, 1),
            gradients=False,
        ),
        Case("cross_entropy", losses.cross_entropy, [rows, rows]),
        Case("byol", losses.byol, [rows, rows]),
        Case("negative_cosine", losses.negative_cosine, [rows, rows]),
        Case("smooth_l1", losses.smooth_l1, [tokens, tokens]),
        Case("nt_xent", losses.nt_xent, [rows, rows]),
        Case("info_nce", losses.info_nce, [rows, rows]),
        Case(
            "info_nce, queue",
            losses.info_nce,
            [rows, rows, queue],
            batch_axes=(0, 0, None),
        ),
    ]


def of_forms(batch: int, width: int, devices: int) -> list[dict[str, Any]]:
    """The covariance losses by each form, with the bytes counted."""
    chosen = covariance.cheapest_form(batch, width, devices)
    results = []
    for case in covariance_cases(batch, width):
        counted = {}
        for form in FORMS:
            with mock.patch.object(covariance, "cheapest_form", lambda *_, f=form: f):
                counted[form] = wire.bytes_sent(case.traffic(devices))
        size = {"loss": case.name, "batch": batch, "width": width, "devices": devices}
        results.append({**size, "chosen": chosen, "bytes": counted})
    return results


def of_losses(batch: int, width: int, devices: int) -> list[dict[str, Any]]:
    """Every loss as it is, with each of its collectives."""
    results = []
    for case in (*covariance_cases(batch, width), *other_cases(batch, width)):
        found = case.traffic(devices)
        results.append(
            {
                "loss": case.name,
                "batch": batch,
                "width": width,
                "devices": devices,
                "bytes": wire.bytes_sent(found),
                "collectives": [collective._asdict() for collective in found],
            }
        )
    return results


def forms_table(results: list[dict[str, Any]]) -> str:
    """MiB by form as Markdown, the chosen form in bold."""
    lines = ["| loss | batch x width | all-to-all | gather | sum |", "|" + "---|" * 5]
    for result in results:
        cells = []
        for form in FORMS:
            cell = f"{result['bytes'][form] / 2**20:.2f}"
            cells.append(f"**{cell}**" if form == result["chosen"] else cell)
        size = f"{result['batch']} x {result['width']}"
        lines.append(f"| {result['loss']} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def losses_table(results: list[dict[str, Any]]) -> str:
    """Every collective as Markdown: equal ones in a row, and each loss's sum."""
    lines = [
        "| loss | batch x width | collective | of | times | KiB |",
        "|" + "---|" * 6,
    ]
    for result in results:
        rows = collections.Counter()
        for found in result["collectives"]:
            parts = collections.Counter(found["arrays"])
            arrays = ", ".join(
                part if count == 1 else f"{count} {part}"
                for part, count in parts.items()
            )
            branch = "".join(f", branch {number}" for _, number in found["branches"])
            key = (found["operation"] + branch, arrays, found["bytes"])
            rows[key] += found["times"]
        head = f"{result['loss']} | {result['batch']} x {result['width']}"
        total = f"{result['bytes'] / 2**10:,.2f}"
        lines.append(f"| {head} | **in all** | | | **{total}** |")
        for (operation, arrays, sent), times in rows.items():
            kib = f"{times * sent / 2**10:,.2f}"
            lines.append(f"| | | {operation} | {arrays} | {times} | {kib} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Compiles all of them and prints the tables."""
    sizes = list(zip(options.batch, options.width, strict=True))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    forms = [row for size in sizes for row in of_forms(*size, options.devices)]
    every = [row for size in sizes for row in of_losses(*size, options.devices)]
    text = (
        f"What one of {options.devices} devices sends for a value and its gradient, in"
        f" MiB; the form that is chosen in bold.\n\n{forms_table(forms)}\n\n"
        "Every collective, in KiB. Of the branches of a conditional one is run, and the"
        f" sum has the one that sends most.\n\n{losses_table(every)}\n"
    )
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "wire.md").write_text(text)
        results = json.dumps({"forms": forms, "losses": every}, indent=2)
        (options.output / "wire.json").write_text(results + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
