"""Pushing from the scripts to a Hub on 127.0.0.1, and training from a Hub id."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from tests.runs import ROOT, SCRIPTS, WEIGHTS_FILE, names, read_tensors

FLAGS = (
    "--max_train_steps 2 --checkpointing_steps 1 --push_to_hub --hub_model_id my-dog --report_to tensorboard "
    "--validation_prompt 'a photo of sks dog' --num_validation_images 1 --validation_num_inference_steps 1"
)
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path):
    """Start a Hub with one user, `tester`."""
    with HubServer() as server:
        yield server


def client(hub: HubServer, home: Path, token: str | None) -> dict[str, str]:
    """Return the variables that point a run at the Hub."""
    settings = {key: value for key, value in hub.environment(home, token).items() if key.startswith(("HF_", "NO_"))}
    return settings | {"HF_HUB_OFFLINE": "0"}


def texts_below(folder: Path) -> bytes:
    """Return the bytes of all files below a folder."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("script", SCRIPTS)
def test_push_uploads_the_result_and_nothing_else(script, hub, trainer, tmp_path):
    """The Hub gets the result, the card and the previews, bit for bit, and no token is left anywhere."""
    out = tmp_path / "out"
    flags = f"{FLAGS} --hub_private_repo --hub_token {WRITE_TOKEN}"
    run = trainer.run(script, out, flags, how="python", **client(hub, tmp_path / "home", None))
    repository = hub.repositories["tester/my-dog"]
    assert repository.private
    own = {"full": {"model_index.json", "unet", "vae", "text_encoder", "tokenizer"}, "lora": {WEIGHTS_FILE}}[script]
    assert {path.partition("/")[0] for path in repository.files} - {".gitattributes"} == own | {
        "README.md",
        "samples",
        "scheduler",
    }
    assert all((out / path).read_bytes() == content for path, content in repository.files.items())
    assert {"args.json", "metrics.jsonl", "checkpoint-1", "checkpoint-2", "logs"} <= set(names(out))
    assert WRITE_TOKEN not in run.text
    assert WRITE_TOKEN.encode() not in texts_below(out) + b"".join(repository.files.values())
    assert "tester/my-dog" in repository.files["README.md"].decode()


@pytest.mark.parametrize(
    ("script", "token", "words"), [("full", "hf_unknown", "refuses the token"), ("lora", READ_TOKEN, "can only read")]
)
def test_push_is_refused_before_training(script, token, words, hub, trainer, tmp_path):
    """A token that cannot write ends the run with one message, before a folder is made."""
    out = tmp_path / "out"
    run = trainer.run(script, out, FLAGS, code=1, how="python", **client(hub, tmp_path / "home", token))
    assert words in run.stderr and "Traceback" not in run.stderr and token not in run.text
    assert not out.exists() and not hub.repositories


def test_failed_upload_keeps_the_result_and_names_the_command(hub, trainer, tmp_path):
    """After a failing commit the exit status is 1, the result is there, and the printed command finishes the job."""
    out, variables = tmp_path / "out", client(hub, tmp_path / "home", WRITE_TOKEN)
    hub.fail("/commit/")
    run = trainer.run("lora", out, FLAGS, code=1, how="python", **variables)
    assert (out / WEIGHTS_FILE).exists() and (out / "README.md").exists()
    command = run.stderr.partition("Try again with: ")[2].splitlines()[0]
    assert command == f"python -m utils.upload {out} --hub_model_id tester/my-dog"
    words = [sys.executable, *command.split()[1:]]
    again = subprocess.run(words, cwd=ROOT, env=trainer.variables | variables, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert WEIGHTS_FILE in hub.repositories["tester/my-dog"].files


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_from_a_hub_id_equals_training_from_a_folder(script, tiny, trainer, tmp_path):
    """A Hub id and a revision, found in the cache, go through the same code as a folder."""
    cached = trainer.home / "hub" / "models--tester--tiny"
    shutil.copytree(tiny, cached / "snapshots" / SHA, dirs_exist_ok=True)
    (cached / "refs").mkdir(exist_ok=True)
    (cached / "refs" / "v1").write_text(SHA)
    flags = "--pretrained_model_name_or_path tester/tiny --revision v1 --max_train_steps 1"
    trainer.run(script, tmp_path / "hub", flags)
    trainer.run(script, tmp_path / "folder", "--max_train_steps 1")
    one, other = read_tensors(tmp_path / "hub"), read_tensors(tmp_path / "folder")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert "base_model: tester/tiny" in (tmp_path / "hub" / "README.md").read_text()

    refused = trainer.run(script, tmp_path / "none", flags.replace("v1", "v2"), code=1)
    assert "tester/tiny at revision v2" in refused.stderr and "Traceback" not in refused.stderr
