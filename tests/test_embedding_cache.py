"""Cached embeddings: the saved bits or nothing, whatever happens to the files and to those who write them."""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch

from utils.core.errors import UserError
from utils.data import cache as cache_module
from utils.data.cache import TensorCache, default_folder, model_identity, prompt_keys

IDENTITY = {"model": "owner/name", "commits": [["text_encoder", "abc"]], "precision": "fp32", "device": "cpu"}
TEXT = ("text_encoder",)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None  # a new Python would take seconds


def prompt(number: int, dtype: torch.dtype = torch.float32, length: int = 7):
    """Return key and embeddings that belong together and to no other number."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 1000, (length,), generator=generator)
    embeds = torch.randn(length, 8, generator=generator).to(dtype)
    return key_of(ids, (torch.arange(length) < 5).long()), embeds


def key_of(ids: torch.Tensor, mask: torch.Tensor | None) -> list:
    """Return the key of one prompt."""
    return prompt_keys(ids[None], mask if mask is None else mask[None])[0]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors are the same, NaN and the sign of zero included."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def only_file(folder: Path) -> Path:
    """Return the one file of a folder."""
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def cache(tmp_path):
    """Make a cache in a folder that does not exist yet."""
    return TensorCache(tmp_path / "new" / "cache", "embeddings", IDENTITY)


# What is saved comes back


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_come_back_bit_for_bit(cache, dtype, caplog):
    """Also NaN, infinities and minus zero; also for another object, and through a tensor that needs a gradient."""
    key, embeds = prompt(0, dtype)
    embeds[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    assert cache.load(key) is None
    assert cache.save(key, embeds.clone().requires_grad_()) and not caplog.messages
    for reader in (cache, TensorCache(cache.folder, "embeddings", dict(reversed(IDENTITY.items())))):
        loaded = reader.load(key)
        assert same_bits(loaded, embeds) and not loaded.requires_grad
        loaded += 1  # it is the caller's own
    assert same_bits(cache.load(key), embeds)


def test_embeddings_that_are_a_view_come_back(cache):
    """Their own numbers are saved, in their order, and not the storage behind them."""
    key, embeds = prompt(0)
    view = torch.stack([embeds.T, embeds.T * 2]).transpose(1, 2)[1]
    assert not view.is_contiguous() and cache.save(key, view)
    assert same_bits(cache.load(key), embeds * 2)
    assert only_file(cache.folder).stat().st_size < 1000


def test_the_file_is_plain_safetensors_as_readable_as_any(cache):
    """Other programs can open it and see whose it is; nothing else lies beside it."""
    key, embeds = prompt(0)
    cache.save(key, embeds)
    path = only_file(cache.folder)
    assert path == cache.path_of(key) and path.suffix == ".safetensors"
    with safetensors.safe_open(path, "pt") as file:
        assert file.keys() == ["embeds"] and '"precision": "fp32"' in file.metadata()["identity"]
        assert same_bits(file.get_tensor("embeds"), embeds)
    (cache.folder / "plain").touch()
    assert path.stat().st_mode == (cache.folder / "plain").stat().st_mode


def test_an_entry_of_an_older_version_is_not_looked_at(cache, caplog):
    """Its name is another one, so there is no warning."""
    key, embeds = prompt(0)
    cache.save(key, embeds)
    now = cache.path_of(key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "_FORMAT", 2)
        assert cache.path_of(key) != now and cache.load(key) is None and not caplog.messages
        now.rename(cache.path_of(key))
        assert cache.load(key) is None and "of another version of this program" in caplog.text


def test_saving_again_replaces(cache):
    """The last save counts."""
    key, embeds = prompt(0)
    for factor in (1, 2):
        assert cache.save(key, embeds * factor)
    assert same_bits(cache.load(key), embeds * 2) and only_file(cache.folder)


# What belongs to something else does not


def test_ids_and_mask_are_part_of_the_key(cache):
    """One token, one bit of the mask, or no mask makes another entry; the mask's dtype does not."""
    ids, mask, embeds = torch.arange(7), (torch.arange(7) < 5).long(), prompt(0)[1]
    cache.save(key_of(ids, mask), embeds)
    other_ids, other_mask = ids.clone(), mask.clone()
    other_ids[-1] += 1
    other_mask[-1] = 1 - other_mask[-1]
    others = [(other_ids, mask), (ids, other_mask), (ids, None), (ids[:-1], mask[:-1]), (ids.flip(0), mask)]
    assert [cache.load(key_of(*other)) for other in others] == [None] * len(others)
    for same in (mask, mask.bool(), mask.int()):
        assert same_bits(cache.load(key_of(ids, same)), embeds)
    assert cache.save(key_of(ids, None), embeds + 1) and same_bits(cache.load(key_of(ids, None)), embeds + 1)
    assert same_bits(cache.load(key_of(ids, mask)), embeds)


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"commits": []}, {"device": "cuda"}, {"more": None}])
def test_the_identity_is_part_of_the_key(cache, change):
    """Another model, precision, device or version finds nothing and leaves the entry alone."""
    key, embeds = prompt(0)
    cache.save(key, embeds)
    other = TensorCache(cache.folder, "embeddings", IDENTITY | change)
    assert other.load(key) is None and other.save(key, embeds + 1)
    assert same_bits(cache.load(key), embeds) and same_bits(other.load(key), embeds + 1)


# Damage


def damaged(content: bytes, seed: int) -> list[bytes]:
    """Return a file cut at every length, with each byte changed, blanked from each on, and with another header."""
    chance = random.Random(seed)
    cut = [content[:length] for length in range(len(content))]
    flipped = [
        content[:place]
        + bytes([content[place] ^ chance.choice([1 << bit, chance.randrange(1, 256)])])
        + content[place + 1 :]
        for place, bit in enumerate(chance.choices(range(8), k=len(content)))
    ]
    blanked = [content[:start].ljust(len(content), b"\0") for start in range(0, len(content), 7)]
    headers = [(b'"F32"', b'"I32"'), (b'"BF16"', b'"F16" '), (b"[7,8]", b"[8,7]"), (b"[7,8]", b"[56] ")]
    reread = [content.replace(*header) for header in headers if header[0] in content]
    return cut + flipped + blanked + reread + [content + b"\0", content + content, b"\0" * 8, b"{}", b"[]" * 20]


@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_no_damage_gives_another_tensor(cache, dtype, seed, monkeypatch):
    """Every cut and every changed byte is noticed, where it changes anything, and logged; saving mends it."""
    key, embeds = prompt(0, dtype)
    cache.save(key, embeds)
    path, logged = cache.path_of(key), []
    monkeypatch.setattr(cache_module.logger, "warning", lambda text, *_: logged.append(text))
    cases, used = damaged(path.read_bytes(), seed), []
    for case in cases:
        path.write_bytes(case)
        loaded = cache.load(key)
        used += [] if loaded is None else [same_bits(loaded, embeds)]
    assert len(cases) > 900 and all(used) and len(logged) == len(cases) - len(used)
    assert len(used) <= 8, "only the blanks behind the header may change unnoticed"
    assert cache.save(key, embeds) and same_bits(cache.load(key), embeds)


def test_swapped_files_are_not_used(cache, caplog):
    """A file under another entry's name holds other embeddings, of whatever ids, identity or shape."""
    entries = [(cache, *prompt(0)), (cache, *prompt(1)), (TensorCache(cache.folder, "embeddings", {}), *prompt(0))]
    contents = []
    for owner, key, embeds in entries:
        owner.save(key, embeds)
        contents.append(owner.path_of(key).read_bytes())
    for shift in (1, 2):
        for index, (owner, key, _) in enumerate(entries):
            owner.path_of(key).write_bytes(contents[(index + shift) % 3])
            caplog.clear()
            assert owner.load(key) is None and "another entry's, under this name" in caplog.text


@pytest.mark.parametrize(
    "tensors", [{"embeds": torch.zeros(7, 8)}, {"other": torch.zeros(7, 8)}, {"embeds": torch.zeros(7, 8).byte()}]
)
@pytest.mark.parametrize("metadata", [None, {}, {"key": "x", "identity": "{}"}, {"checksum": "0"}])
def test_foreign_files_are_not_used(cache, tensors, metadata):
    """Valid safetensors that something else wrote under the same name count as damaged."""
    key, embeds = prompt(0)
    cache.save(key, embeds)
    cache.path_of(key).write_bytes(safetensors.torch.save(tensors, metadata))
    assert cache.load(key) is None


def test_an_entry_that_cannot_be_read_is_none(cache, caplog):
    """A folder in its place is no reason to end a run, neither when loading nor when saving."""
    key, embeds = prompt(0)
    cache.path_of(key).mkdir(parents=True)
    assert cache.load(key) is None and cache.save(key, embeds) is False
    assert len(caplog.messages) == 2 and only_file(cache.folder) == cache.path_of(key)


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    """The run goes on; prompts that follow do not repeat it."""
    (tmp_path / "file").touch()
    cache = TensorCache(tmp_path / "file" / "cache", "embeddings", IDENTITY)
    assert [cache.save(*prompt(number)) for number in range(3)] == [False] * 3
    assert len(caplog.messages) == 1 and "cannot be cached in" in caplog.text and "goes on" in caplog.text


def test_a_full_disk_leaves_no_part_behind(cache, caplog):
    """Neither under the final name nor under a temporary one; the old entry stays."""
    key, embeds = prompt(0)
    cache.save(key, embeds)
    with files_limited_to(only_file(cache.folder).stat().st_size // 2):
        assert cache.save(key, embeds + 1) is False
    assert "File too large" in caplog.text
    assert same_bits(cache.load(key), embeds) and only_file(cache.folder)


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond that many bytes, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Several processes


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_processes_write_the_same_entries_at_once(cache):
    """Who reads meanwhile sees nothing or one writer's whole entry, and none is lost or left half written."""
    writers = [FORK.Process(target=write_entries, args=(cache, rank, 60)) for rank in range(3)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        seen += sum(check_entry(cache, number) for number in range(4))
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 3 and seen > 0
    assert all(check_entry(cache, number) for number in range(4)) and len(list(cache.folder.iterdir())) == 4


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_a_killed_writer_leaves_whole_entries(cache, caplog):
    """Killed at any moment, over and over; what it was writing is never taken for an entry."""
    chance = random.Random(0)
    for round_ in range(15):
        writer = FORK.Process(target=write_entries, args=(cache, round_, 10**9))
        writer.start()
        while not cache.folder.exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0.01, 0.08))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        found = [check_entry(cache, number) for number in range(4)]
    assert all(found) and not caplog.messages
    assert all(path.name.startswith(".tensor-") or path.suffix == ".safetensors" for path in cache.folder.iterdir())


def write_entries(cache: TensorCache, rank: int, times: int) -> None:
    """Save four prompts over and over, each time with embeddings that tell who wrote them."""
    for _ in range(times):
        for number in range(4):
            key, embeds = prompt(number, length=77)
            if not cache.save(key, embeds + rank):
                os._exit(1)


def check_entry(cache: TensorCache, number: int) -> bool:
    """Say whether there is an entry; if so, it is what one of the writers saved."""
    key, embeds = prompt(number, length=77)
    loaded = cache.load(key)
    assert loaded is None or any(same_bits(loaded, embeds + rank) for rank in range(15))
    return loaded is not None


def test_a_file_is_written_elsewhere_and_renamed(cache, monkeypatch):
    """The name before the final one is hidden, in the same folder, and never the same."""
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (seen.append((source, target)), replace(source, target)))
    for _ in range(2):
        cache.save(*prompt(0))
    (first, target), (second, _) = seen
    assert first != second and first.parent == target.parent == cache.folder and first.name.startswith(".")


@pytest.mark.parametrize("name", ["tensor", "embeds"])
def test_leftovers_go_after_a_day(cache, name):
    """Of any version; not those of a run that may still be alive, and nothing that the cache has not written."""
    cache.save(*prompt(0))
    kept = [cache.path_of(prompt(0)[0]), cache.folder / f".{name}-mine.partial", cache.folder / "notes.partial"]
    young, old = (cache.folder / f".{name}-{digit * 16}.partial" for digit in "0f")
    for path, hours in [*((path, 1000) for path in kept), (young, 23), (old, 25)]:
        path.touch()
        os.utime(path, (time.time() - hours * 3600,) * 2)
    again = TensorCache(cache.folder, "embeddings", IDENTITY)
    assert sorted(cache.folder.iterdir()) == sorted([*kept, young])
    assert same_bits(again.load(prompt(0)[0]), prompt(0)[1])


# Whose embeddings they are


def change_content(folder: Path) -> None:
    """Make a file longer and leave its time."""
    path = folder / "text_encoder" / "config.json"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(path.read_text() + " ")
    os.utime(path, ns=times)


def touch(folder: Path) -> None:
    """Give a file another time, a nanosecond or what the file system can tell later, and leave its content."""
    path = folder / "text_encoder" / "more" / "model.safetensors"
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1000))


def rename(folder: Path) -> None:
    """Rename a file."""
    path = folder / "text_encoder" / "config.json"
    path.rename(path.with_name("other.json"))


def add(folder: Path) -> None:
    """Add a file."""
    (folder / "text_encoder" / "new.safetensors").touch()


@pytest.fixture
def model(tmp_path) -> Path:
    """Write what the identity of a folder looks at, and a part that it does not."""
    for name in ("text_encoder/config.json", "text_encoder/more/model.safetensors", "unet/config.json"):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    return tmp_path / "model"


@pytest.mark.parametrize("change", [change_content, touch, rename, add])
def test_a_change_of_a_folder_changes_its_identity(model, change, tmp_path):
    """Then nothing that was cached is found."""
    key, embeds = prompt(0)
    identity = model_identity(str(model), None, TEXT)
    TensorCache(tmp_path / "cache", "embeddings", identity).save(key, embeds)
    (model / "unet" / "config.json").write_text("another U-Net")
    assert model_identity(f"{model}/../model/", None, TEXT) == identity
    assert same_bits(
        TensorCache(tmp_path / "cache", "embeddings", model_identity(str(model), None, TEXT)).load(key), embeds
    )
    change(model)
    assert TensorCache(tmp_path / "cache", "embeddings", model_identity(str(model), None, TEXT)).load(key) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_in_a_model_is_not_waited_for(model):
    """It is no part of the model, and nobody may ever write to it."""
    os.mkfifo(model / "text_encoder" / "pipe")
    assert [entry[1::2] for entry in model_identity(str(model), None, TEXT)["files"] if "pipe" in entry[0]] == [[0, 0]]


def test_files_that_are_gone_do_not_matter(model, tmp_path):
    """Whoever has all embeddings may delete gigabytes of weights, but not put others in their place."""
    key, embeds = prompt(0)
    weights = model / "text_encoder" / "more" / "model.safetensors"
    TensorCache(tmp_path / "cache", "embeddings", model_identity(str(model), None, TEXT)).save(key, embeds)
    weights.unlink()
    assert same_bits(
        TensorCache(tmp_path / "cache", "embeddings", model_identity(str(model), None, TEXT)).load(key), embeds
    )
    weights.write_text("other weights")
    assert TensorCache(tmp_path / "cache", "embeddings", model_identity(str(model), None, TEXT)).load(key) is None


def test_parts_and_places_tell_folders_apart(model, tmp_path):
    """Each part that is asked for counts, also behind a link, and so does the folder itself."""
    identity = model_identity(str(model), None, TEXT)
    assert [name for name, *_ in identity["files"]] == [
        "text_encoder/config.json",
        "text_encoder/more/model.safetensors",
    ]
    assert len(model_identity(str(model), None, ("text_encoder", "unet"))["files"]) == 3
    model.rename(tmp_path / "moved")
    assert model_identity(str(tmp_path / "moved"), None, TEXT) != identity
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "text_encoder").symlink_to(tmp_path / "moved" / "text_encoder")
    assert len(model_identity(str(tmp_path / "linked"), None, TEXT)["files"]) == 2


@pytest.fixture
def hub_copy(tmp_path, monkeypatch) -> Path:
    """Make a local copy of a model of the Hub, with two commits."""
    folder = tmp_path / "hub" / "models--owner--name"
    for commit, branch in (("1" * 40, "main"), ("2" * 40, "other")):
        (folder / "snapshots" / commit / "text_encoder").mkdir(parents=True)
        (folder / "snapshots" / commit / "text_encoder" / "config.json").write_text("{}")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / branch).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def test_a_model_of_the_hub_is_its_commit(hub_copy):
    """The branch's or the given one, without a connection; a branch that moves on is another identity."""
    first, second = ({"model": "owner/name", "commits": [["text_encoder", digit * 40]]} for digit in "12")
    assert model_identity("owner/name", None, TEXT) == model_identity("owner/name", "1" * 40, TEXT) == first
    assert model_identity("owner/name", "other", TEXT) == model_identity("owner/name", "2" * 40, TEXT) == second
    (hub_copy / "refs" / "main").write_text("2" * 40)
    assert model_identity("owner/name", None, TEXT) == second


@pytest.mark.parametrize(
    ("model", "revision"), [("owner/none", None), ("owner/name", "none"), ("no/such/folder", None)]
)
def test_a_model_that_is_not_there_is_an_input_error(hub_copy, model, revision):
    """Neither folder nor local copy."""
    with pytest.raises(UserError, match=f"The model {model} is no folder here, and the Hub gave none of its files"):
        model_identity(model, revision, TEXT)


@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_the_usual_folder_without_a_setting(tmp_path, monkeypatch, value):
    """In the home folder; what the standard says to ignore is ignored."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert default_folder() == tmp_path / ".cache" / "dreambooth" and not default_folder().exists()


def test_the_usual_folder_with_a_setting(tmp_path, monkeypatch):
    """As the environment says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "dreambooth"


def test_a_user_without_a_home_is_told_what_to_do(monkeypatch):
    """In a container, a user may be a number without a name."""

    def find_none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", find_none)
    with pytest.raises(UserError, match="give --cache_dir, or set HOME"):
        default_folder()
