"""Prompt embeddings on disk, an entry of a `TensorCache` for each prompt, found by token ids and attention mask."""

from pathlib import Path

import torch
import transformers
from torch import Tensor

from utils.data.tensor_cache import TensorCache, circumstances, default_folder, model_identity

_SHOWN = 8  # token ids in a label


class EmbeddingCache:
    """The embeddings of one text encoder in a folder, which other encoders, runs and processes may share."""

    def __init__(self, folder: Path, identity: dict):
        """Take a folder and, as `TensorCache` does, an identity: what embeddings depend on beside ids and mask."""
        self.tensors = TensorCache(folder, "embeddings", identity)
        self.folder = self.tensors.folder

    def load(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return a prompt's embeddings, None where there is no entry or, with a warning, no valid one.

        Args:
            ids: Token ids, (L,) int64.
            mask: The attention mask, (L,) of 0 and 1, or None if the encoder is called without.

        Returns:
            (L, D) on the CPU, in the dtype that was saved, bit for bit.
        """
        return self.tensors.load(_key(ids, mask))

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
        first = " ".join(map(str, ids[:_SHOWN].tolist()))
        label = f"token ids {first}{' …' if len(ids) > _SHOWN else ''}"
        return self.tensors.save(_key(ids, mask), embeds, label)

    def path_of(self, ids: Tensor, mask: Tensor | None) -> Path:
        """Return where a prompt's embeddings lie."""
        return self.tensors.path_of(_key(ids, mask))


def open_cache(folder: str | None, source: tuple, variant: str | None, dtype: str, device: str) -> EmbeddingCache:
    """Return the cache of a model's text encoder on one kind of device, for the installed packages.

    Args:
        folder: None takes `default_folder`.
        source: A folder or Hub id, a revision, a token.
        dtype: The precision that the text encoder is loaded in.
        device: "cpu", "cuda" or another type.
    """
    model, revision, token = source
    identity = model_identity(model, revision, ("text_encoder",), token) | {"variant": variant, "dtype": dtype}
    identity |= circumstances(device, [torch.__version__, transformers.__version__])
    return EmbeddingCache(Path(folder) if folder else default_folder(), identity)


def _key(ids: Tensor, mask: Tensor | None) -> list:
    """Return what tells a prompt from others of its text encoder."""
    return [ids.tolist(), None if mask is None else mask.long().tolist()]
