"""What goes wrong through no fault of the library, told in a sentence."""

import contextlib
import errno
import os
from collections.abc import Iterator


class UserError(Exception):
    """A message for the person at the keyboard: what, where, got, expected, the fix.

    The command line prints it without a traceback and leaves with `exit_code`:
    2 for usage and configuration, 3 for data, 4 for numbers that diverge, 5 for saved
    states, and other files of a run, that cannot be written or used.
    """

    exit_code = 2


class DataError(UserError):
    """Data that cannot be used: what, where, what was found, and the fix.

    Where `hangs` is true, a thread that reads them will not end by itself.
    """

    exit_code = 3
    hangs = False


class DivergenceError(UserError):
    """A run whose numbers are no longer finite."""

    exit_code = 4


class CheckpointError(UserError):
    """A saved state that cannot be written or used."""

    exit_code = 5


class CheckpointDamaged(CheckpointError):
    """A saved state whose files are not those that were written."""


class DiskError(UserError):
    """A file that cannot be written, since the disk is full or read-only."""

    exit_code = 5


@contextlib.contextmanager
def explaining_disk() -> Iterator[None]:
    """Says what can be done where a disk is full or read-only.

    Raises:
        DiskError: in place of Python's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise DiskError(
            f"{error.filename or 'the output'}: cannot be written ({error.strerror});"
            " free space or mend the disk, and start again, a run with --resume"
        ) from error


def printable(text: str | os.PathLike[str]) -> str:
    """Text in characters that show, whatever bytes a file is named by.

    Control characters, line ends, marks that turn the direction of writing, and bytes
    that are not UTF-8 are escaped.
    """
    return "".join(map(_printable, os.fspath(text)))


def printable_lines(text: str) -> str:
    """The same of text of several lines, which it remains."""
    return "\n".join(map(printable, text.split("\n")))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
