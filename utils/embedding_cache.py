"""Prompt embeddings on disk, a file for each prompt: whatever becomes of a file, only what was saved is ever loaded.

A file's name is a hash of all that its embeddings depend on: what the caller says of the text encoder, the token ids
and the attention mask. Name and identity are repeated inside, beside a checksum of the numbers, so that an entry that
is cut off, damaged, renamed or foreign is found out. Then, as when there is none, the caller encodes the prompt again.
The encoder's own files may be gone, since they take gigabytes, but those that are there must be as they were.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import time
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from utils.errors import InputError

logger = logging.getLogger(__name__)

_FORMAT = 2  # part of every key: entries of another layout are never looked at
_NAME = "embeds"
_PARTIAL = re.compile(r"\.embeds-[0-9a-f]{16}\.partial")
_DAY = 24 * 60 * 60  # seconds; by then, who was writing a file is dead


class EmbeddingCache:
    """The embeddings of one text encoder in a folder, which other encoders, runs and processes may share."""

    def __init__(self, folder: Path, identity: dict):
        """Remember the folder, which need not exist, and clear it of what dead runs left half written.

        Args:
            identity: What embeddings depend on beside ids and mask: the encoder's files (`model_identity`) and their
                variant, precision, kind of device, versions of packages. Whatever JSON can hold; of "files", a list,
                each must have been there when an entry was written.
        """
        self.folder = Path(folder)
        self.files = identity.get("files", [])
        self.identity = json.dumps({key: identity[key] for key in identity if key != "files"}, sort_keys=True)
        self._has_warned = False
        _remove_leftovers(self.folder)

    def load(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return a prompt's embeddings, None where there is no entry or, with a warning, no valid one.

        Args:
            ids: Token ids, (L,) int64.
            mask: The attention mask, (L,) of 0 and 1, or None if the encoder is called without.

        Returns:
            (L, D) on the CPU, in the dtype that was saved, bit for bit.
        """
        path = self.path_of(ids, mask)
        try:
            return _read(path.read_bytes(), self._metadata(path), self.files)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # damaged bytes raise nearly every type
            logger.warning("The cached embeddings %s cannot be used and are made anew: %s.", path, error)
            return None

    def load_all(self, ids: Tensor, masks: Tensor | None) -> list[Tensor | None]:
        """Return the embeddings of prompts, ids and masks (N, L) on any device, None for those without an entry."""
        masks = [None] * len(ids) if masks is None else masks.cpu()
        return [self.load(*row) for row in zip(ids.cpu(), masks)]

    def save(self, ids: Tensor, mask: Tensor | None, embeds: Tensor) -> bool:
        """Write a prompt's embeddings, (L, D) of any float dtype, so that others see them whole or not at all.

        Returns:
            Whether it could be written. If not, the first time also logs a warning, and the caller can go on.
        """
        if embeds.ndim != 2 or len(embeds) != len(ids):
            raise ValueError(f"embeds are {tuple(embeds.shape)}, not (L, D) with L = {len(ids)}, one row a token.")
        path = self.path_of(ids, mask)
        embeds = embeds.cpu().contiguous()
        metadata = self._metadata(path) | {"files": json.dumps(self.files)}
        content = safetensors.torch.save({_NAME: embeds}, metadata | {"checksum": _checksum(metadata, embeds)})
        try:
            _write(path, content)
        except OSError as error:
            if not self._has_warned:
                logger.warning("Embeddings cannot be cached in %s: %s. The run goes on without.", self.folder, error)
            self._has_warned = True
            return False
        return True

    def path_of(self, ids: Tensor, mask: Tensor | None) -> Path:
        """Return where a prompt's embeddings lie."""
        listed = None if mask is None else mask.long().tolist()
        key = json.dumps([_FORMAT, self.identity, ids.tolist(), listed])
        return self.folder / f"{hashlib.blake2b(key.encode(), digest_size=20).hexdigest()}.safetensors"

    def _metadata(self, path: Path) -> dict[str, str]:
        """Return what a file must say of itself."""
        return {"key": path.stem, "identity": self.identity}


def open_cache(folder: str | None, source: tuple, variant: str | None, dtype: str, device: str) -> EmbeddingCache:
    """Return the cache of a model's text encoder on one kind of device, for the installed packages.

    Args:
        folder: None takes `default_folder`.
        source: Arguments of `model_identity`: a folder or Hub id, a revision, a token.
    """
    model, revision, token = source
    # The last bits of a product depend on these.
    device = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else device
    device = torch.cuda.get_device_name() if device == "cuda" else device
    identity = model_identity(model, revision, token=token) | {"variant": variant, "dtype": dtype}
    identity |= {"device": device, "packages": [torch.__version__, transformers.__version__]}
    return EmbeddingCache(Path(folder) if folder else default_folder(), identity)


def model_identity(
    model: str, revision: str | None, parts: tuple[str, ...] = ("text_encoder",), token: str | None = None
) -> dict:
    """Return what tells a model's weights from others without reading them; not the variant, which a flag chooses.

    Args:
        model: A folder: its path, and name, size and time of each file of the parts. Else a Hub id: that and the
            commit, from the Hub or, without a connection, from the local copy.
        parts: Subfolders of the model; on the Hub each has a config.json.

    Raises:
        InputError: The Hub gave none of the model's files, and there is no local copy.
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
        raise InputError(
            f"The model {model} is no folder here, and the Hub gave none of its files: {error}"
        ) from error
    # …/snapshots/COMMIT/PART/config.json
    return {"model": model, "commits": [[part, Path(path).parents[1].name] for part, path in zip(parts, paths)]}


def default_folder() -> Path:
    """Return where caches of this project belong for this user; need not exist.

    Raises:
        InputError: The user has no home.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # as its standard says, a relative path does not count
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "dreambooth"
    except RuntimeError as error:  # as in a container whose user is a number without a name
        raise InputError("This user has no home folder for embeddings: give --cache_dir, or set HOME.") from error


def _read(content: bytes, expected: dict[str, str], files: list) -> Tensor:
    """Return the embeddings of a file's bytes, or raise an exception of any type if they are not the expected ones.

    Args:
        expected: What its metadata must say.
        files: What its metadata must list among others.
    """
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    embeds, expected = safetensors.torch.load(content)[_NAME], expected | {"files": metadata["files"]}
    if metadata != expected | {"checksum": _checksum(expected, embeds)}:
        raise ValueError("the file is damaged, or another prompt's or model's")
    if changed := [file[0] for file in files if file not in json.loads(metadata["files"])]:
        raise ValueError(f"the text encoder has other files now ({', '.join(changed)})")
    return embeds


def _checksum(metadata: dict[str, str], embeds: Tensor) -> str:
    """Hash embeddings and all that decides how their bytes are read, in hexadecimal digits."""
    head = json.dumps([metadata, str(embeds.dtype), list(embeds.shape)], sort_keys=True)
    digest = hashlib.blake2b(head.encode(), digest_size=20)
    digest.update(embeds.view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write a file under a name of its own and rename it; unsynced, since a power cut costs no more than encoding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".embeds-{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Delete what was being written more than a day ago; of the rest, someone may still be writing it."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if _PARTIAL.fullmatch(path.name) and path.stat().st_mtime < time.time() - _DAY:
                path.unlink()


def _list_files(folder: Path, part: str) -> list[list]:
    """Return the path, bytes and time of change in nanoseconds of each file of a part, sorted."""
    # Links to folders count: large models are often kept elsewhere.
    found = [Path(place, name) for place, _, names in os.walk(folder / part, followlinks=True) for name in names]
    states = [(path.relative_to(folder).as_posix(), path.stat()) for path in found if path.exists()]
    return sorted([name, state.st_size, state.st_mtime_ns] for name, state in states)
