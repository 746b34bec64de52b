"""Training runs against a Hub that misbehaves: nothing is trained for nothing, and no result is lost."""

import concurrent.futures
import contextlib
import math
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.hub_server import USER, WRITE_TOKEN, HubServer
from tests.runs import PRIOR_FLAGS, ROOT, TIMEOUT, WEIGHTS_FILE, Run, Trainer, names, read_metrics

REPOSITORY = f"{USER}/my-dog"
FLAGS = (
    f"{PRIOR_FLAGS} --max_train_steps 2 --checkpointing_steps 1 --push_to_hub --hub_model_id my-dog "
    "--report_to tensorboard --validation_prompt 'a photo of sks dog' --num_validation_images 1 "
    "--validation_num_inference_steps 1"
)
# Written out, and not made by what is to be tested: what is shared once cannot be taken back.
SHARED = (
    "README.md samples/step-000000/00.png samples/step-000000/grid.png samples/step-000002/00.png "
    "samples/step-000002/grid.png scheduler/scheduler_config.json"
).split()
UPLOADED = {
    "full": (
        "model_index.json text_encoder/config.json text_encoder/model.safetensors tokenizer/tokenizer.json "
        "tokenizer/tokenizer_config.json unet/config.json unet/diffusion_pytorch_model.safetensors vae/config.json "
        "vae/diffusion_pytorch_model.safetensors"
    ).split(),
    "lora": [WEIGHTS_FILE],
}
KEPT = {"args.json", "checkpoint-1", "checkpoint-2", "class_images", "logs", "metrics.jsonl"}
QUICKLY = {"HF_HUB_ETAG_TIMEOUT": "1"}  # a hang then ends after 3 s before training, and after 6 s in an upload


class Case(NamedTuple):
    """A run on a Hub that misbehaves."""

    script: str
    failures: dict[str, dict]  # by a pattern of requests, how they fail: arguments of `HubServer.fail`
    code: int = 1  # its exit status
    is_impatient: bool = False  # gives up after `QUICKLY`


CASES = {
    "passing": Case(
        "full",
        {
            "/whoami": {"status": 429, "headers": {"Retry-After": "2"}},
            "/create": {"status": 500},
            "^/lfs/": {"status": "reset"},
            "/commit/": {"status": 500, "times": 3},
        },
        code=0,
    ),
    "no commit": Case("lora", {"/commit/": {"status": "hang"}}, is_impatient=True),
    "broken": Case("full", {"/create": {"status": 503, "times": math.inf}}),
    "silent": Case("lora", {"/whoami": {"status": "hang"}}, is_impatient=True),
    "too large": Case("full", {"/auth-check": {"status": 413}}),
}
REFUSED = {
    "broken": f"{REPOSITORY} was not prepared: 503 made to fail",
    "silent": "the login cannot be checked: no answer within 3 s.",
    "too large": f"{REPOSITORY} was not prepared: 413 made to fail",
}


@pytest.fixture(scope="module")
def hubs():
    """Start a Hub for each run, and one more."""
    with contextlib.ExitStack() as stack:
        hubs = {case: stack.enter_context(HubServer()) for case in [*CASES, "no storage"]}
        for name, case in CASES.items():
            for pattern, failure in case.failures.items():
                hubs[name].fail(pattern, **failure)
        hubs["no storage"].fail("^/lfs/", status="hang", times=math.inf)
        yield hubs


@pytest.fixture(scope="module")
def patient_upload(hubs, trainer, tmp_path_factory) -> subprocess.Popen:
    """Start to upload where large files are never taken; the client itself tries those again for a minute."""
    folder = tmp_path_factory.mktemp("hub") / "my-dog"
    folder.mkdir()
    (folder / WEIGHTS_FILE).write_bytes(b"weights")
    return start_upload(trainer, hubs["no storage"], folder, **QUICKLY)


@pytest.fixture(scope="module")
def runs(patient_upload, hubs, trainer, tmp_path_factory) -> dict[str, Run]:
    """Run all of them, three at the same time, because they wait more than they work."""
    folder, lock = tmp_path_factory.mktemp("hub"), threading.Lock()

    def run(name: str) -> Run:
        case, out = CASES[name], folder / name.replace(" ", "-")
        settings = hubs[name].variables(folder, WRITE_TOKEN) | (QUICKLY if case.is_impatient else {})
        with lock:
            job = trainer.start(case.script, out, FLAGS, "python", **settings)
        run = job.finish()
        assert run.code == case.code, run.text
        return run

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


def start_upload(trainer: Trainer, hub: HubServer, out: Path, **limits: str) -> subprocess.Popen:
    """Start `python -m utils.upload`; the run's own args.json names the repository."""
    settings = trainer.variables | hub.variables(out.parent, WRITE_TOKEN) | limits
    words = [sys.executable, "-m", "utils.upload", str(out)]
    return subprocess.Popen(words, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def check_upload(hub: HubServer, script: str, out: Path) -> None:
    """Check that the Hub has what may be shared, bit for bit, in one commit, and that the folder has more."""
    repository = hub.repositories[REPOSITORY]
    assert sorted(repository.files) == sorted(SHARED + UPLOADED[script])
    assert all((out / name).read_bytes() == content for name, content in repository.files.items())
    assert len(repository.commits) == 1
    assert set(names(out)) >= KEPT
    assert any((out / "class_images").iterdir()) and any((out / "logs").rglob("*tfevents*"))


def pauses_said(run: Run) -> list[tuple[int, int]]:
    """Return the status and the pause of each line that says what is waited for."""
    found = re.findall(r"^WARNING: The Hub answers (\d+); trying again in (\d+) s\.$", run.stderr, re.MULTILINE)
    return [(int(status), int(pause)) for status, pause in found]


@pytest.mark.parametrize("case", REFUSED)
def test_a_hub_that_refuses_ends_the_run_before_training(runs, hubs, case):
    """One message says what is wrong and how to go on; there is no folder, and nothing on the Hub."""
    run = runs[case]
    assert REFUSED[case] in run.stderr
    assert "train without --push_to_hub and upload later with `python -m utils.upload OUTPUT_DIR`" in run.stderr
    assert run.stderr.count("error: ") == 1 and "Traceback" not in run.text and WRITE_TOKEN not in run.text
    assert not run.out.exists()
    assert not any(repository.files for repository in hubs[case].repositories.values())
    assert pauses_said(run) == ([(503, 1), (503, 4), (503, 16)] if case == "broken" else [])


def test_what_passes_is_waited_for(runs, hubs):
    """A busy Hub, a broken connection and three failures in a row cost some seconds, and are told in the log."""
    assert pauses_said(runs["passing"]) == [(429, 2), (500, 1), (500, 1), (500, 4), (500, 16)]
    check_upload(hubs["passing"], "full", runs["passing"].out)


def test_an_upload_that_hangs_ends_with_the_command_that_finishes_it(runs, hubs, trainer):
    """The result stays, the exit status is 1; the command uploads it once the Hub is well."""
    run, hub = runs["no commit"], hubs["no commit"]
    assert "no answer within 6 s" in run.stderr and "Traceback" not in run.text and WRITE_TOKEN not in run.text
    assert f"Try again with: python -m utils.upload {run.out} --hub_model_id {REPOSITORY}\n" in run.stderr
    assert len(read_metrics(run.out)) == 2 and not hub.repositories[REPOSITORY].files
    again = start_upload(trainer, hub, run.out)
    stdout, stderr = again.communicate(timeout=TIMEOUT)
    assert (again.returncode, stdout) == (0, f"{hub.url}/{REPOSITORY}\n"), stderr
    check_upload(hub, "lora", run.out)


def test_large_files_that_are_never_taken_end_the_upload(runs, hubs, trainer, patient_upload):
    """The client gives up at last, and the same command finishes the job."""
    stderr, out, hub = patient_upload.communicate(timeout=TIMEOUT)[1], patient_upload.args[-1], hubs["no storage"]
    assert patient_upload.returncode == 1 and "Traceback" not in stderr and WRITE_TOKEN not in stderr
    assert f"{WEIGHTS_FILE}' to the Hub: no answer within 6 s. The result is safe in {out}. Try again" in stderr
    hub.failures.clear()
    again = start_upload(trainer, hub, Path(out))
    stderr = again.communicate(timeout=TIMEOUT)[1]
    assert again.returncode == 0, stderr
    assert hub.repositories[REPOSITORY].files == {WEIGHTS_FILE: b"weights"}


def test_requests_are_not_listed_in_the_log(runs):
    """The addresses that large files are sent to are as good as a password for an hour."""
    assert "HTTP Request" not in runs["passing"].stderr
