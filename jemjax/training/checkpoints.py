"""Saved states, by orbax: written aside while training goes on, committed at once."""

import hashlib
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jemjax.errors import CheckpointError
from jemjax.training.state import TrainState

# Orbax and absl report every save at level INFO.
for _name in ("absl", "orbax"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class Checkpoints:
    """The checkpoints of one run: `checkpoints/STEP` in its folder, the newest two.

    Of several hosts each has its part in every method, and calls it with the others.
    """

    def __init__(self, run: Path):
        self._manager = ocp.CheckpointManager(
            (run / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(2)
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, if there is one."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state, and writes it in the background."""
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state)),
            force=True,
        )

    def preempted(self, step: int) -> bool:
        """Whether this step is to be the last, since a host has been sent SIGTERM.

        It is the same on all hosts, each of which calls it after every step. Where jax
        knows of no other hosts it is never so.
        """
        return self._manager.reached_preemption(step)

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The saved state, in the shapes, dtypes and shardings of `like`."""
        self._manager.wait_until_finished()
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(
                f"no complete checkpoint in {self._manager.directory}: start the run"
                " again with --overwrite"
            )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )
        except Exception as error:  # orbax has many; each means: not this one
            raise CheckpointError(
                f"checkpoint {step} in {self._manager.directory} cannot be restored"
                f" ({str(error).splitlines()[0][:200]}): remove that folder to resume"
                " from an earlier one"
            ) from error
        return restored["state"]

    def close(self) -> None:
        """Waits until the last save is committed."""
        self._manager.wait_until_finished()
        self._manager.close()


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
