"""Sharing: what is uploaded, what is refused before training, and what a failed upload says."""

import json
import math
import shlex
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.hub_server import READ_TOKEN, USER, WRITE_TOKEN, HubServer, Repository
from utils.core.errors import UserError
from utils.hub import publish

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
    "torn token": (None, ["--hub_token", "hf_token\n-of-nobody"], "The token has spaces or signs in it"),
    "read-only": (READ_TOKEN, [], f"the token of {USER} can only read. Make a token with write role"),
    "foreign": (
        WRITE_TOKEN,
        ["--hub_model_id", "other/dog"],
        f"{USER} may not write to the repository other/dog: 403",
    ),
    "foreign owner": (WRITE_TOKEN, ["--hub_model_id", "other/new"], "may not write to the repository other/new: 403"),
    "name": (WRITE_TOKEN, ["--hub_model_id", "my dog"], f"'{USER}/my dog' cannot be a repository: Repo id must use"),
    "exposed": (WRITE_TOKEN, ["--hub_private_repo", "--hub_model_id", "public"], "exists and is public. Make it"),
    "bad card": (WRITE_TOKEN, ["--hub_model_id", "broken"], "the upload to tester/broken failed: 403 made to fail"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(server, tmp_path, case):
    """Say what is wrong and what to do, create nothing and upload nothing."""
    token, flags, message = REFUSALS[case]
    server.repositories |= {name: Repository() for name in ("other/dog", f"{USER}/public", f"{USER}/broken")}
    server.fail("/validate-yaml", status=403)
    done = upload(server, write_run(tmp_path / "dog", SHARED, LORA), *flags, token=token)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "hf_token" not in done.stderr
    assert len(server.repositories) == 3 and not server.large_files
    assert not any(repository.files for repository in server.repositories.values())


def test_login_is_checked_before_there_is_a_folder(server, tmp_path):
    """Prepare a repository for a run that has not begun, as training does."""
    code = (
        "import sys; from pathlib import Path; from utils.hub import publish;"
        "print(publish.prepare_repository(None, Path(sys.argv[1]), None, True))"
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
        server.fail("/repos/create" if case == "broken" else "nothing", status=501)
        done = upload(server, write_run(tmp_path / "dog", LORA), **changes)
    assert done.returncode == 1
    start = "the repository tester/dog was not prepared: 501" if case == "broken" else "the login cannot be checked: "
    assert done.stderr.startswith(f"error: {start}")
    assert "train without --push_to_hub and upload later" in done.stderr


QUESTIONS = {  # whose request fails: with a status, part of the message, part of the advice
    "/whoami": [
        (401, "the Hub refuses the token: 401 ", "write role"),
        (403, "the Hub refuses the token: 403 made to fail", "write role"),
        (
            404,
            "the login cannot be checked: 404 made to fail",
            "upload later with `python -m utils.upload OUTPUT_DIR`",
        ),
        (409, "the login cannot be checked: 409 made to fail", "upload later"),
        (413, "the login cannot be checked: 413 made to fail", "upload later"),
        ("reset", "the login cannot be checked: ", "Check the connection to http://127.0.0.1:"),
    ],
    "/create": [
        (401, "tester may not write to the repository tester/dog: 401 made", "set another --hub_model_id"),
        (403, "tester may not write to the repository tester/dog: 403 made", "set another --hub_model_id"),
        (404, "tester may not write to the repository tester/dog: 404 made", "set another --hub_model_id"),
        (409, "tester may not write to the repository tester/dog: 404 Repo", "set another --hub_model_id"),
        (413, "the repository tester/dog was not prepared: 413 made to fail", "upload later"),
    ],
    "/auth-check": [(409, "the repository tester/dog was not prepared: 409 made to fail", "upload later")],
}


def test_each_refusal_of_a_question_is_said_once_and_at_once(server, tmp_path):
    """Let each question fail in each way: one message with what to do, no second try, and nothing is uploaded."""
    cases = [(pattern, *case) for pattern, cases in QUESTIONS.items() for case in cases]
    code = (
        "import sys; from pathlib import Path; from utils.core import errors; from utils.hub import publish\n"
        f"for _ in range({len(cases)}):\n"
        "    try: publish.prepare_repository(None, Path('dog'), None, False)\n"
        "    except errors.UserError as error: print(error)"
    )
    for pattern, kinds in QUESTIONS.items():
        for number, (status, *_) in enumerate(kinds):
            # A repository that exists, as 409 says, is asked for before its turn.
            server.fail(pattern, number + 1 + (pattern == "/auth-check"), status)
    done = run_python(server, tmp_path, "-c", code)
    messages = done.stdout.splitlines()
    assert len(messages) == len(cases) and done.stderr == ""
    for message, (_, _, words, advice) in zip(messages, cases, strict=True):
        assert words in message and advice in message
    assert [request.path for request in server.requests].count("/api/whoami-v2") == len(cases)
    assert not any(repository.files for repository in server.repositories.values())


def test_what_passes_is_waited_for(server, tmp_path):
    """Meet a busy Hub, a broken one and a lost answer on the way: the result arrives, in one commit."""
    server.fail("/whoami", status=429, headers={"Retry-After": "2"})
    server.fail("/create", status=502)
    server.fail("/auth-check", status=429, headers={"RateLimit": '"api";r=0;t=2'})
    server.fail("^/lfs/", status="reset")
    server.fail("/commit/", status="lost")
    done = upload(server, write_run(tmp_path / "dog", SHARED, LORA))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("The Hub")]
    waits = [
        "answers 429; trying again in 2 s.",
        "answers 502; trying again in 1 s.",
        "answers 429; trying again in 2 s.",
    ]
    assert said[:3] == [f"The Hub {words}" for words in waits]
    assert len(said) == 4 and said[3].startswith("The Hub cannot be reached (") and said[3].endswith(" in 1 s.")
    repository = server.repositories[f"{USER}/dog"]
    assert repository.files == SHARED | LORA and len(repository.commits) == 1


@pytest.mark.parametrize("pattern", ["/whoami", "/preupload/"])
def test_a_long_pause_is_not_waited_for(server, tmp_path, pattern):
    """Say how long the Hub wants to be left alone, instead of sleeping for an hour."""
    server.fail(pattern, status=429, headers={"Retry-After": "3600"})
    done = upload(server, write_run(tmp_path / "dog", SHARED, LORA))
    assert done.returncode == 1 and "429 " in done.stderr and "(it wants 3600 s of pause)" in done.stderr
    assert "python -m utils.upload " in done.stderr


def test_a_conflict_that_stays_is_no_endless_loop(server, tmp_path):
    """Answer as the Hub does while it creates another repository of the user; the client asks again at once."""
    server.fail(
        "/create", status=409, times=math.inf, words="Cannot create repo: another conflicting operation is in progress"
    )
    done = upload(server, write_run(tmp_path / "dog", LORA))
    assert done.returncode == 1 and "tester/dog was not prepared: 409 Cannot create repo: another" in done.stderr


@pytest.mark.parametrize(
    ("pattern", "words"), [("/whoami", "the login cannot be checked"), ("/dog$", "tester/dog was not prepared")]
)
def test_a_hub_that_hangs_is_given_up(server, tmp_path, pattern, words):
    """Leave the first question or the last one without an answer; the client would set no limit to either."""
    server.fail(pattern, status="hang")
    folder = write_run(tmp_path / "dog", LORA)
    done = upload(server, folder, "--hub_private_repo", HF_HUB_ETAG_TIMEOUT="1")
    assert done.returncode == 1
    assert f"{words}: no answer within 3 s. Check the connection" in done.stderr


def test_an_answer_of_something_else_than_a_hub_is_said_to_be_one(tmp_path):
    """Meet the page that a hotel's network shows to everybody."""

    class Page(BaseHTTPRequestHandler):
        content = b"<html>Welcome</html>"

        def do_GET(self):
            """Welcome the guest."""
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.end_headers()
            self.wfile.write(self.content)

        def log_message(self, *_):
            """Say nothing."""

    with HubServer() as hotel:
        hotel.RequestHandlerClass = Page
        folder = write_run(tmp_path / "dog", LORA)
        for Page.content in (b"<html>Welcome</html>", b'["Welcome"]', b"{}"):
            done = upload(hotel, folder)
            assert done.returncode == 1
            assert done.stderr.startswith("error: the login cannot be checked: the answer is none of a Hub (")


FAILED_UPLOADS = {  # what fails, with which status, part of the message
    "end": ("/commit/", 413, "tester/dog failed: 413 made to fail"),
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


def test_a_commit_that_is_refused_is_not_tried_again(server, tmp_path):
    """Refuse the commit in each way; once the Hub is well, one commit has it all."""
    statuses = [401, 403, 404, 409, 413]
    for number, status in enumerate(statuses):
        server.fail("/commit/", number + 1, status)
    server.repositories[f"{USER}/dog"] = Repository()
    code = (
        "import sys; from pathlib import Path; from utils.core import errors; from utils.hub import publish\n"
        f"for _ in range({len(statuses) + 1}):\n"
        f"    try: print(publish.upload_result(Path(sys.argv[1]), '{USER}/dog', None))\n"
        "    except errors.UserError as error: print(error)"
    )
    *messages, last = run_python(server, tmp_path, "-c", code, write_run(tmp_path / "dog", LORA)).stdout.splitlines()
    assert len(messages) == len(statuses) and last == f"{server.url}/{USER}/dog"
    for message, status in zip(messages, statuses, strict=True):
        assert f"the upload to {USER}/dog failed: {status} made to fail" in message and "Try again with: " in message
    assert len([request for request in server.requests if "/commit/" in request.path]) == len(statuses) + 1
    assert server.repositories[f"{USER}/dog"].files == LORA


def test_a_folder_without_a_result_is_refused(server, tmp_path):
    """Ask the Hub for nothing when there is nothing to upload, or nothing that can be read."""
    done = upload(server, write_run(tmp_path / "stopped", SHARED, FORBIDDEN))
    assert done.returncode == 1 and "stopped holds no result (neither model_index.json nor" in done.stderr
    done = upload(server, write_run(tmp_path / "torn", {"model_index.json": b"[1"}))
    assert done.returncode == 1 and "model_index.json cannot be read" in done.stderr
    done = upload(server, write_run(tmp_path / "args", LORA, {"args.json": b"[1]"}))
    assert done.returncode == 1 and "args.json cannot be read" in done.stderr
    assert server.requests == []


def test_the_pictures_that_previews_enlarge_stay_here(tmp_path):
    """They may be photos; the previews beside them are shared."""
    files = {"samples/small/00.png": b"a photo", "samples/step-000000/00.png": b"drawn", "README.md": b"card"}
    assert publish.files_to_upload(write_run(tmp_path, files)) == ["README.md", "samples/step-000000/00.png"]


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
    assert publish.files_to_upload(folder) == ["model_index.json", "vae/config.json"]
    (tmp_path / "link").symlink_to(folder)
    assert publish.files_to_upload(tmp_path / "link") == ["model_index.json", "vae/config.json"]


def test_an_index_that_is_no_object_is_refused(tmp_path):
    """Name the file."""
    with pytest.raises(UserError, match=r"model_index\.json holds no JSON object"):
        publish.files_to_upload(write_run(tmp_path, {"model_index.json": b"[]"}))


def test_the_server_as_a_program(server, tmp_path):
    """Upload to a server in a process of its own, and find what arrived in its record folder."""
    port_file, records = tmp_path / "port", tmp_path / "records"
    failures = ["--fail", "/commit/:2-:413", "--fail", "/whoami:1-1:429,Retry-After=1", "--fail", "/create:2:lost"]
    command = ["-m", "tests.hub_server", "--port-file", port_file, "--record-dir", records, *failures]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 20
        while not port_file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        endpoint = f"http://127.0.0.1:{port_file.read_text()}"
        folder = write_run(tmp_path / "dog", LORA)
        first = upload(server, folder, HF_ENDPOINT=endpoint)
        assert first.stdout == f"{endpoint}/{USER}/dog\n"
        assert first.stderr.startswith("The Hub answers 429; trying again in 1 s.\n")
        second = [upload(server, folder, "--hub_model_id", "second", HF_ENDPOINT=endpoint) for _ in range(2)]
        assert [done.returncode for done in second] == [1, 1]
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
    assert [request["path"] for request in requests].count("/api/whoami-v2") == 4
