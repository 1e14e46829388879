"""Saved states, by orbax: written aside while training goes on, committed at once."""

import concurrent.futures
import contextlib
import difflib
import errno
import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jemjax.errors import CheckpointDamaged, CheckpointError
from jemjax.training.process.distributed import (
    all_hosts,
    broadcast_from_first,
    is_first,
)
from jemjax.training.step.state import TrainState
from jemjax.training.storage import manifest

# Bytes of a data file, about: some are hashed while others are being written.
FILE_SIZE = 32 * 2**20
# Checkpoints that a run keeps.
KEPT = 2
# Saves in a row that may fail before the run stops.
ATTEMPTS = 3

# Orbax and absl report every save at level INFO, and what fails with a stack.
for _name in ("absl", "orbax"):
    logging.getLogger(_name).setLevel(logging.WARNING)
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of one run: `checkpoints/STEP` in its folder, the newest two.

    A state counts as saved once its manifest is on the disk, with which its files are
    compared before they are used (`jemjax.training.storage.manifest`). Of several hosts
    each has its part in every method, and calls it with the others; the first writes
    manifests and deletes.

    Args:
        run: the folder of the run.
        about: of the run, kept in the manifests.
        writable: whether this process holds the run's lock: then it removes what an
            interrupted save has left, and sets damaged checkpoints aside.
        fallback: whether the checkpoint before is used instead of a damaged one.
        say: told what the user should know.
    """

    def __init__(
        self,
        run: Path,
        *,
        about: Mapping[str, Any] | None = None,
        writable: bool = True,
        fallback: bool = True,
        say: Callable[[str], None] = print,
    ):
        self._folder = (run / "checkpoints").absolute()
        self._about, self._fallback, self._say = about or {}, fallback, say
        self._changes = writable and is_first()
        self._failures = 0
        self._step: int | None = None  # that was saved last
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        if self._changes:
            self._folder.mkdir(exist_ok=True)
            count, size = manifest.remove_unfinished(self._folder)
            if count:
                self._say(
                    f"removed {count} unfinished checkpoint(s): {_megabytes(size)} free"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        """Waits until the last save is committed; an earlier error comes first."""
        try:
            self.wait()
        except CheckpointError as late:
            if error is None:
                raise
            self._say(f"WARNING: {late}")
        finally:
            self._pool.shutdown()
            self._checkpointer.close()

    def save(self, step: int, state: TrainState, *, last: bool = False) -> None:
        """Copies the state, and writes it in the background.

        Args:
            step: of the state; saving one that is saved already does nothing.
            state: what is saved.
            last: waits until it is committed, and tries a second time if that fails.

        Raises:
            CheckpointError: if this or an earlier state could not be saved, and the
                run is not to go on without.
        """
        self.wait()
        if step == self._step:
            return
        self._start(step, state)
        if not last:
            return
        retry = jax.process_count() == 1
        error = self._settle()
        if error is not None and retry:
            self._say(f"WARNING: {error}")
            with contextlib.suppress(OSError):  # the second attempt tells
                self._remove_old(keep=1)
            self._start(step, state)
            error = self._settle()
        if error is not None:
            raise error

    def check(self) -> None:
        """Tells of a save that has failed since; to be called after every step.

        Raises:
            CheckpointError: if it was the last of several in a row.
        """
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in the background is committed; as `check` then."""
        error = self._settle()
        if error is None:
            return
        # Other hosts may have saved their part, and would wait for this one.
        if self._failures >= ATTEMPTS or jax.process_count() > 1:
            raise error
        self._say(f"WARNING: {error}")

    def _start(self, step: int, state: TrainState) -> None:
        leaves = describe(state)
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=FILE_SIZE)
        )

        def commit() -> None:
            digests = manifest.Digests(self._folder, step) if self._changes else None
            try:
                self._checkpointer.wait_until_finished()
            finally:
                if digests:
                    digests.stop()
            if digests:
                manifest.finish(self._folder, step, self._about, leaves, digests)
                with contextlib.suppress(OSError):  # this one is committed
                    self._remove_old(keep=KEPT)

        try:
            self._make_room()
            self._checkpointer.save(manifest.unfinished(self._folder, step), arguments)
        except Exception as error:  # orbax has many
            self._saving = step, concurrent.futures.Future()
            self._saving[1].set_exception(error)
        else:
            self._saving = step, self._pool.submit(commit)

    def _settle(self) -> CheckpointError | None:
        """What became of the save in the background, once it has ended."""
        if self._saving is None:
            return None
        (step, future), self._saving = self._saving, None
        error = future.exception()
        if error is None:
            self._failures, self._step = 0, step
            return None
        self._failures += 1
        if self._changes:  # what it has left keeps a full disk full
            manifest.remove_unfinished(self._folder)
        saved = [str(step) for step in manifest.saved_steps(self._folder)]
        failed = CheckpointError(
            f"checkpoint {step} could not be saved in {self._folder} ({_reason(error)},"
            f" {_megabytes(self._free())} free); saved are:"
            f" {', '.join(saved) or 'none'}. Free space or mend the disk; the same"
            " command with --resume continues from the newest"
        )
        failed.__cause__ = error
        return failed

    def _make_room(self) -> None:
        """Deletes all but the newest where another would not fit, if that helps."""
        sizes = [
            manifest.folder_size(self._folder / str(step))
            for step in manifest.saved_steps(self._folder)
        ]
        needed = sizes[-1] + sizes[-1] // 20 if sizes else 0
        if not self._changes or self._free() >= needed:
            return
        self._remove_old(keep=1)
        if self._free() < needed and jax.process_count() == 1:
            raise OSError(errno.ENOSPC, f"{_megabytes(needed)} do not fit")

    def _free(self) -> int:
        with contextlib.suppress(OSError):  # it may be gone
            return shutil.disk_usage(self._folder).free
        return 0

    def _remove_old(self, keep: int) -> None:
        for step in manifest.saved_steps(self._folder)[:-keep]:
            manifest.remove(self._folder / str(step))

    def preempted(self, step: int) -> bool:
        """Whether this step is to be the last, since a host has been sent SIGTERM.

        It is the same on all hosts, each of which calls it after every step. Where jax
        knows of no other hosts it is never so.
        """
        return ocp.multihost.reached_preemption(step)

    def restore(self, like: TrainState, until: int | None = None) -> TrainState | None:
        """The newest saved state that is whole, if any state was saved.

        Args:
            like: says the shapes, dtypes and shardings.
            until: the last step that it may be of; then there need not be any.

        Raises:
            CheckpointError: if there are checkpoints, but none that can be used.
        """
        self.wait()
        chosen = ""
        with all_hosts():
            if is_first():
                step = self._newest_whole(like, until)
                chosen = "" if step is None else str(step)
        chosen = broadcast_from_first(chosen)
        if not chosen:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            restored = self._checkpointer.restore(
                self._folder / chosen,
                ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        abstract,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(
                            abstract
                        ),
                    )
                ),
            )
        except Exception as error:  # orbax has many
            raise CheckpointError(
                f"checkpoint {chosen} in {self._folder} is whole, but orbax"
                f" {ocp.__version__} cannot restore it ({_reason(error)}): use the"
                f" versions that its {manifest.MANIFEST} names"
            ) from error
        self._step = int(chosen)
        return restored["state"]

    def _newest_whole(self, like: TrainState, until: int | None) -> int | None:
        problem = None
        for step in reversed(manifest.saved_steps(self._folder)):
            if until is not None and step > until:
                continue
            try:
                found = manifest.verify(self._folder / str(step))
            except CheckpointDamaged as error:
                if not (self._folder / str(step)).exists():
                    # A run has just replaced it by a newer one.
                    return self._newest_whole(like, until)
                if not self._fallback:
                    raise CheckpointError(
                        f"{error} (in {self._folder}); --fallback uses the one before"
                    ) from error
                self._set_aside(step, str(error))
                problem = error
            except OSError as error:
                if not (self._folder / str(step)).exists():
                    return self._newest_whole(like, until)
                raise CheckpointError(
                    f"checkpoint {step} in {self._folder} cannot be read"
                    f" ({_reason(error)})"
                ) from error
            else:
                _require_same_leaves(self._folder / str(step), found.leaves, like)
                return step
        if until is not None:  # for `replay`, which can begin at the start, too
            return None
        aside = manifest.set_aside_before(self._folder)
        if problem or aside:
            raise CheckpointError(
                f"no checkpoint in {self._folder} is whole"
                f" ({problem or ', '.join(aside)}): start the run again with"
                " --overwrite"
            )
        return None

    def _set_aside(self, step: int, problem: str) -> None:
        place = "it is not used"
        if self._changes:
            try:
                place = f"set aside as {manifest.set_aside(self._folder, step).name}"
            except OSError as error:
                place = f"it is not used, nor set aside ({_reason(error)})"
        self._say(f"WARNING: {problem}; {place}")


def describe(state: TrainState) -> dict[str, str]:
    """The dtype and shape of every array of a state, by path."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _require_same_leaves(
    place: Path, saved: Mapping[str, str], like: TrainState
) -> None:
    """Refuses a checkpoint that is not of this state, array by array."""
    expected = describe(like)
    extra = [name for name in saved if name not in expected]
    lines = []
    for name, form in expected.items():
        if name not in saved:
            near = difflib.get_close_matches(name, extra, n=1)
            hint = f" (it has {near[0]})" if near else ""
            lines.append(f"  {name}: missing in the checkpoint{hint}")
        elif saved[name] != form:
            lines.append(f"  {name}: {saved[name]} in the checkpoint, expected {form}")
    lines += [f"  {name}: in the checkpoint, but not in the run" for name in extra]
    if lines:
        more = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise CheckpointError(
            f"{place}: is of another network or optimizer:\n"
            + "\n".join(lines[:20] + more)
        )


def _reason(error: BaseException) -> str:
    """An error in a line; TensorStore puts what matters behind its specification."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def fingerprint(state: TrainState) -> str:
    """SHA-256 over the bytes of every array of a state, by path.

    It is the same wherever the arrays lie; of several hosts, each has to call it.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.asarray(leaf)
        digest.update(
            f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode()
        )
        digest.update(array.tobytes())
    return digest.hexdigest()
