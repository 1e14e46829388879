"""The command line: `jemjax COMMAND ...`.

Only what a command needs is imported, and that only once it is known: `jemjax --help`
answers without jax.
"""

import contextlib
import difflib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from jemjax.errors import (
    CheckpointError,
    DataError,
    UserError,
    explaining_disk,
    printable,
    printable_lines,
)

# In the order of the lecture, as `methods.METHODS`, which would bring jax.
METHOD_NAMES = (
    "vicreg",
    "barlow-twins",
    "swav",
    "byol",
    "simsiam",
    "dino",
    "data2vec",
    "simclr",
    "moco",
    "moco-v3",
)


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """What is the user's to mend is said in a sentence, with an exit code."""
    try:
        with explaining_disk():
            yield
    except UserError as error:
        print(f"jemjax: {printable_lines(str(error))}", file=sys.stderr)
        if getattr(error, "hangs", False):  # Python would wait for the thread
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)
        jax = sys.modules.get("jax")
        alone = jax is None or not jax.distributed.is_initialized()
        # A thread that waits for a disk may never end; other hosts are waited for.
        if error.exit_code > 128 and alone:
            leave = threading.Timer(5, os._exit, [error.exit_code])
            leave.daemon = True
            leave.start()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\njemjax: interrupted; --resume continues a run", file=sys.stderr)
        sys.exit(130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and leaves with its exit code."""
    with reporting_errors():
        _dispatch(list(sys.argv[1:] if arguments is None else arguments))


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
    elif arguments[0] == "--version":
        from jemjax import __version__

        print(f"jemjax {__version__}")
    else:
        _choose("command", arguments[0], tuple(COMMANDS))
        COMMANDS[arguments[0]][0](arguments[1:])


def _choose(what: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        near = difflib.get_close_matches(given, choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(choices)}"
        raise UserError(f"unknown {what} {given}: {hint}")


def _usage() -> str:
    lines = [
        "usage: jemjax COMMAND [options]",
        "",
        "Joint-embedding self-supervised learning in JAX.",
        "",
    ]
    for name, (_, arguments, text) in COMMANDS.items():
        lines.append(f"  {f'{name} {arguments}'.strip():<22}{text}")
    lines += ["", f"methods: {', '.join(METHOD_NAMES)}"]
    lines += ["`jemjax COMMAND --help` lists a command's options."]
    return "\n".join(lines)


def _parse(function, program: str, arguments: list[str], **keywords):
    with _importing(program):
        import tyro
    return tyro.cli(function, prog=f"jemjax {program}", args=arguments, **keywords)


@contextlib.contextmanager
def _importing(program: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{program} needs {error.name}: install it with pip install 'jemjax[train]'"
        ) from error


def _has_method(command: str, arguments: list[str]) -> bool:
    """Whether a known method is named; help that names none is given here."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: jemjax {command} METHOD [options]\n")
        print(f"methods: {', '.join(METHOD_NAMES)}")
        print(f"`jemjax {command} METHOD --help` lists all options.")
        return False
    _choose("method", arguments[0], METHOD_NAMES)
    return True


def _pretrain(arguments: list[str]) -> None:
    if not _has_method("pretrain", arguments):
        return
    name, arguments = arguments[0], arguments[1:]
    from jemjax.runtime import prepare_process

    prepare_process()
    path, arguments = _take_config(arguments)
    # VICReg's word for a projector to more dimensions.
    arguments = [re.sub(r"^--expander(?=$|=)", "--projector", a) for a in arguments]
    with _importing("pretrain"):
        from jemjax.training.config.options import PretrainConfig
        from jemjax.training.config.resolve import with_given_length
        from jemjax.training.process.distributed import leaving_at_once
        from jemjax.training.run.pretrain import pretrain
    default = _read_config(path, name)
    config = _parse(
        PretrainConfig,
        f"pretrain {name}",
        arguments,
        default=default,
        description=f"Trains a network with {name}, and measures what it learned."
        " --config FILE reads a TOML file; options given here win over it.",
    )
    with leaving_at_once():
        pretrain(with_given_length(config, default))


def _preview(arguments: list[str]) -> None:
    if not _has_method("preview", arguments):
        return
    name, arguments = arguments[0], arguments[1:]
    from jemjax.runtime import prepare_process

    prepare_process()
    path, arguments = _take_config(arguments)
    with _importing("preview"):
        import dataclasses

        from jemjax.training.config.options import InputConfig
        from jemjax.training.inspect.preview import PreviewConfig, preview
    given = _read_config(path, name)
    shared = [field.name for field in dataclasses.fields(InputConfig)]
    config = _parse(
        PreviewConfig,
        f"preview {name}",
        arguments,
        default=PreviewConfig(**{field: getattr(given, field) for field in shared}),
        description="Draws the first images of a step's batch, and exactly those views"
        f" and masks of them that `jemjax pretrain {name}` makes with these options."
        " --config FILE reads the config.toml of a run; options given here win over"
        " it.",
    )
    preview(config)


def _read_config(path: str | None, method: str):
    """The method's defaults, under what a TOML file says."""
    from pathlib import Path

    from jemjax.methods import METHODS
    from jemjax.training.config.file import from_toml
    from jemjax.training.config.options import PretrainConfig

    default = PretrainConfig(method=METHODS[method]())
    return default if path is None else from_toml(Path(path), default)


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Takes `--config FILE` out: its values are the defaults of all other options."""
    for index, argument in enumerate(arguments):
        if argument == "--config":
            if index + 1 == len(arguments):
                raise UserError("--config: expected a file behind it")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith("--config="):
            rest = arguments[:index] + arguments[index + 1 :]
            return argument.removeprefix("--config="), rest
    return None, arguments


def _evaluate(arguments: list[str]) -> None:
    def evaluate(
        run: str,
        /,
        data: str | None = None,
        eval_data: str | None = None,
        data_dir: str | None = None,
        multihost: bool = False,
    ) -> None:
        """Measures a run's newest checkpoint.

        Args:
            run: the folder of the run.
            data: labelled images that are the neighbors; unless given, the run's.
            eval_data: of which the test part is asked about; unless given, `data`.
            data_dir: where prepared data sets are; unless given, as in the run.
            multihost: several hosts do it, as with `jemjax pretrain --multihost`.
        """
        from pathlib import Path

        from jemjax.runtime import prepare_process

        prepare_process()
        from jemjax.training.process.distributed import leaving_at_once
        from jemjax.training.run.evaluate import evaluate

        with leaving_at_once():
            evaluate(
                Path(run),
                data=data,
                eval_data=eval_data,
                data_dir=data_dir,
                multihost=multihost,
            )

    _parse(evaluate, "evaluate", arguments)


def _replay(arguments: list[str]) -> None:
    def replay(
        run: str, /, step: int | None = None, data_dir: str | None = None
    ) -> None:
        """Takes a step of a run again, and names the first number that is not finite.

        Args:
            run: the folder of the run.
            step: its number, from 1; unless given, the one that the run kept.
            data_dir: where prepared data sets are; unless given, as in the run.
        """
        from pathlib import Path

        from jemjax.runtime import prepare_process

        prepare_process()
        from jemjax.training.inspect.replay import replay

        replay(Path(run), step=step, data_dir=data_dir)

    _parse(replay, "replay", arguments)


def _data(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jemjax data prepare KIND RAW --name NAME [--out FOLDER]")
        print("       jemjax data check PATH [options]\n")
        print("  prepare   make a TensorFlow Datasets set of raw files, for tfds:NAME")
        print("  check     decode every image, and name what cannot be used")
        return
    commands = {"prepare": _data_prepare, "check": _data_check}
    _choose("data command", arguments[0], tuple(commands))
    commands[arguments[0]](arguments[1:])


def _data_prepare(arguments: list[str]) -> None:
    def prepare(
        kind: Literal["idx", "cifar", "folder"],
        raw: str,
        /,
        name: str,
        out: str | None = None,
    ) -> None:
        """Makes a set that `--data tfds:NAME` reads, without TensorFlow.

        Args:
            kind: idx (MNIST-style files), cifar (the Python or binary batches) or
                folder (train/CLASS/... and test/CLASS/...; as by default, transparency
                is laid on white, values of 0 to 65535 or 0 to 1 become 8 bits, and a
                file that cannot be read ends it).
            raw: the folder of the raw files.
            name: under which the set is read, such as fashion_mnist or cifar10.
            out: folder of prepared sets; unless given, TensorFlow Datasets' own.
        """
        from pathlib import Path

        from jemjax.data.prepare import prepare

        path = prepare(kind, Path(raw), name=name, out=Path(out) if out else None)
        print(f"prepared {name} in {path}")
        place = f" --data-dir {out}" if out else ""
        print(f"use it with: jemjax pretrain vicreg --data tfds:{name}{place}")

    _parse(prepare, "data prepare", arguments)


def _data_check(arguments: list[str]) -> None:
    def check(
        path: str,
        /,
        min_size: int = 1,
        value_range: tuple[float, float] | None = None,
        max_pixels: int | None = None,
        data_dir: str | None = None,
    ) -> None:
        """Decodes every image of a set, and names each file that cannot be used.

        The exit code is 0 if all can be, and 3 if not.

        Args:
            path: a folder of images; digits, folder:PATH or tfds:NAME too.
            min_size: the shorter side that an image must have, in pixels.
            value_range: as of jemjax pretrain, of images of more than 8 bits.
            max_pixels: as of jemjax pretrain, of an image.
            data_dir: where prepared data sets are; unless given, TensorFlow Datasets'
                own.
        """
        from jemjax.data import Reading
        from jemjax.data.check import check
        from jemjax.training.reporting.display import Display

        given = {"value_range": value_range, "max_pixels": max_pixels}
        display = Display()
        findings = check(
            path,
            min_size=min_size,
            reading=Reading(**{k: v for k, v in given.items() if v is not None}),
            data_dir=data_dir,
            progress=display.reading(printable(path)),
        )
        display.header(findings.name, findings.rows())
        for sentence in (*findings.notes, *findings.small, *findings.unreadable):
            display.say(sentence)
        usable = "all images can be used" if findings.notes else "all is well"
        display.say(usable if findings.good else "not all images can be used")
        if not findings.good:
            sys.exit(DataError.exit_code)

    _parse(check, "data check", arguments)


def _checkpoint(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jemjax checkpoint COMMAND RUN\n")
        print("  list      steps, sizes, dates, and whether files have their sizes")
        print("  verify    read every file; exit code 5 if one is damaged")
        print("  prune     delete all but the newest whole ones (--keep N)")
        return
    name, arguments = arguments[0], arguments[1:]
    _choose("checkpoint command", name, ("list", "verify", "prune"))
    from pathlib import Path

    from jemjax.training.storage import manifest
    from jemjax.training.storage.folder import locked

    def show(run: str, contents: bool) -> list[manifest.Row]:
        rows = manifest.list_checkpoints(
            manifest.find_checkpoints(Path(run)), contents=contents
        )
        for row in rows:
            size = f"{row.size / 1e6:,.1f} MB"
            print(f"{row.name:<12}  {size:>12}  {row.saved:<25}  {row.state}")
        if not rows:
            print(f"{run}: no checkpoint yet")
        return rows

    def list_(run: str, /) -> None:
        """Lists the checkpoints of a run, and what is left of damaged ones.

        Args:
            run: the folder of the run.
        """
        show(run, contents=False)

    def verify(run: str, /) -> None:
        """Compares every file of every checkpoint with its manifest.

        Args:
            run: the folder of the run.
        """
        rows = show(run, contents=True)
        bad = [row.name for row in rows if row.broken]
        if bad:
            raise CheckpointError(f"{run}: not whole: {', '.join(bad)}")

    def prune(run: str, /, keep: int = 2) -> None:
        """Deletes all but the newest whole checkpoints, and what is left of others.

        Args:
            run: the folder of the run, to which nothing is writing.
            keep: how many checkpoints stay.
        """
        checkpoints = manifest.find_checkpoints(Path(run))
        with locked(checkpoints.resolve().parent):
            gone, size = manifest.prune(checkpoints, keep)
        print(f"deleted {', '.join(gone) or 'nothing'}: {size / 1e6:,.1f} MB")

    functions = {"list": list_, "verify": verify, "prune": prune}
    _parse(functions[name], f"checkpoint {name}", arguments)


def _doctor(arguments: list[str]) -> None:
    def doctor() -> None:
        """Shows versions, devices and settings, and runs one loss on the devices."""
        from jemjax.doctor import doctor

        sys.exit(doctor())

    _parse(doctor, "doctor", arguments)


# name: what runs it, its arguments, a line about it
COMMANDS: dict[str, tuple[Callable[[list[str]], None], str, str]] = {
    "pretrain": (_pretrain, "METHOD", "train a network, and measure what it learned"),
    "evaluate": (_evaluate, "RUN", "measure the newest checkpoint of a run"),
    "replay": (_replay, "RUN", "find what was not finite in a step that was skipped"),
    "checkpoint": (_checkpoint, "COMMAND RUN", "list, verify or prune a run's states"),
    "preview": (_preview, "METHOD", "draw images and their views, before a run"),
    "data": (_data, "prepare|check", "make a data set of raw files, or look at one"),
    "doctor": (_doctor, "", "check the installation and the devices"),
}

if __name__ == "__main__":
    main()
