"""Writing a file whole: whatever happens, it holds its old content or the new one.

A file is written under a hidden name beside its place, synced, and renamed. A kill in between leaves the hidden file.
A file lock, which ends with its process, tells the leftovers of dead processes from the work of a live one.
"""

import contextlib
import io
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils.core.errors import explain_write_errors

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, every leftover counts as dead
    fcntl = None

_HELD = []  # open files, whose locks this process holds until it ends


def write_whole(
    path: Path,
    content: str | bytes,
    hidden_name: str = "",
    to_disk: bool = True,
    prepare: Callable[[Path], None] | None = None,
) -> None:
    """Write a file that others see either with its old content or with the new one.

    Args:
        content: A text is written as UTF-8, its line ends as they are.
        hidden_name: Of the file that is written first, if something looks for it; must be another one each time.
        to_disk: Wait until the file is on the disk, so that also a power cut leaves it whole.
        prepare: Called with the new file before it gets its name.
    """
    path = Path(path)
    temporary = path.with_name(hidden_name or f".saving-file-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file, hold_lock(temporary):
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if to_disk:
                os.fsync(file.fileno())
        if prepare is not None:
            prepare(temporary)
        os.replace(temporary, path)  # Windows renames closed files only
    except BaseException:
        with contextlib.suppress(OSError):  # the first error tells what is wrong
            temporary.unlink()
        raise
    if to_disk:
        sync_folder(path.parent)


def save_png(image: Any, path: Path) -> None:
    """Write a Pillow image as a PNG that other processes see either whole or not at all."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    with explain_write_errors(path):
        write_whole(path, content.getbuffer())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries (not its files' content) are on the disk."""
    if os.name != "nt":  # Windows opens no folders
        sync(folder)


def sync(path: Path) -> None:
    """Wait until a file's content or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Lock a file or folder, where the file system has locks, as a sign that its process lives."""
    if fcntl is None or not path.exists():
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Return whether a live process holds the lock of a file or folder."""
    if fcntl is None or not path.exists():
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def lock_for_life(path: Path) -> None:
    """Lock a file, made if need be, for the life of this process; forks of it, like data workers, hold no lock.

    This process must not open the file again: the lock would go with the first handle that is closed.

    Raises:
        BlockingIOError: Another process has it.
    """
    while fcntl is not None:
        _HELD.append(path.open("a+b"))
        try:
            fcntl.lockf(_HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise BlockingIOError(str(error)) from error
        except OSError:
            return  # a file system without locks
        # Since it was opened, another run may have put its own file in the place of this one.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(_HELD[-1].fileno())):
            return
