"""jemjax and its peers on the same work, in one run.

python experiments/benchmarks/run.py --peers PEERS/bin/python            # everything
python experiments/benchmarks/run.py views --peers PEERS/bin/python      # one workload
python experiments/benchmarks/run.py views/32 --peers PEERS/bin/python   # a part of it
python experiments/benchmarks/run.py losses --against HEAD~20            # before

README.md here says how to make the peers' environment, and what is compared.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import harness
import loss
import step
import tyro
import views
import views_share

WORKLOADS = (
    *loss.WORKLOADS,
    *step.WORKLOADS,
    *views.WORKLOADS,
    *views_share.WORKLOADS,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run, and for how long."""

    workloads: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """names, or what they begin with before a slash; none: all"""
    peers: Path = Path(".venv-peers/bin/python")
    """interpreter of the peers' environment"""
    against: str | None = None
    """an earlier state of jemjax, as git names it, in place of the peers"""
    rounds: int = 5
    """turns of each contender"""
    seconds: float = 1.0
    """of a turn; a longer call is made once"""
    output: Path | None = None
    """folder in which results.md and results.json are written"""


def chosen(names: tuple[str, ...]) -> list[harness.Workload]:
    """The workloads of these names."""
    known = [workload.name for workload in WORKLOADS]
    for name in names:
        if not any(f"{workload}/".startswith(f"{name}/") for workload in known):
            sys.exit(f"workload: got {name!r}, expected one of {', '.join(known)}")
    return [
        workload
        for workload in WORKLOADS
        if not names
        or any(f"{workload.name}/".startswith(f"{name}/") for name in names)
    ]


def beside(workload: harness.Workload, revision: str, source: Path) -> harness.Workload:
    """What is ours of a workload, and the same of an earlier state of jemjax."""
    ours = [
        dataclasses.replace(contender, targets={})
        for contender in workload.contenders
        if contender.packages == harness.JEMJAX and not contender.peer
    ]
    earlier = [
        dataclasses.replace(each, name=f"{each.name} {revision}", source=source)
        for each in ours
    ]
    contenders = [each for pair in zip(ours, earlier, strict=True) for each in pair]
    names = tuple(each.name for each in ours)
    return dataclasses.replace(
        workload, contenders=tuple(contenders), baselines=names, share=False
    )


def main(options: Options) -> None:
    """Runs the workloads and prints their tables."""
    workloads = chosen(options.workloads)
    with contextlib.ExitStack() as stack:
        if options.against is not None:
            before = stack.enter_context(harness.checkout(options.against))
            workloads = [
                beside(workload, options.against, before) for workload in workloads
            ]
        run_all(workloads, options)


def run_all(workloads: list[harness.Workload], options: Options) -> None:
    """Runs workloads one after the other, and prints a table after each."""
    about = harness.machine()
    text = [harness.header(about)]
    print(text[0] + "\n", flush=True)
    results = []
    for workload in workloads:
        try:
            result = harness.run(
                workload,
                peers=options.peers.absolute(),
                rounds=options.rounds,
                seconds=options.seconds,
                say=lambda line: print(line, file=sys.stderr, flush=True),
            )
        except harness.Failed as failure:  # of the reference
            print(f"{workload.name}: no reference: {failure}\n", flush=True)
            continue
        results.append(result)
        text.append(f"## {workload.name}\n\n{harness.table(workload, result)}")
        print(text[-1] + "\n", flush=True)
        if options.output is not None:  # at once, for the next may take long
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "results.md").write_text("\n\n".join(text) + "\n")
            everything = json.dumps({**about, "results": results}, indent=1)
            (options.output / "results.json").write_text(everything + "\n")

    named = {workload.name: workload for workload in workloads}
    for kind in ("losses", "step"):
        of_kind = [each for each in results if each["workload"].startswith(f"{kind}/")]
        if of_kind:
            summary = harness.summary(
                [named[each["workload"]] for each in of_kind], of_kind
            )
            text.append(f"## {kind}\n\n{summary}")
            print(text[-1] + "\n", flush=True)
    if options.output is not None and results:
        (options.output / "results.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
