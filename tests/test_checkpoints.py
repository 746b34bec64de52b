"""Checkpoint folders: what counts as one, and what a kill at any file operation leaves behind."""

import functools
import gc
import json
import logging
import os
import pickle
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.core import atomic_files
from utils.core.errors import UserError
from utils.run import checkpoints
from utils.run.atomic_folders import atomic_folder, prune, remove_leftovers
from utils.run.checkpoints import find_checkpoint, list_checkpoints
from utils.run.metric_log import truncate_metrics

ROOT = Path(__file__).parents[1]

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def make_checkpoint(folder: Path, content: str = "old") -> Path:
    """Write a complete checkpoint of two files."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_text(content)
    state = {"step": checkpoints.step_of(folder) or 0, "fits": {}, "files": {}, "content": content}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def content_of(folder: Path) -> str:
    """Return the content that both files of a checkpoint agree on."""
    weights = (folder / "unet" / "weights").read_text()
    assert json.loads((folder / "trainer_state.json").read_text())["content"] == weights
    return weights


def save(out: Path) -> None:
    """Save a checkpoint of two files."""
    with atomic_folder(out / "checkpoint-500") as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text("new")
        (folder / "trainer_state.json").write_text('{"step": 500, "fits": {}, "files": {}, "content": "new"}')


def is_killed(action: Callable[[], None], operations: int) -> bool:
    """Do something in a fork that is killed just before its N-th operation on a file; return whether it was."""
    pid = os.fork()
    if not pid:
        gc.disable()  # what this process holds is not the fork's to clean up
        sys.addaudithook(functools.partial(kill_at, [None] * operations))
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def kill_at(left: list, event: str, _) -> None:
    """Count an event, and kill this process if none is left."""
    if event in WATCHED:
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left.pop()


def names(paths) -> list[str]:
    """Return the names of paths."""
    return [path.name for path in paths]


def mixed_folder(out: Path) -> Path:
    """Make an output folder with three complete checkpoints and everything that only looks like one."""
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-0"):
        make_checkpoint(out / name)
    for name in (
        "checkpoint-best",
        "checkpoint-1-backup",
        "checkpoint-007",
        "checkpoint-+5",
        "checkpoint-٥",
        "checkpoint-",
    ):
        make_checkpoint(out / name)
    make_checkpoint(out / ".saving-3-00000000")
    (out / "checkpoint-30").mkdir()
    (out / "checkpoint-31").mkdir()
    (out / "checkpoint-31" / "trainer_state.json").write_text('{"step": 3')
    (out / "checkpoint-32").write_text("a file")
    (out / "checkpoint-33").symlink_to(out / "checkpoint-2", target_is_directory=True)
    return out


def test_only_complete_folders_of_the_exact_name_are_listed(tmp_path):
    assert names(list_checkpoints(mixed_folder(tmp_path))) == ["checkpoint-0", "checkpoint-2", "checkpoint-10"]
    assert list_checkpoints(tmp_path / "missing") == []


def test_latest_is_the_newest_complete_one_and_says_what_it_passed_over(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    assert find_checkpoint(mixed_folder(tmp_path), "latest").name == "checkpoint-10"
    for line in (
        "checkpoint-30: it is incomplete: it has no readable trainer_state.json",
        "checkpoint-31: it is incomplete: its trainer_state.json is no valid JSON",
        "checkpoint-32: it is no folder",
        "checkpoint-33: it is a link",
        "checkpoint-best: it is not named checkpoint-N",
    ):
        assert line in caplog.text
    assert "checkpoint-2:" not in caplog.text
    assert find_checkpoint(tmp_path / "missing", "latest") is None


def test_a_damaged_checkpoint_is_passed_over_and_said_to_be_one(tmp_path, caplog):
    """A file that is missing, or shorter than when it was written, is found without reading it."""
    make_checkpoint(tmp_path / "checkpoint-2")
    for step in (4, 6):
        checkpoints.write_state(make_checkpoint(tmp_path / f"checkpoint-{step}"), step, {"seed": 1})
    assert checkpoints.read_state(tmp_path / "checkpoint-4")["files"] == {"unet/weights": 3}
    assert names(list_checkpoints(tmp_path)) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    (tmp_path / "checkpoint-4" / "unet" / "weights").unlink()
    (tmp_path / "checkpoint-6" / "unet" / "weights").write_text("o")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"
    assert [message.partition("checkpoint-")[2] for message in caplog.messages] == [
        "4: it is damaged: it lacks unet/weights.",
        "6: it is damaged: its unet/weights has 1 bytes, not 3.",
    ]
    with pytest.raises(UserError, match=r"checkpoint-6 is damaged.*Complete checkpoints in .*: checkpoint-2\."):
        find_checkpoint(tmp_path, "checkpoint-6")


def test_what_cannot_be_read_is_said_without_a_traceback(tmp_path):
    """The message has the reason and the other checkpoints; mistakes of the code are not hidden."""
    for name in ("checkpoint-2", "checkpoint-4"):
        make_checkpoint(tmp_path / name)
    for error in (OSError("short"), RuntimeError("short"), EOFError("short"), pickle.UnpicklingError("short")):
        with (
            pytest.raises(UserError, match=r"checkpoint-4 cannot be read.*: short\n.*: checkpoint-2\."),
            checkpoints.explaining_damage(tmp_path / "checkpoint-4"),
        ):
            raise error
    with pytest.raises(TypeError), checkpoints.explaining_damage(tmp_path / "checkpoint-4"):
        raise TypeError
    full = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError), checkpoints.explaining_damage(tmp_path / "checkpoint-4"):
        raise full


def test_what_has_changed_since_the_checkpoint_is_said(tmp_path, caplog):
    """Flags that are the same are not, nor is anything without the earlier run's flags."""
    folder = make_checkpoint(tmp_path / "checkpoint-4")
    with caplog.at_level(logging.INFO):
        checkpoints.announce_changes(folder, 4, {"seed": 1})
        (tmp_path / "args.json").write_text(json.dumps({"seed": 1, "learning_rate": 1e-4, "gone": 0}))
        checkpoints.announce_changes(None, 0, {"seed": 2})
        checkpoints.announce_changes(folder, 4, {"seed": 1, "learning_rate": 5e-5, "new": 3})
    assert caplog.messages == ["From step 4 on, --learning_rate is 5e-05; it was 0.0001."]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": 3}, "is that of step 3"),
        ({"step": "4"}, "has no usable step"),
        ({"step": None, "fits": []}, "has no usable step and no usable fits"),
        ({"files": ["unet/weights"]}, "has no usable files"),
    ],
)
def test_a_state_that_was_tampered_with_is_found_out(tmp_path, change, reason):
    """What resuming reads has the kinds that it is written with, and the step is that of the name."""
    folder = make_checkpoint(tmp_path / "checkpoint-4")
    assert checkpoints.why_unusable(folder) == ""
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps(state | change))
    assert checkpoints.why_unusable(folder) == f"is damaged: its trainer_state.json {reason}"
    assert checkpoints.why_incomplete(folder.rename(tmp_path / "mine")) == (
        "" if change == {"step": 3} else f"is damaged: its trainer_state.json {reason}"
    )


@pytest.mark.parametrize("kind", ["file", "link", "empty folder"])
def test_what_is_not_ours_is_kept_under_another_name_when_its_place_is_needed(tmp_path, caplog, kind):
    """It is no loss to us, but may be one to somebody; a link's target is not touched."""
    final, elsewhere = tmp_path / "checkpoint-7", make_checkpoint(tmp_path / "mine", "other")
    make = {"file": final.touch, "link": lambda: final.symlink_to(elsewhere), "empty folder": final.mkdir}
    make[kind]()
    with atomic_folder(final) as folder:
        make_checkpoint(folder / "inner", "new")
    assert sorted(names(final.iterdir())) == ["inner"] and content_of(elsewhere) == "other"
    (kept,) = tmp_path.glob("passed-over-7-*")
    assert (kept.is_file(), kept.is_symlink()) == (kind == "file", kind == "link")
    assert f"it is kept as {kept.name}" in caplog.text


@pytest.mark.parametrize("content", ["null", "[1]", '"x"', "[" * 100_000, "{"])
def test_settings_that_are_none_change_nothing(tmp_path, caplog, content):
    """An args.json that somebody has damaged is no reason not to go on."""
    folder = make_checkpoint(tmp_path / "checkpoint-4")
    (tmp_path / "args.json").write_text(content)
    with caplog.at_level(logging.INFO):
        checkpoints.announce_changes(folder, 4, {"seed": 1})
    assert caplog.messages == []


def test_a_checkpoint_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "out" / "checkpoint-5")
    monkeypatch.chdir(tmp_path)
    for wanted in ("checkpoint-5", str(folder), "out/checkpoint-5"):
        assert find_checkpoint(Path("out"), wanted).resolve() == folder


@pytest.mark.parametrize(
    "wanted, problem",
    [
        ("checkpoint-7", "does not exist"),
        ("checkpoint-6", "is incomplete"),
        ("", "is incomplete"),
        ("file", "is no folder"),
    ],
)
def test_a_wrong_checkpoint_is_an_error_that_names_the_right_ones(tmp_path, wanted, problem):
    make_checkpoint(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"{problem}.*Complete checkpoints in .*: checkpoint-5\."):
        find_checkpoint(tmp_path, wanted)


@pytest.mark.parametrize("old", [True, False])
def test_a_kill_at_any_operation_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path, old):
    seen = set()
    for operations in range(100):
        out = tmp_path / str(operations)
        final = out / "checkpoint-500"
        make_checkpoint(out / "checkpoint-400", "other")
        if old:
            make_checkpoint(final)
        killed = is_killed(functools.partial(save, out), operations)
        before = content_of(final) if final.exists() else "absent"
        remove_leftovers(out)
        after = content_of(final) if final.exists() else "absent"
        seen.add((before, after))
        assert set(names(out.iterdir())) == {"checkpoint-400"} | ({"checkpoint-500"} if after != "absent" else set())
        assert content_of(out / "checkpoint-400") == "other"
        if not killed:
            break
    assert not killed and operations > 10
    expected = {("old", "old"), ("absent", "old"), ("new", "new")} if old else {("absent", "absent"), ("new", "new")}
    assert seen == expected


def test_a_kill_at_any_operation_of_pruning_leaves_complete_checkpoints(tmp_path):
    seen = set()
    for operations in range(100):
        out = tmp_path / str(operations)
        for step in (300, 400, 500):
            make_checkpoint(out / f"checkpoint-{step}", str(step))
        killed = is_killed(functools.partial(prune, out, 1, 500), operations)
        visible = sorted(out.glob("checkpoint-*"))
        assert [content_of(path) for path in visible] == [path.name[-3:] for path in visible]
        remove_leftovers(out)
        assert sorted(out.iterdir()) == visible and visible[-1].name == "checkpoint-500"
        seen.add(len(visible))
        if not killed:
            break
    assert not killed and names(visible) == ["checkpoint-500"]
    assert seen == {1, 2, 3}


def test_an_exception_leaves_what_was_there(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-5")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "checkpoint-5") as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".saving-5-")
        make_checkpoint(folder / "part", "new")
        raise KeyboardInterrupt
    assert names(tmp_path.iterdir()) == ["checkpoint-5"] and content_of(tmp_path / "checkpoint-5") == "old"


def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "checkpoint-5")
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if ".saving" not in str(a) else os.stat("/missing"))
    with pytest.raises(UserError, match="/missing"), atomic_folder(tmp_path / "checkpoint-5") as folder:
        make_checkpoint(folder / "part", "new")
    assert names(tmp_path.iterdir()) == ["checkpoint-5"] and content_of(tmp_path / "checkpoint-5") == "old"


def test_everything_is_synced_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    final = tmp_path / "checkpoint-5"
    with atomic_folder(final) as folder:
        (folder / "unet").mkdir()
        for name in ("trainer_state.json", "unet/weights"):
            (folder / name).write_text("{}")
    inside = {path.stat().st_ino for path in [final, *final.rglob("*")]}
    assert len(inside) == 4
    assert set(events[: events.index("rename")]) == inside
    assert events[events.index("rename") :] == ["rename", tmp_path.stat().st_ino]


def test_a_saved_folder_has_the_permissions_of_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "checkpoint-5"):
        pass
    assert stat.S_IMODE((tmp_path / "checkpoint-5").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_other_names_come_back_too_and_names_that_would_not_are_refused(tmp_path):
    make_checkpoint(tmp_path / ".replaced-text-encoder-01234567")
    make_checkpoint(tmp_path / ".replaced-5-01234567")
    remove_leftovers(tmp_path)
    assert sorted(names(tmp_path.iterdir())) == ["checkpoint-5", "text-encoder"]
    for name in ("500", "checkpoint-best"):
        with pytest.raises(ValueError, match=name), atomic_folder(tmp_path / name):
            pass


def test_leftovers_of_a_live_process_and_foreign_hidden_files_stay(tmp_path):
    foreign = [tmp_path / ".saving-notes", tmp_path / ".saving-5-abc"]
    for path in foreign:
        path.mkdir()
    code = "import sys; from pathlib import Path; from utils.run.atomic_folders import atomic_folder\n"
    code += "with atomic_folder(Path(sys.argv[1], 'checkpoint-5')): print('in', flush=True); sys.stdin.read()"
    live = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with live:
        assert live.stdout.readline() == "in\n"
        before = set(tmp_path.iterdir())
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == before and len(before) == 3
        live.kill()
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == set(foreign)


def test_pruning_keeps_the_newest_and_touches_nothing_else(tmp_path):
    mixed_folder(tmp_path)
    make_checkpoint(tmp_path / "checkpoint-99")
    before = set(names(tmp_path.iterdir()))
    assert prune(tmp_path, None, 10) == [] == prune(tmp_path, 3, 10)
    assert names(prune(tmp_path, 1, 10)) == ["checkpoint-0", "checkpoint-2"]
    assert before - set(names(tmp_path.iterdir())) == {"checkpoint-0", "checkpoint-2"}
    with pytest.raises(ValueError, match="limit is 0"):
        prune(tmp_path, 0, 10)


def test_metrics_are_cut_after_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 1, "loss": 0.5}\n{"step": 2, "eval_loss": NaN}\n'
    path.write_text('{"step": 1, "loss": 0.5}\n{"st\n{"step": 3}\n[2]\n{"loss": 1}\n\n{"step": 2, "eval_loss": NaN}')
    truncate_metrics(path, 2)
    assert path.read_text() == kept
    unchanged = path.stat().st_ino
    truncate_metrics(path, 2)
    assert path.stat().st_ino == unchanged
    truncate_metrics(path, 0)
    assert path.read_text() == ""
    truncate_metrics(tmp_path / "missing.jsonl", 2)
    assert names(tmp_path.iterdir()) == ["metrics.jsonl"]


def test_metrics_of_another_encoding_are_dropped(tmp_path):
    """So that what is left can be read."""
    lines = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(lines.encode("utf-16") + b"[" * 100_000 + b'\n{"step": 3}\n')
    truncate_metrics(tmp_path / "metrics.jsonl", 3)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "args.json"
    atomic_files.write_whole(path, "größe\n")
    assert path.read_bytes() == "größe\n".encode()
    monkeypatch.setattr(os, "replace", lambda a, b: os.stat("/missing"))
    with pytest.raises(FileNotFoundError):
        atomic_files.write_whole(path, "new")
    assert path.read_text() == "größe\n" and names(tmp_path.iterdir()) == ["args.json"]


def test_the_scale_of_fp16_comes_back(tmp_path):
    """And the steps since it grew; without a scaler there is none."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5)
    weight.grad = scaler.scale(torch.ones(3))
    scaler.step(optimizer)
    scaler.update()
    checkpoints.save_optimizer(tmp_path, optimizer.state_dict(), scaler)
    again = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=5)
    again.scale(torch.ones(1))
    checkpoints.load_optimizer(tmp_path, optimizer, again)
    assert (again.get_scale(), again.state_dict()["_growth_tracker"]) == (64.0, 1)
    checkpoints.save_optimizer(tmp_path, optimizer.state_dict(), None)
    checkpoints.load_optimizer(tmp_path, optimizer, None)


def test_settings_of_the_optimizer_are_those_of_the_command_that_resumes(tmp_path):
    """What was learned is the checkpoint's; rate, betas, epsilon and weight decay are those of the flags."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.4)
    weight.grad = torch.ones(3)
    optimizer.step()
    checkpoints.save_optimizer(tmp_path, optimizer.state_dict(), None)
    given = {"lr": 0.2, "betas": (0.7, 0.8), "eps": 1e-4, "weight_decay": 0.0}
    other = torch.optim.AdamW([weight], **given)
    checkpoints.load_optimizer(tmp_path, other, None)
    assert {key: other.param_groups[0][key] for key in given} == given
    assert torch.equal(other.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
