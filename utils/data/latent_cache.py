"""What a VAE makes of pictures, on disk: an entry of a `TensorCache` for each picture as it was cut and scaled.

An entry is no latent but the posterior from which one is drawn (arXiv 2112.10752, section 3.1): its mean and standard
deviation. So each visit of a picture can draw anew, as without a cache.
"""

import functools
import hashlib
from pathlib import Path

import diffusers
import PIL
import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.data.decode_images import READING
from utils.data.tensor_cache import TensorCache, circumstances, default_folder, model_identity


class LatentCache:
    """The latents of one VAE in a folder, which other models, runs and processes may share."""

    def __init__(self, folder: Path, identity: dict):
        """Take a folder and, as `TensorCache` does, an identity: what latents depend on beside the picture."""
        self.tensors = TensorCache(folder, "latents", identity)
        self.folder = self.tensors.folder

    def load(self, key: list) -> Tensor | None:
        """Return a picture's moments, None where there is no entry or, with a warning, no valid one.

        Args:
            key: All that decides the pixels, as JSON can hold it: `content_hash` of the file, scaled size, crop box,
                flip, resampling and whatever else the caller does to them.

        Returns:
            (2, C, h, w): mean and standard deviation, on the CPU, in the dtype that was saved, bit for bit.
        """
        return self.tensors.load(key)

    def save(self, key: list, moments: Tensor, label: str) -> bool:
        """Write a picture's moments, so that others see them whole or not at all.

        Args:
            moments: (2, C, h, w): mean and standard deviation, in the VAE's own dtype.
            label: The photo's file name, to be listed; no part of the key.

        Returns:
            Whether it could be written. If not, the first time also logs a warning, and the caller can go on.

        Raises:
            UserError: A number is NaN or infinite.
            ValueError: It is another shape, or no standard deviation.
        """
        moments = moments.detach().cpu()
        if moments.ndim != 4 or len(moments) != 2 or not moments.is_floating_point():
            words = f"{tuple(moments.shape)} {moments.dtype}"
            raise ValueError(f"moments are {words}, not (2, C, h, w) of floats: a picture's mean and deviation.")
        if wrong := int((~moments.isfinite()).sum()):
            raise UserError(
                f"{wrong} of the {moments.numel()} numbers that the VAE makes of {label} are NaN or infinite, in "
                f"{moments.dtype}: choose another precision (float16 overflows in many VAEs) or another VAE."
            )
        if (moments[1] < 0).any():
            raise ValueError("moments[1] has numbers below 0, as no standard deviation has: is it the log variance?")
        return self.tensors.save(key, moments, label)

    def path_of(self, key: list) -> Path:
        """Return where a picture's moments lie."""
        return self.tensors.path_of(key)


def open_latents(folder: str | None, source: tuple, variant: str | None, dtype: str, device: str) -> LatentCache:
    """Return the cache of a model's VAE on one kind of device, for the installed packages.

    Args:
        folder: None takes `default_folder`.
        source: A folder or Hub id, a revision, a token.
        dtype: The precision that the VAE is loaded in.
        device: "cpu", "cuda" or another type.
    """
    model, revision, token = source
    identity = model_identity(model, revision, ("vae",), token) | {"variant": variant, "dtype": dtype}
    identity |= circumstances(device, [torch.__version__, diffusers.__version__, PIL.__version__, str(READING)])
    return LatentCache(Path(folder) if folder else default_folder(), identity)


def content_hash(path: Path) -> str:
    """Return 40 hexadecimal digits that tell a file's bytes from others."""
    state = Path(path).stat()
    return _hash(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _hash(path: Path, _size: int, _time: int) -> str:
    """Hash a file, once for each state of it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=20)).hexdigest()
