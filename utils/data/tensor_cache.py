"""Tensors on disk, a file each: whatever becomes of a file, only what was saved is ever loaded.

A file's name is a hash of all that its tensor depends on: its kind, what the caller says of the model that made it,
and a key. Name and identity are repeated inside, beside a checksum of the numbers, so that an entry that is cut off,
damaged, renamed or foreign is found out. Then, as when there is none, the caller makes the tensor again. The model's
own files may be gone, since they take gigabytes, but those that are there must be as they were.

The time of change of an entry is that of its last use, by which `python -m utils.inspect_cache` prunes.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from utils.core.atomic_files import write_whole
from utils.core.errors import UserError

logger = logging.getLogger(__name__)

KINDS = {"embeddings": "embeds", "latents": "moments"}  # and what the tensor is called in a file
ENTRY = re.compile(r"[0-9a-f]{40}\.safetensors")
LEFTOVER = re.compile(r"\.(?:tensor|embeds)-[0-9a-f]{16}\.partial")  # the second is the name before format 3
WRITING = 24 * 60 * 60  # seconds; by then, who was writing a file is dead
_FORMAT = 4  # part of every key: entries of another layout are never looked at


class DamagedEntry(ValueError):
    """A file that no cache of this version has written under this name, as it is now."""


@dataclass(frozen=True)
class Entry:
    """What a whole file holds."""

    identity: str  # what the tensor depends on beside the key, as JSON
    files: list[list]  # of the model, when the entry was written
    label: str
    tensor: Tensor

    @property
    def source(self) -> tuple[str, str]:
        """Return the kind and the model, "?" if its caller gave none."""
        identity = json.loads(self.identity)
        return identity["kind"], str(identity.get("model", "?"))


class TensorCache:
    """The tensors of one kind and model in a folder, which other kinds, models, runs and processes may share."""

    def __init__(self, folder: Path, kind: str, identity: dict):
        """Remember the folder, which need not exist, and clear it of what dead runs left half written.

        Args:
            kind: One of `KINDS`.
            identity: What tensors depend on beside their keys: the model's files (`model_identity`) and their variant,
                precision, `circumstances`. Whatever JSON can hold; of "files", a list, each must have been there when
                an entry was written.
        """
        self.folder, self.kind, self._name = Path(folder), kind, KINDS[kind]
        self.files = identity.get("files", [])
        rest = {key: identity[key] for key in identity if key != "files"}
        self.identity = json.dumps(rest | {"kind": kind}, sort_keys=True)
        self._warned = set()
        _remove_leftovers(self.folder)

    def load(self, key: Any) -> Tensor | None:
        """Return a tensor on the CPU as it was saved, bit for bit; None without an entry or, warned, a valid one."""
        path = self.path_of(key)
        try:
            entry = read_entry(path)
            if entry.identity != self.identity:
                raise DamagedEntry("it is another model's")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DamagedEntry as error:
            logger.warning("The cached %s %s cannot be used and are made anew: %s.", self.kind, path, error)
            return None
        except OSError as error:
            self._warn("reading", f"{self._title} cannot be read from {self.folder} and are made anew: {error}.")
            return None
        if changed := [file[0] for file in self.files if file not in entry.files]:
            reason = f"the model has other files now ({', '.join(changed)})"
            self._warn("files", f"{self._title} in {self.folder} cannot be used and are made anew: {reason}.")
            return None
        with contextlib.suppress(OSError):  # another user's, or read-only
            os.utime(path)
        return entry.tensor

    def save(self, key: Any, tensor: Tensor, label: str = "") -> bool:
        """Write a tensor of any shape, dtype and device, so that others see it whole or not at all.

        Args:
            key: What the tensor depends on beside the identity; whatever JSON can hold.
            label: What a person may call it; no part of the key.

        Returns:
            Whether it could be written. If not, the first time also logs a warning, and the caller can go on.
        """
        path, tensor = self.path_of(key), tensor.detach().cpu().contiguous()
        metadata = {"format": str(_FORMAT), "key": path.stem, "identity": self.identity}
        # A file name may hold bytes that are no text.
        label = label.encode("utf-8", "backslashreplace").decode()
        metadata |= {"files": json.dumps(self.files), "label": label}
        metadata["checksum"] = _checksum(metadata, tensor)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = safetensors.torch.save({self._name: tensor}, metadata)
            # Unsynced: after a power cut, the checksum finds what is damaged, and it is made again.
            write_whole(path, content, f".tensor-{secrets.token_hex(8)}.partial", to_disk=False)
        except OSError as error:
            self._warn(
                "writing", f"{self._title} cannot be cached in {self.folder}: {error}. The run goes on without."
            )
            return False
        return True

    def path_of(self, key: Any) -> Path:
        """Return where a key's tensor lies."""
        content = json.dumps([_FORMAT, self.identity, key], sort_keys=True)
        return self.folder / f"{hashlib.blake2b(content.encode(), digest_size=20).hexdigest()}.safetensors"

    @property
    def _title(self) -> str:
        """Return the kind as a sentence begins with it."""
        return self.kind.capitalize()

    def _warn(self, topic: str, text: str) -> None:
        """Log a warning that would be the same for every entry, once."""
        if topic not in self._warned:
            logger.warning("%s", text)
        self._warned.add(topic)


def read_entry(path: Path) -> Entry:
    """Return what a file holds, whoever wrote it.

    Raises:
        DamagedEntry: It is not, bit for bit, what a cache of this version wrote under this name.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        return _parse(content, path.stem)
    except DamagedEntry:
        raise
    except Exception as error:  # damaged bytes raise nearly every type
        raise DamagedEntry("it is damaged") from error


def circumstances(device: str, versions: list[str]) -> dict:
    """Return what the last bits of a model's output depend on beside its weights and precision, for an identity.

    Args:
        device: "cpu", "cuda" or another type.
        versions: Of the packages that the model is made of.
    """
    found = {"device": device, "packages": versions}
    if device == "cpu":
        found["device"] = f"{torch.get_num_threads()} CPU threads"
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        kernels = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        found["arithmetic"] = [*kernels, torch.are_deterministic_algorithms_enabled()]
    return found


def model_identity(model: str, revision: str | None, parts: tuple[str, ...], token: str | None = None) -> dict:
    """Return what tells a model's weights from others without reading all of them; a flag chooses the variant.

    Args:
        model: A folder: its path, and name, size, time and samples of each file of the parts. Else a Hub id: that and
            the commit, from the Hub or, without a connection, from the local copy.
        parts: Subfolders of the model; on the Hub each has a config.json.

    Raises:
        UserError: The Hub gave none of the model's files, and there is no local copy.
    """
    if Path(model).is_dir():
        folder = Path(model).resolve()
        return {"model": str(folder), "files": [entry for part in parts for entry in _list_files(folder, part)]}
    try:
        paths = [
            huggingface_hub.hf_hub_download(model, f"{part}/config.json", revision=revision, token=token)
            for part in parts
        ]
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"The model {model} is no folder here, and the Hub gave none of its files: {error}") from error
    # …/snapshots/COMMIT/PART/config.json
    return {"model": model, "commits": [[part, Path(path).parents[1].name] for part, path in zip(parts, paths)]}


def read_samples(path: Path) -> bytes:
    """Return 64 pieces that lie all over a file, of 4 KiB at most; of one of up to 256 KiB all that is in it."""
    size, pieces = path.stat().st_size, []
    with path.open("rb") as file:
        for place in range(0, size, max(1, size // 64)):
            file.seek(place)
            pieces.append(file.read(4096))
    return b"".join(pieces)


def default_folder() -> Path:
    """Return where caches of this project belong for this user; need not exist.

    Raises:
        UserError: The user has no home.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # as its standard says, a relative path does not count
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "dreambooth"
    except RuntimeError as error:  # as in a container whose user is a number without a name
        raise UserError("This user has no home folder for a cache: give --cache_dir, or set HOME.") from error


def _parse(content: bytes, key: str) -> Entry:
    """Return the entry that a file's bytes are, or raise an exception of any type if they are not the key's."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    if metadata.get("format") != str(_FORMAT):
        raise DamagedEntry("it is of another version of this program, or damaged")
    name = KINDS[json.loads(metadata["identity"])["kind"]]
    tensor, checksum = safetensors.torch.load(content)[name], metadata.pop("checksum")
    if checksum != _checksum(metadata, tensor):
        raise DamagedEntry("it is damaged")
    if metadata["key"] != key:
        raise DamagedEntry("it is another entry's, under this name")
    return Entry(metadata["identity"], json.loads(metadata["files"]), metadata["label"], tensor)


def _checksum(metadata: dict[str, str], tensor: Tensor) -> str:
    """Hash a tensor and all that decides how its bytes are read, in hexadecimal digits."""
    head = json.dumps([metadata, str(tensor.dtype), list(tensor.shape)], sort_keys=True)
    digest = hashlib.blake2b(head.encode(), digest_size=20)
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _remove_leftovers(folder: Path) -> None:
    """Delete what was being written more than a day ago; of the rest, someone may still be writing it."""
    names = []
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(folder) if LEFTOVER.fullmatch(name)]
    for name in names:
        with contextlib.suppress(OSError):
            if (folder / name).stat().st_mtime < time.time() - WRITING:
                (folder / name).unlink()


def _list_files(folder: Path, part: str) -> list[list]:
    """Return the path, bytes, time of change in nanoseconds and a hash of samples of each file of a part, sorted.

    The time alone may be the same, as of files that come out of an archive.
    """
    # Links to folders count: large models are often kept elsewhere.
    found = [Path(place, name) for place, _, names in os.walk(folder / part, followlinks=True) for name in names]
    states = [(path.relative_to(folder).as_posix(), path.stat(), path) for path in found if path.exists()]
    return sorted([name, state.st_size, state.st_mtime_ns, _hash_samples(path)] for name, state, path in states)


def _hash_samples(path: Path) -> int:
    """Return a hash of samples of a file; 0 of what cannot be read, and so is no part of the model."""
    content = b""
    with contextlib.suppress(OSError):
        content = read_samples(path) if path.is_file() else b""  # a pipe would be waited for
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest()) if content else 0
