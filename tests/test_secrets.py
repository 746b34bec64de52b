"""The Hub's token stays where it was given: it is in no file, no upload and nothing printed, however a run ends."""

import base64
import concurrent.futures
import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.hub_server import USER, WRITE_TOKEN, HubServer
from tests.runs import SCRIPTS, WEIGHTS_FILE, Job, Run, read_metrics, wait_until
from utils import upload
from utils.hub import publish as sharing

DEBUG = {
    "HF_DEBUG": "1",
    **dict.fromkeys(("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"), "debug"),
    "ACCELERATE_LOG_LEVEL": "debug",
    "WANDB_MODE": "offline",
}
FLAGS = (
    "--push_to_hub --hub_model_id dog --report_to tensorboard,wandb --checkpointing_steps 1 --validation_prompt dog "
    "--num_validation_images 1 --validation_num_inference_steps 1"
)
BY_FLAG = f"--hub_token {WRITE_TOKEN}"
VISIBLE = "--hub_token is visible in the process list"


class Case(NamedTuple):
    """A run: where it has the token from ("flag", "variable" or "login"), what it meets, and how it ends."""

    script: str
    place: str
    flags: str
    code: int
    words: str  # of what it prints, so that it ends as it should
    fails: str = "nothing"  # requests that the Hub refuses; it quotes their headers
    status: int = 403


CASES = {
    "good": Case("full", "flag", f"{BY_FLAG} --max_train_steps 1", 0, "Uploaded to"),
    "not uploaded": Case("lora", "login", "--max_train_steps 1", 1, "The result is safe in", "/commit/"),
    "refused": Case("lora", "variable", "--max_train_steps 1", 1, "may not write to the repository", "/create"),
    "stopped": Case("lora", "flag", f"{BY_FLAG} --max_train_steps 500 --checkpointing_steps 500", 143, "Stopping:"),
    "diverged": Case("full", "variable", "--max_train_steps 8 --learning_rate 1e30", 1, "Training has diverged"),
    "no model": Case(
        "lora", "flag", f"{BY_FLAG} --pretrained_model_name_or_path tester/no", 1, "no such model", "no/resolve", 401
    ),
    "mistaken": Case("full", "flag", f"{BY_FLAG} --learning_rate -1", 2, "--learning_rate"),
}


class Ended(NamedTuple):
    """A run that has ended, and all places where it may have left something."""

    run: Run
    hub: HubServer
    folders: list[Path]


@pytest.fixture(scope="module")
def ended(trainer, tmp_path_factory) -> dict[str, Ended]:
    """Run all cases with everything at debug level, three at the same time."""
    lock = threading.Lock()

    def run(case: str, hub: HubServer) -> Ended:
        script, place, flags, code, words, fails, status = CASES[case]
        folder = tmp_path_factory.mktemp("secrets")
        hub.fail(fails, status=status)
        variables = hub.variables(folder / "hf", WRITE_TOKEN if place == "variable" else None)
        for name in ("HOME", "TMPDIR", "WANDB_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
            variables[name] = str(folder / name.lower())
            (folder / name.lower()).mkdir()
        if place == "login":
            (folder / "hf").mkdir()
            (folder / "hf" / "token").write_text(WRITE_TOKEN)
        with lock:
            job = trainer.start(script, folder / "out", f"{FLAGS} {flags}", "python", **variables, **DEBUG)
        if case == "stopped":
            stop_in_training(job)
        run = job.finish()
        assert run.code == code and words in run.stderr, run.text
        return Ended(run, hub, [folder, job.log])

    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(3) as pool:
        hubs = [stack.enter_context(HubServer()) for _ in CASES]
        yield dict(zip(CASES, pool.map(run, CASES, hubs), strict=True))


def stop_in_training(job: Job) -> None:
    """Send SIGTERM once a step is done."""
    wait_until(lambda: job.steps_logged() or job.process.poll() is not None, f"a step of {job.log}")
    os.kill(job.pid, signal.SIGTERM)


# The search.


def find_token(folders: list[Path], token: str = WRITE_TOKEN) -> list[str]:
    """Return the files whose path or content has a token: plain, encoded, in an archive or in parts."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if token in str(path) or any(has_token(part, token) for part in parts(path))]


def has_token(content: bytes, token: str) -> bool:
    """Tell whether a token is in some bytes, as text of usual encodings or in base64 at any of its three shifts."""
    inner = [base64.b64encode(b"\0" * shift + token.encode())[4:-4] for shift in range(3)]
    plain = [token.encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-32-le")]
    return any(form in content for form in plain + inner)


def parts(path: Path) -> list[bytes]:
    """Return a file's content, and what is in it if it is an archive or a log in blocks."""
    found = [path.read_bytes()]
    if path.suffix == ".gz":
        found.append(gzip.decompress(found[0]))
    if path.suffix == ".wandb":
        found.append(without_headers(found[0]))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found += [archive.read(name) for name in archive.namelist()]
    return found


def without_headers(log: bytes) -> bytes:
    """Return the records of a LevelDB log, which are cut at blocks of 32 KiB, without what is between their parts."""
    position, records = 7, b""
    while position + 7 <= len(log):
        left = 32768 - position % 32768
        length = int.from_bytes(log[position + 4 : position + 6], "little")
        if left >= 7:
            records += log[position + 7 : position + 7 + length]
        position += left if left < 7 else 7 + length
    return records


@pytest.mark.parametrize("case", CASES)
def test_the_token_is_nowhere(ended, case):
    """Search the result, checkpoints, trackers' files, logs, caches, what was printed, and what the Hub was sent."""
    run, hub, folders = ended[case]
    login = [str(folders[0] / "hf" / "token")] if CASES[case].place == "login" else []
    assert find_token(folders) == login
    assert run.stderr.count(VISIBLE) == (CASES[case].place == "flag" and case != "mistaken")
    for name, repository in hub.repositories.items():
        assert not any(has_token(content, WRITE_TOKEN) for content in [*repository.files.values(), name.encode()])
    for request in hub.requests:
        headers = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert WRITE_TOKEN not in f"{request.path} {headers}"
        assert not request.path.startswith("/lfs/") or "authorization" not in request.headers


def test_the_runs_left_what_was_to_be_searched(ended):
    """Find what makes the test above worth something: files of each kind, lines at debug level, and requests."""
    good, folders = ended["good"], [folder for one in ended.values() for folder in one.folders]
    names = {path.name for folder in folders for path in folder.rglob("*")}
    assert {"args.json", "metrics.jsonl", "README.md", "optimizer.pt", "token", "output.log"} <= names
    assert any(name.endswith(".wandb") for name in names) and any("tfevents" in name for name in names)
    assert "authorization: <TOKEN>" in good.run.text
    (log,) = good.run.out.glob("wandb/offline-run-*/*.wandb")
    assert b"--hub_token" in log.read_bytes(), "wandb has the command line"
    assert any("/resolve/" in request.path for request in ended["no model"].hub.requests)
    assert len(good.hub.repositories[f"{USER}/dog"].files) > 10
    assert ended["diverged"].hub.repositories and not ended["refused"].hub.repositories
    assert read_metrics(ended["stopped"].run.out) and (ended["not uploaded"].run.out / WEIGHTS_FILE).exists()


# Controls.


def test_the_search_finds_a_token_that_is_there(tmp_path):
    """Plant one in each kind of place."""
    token = WRITE_TOKEN.encode()
    (tmp_path / "log").write_bytes(b"\xff" * 100 + token)
    (tmp_path / "wide").write_bytes(WRITE_TOKEN.encode("utf-16"))
    for shift in range(3):
        (tmp_path / f"base64-{shift}").write_bytes(base64.b64encode(b"x" * shift + token + b"more"))
    (tmp_path / "log.gz").write_bytes(gzip.compress(token))
    with zipfile.ZipFile(tmp_path / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", token * 2)
    (tmp_path / WRITE_TOKEN).mkdir()
    (tmp_path / WRITE_TOKEN / "named").write_bytes(b"")
    clean = tmp_path / "clean"
    clean.write_bytes(token[:-1])
    assert set(find_token([tmp_path])) == {str(path) for path in tmp_path.rglob("*") if path.is_file()} - {str(clean)}


def test_the_search_finds_what_wandb_stores(tmp_path):
    """Let wandb log so many tokens that some of them lie across the blocks of its file, then remove the whole ones."""
    code = (
        "import wandb, sys\n"
        "run = wandb.init(project='p', dir=sys.argv[1], config={'text': sys.argv[2]})\n"
        "for step in range(300): run.log({'text': sys.argv[2] * 20})\n"
        "run.finish()"
    )
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), WRITE_TOKEN], env=environment, check=True, timeout=60)
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert str(log) in find_token([tmp_path])
    content = log.read_bytes()
    assert without_headers(content).count(WRITE_TOKEN.encode()) > content.count(WRITE_TOKEN.encode()) >= 6000


# What else may show a token, or share a file.


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words", [["--hub_tokn", WRITE_TOKEN], [f"--hubtoken={WRITE_TOKEN}"], [WRITE_TOKEN]])
def test_a_token_behind_a_misspelled_flag_is_not_repeated(trainer, tmp_path, script, words):
    """The message names the flag without what was given to it."""
    run = trainer.start_words(script, tmp_path / "out", words).finish()
    assert run.code == 2 and "unrecognized arguments" in run.stderr
    assert WRITE_TOKEN not in run.text


@pytest.mark.parametrize("case", ["not uploaded", "diverged"])
def test_no_tracker_prints_a_traceback(ended, case):
    """A message is one message, also with wandb."""
    assert "Traceback" not in ended[case].run.text


def test_an_index_cannot_name_what_is_private(tmp_path):
    """Name the folders of the run itself, and places outside, as components of the pipeline."""
    outside = tmp_path / "outside"
    folder = tmp_path / "run"
    private = ["class_images", "logs", "samples", "wandb", "checkpoint-1", ".cache", "_private"]
    inside = [f"{name}/config.json" for name in ["unet", *private]] + ["unet.json", "args.json"]
    for path in [outside / "config.json", *(folder / name for name in inside)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    places = ["", ".", "/", "unet/..", "../outside", str(outside), "*", "**", "unet.json", "args.json"]
    index = {name: ["diffusers", "X"] for name in ["unet", *private, *places]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert sharing.files_to_upload(folder) == ["model_index.json", "unet/config.json"]


@pytest.mark.parametrize("words", [["--hub_tokn", WRITE_TOKEN], [f"--hubtoken={WRITE_TOKEN}"], ["--", WRITE_TOKEN]])
def test_the_upload_repeats_no_misplaced_token(capsys, words):
    """The message names what is unknown without the token."""
    with pytest.raises(SystemExit) as end:
        upload.parse_args(["folder", *words])
    printed = capsys.readouterr()
    assert end.value.code == 2 and "<token>" in printed.err and WRITE_TOKEN not in printed.out + printed.err
