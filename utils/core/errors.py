"""Mistakes that a person can mend: shown as one message instead of a traceback."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

# What a disk, a mount or its permissions cause, and no mistake of the program.
OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EMFILE, errno.ENFILE),
)
SHOWN = 10  # entries of a list in a message


class UserError(ValueError):
    """Bad data, a bad model folder or a service's refusal; the message says what, why and what to do."""


def list_first(entries: Sequence[Any]) -> str:
    """Return the first ten entries, and how many more there are."""
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return ", ".join(map(str, entries[:SHOWN])) + more


def cannot_write(path: Path, error: Exception) -> str:
    """Say that a file or folder could not be written, why, and how much room there is."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    reason, inner = getattr(error, "strerror", None) or error, getattr(error, "filename", None)
    reason = f"{reason} ({inner})" if inner and str(inner) != str(path) else reason
    return f"{path} could not be written: {reason}. {shutil.disk_usage(there).free / 1e9:.2f} GB are free there."


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn the system's OSErrors, which have a number, into InputErrors that name the file and the room there is."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(cannot_write(path, error)) from error


def exit_status(main: Callable[[], int]) -> int:
    """Call a program's `main` and return its exit status; what a person can mend is a message, and status 1.

    No excepthook does this, because trackers replace that by one that prints a traceback first.
    """
    keep_streams()
    try:
        return main()
    except KeyboardInterrupt:
        message, status = "stopped before anything was begun.", 130
    except (UserError, ImportError, OSError) as error:
        message, status = explain(error), 1
        if not message:
            raise
    tqdm.write(f"error: {message}", file=sys.stderr)  # `print` would go on in the line of a progress bar
    return status


def keep_streams() -> None:
    """Let neither a reader that has gone, nor a log on a full disk, nor a closed stream end or harm the run."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # else the next file would get the number, and with it what C libraries print
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (stream and LastingStream(stream) for stream in (sys.stdout, sys.stderr))


class LastingStream:
    """A text stream that drops what cannot be written, and writes letters that its encoding lacks as their codes."""

    def __init__(self, stream: TextIO):
        """Stand before another stream."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        """Flush, if there is anybody to read it."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Be the other stream in all else."""
        return getattr(self._stream, name)


def explain(error: Exception) -> str:
    """Return the message of an error that a person can mend, "" for others."""
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        words = f"A file of the run could not be written: {error.strerror}."
        return cannot_write(Path(error.filename), error) if error.filename else words
    if isinstance(error, (UserError, ImportError)):
        return str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2]  # of a data worker's
    return ""
