"""Sharing: what is uploaded, what is refused before training, and what a failed upload says."""

import json
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub_server import READ_TOKEN, USER, WRITE_TOKEN, HubServer, Repository
from utils import hub
from utils.errors import InputError

ROOT = Path(__file__).parent.parent
WRONG_TOKEN = "hf_token-of-nobody"
SHARED = {  # of every run
    "README.md": b"---\nlicense: mit\n---\nA dog.\n",
    "samples/step-000000/0.png": b"\x89PNG before",
    "samples/step-000500/0.png": b"\x89PNG after",
    "samples/step-000500/grid.png": b"\x89PNG grid",
}
PIPELINE = {
    "model_index.json": json.dumps(
        {
            "_class_name": "StableDiffusionPipeline",
            "_private": ["diffusers", "Thing"],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDPMScheduler"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "..": ["diffusers", "Thing"],
            "checkpoint-500": ["diffusers", "Thing"],
        }
    ).encode(),
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/merges.txt": b"",  # empty files take another way than other ones
    "tokenizer/vocab.json": b'{"a": 0}',
    "unet/config.json": b'{"in_channels": 4}',
    "unet/diffusion_pytorch_model.safetensors": bytes(range(256)) * 500,
    "unet/nested/more.safetensors": b"more",
}
LORA = {
    "pytorch_lora_weights.safetensors": bytes(range(255, -1, -1)) * 300,
    "scheduler/scheduler_config.json": b"{}",
}
FORBIDDEN = {
    ".cache/huggingface/x": b"hidden",
    ".gitignore": b"*",
    "_private/config.json": b"not a component",
    "args.json": b"{}",
    "checkpoint-500/optimizer.bin": b"moments",
    "checkpoint-500/pytorch_lora_weights.safetensors": b"older",
    "checkpoint-500/samples/0.png": b"\x89PNG",
    "class_images/0.png": b"\x89PNG of nobody",
    "logs/events.out.tfevents.1": b"log",
    "metrics.jsonl": b"{}\n",
    "notes.txt": b"private",
    "optimizer.bin": b"moments",
    "photo.png": b"\x89PNG of somebody",
    "samples/.thumbnails/0.png": b"\x89PNG",
    "samples/step-000500/latents.pt": b"tensor",
    "scheduler/.scheduler_config.json.swp": b"hidden",
    "vae/config.json": b"not in model_index.json",
}


@pytest.fixture
def server():
    """Serve a Hub."""
    with HubServer() as server:
        yield server


def write_run(folder: Path, *contents: dict[str, bytes]) -> Path:
    """Write the files of a run."""
    for name, content in [item for files in contents for item in files.items()]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def run_python(server: HubServer, home: Path, *arguments: object, token: str | None = WRITE_TOKEN, **changes: str):
    """Run Python as a client of the server, and check that it shows neither a token nor a traceback."""
    environment = server.environment(home / "home", token) | changes
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    for secret in (WRITE_TOKEN, READ_TOKEN, WRONG_TOKEN, "Traceback"):
        assert secret not in done.stdout + done.stderr
    return done


def upload(server: HubServer, folder: Path, *flags: str, **options):
    """Run the tool on a folder."""
    return run_python(server, folder.parent, "-m", "utils.upload", folder, *flags, **options)


@pytest.mark.parametrize("result", [PIPELINE, LORA], ids=["pipeline", "lora"])
def test_exactly_the_allowed_files_arrive(server, tmp_path, result):
    """Upload a run with everything lying around, and find the allowed files on the Hub, in one commit, in full."""
    done = upload(server, write_run(tmp_path / "my-dog", SHARED, result, FORBIDDEN))
    assert (done.returncode, done.stdout) == (0, f"{server.url}/{USER}/my-dog\n"), done.stderr
    assert list(server.repositories) == [f"{USER}/my-dog"]
    repository = server.repositories[f"{USER}/my-dog"]
    assert repository.files == SHARED | result
    assert len(repository.commits) == 1 and not repository.private
    logins = {request.headers.get("authorization") for request in server.requests if "/tester/" in request.path}
    assert logins == {f"Bearer {WRITE_TOKEN}"}


def test_an_unchanged_result_makes_no_second_commit(server, tmp_path):
    """Upload twice."""
    folder = write_run(tmp_path / "dog", SHARED, LORA)
    assert [upload(server, folder).returncode for _ in range(2)] == [0, 0]
    assert len(server.repositories[f"{USER}/dog"].commits) == 1


def test_where_the_repository_gets_its_name_and_its_privacy(server, tmp_path):
    """Take both from the flags, else from args.json; a name without owner is the user's own."""
    saved = {"args.json": b'{"hub_model_id": "saved", "hub_private_repo": true, "seed": 1}'}
    folder = write_run(tmp_path / "folder", LORA, saved)
    for flags in (
        [],
        ["--hub_model_id", "own", "--no-hub_private_repo"],
        ["--hub_model_id", f"{USER}/full", "--hub_token", WRITE_TOKEN],
    ):
        assert upload(server, folder, *flags, token=None if "--hub_token" in flags else WRITE_TOKEN).returncode == 0
    (folder / "args.json").write_text('{"hub_model_id": null}')
    assert upload(server, folder, "--hub_private_repo").returncode == 0
    privacy = {name.removeprefix(f"{USER}/"): repo.private for name, repo in server.repositories.items()}
    assert privacy == {"saved": True, "own": False, "full": True, "folder": True}


REFUSALS = {  # token, flags, part of the message
    "wrong token": (WRONG_TOKEN, [], "the Hub refuses the token: 401 Invalid user token. The token from HF_TOKEN"),
    "wrong flag": (WRITE_TOKEN, ["--hub_token", WRONG_TOKEN], "the Hub refuses the token: 401"),
    "no login": (None, [], "there is no login for the Hub. Make a token with write role"),
    "torn token": (None, ["--hub_token", "hf_token\n-of-nobody"], "the token has spaces or signs in it"),
    "read-only": (READ_TOKEN, [], f"the token of {USER} can only read. Make a token with write role"),
    "foreign": (
        WRITE_TOKEN,
        ["--hub_model_id", "other/dog"],
        f"{USER} may not write to the repository other/dog: 403",
    ),
    "foreign owner": (WRITE_TOKEN, ["--hub_model_id", "other/new"], "may not write to the repository other/new: 403"),
    "name": (WRITE_TOKEN, ["--hub_model_id", "my dog"], f"'{USER}/my dog' cannot be a repository: Repo id must use"),
    "exposed": (WRITE_TOKEN, ["--hub_private_repo", "--hub_model_id", "public"], "exists and is public. Make it"),
    "bad card": (WRITE_TOKEN, ["--hub_model_id", "broken"], "the upload to tester/broken failed: 502 made to fail"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(server, tmp_path, case):
    """Say what is wrong and what to do, create nothing and upload nothing."""
    token, flags, message = REFUSALS[case]
    server.repositories |= {name: Repository() for name in ("other/dog", f"{USER}/public", f"{USER}/broken")}
    server.fail("/validate-yaml", status=502)
    done = upload(server, write_run(tmp_path / "dog", SHARED, LORA), *flags, token=token)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "hf_token" not in done.stderr
    assert len(server.repositories) == 3 and not server.large_files
    assert not any(repository.files for repository in server.repositories.values())


def test_login_is_checked_before_there_is_a_folder(server, tmp_path):
    """Prepare a repository for a run that has not begun, as training does."""
    code = (
        "import sys; from pathlib import Path; from utils import hub;"
        "print(hub.prepare_repository(None, Path(sys.argv[1]), None, True))"
    )
    done = run_python(server, tmp_path, "-c", code, tmp_path / "not" / "yet")
    assert done.stdout == f"{USER}/yet\n", done.stderr
    assert server.repositories == {f"{USER}/yet": Repository(private=True)}
    assert server.requests[-2].path == f"/api/models/{USER}/yet/auth-check/write"


@pytest.mark.parametrize("case", ["unreachable", "offline", "broken"])
def test_a_hub_that_does_not_answer(server, tmp_path, case):
    """Say how to reach it or how to go on without it."""
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        changes = {
            "unreachable": {"HF_ENDPOINT": f"http://127.0.0.1:{unused.getsockname()[1]}"},
            "offline": {"HF_HUB_OFFLINE": "1"},
            "broken": {},
        }[case]
        server.fail("/repos/create" if case == "broken" else "nothing", status=503)
        done = upload(server, write_run(tmp_path / "dog", LORA), **changes)
    assert done.returncode == 1
    start = "the repository tester/dog was not prepared: 503" if case == "broken" else "the login cannot be checked: "
    assert done.stderr.startswith(f"error: {start}")
    assert "train without --push_to_hub and upload later" in done.stderr


FAILED_UPLOADS = {  # what fails, with which status, part of the message
    "end": ("/commit/", 500, "tester/dog failed: 500 made to fail"),
    "plan": ("/objects/batch", 403, "tester/dog failed: 403 made to fail"),
    "verification": ("/lfs-verify", 403, "to the Hub: 403 made to fail: POST /tester/dog/lfs-verify, Bearer <token>."),
    "thread": ("^/lfs/", 403, "failed: Error while uploading 'pytorch_lora_weights.safetensors' to the Hub: 403 made"),
}


@pytest.mark.parametrize("case", FAILED_UPLOADS)
def test_the_message_of_a_failed_upload_has_the_command_that_mends_it(server, tmp_path, case):
    """Let the upload fail at its end or on its way, then run what the message says."""
    pattern, status, message = FAILED_UPLOADS[case]
    folder = write_run(tmp_path / "my dog", LORA, {"README.md": b"# Dog\n"})
    server.fail(pattern, status=status)
    done = upload(server, folder, "--hub_model_id", "dog", "--hub_token", WRITE_TOKEN, token=None)
    assert done.returncode == 1 and done.stdout == "" and message in done.stderr
    assert server.repositories[f"{USER}/dog"].files == {}
    python, *command = shlex.split(done.stderr.partition("Try again with: ")[2].partition("\n")[0])
    assert (python, command) == ("python", ["-m", "utils.upload", str(folder), "--hub_model_id", f"{USER}/dog"])
    assert run_python(server, tmp_path, *command).returncode == 0
    assert server.repositories[f"{USER}/dog"].files == LORA | {"README.md": b"# Dog\n"}


def test_a_folder_without_a_result_is_refused(server, tmp_path):
    """Ask the Hub for nothing when there is nothing to upload, or nothing that can be read."""
    done = upload(server, write_run(tmp_path / "stopped", SHARED, FORBIDDEN))
    assert done.returncode == 1 and "stopped holds no result (neither model_index.json nor" in done.stderr
    done = upload(server, write_run(tmp_path / "torn", {"model_index.json": b"[1"}))
    assert done.returncode == 1 and "model_index.json cannot be read" in done.stderr
    done = upload(server, write_run(tmp_path / "args", LORA, {"args.json": b"[1]"}))
    assert done.returncode == 1 and "args.json cannot be read" in done.stderr
    assert server.requests == []


def test_nothing_behind_a_symlink_is_shared(tmp_path):
    """List a run with links to files and folders outside."""
    outside = write_run(tmp_path / "outside", {"key.png": b"secret", "unet/weights.bin": b"secret"})
    folder = write_run(tmp_path / "run", {"model_index.json": b'{"unet": [], "vae": []}', "vae/config.json": b"{}"})
    (folder / "unet").symlink_to(outside / "unet")
    (folder / "samples").mkdir()
    (folder / "samples" / "key.png").symlink_to(outside / "key.png")
    (folder / "samples" / "more").symlink_to(outside)
    (folder / "vae" / "more").symlink_to(outside)
    (folder / "README.md").symlink_to(tmp_path / "nowhere")
    assert hub.files_to_upload(folder) == ["model_index.json", "vae/config.json"]
    (tmp_path / "link").symlink_to(folder)
    assert hub.files_to_upload(tmp_path / "link") == ["model_index.json", "vae/config.json"]


def test_an_index_that_is_no_object_is_refused(tmp_path):
    """Name the file."""
    with pytest.raises(InputError, match=r"model_index\.json holds no JSON object"):
        hub.files_to_upload(write_run(tmp_path, {"model_index.json": b"[]"}))


def test_the_server_as_a_program(server, tmp_path):
    """Upload to a server in a process of its own, and find what arrived in its record folder."""
    port_file, records = tmp_path / "port", tmp_path / "records"
    command = ["-m", "tests.hub_server", "--port-file", port_file, "--record-dir", records, "--fail", "/commit/:2:500"]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 20
        while not port_file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        endpoint = f"http://127.0.0.1:{port_file.read_text()}"
        folder = write_run(tmp_path / "dog", LORA)
        assert upload(server, folder, HF_ENDPOINT=endpoint).stdout == f"{endpoint}/{USER}/dog\n"
        assert upload(server, folder, "--hub_model_id", "second", HF_ENDPOINT=endpoint).returncode == 1
    finally:
        process.terminate()
        process.wait(10)
    arrived = records / "files" / USER / "dog"
    assert {p.relative_to(arrived).as_posix(): p.read_bytes() for p in arrived.rglob("*") if p.is_file()} == LORA
    overview = json.loads((records / "repositories.json").read_text())
    assert {name: len(repository["commits"]) for name, repository in overview.items()} == {
        f"{USER}/dog": 1,
        f"{USER}/second": 0,
    }
    requests = [json.loads(line) for line in (records / "requests.jsonl").read_text().splitlines()]
    assert [request["path"] for request in requests].count("/api/whoami-v2") == 2
