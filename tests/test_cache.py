"""What is the same for all kinds of cached tensors: filling a cache, and reading what earlier versions wrote."""

from collections.abc import Iterator
from pathlib import Path

import diffusers
import huggingface_hub
import PIL
import pytest
import torch
import transformers

from utils.data.cache import TensorCache, open_cache, prompt_keys

COMMIT = "1" * 40
OPTIONS = {"source": ("owner/name", None, None), "device": "cpu"}
# Two files as the version of November 2026 wrote them; the labels in them are no longer written.
LATENTS = b'\xf8\x01\0\0\0\0\0\0{"__metadata__":{"key":"ecf247086b45b3751f90a6c2592f51e1c5837801","files":"[]","checksum":"ea62d4933f06499b8aefc3e7acf491d999ab5918","format":"4","identity":"{\\"commits\\": [[\\"vae\\", \\"1111111111111111111111111111111111111111\\"]], \\"device\\": \\"4 CPU threads\\", \\"dtype\\": \\"torch.float16\\", \\"kind\\": \\"latents\\", \\"model\\": \\"owner/name\\", \\"packages\\": [\\"1.0\\", \\"1.0\\", \\"1.0\\", \\"1\\"], \\"variant\\": \\"fp16\\"}","label":"dog.jpg"},"moments":{"dtype":"F16","shape":[2,4,1,1],"data_offsets":[0,16]}}   \0\0\0<\0@\0B\0D\0E\0F\0G'  # noqa: E501
EMBEDDINGS = b'\xf8\x01\0\0\0\0\0\0{"__metadata__":{"files":"[]","label":"token ids 0 1 2","key":"01765be4a98056ba69ae165b261548f1a65bdc10","checksum":"7ecbaa09e5e9ac07890340a770fe53c574f4f7ce","format":"4","identity":"{\\"commits\\": [[\\"text_encoder\\", \\"1111111111111111111111111111111111111111\\"]], \\"device\\": \\"4 CPU threads\\", \\"dtype\\": \\"torch.bfloat16\\", \\"kind\\": \\"embeddings\\", \\"model\\": \\"owner/name\\", \\"packages\\": [\\"1.0\\", \\"1.0\\"], \\"variant\\": null}"},"embeds":{"dtype":"BF16","shape":[3,2],"data_offsets":[0,12]}}      \0\0\x80?\0@@@\x80@\xa0@'  # noqa: E501


@pytest.fixture
def machine(tmp_path, monkeypatch) -> None:
    """Be a machine with a model of the Hub, four threads and version 1.0 of each package."""
    for part in ("vae", "text_encoder"):
        folder = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT / part
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (tmp_path / "hub" / "models--owner--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--name" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for package in (torch, diffusers, transformers, PIL):
        monkeypatch.setattr(package, "__version__", "1.0")


@pytest.mark.parametrize(
    ("kind", "variant", "dtype", "key", "content", "tensor"),
    [
        (
            *("latents", "fp16", "torch.float16", ["0" * 40, (64, 80), (0, 8, 64, 72), False, "3", "False"], LATENTS),
            torch.arange(8).reshape(2, 4, 1, 1).half(),
        ),
        (
            *("embeddings", None, "torch.bfloat16"),
            *(prompt_keys(torch.arange(3)[None], torch.tensor([[1, 1, 0]]))[0], EMBEDDINGS),
            torch.arange(6).reshape(3, 2).bfloat16(),
        ),
    ],
    ids=["latents", "embeddings"],
)
def test_entries_of_earlier_versions_are_found(machine, tmp_path, kind, variant, dtype, key, content, tensor):
    """Under the same name, for the same key, in the same format; they take hours to make."""
    cache = open_cache(kind, folder=str(tmp_path / "cache"), variant=variant, dtype=dtype, **OPTIONS)
    name = content[content.index(b'"key":"') + 7 :][:40].decode()
    assert cache.path_of(key) == tmp_path / "cache" / f"{name}.safetensors"
    cache.folder.mkdir()
    cache.path_of(key).write_bytes(content)
    (loaded,) = cache.fill([key], refuse)
    assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor)


def refuse(places: list[int]) -> Iterator[torch.Tensor]:
    """Make tensors where none are missing."""
    raise AssertionError(f"{places} are asked for")


def test_filling_makes_what_is_missing_alone(tmp_path, caplog):
    """In the order of the keys, with one message; the second time nothing is made."""
    caplog.set_level("INFO")
    cache, asked = TensorCache(tmp_path / "cache", "latents", {}), []
    cache.save("b", torch.tensor([10.0]))

    def make(places: list[int]) -> Iterator[torch.Tensor]:
        """Make numbered tensors, and note when the last one is taken."""
        asked.append(places)
        for place in places:
            yield torch.tensor([float(place)], requires_grad=True)
        asked.append("freed")

    found = cache.fill(["a", "b", "c"], make)
    assert [tensor.tolist() for tensor in found] == [[0], [10], [2]] and not any(one.requires_grad for one in found)
    assert asked == [[0, 2], "freed"]
    assert caplog.messages == [f"Encoding 2 of 3 crops; the others are in {tmp_path / 'cache'}."]
    again = TensorCache(tmp_path / "cache", "latents", {}).fill(["c", "a"], refuse)
    assert [tensor.tolist() for tensor in again] == [[2], [0]] and len(caplog.messages) == 1


def test_filling_goes_on_without_a_disk(tmp_path, caplog):
    """All is made, one warning is enough."""
    (tmp_path / "file").touch()
    cache = TensorCache(Path(tmp_path / "file" / "cache"), "embeddings", {})
    found = cache.fill([1, 2], lambda places: iter([torch.zeros(1), torch.ones(1)]))
    assert [tensor.tolist() for tensor in found] == [[0], [1]]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_what_was_made_before_a_failure_is_kept(tmp_path):
    """A run that ends in the middle of a large folder goes on there; too few tensors are an error."""
    cache = TensorCache(tmp_path, "latents", {})
    with pytest.raises(ValueError, match="zip"):
        cache.fill([1, 2, 3], lambda places: iter([torch.zeros(1)]))
    assert cache.load(1) is not None and cache.load(2) is None
