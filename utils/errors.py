"""Mistakes that a person can mend: shown as one message instead of a traceback."""

import errno
import sys

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class InputError(ValueError):
    """Bad data, a bad model folder or a service's refusal; the message says what, why and what to do."""


def show_input_errors_without_traceback() -> None:
    """Make an uncaught `InputError`, `ImportError` or full disk end the program with a message and exit status 1."""
    sys.excepthook = show_traceback_or_message


def show_traceback_or_message(kind, error, traceback) -> None:
    """Print an input error's message; hand every other exception to Python's own hook."""
    if issubclass(kind, OSError) and error.errno in CANNOT_WRITE:
        print(
            f"error: {error.filename or 'A file of the run'} could not be written: {error.strerror}.", file=sys.stderr
        )
    elif issubclass(kind, (InputError, ImportError)):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
