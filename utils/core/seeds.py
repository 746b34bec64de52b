"""Seeds derived by hashing, so that every random draw is a function of what it is for and of nothing else."""

import functools
import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Hash the parts (seed, purpose, step, …) to 32 bits, all that a CPU generator keeps of a seed."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator whose stream depends on the parts alone."""
    return torch.Generator("cpu").manual_seed(derive_seed(*parts))


@functools.lru_cache(maxsize=16)
def shuffled(count: int, seed: int) -> list[int]:
    """Return the numbers below `count` in an order that depends on the seed alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
