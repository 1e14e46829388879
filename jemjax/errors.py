"""What goes wrong through no fault of the library, told in a sentence."""


class UserError(Exception):
    """A message for the person at the keyboard: what, where, got, expected, the fix.

    The command line prints it without a traceback and leaves with `exit_code`.
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
    """A saved state that cannot be used."""

    exit_code = 5
