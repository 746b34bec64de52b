"""The tool that lists and prunes the cache: what it says is there, and what it deletes and lets be."""

import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT, environment
from utils import inspect_cache
from utils.core.errors import UserError
from utils.data.cache import TensorCache, prompt_keys
from utils.inspect_cache import DAY, main

MODELS = ("owner/name", "/models/local")
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None  # a new Python would take seconds
SIZE = (2, 4, 32, 32)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write a prompt and two photos of each of two models, unused for 1, 2, … 6 days in this order."""
    folder, paths = tmp_path / "cache", []
    for number, model in enumerate(MODELS):
        identity = {"model": model, "dtype": "x"}
        prompts, photos = (TensorCache(folder, kind, identity) for kind in ("embeddings", "latents"))
        (key,) = prompt_keys(torch.arange(7)[None] + number, None)
        prompts.save(key, torch.zeros(7, 16, dtype=torch.bfloat16))
        paths.append(prompts.path_of(key))
        for name in ("dog.jpg", "beach.png"):
            photos.save([name], torch.ones(SIZE))
            paths.append(photos.path_of([name]))
    for days, path in enumerate(paths, 1):
        age(path, days)
    return folder


def age(path: Path, days: float) -> None:
    """Let a file be unused for so long."""
    os.utime(path, (time.time() - days * DAY,) * 2)


def by_age(folder: Path) -> list[Path]:
    """Return a folder's files, the last used first."""
    return sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime)


def run(capsys, folder: Path, words: str = "", code: int = 0) -> str:
    """Call the tool and return what it prints."""
    assert main(["--cache_dir", str(folder), *words.split()]) == code
    return capsys.readouterr().out


def add_foreign(folder: Path) -> set[Path]:
    """Add what is not the cache's, in part under its names, and return it."""
    entry = by_age(folder)[0]
    names = ["notes.txt", "0" * 39 + ".safetensors", "0" * 41 + ".safetensors", "G" * 40 + ".safetensors"]
    names += ["A" * 40 + ".safetensors", "0" * 40 + ".safetensors.bak", "model.safetensors", "0" * 40, ".hidden"]
    names += [
        ".tensor-" + "0" * 15 + ".partial",
        ".tensor-" + "x" * 16 + ".partial",
        "tensor-" + "0" * 16 + ".partial",
    ]
    names += [".embeds-" + "0" * 16 + ".partial.bak", ".other-" + "0" * 16 + ".partial", "0" * 40 + ".safetensors\n"]
    for name in names:
        (folder / name).write_bytes(entry.read_bytes())
    (folder / ("1" * 40 + ".safetensors")).mkdir()
    (folder / ("1" * 40 + ".safetensors") / ("2" * 40 + ".safetensors")).touch()
    (folder / ("3" * 40 + ".safetensors")).symlink_to(entry)
    (folder / ("4" * 40 + ".safetensors")).symlink_to("nowhere")
    (folder / (".tensor-" + "5" * 16 + ".partial")).symlink_to("notes.txt")
    links = [path for digit in "1345" for path in folder.glob(f"*{digit * 16}*")]
    found = {folder / name for name in names} | set(links)
    for path in found - set(links):
        age(path, 1000)
    return found


# What it shows


def test_entries_are_grouped_by_kind_and_model(folder, capsys):
    """With how many and how large they are, and times of use; nothing is changed by looking."""
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    lines = run(capsys, folder).splitlines()
    total = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    assert lines[0] == f"{folder}: 6 files, {total:.2f} MB" and len(lines) == 9
    assert lines[1::2] == [f"{kind} of {model}" for kind in ("embeddings", "latents") for model in sorted(MODELS)]
    first, last = (time.strftime("%Y-%m-%d", time.localtime(time.time() - days * DAY)) for days in (6, 5))
    assert re.fullmatch(r"    1 file, 0\.00 MB, last used (\S+) to \1", lines[2])
    assert lines[6] == f"    2 files, 0.07 MB, last used {first} to {last}"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_copies_of_datasets_are_counted_and_left_alone(folder, capsys):
    """Who wonders how the cache came to be so large is told; photos are deleted by nobody but their owner."""
    photo = folder / "datasets" / "dogs-0123" / "000000.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(bytes(1_500_000))
    line = f"{folder / 'datasets'} also holds 1.50 MB of datasets. Delete what you do not need."
    assert run(capsys, folder).splitlines()[-1] == line
    assert line not in run(capsys, folder, "--older_than 1")
    assert "Deleted 6 files" in run(capsys, folder, "--prune --older_than 0") and photo.exists()


def test_what_no_run_can_use_is_listed_apart(folder, capsys):
    """Cut off in its head, or left half written more than a day ago; not what a run may be writing now."""
    for name in (f"{'a' * 40}.safetensors", f".tensor-{'0' * 16}.partial", f".embeds-{'0' * 16}.partial"):
        (folder / name).write_bytes(by_age(folder)[-1].read_bytes()[:20])
        age(folder / name, 1.1)
    (folder / f".tensor-{'f' * 16}.partial").touch()
    assert "unreadable\n    3 files, 0.00 MB" in (text := run(capsys, folder)) and ": 9 files" in text
    assert "Deleted 9 files" in run(capsys, folder, "--older_than 0 --prune")
    assert [path.name for path in folder.iterdir()] == [f".tensor-{'f' * 16}.partial"]


def refuse(path: Path) -> bytes:
    """Fail as a broken disk does."""
    raise OSError(5, "Input/output error", str(path))


def test_a_folder_that_is_not_there(tmp_path, capsys, monkeypatch):
    """The usual one is empty before the first run; one that is named is a slip."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main([]) == 0 and capsys.readouterr().out == f"{tmp_path / 'dreambooth'}: 0 files, 0.00 MB\n"
    assert main(["--prune", "--older_than", "0"]) == 0 and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(UserError, match=f"--cache_dir {tmp_path / name} is no folder"):
            main(["--cache_dir", str(tmp_path / name)])


def test_a_folder_that_cannot_be_listed_is_said(folder, monkeypatch):
    """Another user's, or on a disk that is gone."""
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=f"The cache {folder} cannot be listed: Input/output error. Give --cache_dir"):
        main(["--cache_dir", str(folder)])


# What it deletes


@pytest.mark.parametrize(
    ("words", "kept"),  # days
    [
        ("--older_than 3.5", [1, 2, 3]),
        ("--older_than 0", []),
        ("--older_than 3.5 --larger_than 0", [1, 2, 3]),
        ("--older_than 0 --larger_than 1", [1, 2, 3, 4, 5, 6]),
        ("--larger_than 0", []),
        ("--larger_than 1", [1, 2, 3, 4, 5, 6]),
    ],
)
def test_files_to_which_all_flags_apply_go(folder, capsys, words, kept):
    """Without --prune they are only counted; with it the same are deleted, and nothing foreign is."""
    foreign, ages = add_foreign(folder), {}
    for path in set(folder.iterdir()) - foreign:
        ages[round((time.time() - path.stat().st_mtime) / DAY)] = path
    goes = [path.stat().st_size for days, path in ages.items() if days not in kept]
    amount = f"{len(goes)} file{'' if len(goes) == 1 else 's'}, {sum(goes) / 1e6:.2f} MB"
    shown = run(capsys, folder, words)
    assert shown.startswith(f"{folder}: {amount}\n") and shown.endswith("--prune deletes these files.\n")
    assert set(folder.iterdir()) == foreign | set(ages.values())
    assert run(capsys, folder, f"{words} --prune") == f"Deleted {amount}.\n"
    assert set(folder.iterdir()) == foreign | {ages[days] for days in kept}
    assert len(list((folder / ("1" * 40 + ".safetensors")).iterdir())) == 1


def test_the_longest_unused_go_until_the_cache_is_small_enough(folder, capsys):
    """Loading is use."""
    oldest = by_age(folder)[-1]
    assert TensorCache(folder, "latents", {"model": MODELS[1], "dtype": "x"}).load(["beach.png"]) is not None
    assert by_age(folder)[0] == oldest
    paths = by_age(folder)
    limit = sum(path.stat().st_size for path in paths[:3]) / 1e9
    run(capsys, folder, f"--larger_than {limit:.9f} --prune")
    assert by_age(folder) == paths[:3]


def test_what_is_used_or_mended_meanwhile_stays(folder, capsys, monkeypatch):
    """A look at a large cache takes minutes; what vanishes in them is no error."""
    choose, (used, mended, gone, *others) = inspect_cache.choose, by_age(folder)
    monkeypatch.setattr(
        inspect_cache,
        "choose",
        lambda *given: [choose(*given), used.touch(), mended.write_bytes(b"other"), gone.unlink()][0],
    )
    assert "Deleted 3 files" in run(capsys, folder, "--older_than 0 --prune")
    assert set(folder.iterdir()) == {used, mended} and len(others) == 3


def test_a_file_that_vanishes_before_the_look_is_none(folder, capsys, monkeypatch):
    """As when two prune at once."""
    names = os.listdir(folder)
    monkeypatch.setattr(os, "listdir", lambda _: ["0" * 40 + ".safetensors", *names])
    assert f"{folder}: 6 files" in run(capsys, folder)


def test_a_file_that_cannot_be_deleted_is_said(folder, capsys, monkeypatch):
    """The others are deleted; the exit status tells."""
    unlink, (kept, *_) = Path.unlink, by_age(folder)
    monkeypatch.setattr(Path, "unlink", lambda path: refuse(path) if path == kept else unlink(path))
    assert main(["--cache_dir", str(folder), "--older_than", "0", "--prune"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("Deleted 5 files") and "error: 1 could not be deleted: [Errno 5]" in err


def test_a_run_makes_anew_what_was_pruned(folder, capsys):
    """It misses entries without a word, and may write them again."""
    cache = TensorCache(folder, "latents", {"model": MODELS[0], "dtype": "x"})
    run(capsys, folder, "--older_than 0 --prune")
    assert cache.load(["dog.jpg"]) is None and cache.save(["dog.jpg"], torch.ones(SIZE))
    assert torch.equal(cache.load(["dog.jpg"]), torch.ones(SIZE))


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_runs_and_prunes_at_once(tmp_path, capsys):
    """A run that is pruned all the time writes, reads what it wrote or nothing, and sees no error."""
    cache = TensorCache(tmp_path, "latents", {"model": "m"})
    runs = [FORK.Process(target=use_entries, args=(cache, 100)) for _ in range(2)]
    for process in runs:
        process.start()
    deleted = 0
    while any(process.is_alive() for process in runs):
        deleted += int(run(capsys, tmp_path, "--older_than 0 --prune").split()[1])
        assert "unreadable" not in run(capsys, tmp_path)
    assert [process.exitcode for process in runs] == [0, 0] and deleted > 0


def use_entries(cache: TensorCache, times: int) -> None:
    """Load four photos over and over, and save those that are not there."""
    for number in [*range(4)] * times:
        loaded, moments = cache.load([number]), torch.full(SIZE, number)
        if loaded is None and not cache.save([number], moments.float()):
            os._exit(1)
        if loaded is not None and not torch.equal(loaded, moments):
            os._exit(2)


# The command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--prune", "--prune needs --older_than or --larger_than. To delete all, use --older_than 0."),
        ("--older_than -1", "--older_than -1.0 is out of range: it must be 0 or more."),
        ("--larger_than nan", "--larger_than nan is out of range: it must be 0 or more."),
        ("--old 3 --prune", "unrecognized arguments: --old 3"),
    ],
)
def test_flags_that_make_no_sense_are_refused(folder, words, message, capsys):
    """Before anything is deleted."""
    with pytest.raises(SystemExit, match="2"):
        main(["--cache_dir", str(folder), *words.split()])
    assert message in " ".join(capsys.readouterr().err.split()) and len(by_age(folder)) == 6


def test_the_tool_runs_as_a_module(folder, tmp_path):
    """From the command line; a slip is one line."""
    command = [sys.executable, "-m", "utils.inspect_cache", "--cache_dir"]
    variables = environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    for path, code in ((folder, 0), (tmp_path / "none", 1)):
        done = subprocess.run(
            [*command, str(path)], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, done.stderr
        assert (f"{folder}: 6 files" in done.stdout) == (not code)
    assert done.stderr.startswith("error: --cache_dir") and done.stderr.count("\n") == 1
