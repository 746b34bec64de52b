"""Mistakes that a person can mend: shown as one message instead of a traceback."""

import contextlib
import errno
import shutil
import sys
from collections.abc import Callable, Iterator
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


def exit_status(main: Callable[[], int]) -> int:
    """Call a program's `main` and return its exit status; what a person can mend is a message, and status 1.

    No excepthook does this, because trackers replace that by one that prints a traceback first.
    """
    try:
        return main()
    except KeyboardInterrupt:
        message, status = "stopped before anything was begun.", 130
    except (InputError, ImportError, OSError) as error:
        message, status = explain(error), 1
        if not message:
            raise
    tqdm.write(f"error: {message}", file=sys.stderr)  # `print` would go on in the line of a progress bar
    return status


def explain(error: Exception) -> str:
    """Return the message of an error that a person can mend, "" for others."""
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        words = f"A file of the run could not be written: {error.strerror}."
        return cannot_write(Path(error.filename), error) if error.filename else words
    if isinstance(error, (InputError, ImportError)):
        return str(error).rpartition(f"{InputError.__module__}.{InputError.__name__}: ")[2]  # of a data worker's
    return ""
