"""Prompt embeddings and image latents on disk, a file each: what is loaded is what was saved, bit for bit, or nothing.

A file's name is a hash of all that its tensor depends on: its kind, the model and the circumstances of the run
(together the identity), and a key. The file repeats name and identity, with a checksum. So an entry that is cut off,
damaged, renamed or foreign is found out, and its tensor is made again. The model's own files may be deleted, since
they take gigabytes, but those that exist must be unchanged.

The time of change of an entry is that of its last use: `python -m utils.inspect_cache` prunes by it.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import huggingface_hub
import PIL
import safetensors.torch
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from utils.core.atomic_files import write_whole
from utils.core.errors import UserError
from utils.data.decode_images import READING

logger = logging.getLogger(__name__)

ENTRY = re.compile(r"[0-9a-f]{40}\.safetensors")
LEFTOVER = re.compile(r"\.(?:tensor|embeds)-[0-9a-f]{16}\.partial")  # the second is the name before format 3
WRITING = 24 * 60 * 60  # seconds; the process that began a file so long ago is dead
_FORMAT = 4  # part of every key: entries of another layout are never looked at


class Kind(NamedTuple):
    """A kind of tensors."""

    tensor: str  # its name in a file
    part: str  # of the model that makes it
    source: str  # what it is made from


KINDS = {
    "embeddings": Kind("embeds", "text_encoder", "prompts"),  # (L, D)
    "latents": Kind("moments", "vae", "crops"),  # (2, C, h, w): a posterior, so that each visit can sample anew
}


class DamagedEntry(ValueError):
    """A file that no cache of this version wrote under this name, as it is now."""


class TensorCache:
    """The tensors of one kind and model, in a folder that other kinds, models, runs and processes may share."""

    def __init__(self, folder: Path, kind: str, identity: dict):
        """Remember the folder, which need not exist, and delete what killed runs left half written in it.

        Args:
            kind: One of `KINDS`.
            identity: What tensors depend on beside their keys, as JSON can hold it. "files" is a list apart: an entry
                is valid if it was written when each of them was there.
        """
        self.folder, self.kind, self.title = Path(folder), kind, kind.capitalize()
        self.files = identity.get("files", [])
        rest = {key: identity[key] for key in identity if key != "files"}
        self.identity = json.dumps(rest | {"kind": kind}, sort_keys=True)
        self.warned = set()
        _remove_leftovers(self.folder)

    def fill(self, keys: list, make: Callable[[list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """Return the tensors of keys on the CPU; make and save those that are not in the cache.

        Args:
            make: Called with the places in `keys` of the missing tensors, if there are any; yields these in order.
        """
        tensors = [self.load(key) for key in keys]
        missing = [place for place, tensor in enumerate(tensors) if tensor is None]
        if missing:
            counts = f"{len(missing)} of {len(keys)} {KINDS[self.kind].source}"
            logger.info(f"Encoding {counts}; the others are in {self.folder}.")
            for tensor, place in zip(make(missing), missing, strict=True):
                tensors[place] = tensor.detach().cpu()
                self.save(keys[place], tensors[place])
        return tensors

    def load(self, key: Any) -> Tensor | None:
        """Return a tensor on the CPU, bit for bit as it was saved; None if there is no entry, or no valid one."""
        path = self.path_of(key)
        try:
            tensor, files = _read(path, self.identity, KINDS[self.kind].tensor)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DamagedEntry as error:
            logger.warning("The cached %s %s cannot be used and are made anew: %s.", self.kind, path, error)
            return None
        except OSError as error:
            self._warn("reading", f"{self.title} cannot be read from {self.folder} and are made anew: {error}.")
            return None
        if changed := [file[0] for file in self.files if file not in files]:
            reason = f"the model has other files now ({', '.join(changed)})"
            self._warn("files", f"{self.title} in {self.folder} cannot be used and are made anew: {reason}.")
            return None
        with contextlib.suppress(OSError):  # another user's, or read-only
            os.utime(path)
        return tensor

    def save(self, key: Any, tensor: Tensor) -> bool:
        """Write a tensor of any shape, dtype and device, so that others see it whole or not at all.

        Args:
            key: What the tensor depends on beside the identity, as JSON can hold it.

        Returns:
            Whether it could be written. If not, the first time also logs a warning.
        """
        path, tensor = self.path_of(key), tensor.detach().cpu().contiguous()
        metadata = {"format": str(_FORMAT), "key": path.stem, "identity": self.identity}
        metadata["files"] = json.dumps(self.files)
        metadata["checksum"] = _checksum(metadata, tensor)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = safetensors.torch.save({KINDS[self.kind].tensor: tensor}, metadata)
            # Unsynced: after a power cut, the checksum finds what is damaged, and it is made again.
            write_whole(path, content, f".tensor-{secrets.token_hex(8)}.partial", to_disk=False)
        except OSError as error:
            self._warn("writing", f"{self.title} cannot be cached in {self.folder}: {error}. The run goes on without.")
            return False
        return True

    def path_of(self, key: Any) -> Path:
        """Return where a key's tensor lies."""
        content = json.dumps([_FORMAT, self.identity, key], sort_keys=True)
        return self.folder / f"{hashlib.blake2b(content.encode(), digest_size=20).hexdigest()}.safetensors"

    def _warn(self, topic: str, text: str) -> None:
        """Log a warning once that would be the same for every entry."""
        if topic not in self.warned:
            logger.warning("%s", text)
        self.warned.add(topic)


def open_cache(
    kind: str, folder: str | None, source: tuple, variant: str | None, dtype: str, device: str
) -> TensorCache:
    """Return the cache of what a part of a model makes on one kind of device, with the installed packages.

    Args:
        kind: One of `KINDS`.
        folder: None takes `default_folder`.
        source: The model's folder or Hub id, a revision, a token.
        dtype: The precision in which the part is loaded.
        device: "cpu", "cuda" or another type.
    """
    model, revision, token = source
    versions = [transformers.__version__]
    if kind == "latents":
        versions = [diffusers.__version__, PIL.__version__, str(READING)]
    identity = model_identity(model, revision, (KINDS[kind].part,), token) | {"variant": variant, "dtype": dtype}
    identity |= circumstances(device, [torch.__version__, *versions])
    return TensorCache(Path(folder) if folder else default_folder(), kind, identity)


def prompt_keys(ids: Tensor, masks: Tensor | None) -> list[list]:
    """Return the key of each prompt.

    Args:
        ids: (N, L) int64 token ids on any device.
        masks: (N, L) attention masks of 0 and 1, or None if the text encoder is called without.
    """
    rows = [None] * len(ids) if masks is None else masks.long().tolist()
    return [list(pair) for pair in zip(ids.tolist(), rows, strict=True)]


def check_moments(moments: Tensor, name: str) -> Tensor:
    """Return what a VAE makes of a picture, mean and standard deviation, (2, C, h, w), if all its numbers are usable.

    Raises:
        UserError: A number is NaN or infinite; the message has the picture's name.
        ValueError: It is another shape, or no standard deviation.
    """
    if moments.ndim != 4 or len(moments) != 2 or not moments.is_floating_point():
        words = f"{tuple(moments.shape)} {moments.dtype}"
        raise ValueError(f"moments are {words}, not (2, C, h, w) of floats: a picture's mean and deviation.")
    if wrong := int((~moments.isfinite()).sum()):
        raise UserError(
            f"{wrong} of the {moments.numel()} numbers that the VAE makes of {name} are NaN or infinite, in "
            f"{moments.dtype}: choose another precision (float16 overflows in many VAEs) or another VAE."
        )
    if (moments[1] < 0).any():
        raise ValueError("moments[1] has numbers below 0, as no standard deviation has: is it the log variance?")
    return moments


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
    get = functools.partial(huggingface_hub.hf_hub_download, model, revision=revision, token=token)
    try:
        paths = [get(f"{part}/config.json") for part in parts]
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"The model {model} is no folder here, and the Hub gave none of its files: {error}") from error
    # …/snapshots/COMMIT/PART/config.json
    return {
        "model": model,
        "commits": [[part, Path(path).parents[1].name] for part, path in zip(parts, paths, strict=True)],
    }


def content_hash(path: Path) -> str:
    """Return 40 hexadecimal digits that tell a file's bytes from others."""
    state = Path(path).stat()
    return _hash_content(path, state.st_size, state.st_mtime_ns)


def read_samples(path: Path) -> bytes:
    """Return 64 pieces of up to 4 KiB from all over a file; of up to 256 KiB, the whole file."""
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


def _read(path: Path, identity: str, name: str) -> tuple[Tensor, list[list]]:
    """Return a file's tensor of some name, and the model's files when it was written.

    Raises:
        DamagedEntry: It is not, bit for bit, what a cache of this version and identity wrote under this name.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        if metadata.get("format") != str(_FORMAT):
            raise DamagedEntry("it is of another version of this program, or damaged")
        tensor, checksum = safetensors.torch.load(content)[name], metadata.pop("checksum")
        if checksum != _checksum(metadata, tensor):
            raise DamagedEntry("it is damaged")
        if metadata["key"] != path.stem:
            raise DamagedEntry("it is another entry's, under this name")
        if metadata["identity"] != identity:
            raise DamagedEntry("it is another model's")
        return tensor, json.loads(metadata["files"])
    except DamagedEntry:
        raise
    except Exception as error:  # damaged bytes raise nearly every type
        raise DamagedEntry("it is damaged") from error


def _checksum(metadata: dict[str, str], tensor: Tensor) -> str:
    """Hash a tensor and all that decides how its bytes are read, in hexadecimal digits."""
    head = json.dumps([metadata, str(tensor.dtype), list(tensor.shape)], sort_keys=True)
    digest = hashlib.blake2b(head.encode(), digest_size=20)
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _remove_leftovers(folder: Path) -> None:
    """Delete what was being written more than a day ago; a live process may still write the others."""
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


@functools.lru_cache(maxsize=65536)
def _hash_content(path: Path, _size: int, _time: int) -> str:
    """Hash a file, once for each state of it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=20)).hexdigest()
