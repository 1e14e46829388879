"""Steps that the guard in the step skipped: told, kept for `replay`, and limited."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from jemjax.errors import DivergenceError, UserError
from jemjax.training.config.options import PretrainConfig
from jemjax.training.process.distributed import (
    all_hosts,
    broadcast_from_first,
    is_first,
)
from jemjax.training.step.state import TrainState, all_finite
from jemjax.training.storage.checkpoints import Checkpoints
from jemjax.training.storage.files import write_json
from jemjax.training.storage.manifest import saved_steps, unfinished

# In a run's folder: a state from which the bad step is reached, and its number.
FOLDER = "skipped"
_FILE = "step.json"


class SkippedSteps:
    """What the loop does about steps that were skipped.

    It learns of them where it waits for the devices anyway: at logged steps, and before
    a state is saved. By then the state has gone on from a step that was skipped alone.
    It can be computed again from the last checkpoint, exactly, so that is kept; a state
    that nothing has changed since is kept itself.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        state: TrainState,
        say: Callable[[str], None],
        settle: Callable[[], None],
    ):
        """`state` is that before the first step; `settle` ends a save of the run.

        Two saves at once would be taken for one another: hosts wait for each other in
        orbax by the name of the folder that is written, which is the step.
        """
        self._config, self._folder = config, folder
        self._say, self._settle = say, settle
        self._known = int(state.skipped.steps)

    def report_skipped(self, step: int, state: TrainState) -> int:
        """The number of steps skipped so far.

        Args:
            step: that was just taken.
            state: after it.

        Raises:
            DivergenceError: if as many in a row were as the configuration allows.
        """
        count, in_a_row, latest = (int(number) for number in state.skipped)
        diverged = in_a_row >= self._config.max_skipped
        if count > self._known:
            number = step - in_a_row + 1 if in_a_row else latest
            self._known = count
            self._say(
                f"step {number}: loss or gradient was not finite, so it changed"
                f" nothing; {count} skipped so far; `jemjax replay {self._folder}"
                f" --step {number}` names the first such number"
            )
            self._keep(number, state if in_a_row else None, diverged)
        if diverged:
            last = self._last()
            with all_hosts():
                raise DivergenceError(
                    f"steps {step - in_a_row + 1} to {step}: loss or gradient was not"
                    f" finite; --max-skipped allows {self._config.max_skipped} in a"
                    " row. "
                    + (f"Step {last} is saved. " if last is not None else "")
                    + f"`jemjax replay {self._folder}` names the first such number. A"
                    " lower --optimizer.learning-rate, or a smaller"
                    " --optimizer.clip-norm, may help"
                )
        return count

    def require_finite(self, step: int, state: TrainState) -> None:
        """Refuses to save numbers that are not finite.

        Raises:
            DivergenceError: if there are any.
        """
        if not bool(_all_finite(state)):
            with all_hosts():
                raise DivergenceError(
                    f"step {step}: the state is not finite, and is not saved; the"
                    " checkpoints before it are. Lower --optimizer.learning-rate"
                )

    def _last(self) -> int | None:
        steps = saved_steps(self._folder / "checkpoints")
        return steps[-1] if steps else None

    def _keep(self, number: int, state: TrainState | None, again: bool) -> None:
        """A state from which step `number` is reached; the first one stays, or `again`.

        Args:
            number: of the step.
            state: if nothing has changed it since that step.
            again: whether it takes the place of one that is kept.
        """
        place = self._folder / FOLDER
        # The first host's word: the others may see its files late.
        kept_before = broadcast_from_first("kept" if (place / _FILE).exists() else "")
        if kept_before and not again:
            return
        self._settle()
        names = " ".join(map(str, saved_steps(place / "checkpoints")))
        kept_steps = [int(name) for name in broadcast_from_first(names).split()]
        if state is not None and number - 1 not in kept_steps:
            # As it was before the step.
            back = state.step - (state.step - number + 1)
            zeros = jax.tree.map(lambda x: x - x, state.skipped)
            before = state.replace(step=back, skipped=zeros)
            try:
                with all_hosts():
                    if is_first():
                        place.mkdir(exist_ok=True)
                    checkpoints = Checkpoints(place, say=self._say)
                with checkpoints as kept:
                    kept.save(number - 1, before, last=True)
            except (UserError, OSError) as error:
                if jax.process_count() > 1:  # the others may wait for this one
                    raise
                self._warn(place, error)
        elif state is None and is_first():
            last = self._last()
            if last is not None and last not in kept_steps:
                where = Path("checkpoints") / str(last)
                copy = unfinished(place / "checkpoints", last)
                try:
                    shutil.copytree(self._folder / where, copy, dirs_exist_ok=True)
                    copy.rename(place / where)
                except OSError as error:  # `replay` takes more steps again, then
                    shutil.rmtree(copy, ignore_errors=True)
                    self._warn(place / where, error)
        if is_first():
            try:
                place.mkdir(exist_ok=True)
                write_json(place / _FILE, {"step": number})
            except OSError as error:
                self._warn(place / _FILE, error)

    def _warn(self, path: Path, error: Exception) -> None:
        self._say(f"WARNING: {path}: not kept ({error})")


_all_finite = jax.jit(all_finite)


def skipped_step(folder: Path) -> int | None:
    """The number of the step of a run that is kept for `replay`, if one is."""
    path = folder / FOLDER / _FILE
    return json.loads(path.read_text())["step"] if path.exists() else None
