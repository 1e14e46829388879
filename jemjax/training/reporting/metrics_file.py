"""What a run tells programs: metrics.jsonl."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jemjax.training.storage.files import replacing, to_json


class MetricsFile:
    """`metrics.jsonl`: a line for each logged step, in order, each step once.

    A line is a JSON object: "step", and figures by name. One that is not finite, as the
    loss of a skipped step may be, is null.
    """

    def __init__(
        self,
        path: Path | None,
        first_step: int,
        say: Callable[[str], None] = print,
    ):
        """Opens the file, and removes lines of `first_step` and after.

        Those are of a run that was interrupted after its last checkpoint, and is now
        resumed from it; a last line that is cut off goes too. Without a path nothing
        is written.
        """
        self._file: io.FileIO | None = None
        self._say, self._told, self._waiting = say, False, b""
        if path is None:
            return
        kept = [row for row in read_metrics(path) if row["step"] < first_step]
        with replacing(path) as file:
            file.writelines(to_json(row) + "\n" for row in kept)
        self._file = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one line; where the disk is full it waits for the next."""
        if self._file:
            self._waiting += to_json(row).encode() + b"\n"
            self._append()

    def _append(self) -> None:
        assert self._file
        try:
            while self._waiting:
                written = self._file.write(self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as error:
            if not self._told:
                self._told = True
                self._say(
                    f"WARNING: {self._file.name}: cannot be written ({error.strerror});"
                    " its lines are kept until it can"
                )

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._append()
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, without a last line that a kill cut off."""
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
