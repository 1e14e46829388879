"""Names a loss that stays where it is once a network tells no images apart.

Embeddings can be looked at only now and then; the loss is logged all the time, and of
most methods it is known what it is after a collapse: ln K of DINO's K outputs, say.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# How near the collapsed value counts as being there, as a share of it, or of 1.
NEARNESS = 0.005
# The share of a run for which the loss has to stay there.
STAY = 0.1


class LossWatch:
    """Follows the logged losses of a run, also of one that is resumed."""

    def __init__(
        self,
        collapsed: float | None,
        total_steps: int,
        past: Iterable[Mapping[str, Any]] = (),
    ):
        """Begins with what was logged before.

        Args:
            collapsed: the loss where all images have the same embedding, if it is
                known.
            total_steps: of the run.
            past: rows of `metrics.jsonl` with a loss, of a run that is resumed.
        """
        self._collapsed, self._total = collapsed, total_steps
        self._since: int | None = None
        self._step = 0
        self._told = False
        for row in past:
            self.logged(row["step"], row["loss"])

    def logged(self, step: int, loss: float | None) -> str | None:
        """Notes a logged loss; returns what to say of it, once a run.

        Args:
            step: its number, from 1.
            loss: its value; None where it was not finite.
        """
        value = self._collapsed
        if value is None:
            return None
        near = loss is not None and abs(loss - value) <= NEARNESS * max(1, abs(value))
        if not near:
            self._since = None
        elif self._since is None:
            self._since = step
        self._step = step
        sentences = self.verdict()
        if not sentences or self._told:
            return None
        self._told = True
        return sentences[0]

    def verdict(self) -> list[str]:
        """One sentence where the loss has stayed at its collapsed value, else none."""
        if self._since is None or self._step - self._since < STAY * self._total:
            return []
        return [
            f"the loss has stayed at {self._collapsed:.4g} since step {self._since}:"
            " its value where all images have the same embedding"
        ]
