"""Cached latents: the saved bits of the same picture and VAE or nothing, whatever happens to the files and writers."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch

from utils.core.errors import UserError
from utils.data import cache as cache_module
from utils.data.cache import TensorCache, check_moments, content_hash, open_cache

IDENTITY = {"model": "owner/name", "commits": [["vae", "abc"]], "dtype": "fp32"}
KEY = ["0" * 40, [64, 80], [0, 8, 64, 72], False, "bicubic"]
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None  # a new Python would take seconds


def photo(number: int, dtype: torch.dtype = torch.float32, shape: tuple = (2, 4, 6, 5)):
    """Return key and moments that belong together and to no other number."""
    moments = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)
    moments[1] = moments[1].abs()
    return [f"{number:040x}", *KEY[1:]], moments


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors are the same, the sign of zero included."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture
def cache(tmp_path) -> TensorCache:
    """Make a cache in a folder that does not exist yet."""
    return TensorCache(tmp_path / "new" / "cache", "latents", IDENTITY)


# What is saved comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_a_vae_makes_comes_back_bit_for_bit(cache, dtype, caplog):
    """Of a real, untrained VAE in its own precision; the latents drawn from it are the same ones."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=16).to(dtype)
    with torch.no_grad():
        posterior = vae.encode(torch.rand(1, 3, 16, 12).to(dtype) * 2 - 1).latent_dist
    moments = torch.cat([posterior.mean, posterior.std])
    caplog.clear()
    assert cache.load(KEY) is None and cache.save(KEY, moments) and not caplog.messages
    loaded = TensorCache(cache.folder, "latents", dict(reversed(IDENTITY.items()))).load(KEY)
    assert loaded.dtype == dtype and loaded.shape == (2, 4, 16, 12) and same_bits(loaded, moments)
    mean, std = loaded.split(1)
    assert same_bits(mean, posterior.mean) and same_bits(std, posterior.std)
    loaded += 1  # it is the caller's own
    assert same_bits(cache.load(KEY), moments)


@pytest.mark.parametrize(("edge", "dtype", "kilobytes"), [(512, torch.float32, 131), (512, torch.float16, 66)])
def test_a_picture_takes_little_more_than_its_numbers(cache, edge, dtype, kilobytes):
    """Of Stable Diffusion: mean and deviation of four channels for every eight pixels, and a kilobyte about them."""
    key, _ = photo(0)
    moments = torch.rand(2, 4, edge // 8, edge // 8).to(dtype)
    assert cache.save(key, moments)
    (entry,) = cache.folder.iterdir()
    assert moments.nbytes < entry.stat().st_size < moments.nbytes + 1500
    assert round(moments.nbytes / 1000) == kilobytes  # as the README has it


def test_views_and_gradients_are_saved_as_numbers(cache):
    """A slice of a batch that needs a gradient is written alone, and its loaded copy needs none."""
    key, moments = photo(0)
    batch = torch.stack([moments * 2, moments]).transpose(-1, -2).contiguous().requires_grad_().transpose(-1, -2)
    assert not batch[1].is_contiguous() and cache.save(key, batch[1])
    loaded = cache.load(key)
    assert same_bits(loaded, moments) and not loaded.requires_grad
    assert cache.path_of(key).stat().st_size < moments.nbytes + 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_moments_come_back_to_the_cpu(cache):
    """In the same bits, and for that GPU by name."""
    key, moments = photo(0)
    assert cache.save(key, moments.cuda()) and same_bits(cache.load(key), moments)
    assert cache_module.circumstances("cuda", [])["device"] == torch.cuda.get_device_name()


def test_loading_is_use(cache):
    """The entry's time says when it was last loaded; a damaged one's stays."""
    key, moments = photo(0)
    cache.save(key, moments)
    path = cache.path_of(key)
    os.utime(path, (1, 1))
    assert cache.load(key) is not None and time.time() - path.stat().st_mtime < 60
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, (1, 1))
    assert cache.load(key) is None and path.stat().st_mtime == 1


def test_a_time_that_cannot_be_set_is_no_error(cache, monkeypatch, caplog):
    """A cache on a read-only disk serves as well."""
    key, moments = photo(0)
    cache.save(key, moments)
    monkeypatch.setattr(os, "utime", refuse)
    assert same_bits(cache.load(key), moments) and not caplog.messages


def refuse(*_) -> None:
    """Fail as on a read-only disk."""
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1])
def test_numbers_that_are_none_are_refused(part, number):
    """What overflowed would come back in every epoch; the message names the photo."""
    _, moments = photo(0, torch.float16)
    moments[part, 3, 5, 4] = number
    with pytest.raises(UserError, match=r"1 of the 240 numbers .* dog\.jpg are NaN or infinite, in torch\.float16"):
        check_moments(moments, "dog.jpg")


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (torch.ones(4, 6, 5), r"moments are \(4, 6, 5\) torch.float32, not \(2, C, h, w\)"),
        (torch.ones(1, 2, 4, 6, 5), r"not \(2, C, h, w\)"),
        (torch.ones(1, 8, 6, 5), r"not \(2, C, h, w\)"),
        (torch.ones(2, 4, 6, 5, dtype=torch.int64), r"\(2, 4, 6, 5\) torch.int64, not"),
        (-torch.ones(2, 4, 6, 5), r"below 0, as no standard deviation has: is it the log variance\?"),
    ],
)
def test_what_are_no_moments_is_refused(moments, message):
    """A batch, a sample or the VAE's raw output is a mistake of the caller."""
    with pytest.raises(ValueError, match=message):
        check_moments(moments, "dog.jpg")


# What belongs to something else does not


@pytest.mark.parametrize(
    "other",
    [
        ["1" + "0" * 39, *KEY[1:]],
        [KEY[0], [80, 64], *KEY[2:]],
        [KEY[0], [64, 80.0], *KEY[2:]],
        [*KEY[:2], [1, 8, 65, 72], *KEY[3:]],
        [*KEY[:3], True, KEY[4]],
        [*KEY[:4], "lanczos"],
        [*KEY, None],
        KEY[:-1],
        [],
    ],
)
def test_another_picture_is_another_entry(cache, other):
    """Another content, size, crop, flip or filter; each is kept beside the others."""
    _, moments = photo(0)
    cache.save(KEY, moments)
    assert cache.load(other) is None and cache.save(other, moments + 1)
    assert same_bits(cache.load(KEY), moments) and same_bits(cache.load(other), moments + 1)
    assert same_bits(cache.load([tuple(part) if isinstance(part, list) else part for part in KEY]), moments)


@pytest.mark.parametrize(
    "change",
    [{"model": "owner/other"}, {"commits": [["vae", "abd"]]}, {"dtype": "bf16"}, {"packages": ["2.0"]}, {"kind": "x"}],
)
def test_another_vae_is_another_entry(cache, change):
    """Another model, revision, precision or version finds nothing and leaves the entry alone; no one sets the kind."""
    key, moments = photo(0)
    cache.save(key, moments)
    other = TensorCache(cache.folder, "latents", IDENTITY | change)
    assert (other.load(key) is None) == ("kind" not in change)
    assert other.save(key, moments + 1) and same_bits(other.load(key), moments + 1)
    assert same_bits(cache.load(key), moments + ("kind" in change))


def test_kinds_are_apart(tmp_path):
    """The same identity and key give embeddings and latents an entry each."""
    caches = [cache_module.TensorCache(tmp_path, kind, IDENTITY) for kind in cache_module.KINDS]
    for number, cache in enumerate(caches):
        assert cache.load(KEY) is None and cache.save(KEY, torch.full((3,), number))
    assert [cache.load(KEY).tolist() for cache in caches] == [[0] * 3, [1] * 3]


@pytest.mark.parametrize("tensor", [torch.tensor(1.5), torch.zeros(0, 3), torch.tensor([True]), torch.arange(3)])
def test_tensors_of_any_shape_and_dtype_come_back(tmp_path, tensor):
    """Numbers, nothing, and what is no float."""
    cache = cache_module.TensorCache(tmp_path, "latents", {})
    assert cache.save("key", tensor)
    loaded = cache.load("key")
    assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape and torch.equal(loaded, tensor)


# Damage


def corrupt(paths: list[Path], contents: list[bytes], chance: random.Random) -> None:
    """Damage one or two of some files in a way that chance picks."""
    target, other = chance.sample(range(len(paths)), 2)
    content, size = bytearray(contents[target]), len(contents[target])
    start = chance.randrange(size)
    end = chance.randint(start + 1, size)
    match chance.choice(["bits", "byte", "cut", "zeros", "noise", "append", "drop", "swap", "replace", "splice"]):
        case "bits":
            for _ in range(chance.randint(1, 8)):
                content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        case "byte":
            content[start] = chance.randrange(256)
        case "cut":
            del content[start:]
        case "zeros":
            content[start:end] = bytes(end - start)
        case "noise":
            content[start:end] = chance.randbytes(end - start)
        case "append":
            content += chance.choice([b"\0", b" ", chance.randbytes(chance.randint(1, 4000)), contents[target]])
        case "drop":
            del content[start:end]
        case "swap":
            paths[other].write_bytes(contents[target])
            content = contents[other]
        case "replace":
            content = contents[other]
        case "splice":
            content[start:] = contents[other][start:]
    paths[target].write_bytes(content)


@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_no_corruption_gives_another_tensor(cache, dtype, seed, monkeypatch):
    """A thousand of each: every load gives what was saved, or a warning and nothing; saving mends it."""
    entries, chance, logged = [photo(number, dtype) for number in range(4)], random.Random(seed), []
    caches = [cache, cache, cache, TensorCache(cache.folder, "latents", IDENTITY | {"dtype": "bf16"})]
    for owner, entry in zip(caches, entries, strict=True):
        owner.save(*entry)
    paths = [owner.path_of(key) for owner, (key, _) in zip(caches, entries, strict=True)]
    contents = [path.read_bytes() for path in paths]
    monkeypatch.setattr(cache_module.logger, "warning", lambda text, *_: logged.append(text))
    refused = 0
    for _ in range(1000):
        corrupt(paths, contents, chance)
        for owner, (key, moments), path, content in zip(caches, entries, paths, contents, strict=True):
            loaded = owner.load(key)
            assert loaded is None or same_bits(loaded, moments)
            refused += loaded is None
            path.write_bytes(content)
    assert len(logged) == refused > 950
    assert all(same_bits(owner.load(key), moments) for owner, (key, moments) in zip(caches, entries, strict=True))


def test_each_changed_bit_is_noticed(cache, monkeypatch):
    """One at a time, all over a small file; but for the blanks behind its header nothing may change."""
    key, moments = photo(0, torch.float16, (2, 1, 3, 2))
    cache.save(key, moments)
    path = cache.path_of(key)
    content, used = path.read_bytes(), 0
    monkeypatch.setattr(cache_module.logger, "warning", lambda *_: None)
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            loaded = cache.load(key)
            used += loaded is not None
            assert loaded is None or same_bits(loaded, moments)
    assert used <= 8 * 8


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"{}", b"[]" * 20, b"\xff" * 100, b"\2\0\0\0\0\0\0\0{}"])
def test_what_is_no_safetensors_is_damage(cache, content, caplog):
    """Whatever type of error it raises."""
    cache.save(KEY, photo(0)[1])
    cache.path_of(KEY).write_bytes(content)
    assert cache.load(KEY) is None and "cannot be used and are made anew: it is" in caplog.text


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    """The run goes on; photos that follow do not repeat it."""
    (tmp_path / "file").touch()
    cache = TensorCache(tmp_path / "file" / "cache", "latents", IDENTITY)
    assert cache.load(KEY) is None and not caplog.messages
    assert [cache.save(*photo(number)) for number in range(3)] == [False] * 3
    assert len(caplog.messages) == 1 and "Latents cannot be cached in" in caplog.text


def test_a_folder_that_cannot_be_read_is_one_warning(cache, caplog, monkeypatch):
    """As on a broken disk; a run with thousands of photos says it once."""
    for number in range(3):
        cache.save(*photo(number))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert [cache.load(photo(number)[0]) for number in range(3)] == [None] * 3
    assert len(caplog.messages) == 1 and "Latents cannot be read from" in caplog.text


# Several processes


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_processes_write_the_same_entries_at_once(cache):
    """Who reads meanwhile sees nothing or one writer's whole entry, and none is lost or left half written."""
    writers = [FORK.Process(target=write_entries, args=(cache, rank, 60)) for rank in range(2)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        seen += sum(check_entry(cache, number) for number in range(4))
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 2 and seen > 0
    assert all(check_entry(cache, number) for number in range(4)) and len(list(cache.folder.iterdir())) == 4


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_a_killed_writer_leaves_whole_entries(cache, caplog):
    """Killed at any moment, over and over; what it was writing is never taken for an entry."""
    chance = random.Random(0)
    for rank in range(15):
        writer = FORK.Process(target=write_entries, args=(cache, rank, 10**9))
        writer.start()
        while not cache.folder.exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0.01, 0.08))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        found = [check_entry(cache, number) for number in range(4)]
    assert all(found) and not caplog.messages
    assert all(cache_module.LEFTOVER.fullmatch(p.name) or p.suffix == ".safetensors" for p in cache.folder.iterdir())


def write_entries(cache: TensorCache, rank: int, times: int) -> None:
    """Save four photos over and over, each time with moments that tell who wrote them."""
    entries = [photo(number, shape=(2, 4, 64, 48)) for number in range(4)]
    for _ in range(times):
        for key, moments in entries:
            if not cache.save(key, moments + rank):
                os._exit(1)


def check_entry(cache: TensorCache, number: int) -> bool:
    """Say whether there is an entry; if so, it is what one of the writers saved."""
    key, moments = photo(number, shape=(2, 4, 64, 48))
    loaded = cache.load(key)
    assert loaded is None or any(same_bits(loaded, moments + rank) for rank in range(15))
    return loaded is not None


# Whose latents they are


@pytest.fixture
def model(tmp_path) -> Path:
    """Write the files of a model of which an identity is made."""
    for name in ("vae/config.json", "vae/model.safetensors", "text_encoder/config.json", "unet/config.json"):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    return tmp_path / "model"


@pytest.fixture
def options(model, tmp_path) -> dict:
    """Return arguments of `open_cache`."""
    source = (str(model), None, None)
    return {"folder": str(tmp_path / "cache"), "source": source, "variant": None, "dtype": "fp32", "device": "cpu"}


def test_only_the_vae_counts(options, model):
    """Another U-Net or text encoder finds the same latents; the prompts of the model are no latents."""
    open_cache("latents", **options).save(*photo(0))
    for part in ("unet", "text_encoder"):
        (model / part / "config.json").write_text("another")
    cache = open_cache("latents", **options)
    assert same_bits(cache.load(photo(0)[0]), photo(0)[1])
    assert open_cache("embeddings", **options).path_of(photo(0)[0]) != cache.path_of(photo(0)[0])


def change_content(vae: Path) -> None:
    """Make the weights longer and leave their time."""
    path = vae / "model.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text("longer than before")
    os.utime(path, ns=times)


def replace_weights(vae: Path) -> None:
    """Put other weights of the same size and time in their place, as a new version from an archive may have them."""
    path = vae / "model.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(path.read_text().swapcase())
    os.utime(path, ns=times)


def touch(vae: Path) -> None:
    """Give the weights another time and leave their content."""
    path = vae / "model.safetensors"
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1000))


def add(vae: Path) -> None:
    """Add a file."""
    (vae / "model.fp16.safetensors").touch()


@pytest.mark.parametrize("change", [change_content, replace_weights, touch, add])
def test_a_vae_that_was_changed_is_another(options, model, change, caplog):
    """Its old latents are not used, which is said once, and are replaced."""
    entries = [photo(number) for number in range(3)]
    for entry in entries:
        open_cache("latents", **options).save(*entry)
    change(model / "vae")
    cache = open_cache("latents", **options)
    assert [cache.load(key) for key, _ in entries] == [None] * 3
    assert len(caplog.messages) == 1 and "the model has other files now (vae/model" in caplog.text
    for key, moments in entries:
        assert cache.save(key, moments + 1) and same_bits(open_cache("latents", **options).load(key), moments + 1)


def test_an_entry_cannot_be_made_to_fit(options, model, caplog):
    """What it says of the VAE's files and whose it is stands under the checksum."""
    key, moments = photo(0)
    cache = open_cache("latents", **options)
    cache.save(key, moments)
    content = cache.path_of(key).read_bytes()
    (model / "vae" / "config.json").write_text("vae/other.json!")
    assert len("vae/config.json") == len("vae/other.json!")
    now = open_cache("latents", **options)
    listed = [b",".join(str(number).encode() for number in one.files[0][1:]) for one in (cache, now)]
    cache.path_of(key).write_bytes(content.replace(*(text.replace(b",", b", ") for text in listed)))
    assert cache.path_of(key).read_bytes() != content and now.load(key) is None and "it is damaged" in caplog.text
    other = open_cache("latents", **options | {"dtype": "bf16"})
    other.save(key, moments + 1)
    other.path_of(key).write_bytes(content)
    assert other.load(key) is None and "it is another entry's" in caplog.text


def test_an_entry_of_another_identity_is_not_used(cache, caplog, monkeypatch):
    """Not even where the names are the same."""
    key, moments = photo(0)
    cache.save(key, moments)
    other = TensorCache(cache.folder, "latents", IDENTITY | {"dtype": "bf16"})
    monkeypatch.setattr(other, "path_of", cache.path_of)
    assert other.load(key) is None and "it is another model's" in caplog.text


def test_a_vae_that_is_gone_costs_nothing(options, model):
    """Its latents may still be used."""
    open_cache("latents", **options).save(*photo(0))
    (model / "vae" / "model.safetensors").unlink()
    assert same_bits(open_cache("latents", **options).load(photo(0)[0]), photo(0)[1])


@pytest.mark.parametrize("change", [{"variant": "fp16"}, {"dtype": "bf16"}, {"device": "mps"}])
def test_what_else_decides_the_bits_is_another_entry(options, change):
    """A variant of the weights, a precision, a device."""
    open_cache("latents", **options).save(*photo(0))
    assert open_cache("latents", **options | change).load(photo(0)[0]) is None


@pytest.mark.parametrize("package", [torch, diffusers])
def test_versions_and_threads_decide_the_bits(options, package, monkeypatch):
    """Another one of either finds nothing."""
    open_cache("latents", **options).save(*photo(0))
    with monkeypatch.context() as patch:
        patch.setattr(package, "__version__", "0.0.1")
        assert open_cache("latents", **options).load(photo(0)[0]) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert open_cache("latents", **options).load(photo(0)[0]) is None


def test_a_photo_that_was_changed_has_another_hash(tmp_path):
    """Also one of the same length, in a run that goes on."""
    path, found = tmp_path / "photo.png", []
    for number, content in enumerate((b"one", b"two", b"three", b"one")):
        path.write_bytes(content)
        os.utime(path, ns=(number, number))
        found.append(content_hash(path))
    assert len(set(found)) == 3 and found[0] == found[3] and len(found[0]) == 40


def test_how_pictures_are_read_decides_the_bits(options, monkeypatch):
    """After a change of the code that reads them, or of Pillow, entries are made anew."""
    open_cache("latents", **options).save(*photo(0))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "READING", cache_module.READING + 1)
        assert open_cache("latents", **options).load(photo(0)[0]) is None
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.PIL, "__version__", "0.0.1")
        assert open_cache("latents", **options).load(photo(0)[0]) is None
    assert open_cache("latents", **options).load(photo(0)[0]) is not None


def test_a_gpus_name_and_arithmetic_decide_the_bits(monkeypatch):
    """TF32 rounds, and deterministic kernels add in another order."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    found = [cache_module.circumstances("cuda", ["1"])]
    for arithmetic in (torch.backends.cuda.matmul, torch.backends.cudnn):
        usual = arithmetic.allow_tf32
        arithmetic.allow_tf32 = not usual
        found.append(cache_module.circumstances("cuda", ["1"]))
        arithmetic.allow_tf32 = usual
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    found.append(cache_module.circumstances("cuda", ["1"]))
    assert found[0]["device"] == "A GPU" and all(found.count(one) == 1 for one in found)


def test_a_revision_of_the_hub_is_its_commit(tmp_path, options, monkeypatch):
    """Without a connection, by the local copy; a branch that moves on is another VAE, one that moves back is not."""
    hub = tmp_path / "hub" / "models--owner--name"
    for digit in "12":
        (hub / "snapshots" / (digit * 40) / "vae").mkdir(parents=True)
        (hub / "snapshots" / (digit * 40) / "vae" / "config.json").write_text("{}")
    (hub / "refs").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = []
    for digit in "121":
        (hub / "refs" / "main").write_text(digit * 40)
        cache = open_cache("latents", **options | {"source": ("owner/name", None, None)})
        assert cache.path_of(KEY) == open_cache(
            "latents", **options | {"source": ("owner/name", digit * 40, None)}
        ).path_of(KEY)
        found.append(cache.load(KEY))
        cache.save(KEY, photo(int(digit))[1])
    assert found[:2] == [None, None] and same_bits(found[2], photo(1)[1])
    with pytest.raises(UserError, match="The model owner/none is no folder here"):
        open_cache("latents", **options | {"source": ("owner/none", None, None)})


def test_the_usual_folder(options, tmp_path, monkeypatch):
    """The same as that of embeddings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_cache("latents", **options | {"folder": None}).folder == tmp_path / "dreambooth"


def test_the_hash_of_a_content(tmp_path):
    """Of the bytes alone: neither name nor time count, and one bit does."""
    for name, content in (("a.png", b"photo"), ("b.jpg", b"photo"), ("c.png", b"phoTo"), ("d.png", b"")):
        (tmp_path / name).write_bytes(content)
    hashes = [content_hash(path) for path in sorted(tmp_path.iterdir())]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3 and {len(text) for text in hashes} == {40}
    assert content_hash(str(tmp_path / "a.png")) == hashes[0]
    with pytest.raises(FileNotFoundError):
        content_hash(tmp_path / "none.png")
