"""Mistakes that a person can mend: shown as one message instead of a traceback."""

import contextlib
import errno
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

# What a disk, a mount or its permissions cause, and no mistake of the program.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class InputError(ValueError):
    """Bad data, a bad model folder or a service's refusal; the message says what, why and what to do."""


def cannot_write(path: Path, error: Exception) -> str:
    """Say that a file or folder could not be written, why, and how much room there is."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    reason, inner = getattr(error, "strerror", None) or error, getattr(error, "filename", None)
    reason = f"{reason} ({inner})" if inner and str(inner) != str(path) else reason
    return f"{path} could not be written: {reason}. {shutil.disk_usage(there).free / 1e9:.2f} GB are free there."


@contextlib.contextmanager
def naming_what_cannot_be_written(path: Path) -> Iterator[None]:
    """Turn an OSError into an InputError that names the file and the room there is."""
    try:
        yield
    except OSError as error:
        raise InputError(cannot_write(path, error)) from error


def show_input_errors_without_traceback() -> None:
    """Make an uncaught `InputError`, `ImportError` or full disk end the program with a message and exit status 1."""
    sys.excepthook = show_traceback_or_message


def show_traceback_or_message(kind, error, traceback) -> None:
    """Print an input error's message; hand every other exception to Python's own hook."""
    if issubclass(kind, OSError) and error.errno in OF_THE_DISK and error.filename:
        message = cannot_write(Path(error.filename), error)
    elif issubclass(kind, OSError) and error.errno in OF_THE_DISK:
        message = f"A file of the run could not be written: {error.strerror}."
    elif issubclass(kind, (InputError, ImportError)):
        message = str(error)
    elif issubclass(kind, KeyboardInterrupt):
        message = "stopped before anything was begun."
    else:
        return sys.__excepthook__(kind, error, traceback)
    tqdm.write(f"error: {message}", file=sys.stderr)  # `print` would go on in the line of a progress bar
