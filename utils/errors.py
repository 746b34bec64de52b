"""Mistakes that a person can mend: shown as one message instead of a traceback."""

import sys


class InputError(ValueError):
    """Bad data, a bad model folder or a service's refusal; the message says what, why and what to do."""


def show_input_errors_without_traceback() -> None:
    """Make an uncaught `InputError` or `ImportError` end the program with its message and exit status 1."""
    sys.excepthook = _excepthook


def _excepthook(kind, error, traceback) -> None:
    """Print an input error's message; hand every other exception to Python's own hook."""
    if issubclass(kind, (InputError, ImportError)):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
