"""Every file of a checkpoint, damaged in four ways: is it noticed, what is used then?

python experiments/reliability/damage.py

For each damage the newest checkpoint of a finished run is restored twice: as a run that
is resumed does it, and by orbax alone, without the manifest. At the end one damaged run
is resumed for real, and has to end in the bytes of the run that nobody damaged.
"""

import contextlib
import io
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from _tiny import EVERY, STEPS, finish

from jemjax.data import open_data
from jemjax.errors import CheckpointError
from jemjax.training.run.setup import build
from jemjax.training.storage.checkpoints import Checkpoints, fingerprint
from jemjax.training.storage.provenance import load_config

NEWEST, BEFORE = str(STEPS), str(STEPS - EVERY)


def flip(path: Path) -> None:
    """Changes one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


DAMAGES = {
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "delete": lambda path: path.unlink(),
    "flip one byte": flip,
}


def resumed(folder: Path, like) -> tuple[str, str]:
    """What a resumed run starts from, and the warning that it prints."""
    said = []
    with Checkpoints(folder, say=said.append) as checkpoints:
        state = checkpoints.restore(like)
    return fingerprint(state) if state is not None else "nothing", " ".join(said)


def by_orbax_alone(folder: Path, like) -> str:
    """What orbax makes of it, without a manifest."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                folder / "checkpoints" / NEWEST,
                ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
            )
        return fingerprint(restored["state"])
    except Exception as error:  # of many kinds
        return type(error).__name__


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as place:
        folder, copy = Path(place, "run"), Path(place, "copy")
        results = finish("vicreg", folder)
        config = load_config(folder)
        run = build(config, open_data(config.data))
        like = run.init()
        newest, _ = resumed(folder, like)
        shutil.copytree(folder, copy)
        shutil.rmtree(copy / "checkpoints" / NEWEST)
        before, _ = resumed(copy, like)
        assert newest == results["state_sha256"] != before
        checkpoint = folder / "checkpoints" / NEWEST
        names = [
            str(path.relative_to(checkpoint))
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file()
        ]
        counts = Counter()
        print(f"{'file':<46}{'damage':<15}{'noticed':<9}{'used':<6}orbax alone")
        # Orbax's threads write thousands of lines about what they cannot read.
        with contextlib.redirect_stderr(io.StringIO()):
            for name in names:
                for damage, do in DAMAGES.items():
                    shutil.rmtree(copy)
                    shutil.copytree(folder, copy)
                    do(copy / "checkpoints" / NEWEST / name)
                    alone = by_orbax_alone(copy, like)
                    if alone == newest:
                        alone = "the same state"
                    elif len(alone) == 64:
                        alone = "OTHER NUMBERS, silently"
                    try:
                        used, said = resumed(copy, like)
                    except CheckpointError as error:
                        used, said = "nothing", str(error)
                    used = {newest: NEWEST, before: BEFORE}.get(used, used[:12])
                    aside = (copy / "checkpoints" / f"{NEWEST}.damaged").is_dir()
                    noticed = aside and name in said
                    print(
                        f"{name[-44:]:<46}{damage:<15}{'yes' if noticed else 'NO':<9}"
                        f"{used:<6}{alone}",
                        flush=True,
                    )
                    counts["all"] += 1
                    counts["noticed"] += noticed
                    counts["before"] += used == BEFORE
                    counts["silent"] += alone.startswith("OTHER")
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
        files = (copy / "checkpoints" / NEWEST).rglob("*")
        flip(max(files, key=lambda path: path.stat().st_size))
        same = finish("vicreg", copy)["state_sha256"] == newest
    print(
        f"\n{counts['noticed']} of {counts['all']} damages noticed, the checkpoint"
        f" before used {counts['before']} times; orbax alone gave other numbers"
        f" {counts['silent']} times without an error.\nA damaged run, resumed to its"
        f" end: {'the same bytes' if same else 'OTHER BYTES'} as the undamaged one"
    )
    if not same or not counts["all"] == counts["noticed"] == counts["before"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
