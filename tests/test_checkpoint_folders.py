"""What lies beside a run's own checkpoints, and checkpoints that do not fit a run: through the trainer."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import draw_picture
from tests.runs import SCRIPTS, Trainer, differing, names, read_metrics, read_tensors, untimed, wait_until

SAVE_EACH = "--checkpointing_steps 1 --checkpoints_total_limit 1 --max_train_steps"
LATEST = "--resume_from_checkpoint latest"


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_others(out: Path) -> dict[str, str]:
    """Put beside checkpoint-2 what only looks like a checkpoint; return the reasons why not, by name."""
    own = out / "checkpoint-2"
    (out / "checkpoint-3").mkdir()
    (out / "checkpoint-4").write_text("my notes")
    (out / "checkpoint-5").symlink_to(own, target_is_directory=True)
    for name in ("checkpoint-6", "checkpoint-7", "checkpoint-8", "checkpoint-best", "checkpoint-1-backup"):
        shutil.copytree(own, out / name)
    state = json.loads((own / "trainer_state.json").read_text()) | {"step": 6}
    (out / "checkpoint-6" / "trainer_state.json").write_text(json.dumps(state))
    (out / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    (out / "checkpoint-7" / "trainer_state.json").write_text('{"step": 7')
    size = (own / "optimizer.pt").stat().st_size
    return {
        "checkpoint-3": "is incomplete: it has no readable trainer_state.json",
        "checkpoint-4": "is no folder",
        "checkpoint-5": "is a link",
        "checkpoint-6": f"is damaged: its optimizer.pt has 0 bytes, not {size}",
        "checkpoint-7": "is incomplete: its trainer_state.json is no valid JSON",
        "checkpoint-8": "is damaged: its trainer_state.json is that of step 2",
        "checkpoint-best": "is not named checkpoint-N",
        "checkpoint-1-backup": "is not named checkpoint-N",
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_not_ours_is_never_chosen_and_never_lost(trainer, tmp_path, script):
    """It is passed over with the reason, also by pruning; what is in the way is kept under another name."""
    whole = trainer.run(script, tmp_path / "whole", f"{SAVE_EACH} 8").out
    out = trainer.run(script, tmp_path / "out", f"{SAVE_EACH} 2").out
    reasons = put_others(out)
    before = {name: contents(out / name) for name in reasons if (out / name).is_dir()}
    before["checkpoint-5"] = {}  # a link's target is one of ours
    run = trainer.run(script, out, f"{SAVE_EACH} 8 {LATEST}")
    for name, reason in reasons.items():
        assert run.stderr.count(f"Passed over {out / name}: it {reason}.") == 1
    assert f"Resumed from {out}/checkpoint-2: 2 of 8 steps are done" in run.stderr
    kept = {f"checkpoint-{path.name.split('-')[2]}": path for path in out.glob("passed-over-*")}
    assert sorted(kept) == [f"checkpoint-{step}" for step in range(3, 9)]
    assert [name for name in names(out) if "checkpoint" in name] == [
        "checkpoint-1-backup", "checkpoint-8", "checkpoint-best"
    ]  # fmt: skip
    assert kept["checkpoint-4"].read_text() == "my notes" and kept["checkpoint-5"].is_symlink()
    for name, files in before.items():
        assert contents(kept.get(name, out / name)) == files
        assert name not in kept or run.stderr.count(f"it is kept as {kept[name].name}") == 1
    assert differing(read_tensors(whole / "checkpoint-8"), read_tensors(out / "checkpoint-8")) == []
    assert untimed(whole) == untimed(out)


MISFITS = {  # script of the first run, script of the second, flags of the second, what is named
    "script": ("full", "lora", "", "script: DreamBooth there, LoRA DreamBooth here"),
    "other script": ("lora", "full", "", "script: LoRA DreamBooth there, DreamBooth here"),
    "rank": ("lora", "lora", "--rank 2", "rank: 4 there, 2 here"),
    "alpha": ("lora", "lora", "--lora_alpha 8", "alpha: 4 there, 8 here"),
    "layers": (
        "lora",
        "lora",
        "--lora_layers to_q",
        "layers: to_k,to_q,to_v,to_out.0 there, to_q here",
    ),
    "model": ("full", "full", "--pretrained_model_name_or_path {other}", "base model: tiny there, other here"),
    "optimizer": ("lora", "lora", "--use_8bit_adam", "use_8bit_adam: False there, True here"),
    "precision": ("full", "full", "--mixed_precision bf16", "precision: no there, bf16 here"),
    "resolution": ("lora", "lora", "--resolution 32", "resolution: 64 there, 32 here"),
    "photos": ("lora", "lora", "--instance_data_dir {fewer}", "photos: ['beach.png', 'grass.jpg', 'table.png'"),
    "class images": (
        "full",
        "full",
        "--with_prior_preservation --class_prompt dog --num_class_images 2",
        "class images: 0 there, 2 here",
    ),
}


@pytest.fixture(scope="module")
def outputs(trainer: Trainer, tiny: Path, photos: Path, tmp_path_factory) -> Path:
    """Run both scripts for a step, and make another model and another folder of photos."""
    folder = tmp_path_factory.mktemp("misfits")
    flags = "--max_train_steps 1 --checkpointing_steps 1"
    trainer.run_all({folder / script: (script, flags) for script in SCRIPTS})
    shutil.copytree(tiny, folder / "other")
    shutil.copytree(photos, folder / "fewer")
    (folder / "fewer" / "beach.png").unlink()
    return folder


@pytest.mark.parametrize("case", MISFITS)
def test_a_checkpoint_that_does_not_fit_names_the_difference(trainer, outputs, tmp_path, case):
    """All of it in one message; nothing is trained, and the checkpoint stays."""
    first, second, flags, words = MISFITS[case]
    shutil.copytree(outputs / first, out := tmp_path / "out")
    before = contents(out)
    flags = flags.format(other=outputs / "other", fewer=outputs / "fewer")
    run = trainer.run(second, out, f"--max_train_steps 2 {LATEST} {flags}", code=1)
    head = f"error: {out}/checkpoint-1 cannot be resumed: this command differs from the run that wrote it in\n"
    assert f"{head}  " in run.stderr and f"\n  {words}" in run.stderr and "Traceback" not in run.text
    assert run.stderr.endswith("Use the same values, or start a new run in another --output_dir.\n")
    assert contents(out) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_content_under_the_same_names_is_found_out(trainer, outputs, tmp_path, script):
    """Photos and weights that were replaced would train something else; older checkpoints know nothing of it."""
    shutil.copytree(outputs / script, out := tmp_path / "out")
    photos = shutil.copytree(trainer.photos, tmp_path / "photos")
    model = shutil.copytree(trainer.model, tmp_path / "tiny")
    flags = f"--max_train_steps 2 {LATEST} --instance_data_dir {photos} --pretrained_model_name_or_path {model}"
    draw_picture(80, 64, 77).save(photos / "beach.png")
    (weights,) = (model / "unet").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-40] ^= 1
    weights.write_bytes(content)
    run = trainer.run(script, out, flags, code=1)
    assert re.search(r"\n  content of the base model: \w{16} there, \w{16} here\n", run.stderr)
    assert re.search(r"\n  content of the pictures: \w{16} there, \w{16} here\n", run.stderr)
    path = out / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["fits"] = {name: value for name, value in state["fits"].items() if not name.startswith("content of")}
    path.write_text(json.dumps(state))
    trainer.run(script, out, flags)


def test_an_abandoned_branch_is_not_gone_on_with(trainer, tmp_path):
    """After a run is gone on with from an earlier checkpoint, `latest` is that run's, not the one's that was left."""
    flags = "--checkpointing_steps 2 --max_train_steps"
    whole = trainer.run("lora", tmp_path / "whole", f"{flags} 4").out
    shutil.copytree(whole, out := tmp_path / "out")
    branch = "--checkpointing_steps 1 --max_train_steps 3 --learning_rate 1e-4 --resume_from_checkpoint checkpoint-2"
    run = trainer.run("lora", out, branch)
    assert "checkpoint-4 is from a later step than this run's start (2): it is kept as passed-over-4-" in run.stderr
    run = trainer.run("lora", out, f"{flags} 4 --learning_rate 1e-4 {LATEST}")
    assert f"Resumed from {out}/checkpoint-3: 3 of 4 steps are done." in run.stderr
    assert [line["lr"] for line in read_metrics(out)] == [1e-3, 1e-3, 1e-4, 1e-4]


def test_a_checkpoint_of_another_number_of_processes_is_named(trainer, outputs, tmp_path):
    """Its batches were others, even if as many pictures came in each."""
    shutil.copytree(outputs / "lora", out := tmp_path / "out")
    path = out / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"fits": state["fits"] | {"processes": 2}}))
    run = trainer.run("lora", out, f"--max_train_steps 2 {LATEST}", code=1)
    assert "in\n  processes: 2 there, 1 here\nUse the same values" in run.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_changed_rate_and_length_hold_from_there_on_and_are_said(trainer, outputs, tmp_path, script):
    """Only what is changed is said, once each."""
    shutil.copytree(outputs / script, out := tmp_path / "out")
    flags = f"--max_train_steps 3 --learning_rate 5e-4 --checkpointing_steps 1 {LATEST}"
    run = trainer.run(script, out, flags)
    said = re.findall(r"From step 1 on, --(\S+) is (\S+); it was (\S+)\.\n", run.stderr)
    assert sorted(said) == [
        ("learning_rate", "0.0005", "0.001"),
        ("max_train_steps", "3", "1"),
    ]
    assert [line["lr"] for line in read_metrics(out)] == [1e-3, 5e-4, 5e-4]


def test_two_runs_do_not_share_a_folder(trainer, tmp_path):
    """The second is refused as long as the first lives, however its data workers live on, and changes nothing."""
    flags = "--max_train_steps 100000 --checkpointing_steps 2 --checkpoints_total_limit 1 --dataloader_num_workers 1"
    job = trainer.start("lora", tmp_path / "out", flags)
    wait_until(lambda: list(job.out.glob("checkpoint-*")), "a checkpoint")
    before = (job.out / "args.json").read_bytes()
    refused = trainer.run("lora", job.out, f"{flags} --seed 51 {LATEST}", code=1)
    assert refused.stderr.endswith(
        f"error: --output_dir {job.out} is in use by another run. Wait, or use another folder.\n"
    )
    assert (job.out / "args.json").read_bytes() == before
    os.kill(job.pid, signal.SIGKILL)
    step = int(list(job.out.glob("checkpoint-*"))[-1].name.partition("-")[2])
    trainer.run("lora", job.out, f"--max_train_steps {step + 3} {LATEST}")
