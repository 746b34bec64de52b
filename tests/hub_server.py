"""A Hub for tests on 127.0.0.1: real HTTP, for the real huggingface_hub client, with repositories in memory.

    with HubServer() as hub:
        subprocess.run(command, env=hub.environment(tmp_path, WRITE_TOKEN))
        assert hub.repositories["tester/dog"].files == {"README.md": b"..."}

    python -m tests.hub_server --port-file port --record-dir records --fail /commit/:1:500

There is one user, `tester`. Tokens other than the two below are refused, and so is writing to another owner's
repository. `fail` lets later requests fail: refused, cut off or never answered. The client reads HF_ENDPOINT when it
is imported, so it must run in a process of its own, with the variables that `environment` returns.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

USER = "tester"
WRITE_TOKEN = "hf_token-that-writes"
READ_TOKEN = "hf_token-that-reads"
ROLES = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
LFS_SUFFIXES = (".safetensors", ".bin", ".png")
REPOSITORY = r"([^/]+/[^/]+)"


@dataclass
class Repository:
    """What the Hub holds of one model."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # their summaries, oldest first

    @property
    def sha(self) -> str:
        """Return the id of the newest commit."""
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case


@dataclass
class Failure:
    """Requests that shall fail: the one that brings the countdown to zero, and those after it as long as it lasts."""

    pattern: str
    countdown: int
    status: int | str
    times: float = 1
    headers: dict[str, str] = field(default_factory=dict)
    words: str = "made to fail"

    def hits(self, path: str) -> bool:
        """Count a request if it is one of those, and tell whether it is to fail."""
        if not re.search(self.pattern, path):
            return False
        self.countdown -= 1
        return -self.times < self.countdown <= 0


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


class HubServer(ThreadingHTTPServer):
    """The server and all that it knows; serves in a thread while used as a context manager.

    Args:
        record_dir: Also write requests.jsonl, repositories.json and files/OWNER/NAME/... into this folder.
    """

    daemon_threads = True

    def __init__(self, record_dir: Path | None = None):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.record_dir = record_dir
        self.requests: list[Request] = []
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by sha256; uploaded, but not necessarily committed
        self.failures: list[Failure] = []
        self.lock = threading.RLock()
        self.ending = threading.Event()

    def __enter__(self) -> "HubServer":
        """Start to serve."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        """Stop to serve, and let go of those who wait for an answer."""
        self.ending.set()
        self.shutdown()
        self.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return this process's environment, changed so that a client in it talks to this server alone.

        Args:
            home: Becomes HF_HOME: an empty folder hides a stored login.
            token: Becomes HF_TOKEN; None leaves the client without a login.
        """
        drop = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_OFFLINE")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
        return environment | self.variables(home, token)

    def variables(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return what `environment` sets, for an environment without other settings of the client."""
        fixed = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        fixed |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return fixed if token is None else fixed | {"HF_TOKEN": token}

    def fail(self, pattern: str, nth: int = 1, status: int | str = 403, times: float = 1, **answer) -> None:
        """Let requests from now on fail, of those in whose path the regular expression is found.

        Args:
            nth: The first of them that fails.
            status: Of the answer; "reset" breaks the connection in the middle of the request's body, "lost" instead of
                the answer, and "hang" leaves the request without one until the server ends.
            times: How many fail; the later ones do well.
            answer: Its `headers` and `words`.
        """
        self.failures.append(Failure(pattern, nth, status, times, **answer))

    def record(self, request: Request) -> Failure | None:
        """Remember a request, and return the failure that it shall meet."""
        with self.lock:
            self.requests.append(request)
            if self.record_dir:
                self.record_dir.mkdir(parents=True, exist_ok=True)
                with open(self.record_dir / "requests.jsonl", "a") as file:
                    file.write(json.dumps(vars(request)) + "\n")
            hits = [failure for failure in self.failures if failure.hits(request.path)]
            return hits[0] if hits else None

    def save_records(self) -> None:
        """Write down the repositories and their files, if there is a folder for it."""
        if not self.record_dir:
            return
        for name, repository in self.repositories.items():
            for path, content in repository.files.items():
                file = self.record_dir / "files" / name / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        overview = {
            name: {"private": repository.private, "commits": repository.commits, "files": sorted(repository.files)}
            for name, repository in self.repositories.items()
        }
        (self.record_dir / "repositories.json").write_text(json.dumps(overview, indent=2))


class HubHandler(BaseHTTPRequestHandler):
    """Answer one connection's requests, each by the method that `ROUTES` names."""

    ROUTES = (
        ("GET", "/api/agent-harnesses", "harnesses"),
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate_card"),
        ("GET", f"/api/models/{REPOSITORY}(?:/revision/main)?", "info"),
        ("GET", f"/api/models/{REPOSITORY}/auth-check", "may_read"),
        ("GET", f"/api/models/{REPOSITORY}/auth-check/write", "may_write"),
        ("POST", f"/api/models/{REPOSITORY}/preupload/main", "preupload"),
        ("POST", f"/api/models/{REPOSITORY}/commit/main", "commit"),
        ("POST", f"/{REPOSITORY}.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", f"/{REPOSITORY}/lfs-verify", "lfs_verify"),
        ("PUT", "/lfs/([0-9a-f]{64})", "lfs_put"),
    )
    OPEN = ("harnesses", "lfs_put")  # no login: the client asks before it sends one, and a storage knows none
    protocol_version = "HTTP/1.1"  # keeps connections open, as the Hub does
    wbufsize = -1  # sends header and body in one packet: two would wait 40 ms for each other

    def answer(self) -> None:
        """Record a request, find what answers it, and send its answer or its refusal."""
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        failure = self.server.record(Request(self.command, path, headers))
        status = failure and failure.status
        if status == "reset":
            self.rfile.read(int(headers.get("content-length", 0)) // 2)
            return self.cut()
        body = self.read_body()
        if status == "hang":
            self.close_connection = self.server.ending.wait()
            return None
        try:
            if isinstance(status, int):
                # As careless as a proxy may be: what the client prints of it must not hold the token.
                words = f"{failure.words}: {self.command} {path}, {headers.get('authorization')}"
                raise Refusal(status, words, headers=failure.headers)
            with self.server.lock:
                content = self.dispatch(path, body)
            return self.cut() if status == "lost" else self.send(200, content)
        except Refusal as refusal:
            extra = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code} | refusal.headers
            if refusal.status == 409:  # the client wants to know what exists already
                self.send(409, {"error": refusal.message, "url": f"{self.server.url}/{refusal.code or f'{USER}/dog'}"})
            else:
                self.send(refusal.status, {"error": refusal.message}, extra)

    def cut(self) -> None:
        """Break the connection without a farewell, as a router does that restarts."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for end in (self.rfile, self.wfile, self.connection):
            end.close()
        self.close_connection, self.wfile = True, io.BytesIO()  # whatever is still to be flushed

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def dispatch(self, path: str, body: bytes) -> dict:
        """Call the route's method with the parts of the path and the body, and return its answer."""
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                if name not in self.OPEN and self.role is None:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                return getattr(self, name)(*match.groups(), body)
        raise Refusal(404, f"no such route: {self.command} {path}")

    def read_body(self) -> bytes:
        """Read the request's body, of a given length or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, content: dict, headers: dict[str, str | None] | None = None) -> None:
        """Send a JSON answer."""
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            if value is not None:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Keep standard error clean; `HubServer.requests` has it all."""

    @property
    def role(self) -> str | None:
        """Return the role of the request's token; None if it is unknown or missing."""
        return ROLES.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def find(self, name: str, write: bool) -> Repository:
        """Return a repository that this login may read or write."""
        repository = self.server.repositories.get(name)
        is_own = name.split("/")[0] == USER
        if repository is None or (repository.private and not is_own):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not (is_own and self.role == "write"):
            raise Refusal(403, f"You have no right to write to {name}")
        return repository

    def harnesses(self, body: bytes) -> dict:
        """Name no program that the client would have to look out for; it asks this at its start."""
        return {"standardEnvVars": [], "harnesses": {}}

    def whoami(self, body: bytes) -> dict:
        """Tell the client who it is."""
        access = {"displayName": "tests", "role": self.role}
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token", "accessToken": access}}

    def create(self, body: bytes) -> dict:
        """Create a repository."""
        wish = json.loads(body)
        name = f"{wish.get('organization') or USER}/{wish['name']}"
        if self.role != "write" or not name.startswith(f"{USER}/"):
            raise Refusal(403, f"You have no right to create {name}")
        if name in self.server.repositories:
            raise Refusal(409, "You already created this model repo", name)
        self.server.repositories[name] = Repository(private=wish.get("visibility") == "private")
        self.server.save_records()
        return {"name": name, "url": f"{self.server.url}/{name}"}

    def validate_card(self, body: bytes) -> dict:
        """Find every card good."""
        return {"warnings": [], "errors": []}

    def info(self, name: str, body: bytes) -> dict:
        """Describe a repository."""
        found = self.find(name, write=False)
        siblings = [{"rfilename": path} for path in sorted(found.files)]
        return {"_id": name, "id": name, "sha": found.sha, "private": found.private, "tags": [], "siblings": siblings}

    def may_read(self, name: str, body: bytes) -> dict:
        """Refuse those who may not read."""
        self.find(name, write=False)
        return {}

    def may_write(self, name: str, body: bytes) -> dict:
        """Refuse those who may not write."""
        self.find(name, write=True)
        return {}

    def preupload(self, name: str, body: bytes) -> dict:
        """Say of each file how to upload it, and what the Hub has under its name."""
        found, answer = self.find(name, write=True), []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = object_id(found.files[path], mode) if path in found.files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_batch(self, name: str, body: bytes) -> dict:
        """Say where to put large files, unless they are here already."""
        self.find(name, write=True)
        objects = [{"oid": file["oid"], "size": file["size"]} for file in json.loads(body)["objects"]]
        for file in objects:
            if file["oid"] not in self.server.large_files:
                upload, verify = f"{self.server.url}/lfs/{file['oid']}", f"{self.server.url}/{name}/lfs-verify"
                file["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str, body: bytes) -> dict:
        """Take a large file, if its bytes are what its name says."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, f"the content is not {oid}")
        self.server.large_files[oid] = body
        return {}

    def lfs_verify(self, name: str, body: bytes) -> dict:
        """Confirm that a large file is here, in full."""
        file = json.loads(body)
        if len(self.server.large_files.get(file["oid"], b"")) != file["size"]:
            raise Refusal(404, f"{file['oid']} has not arrived")
        return {}

    def commit(self, name: str, body: bytes) -> dict:
        """Put the listed files into the repository, all or none."""
        found, files, summary = self.find(name, write=True), {}, None
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.server.large_files:
                files[value["path"]] = self.server.large_files[value["oid"]]
            else:
                raise Refusal(400, f"cannot commit {key} {value.get('path')}")
        found.files |= files
        found.commits.append(summary)
        self.server.save_records()
        return {"success": True, "commitOid": found.sha, "commitUrl": f"{self.server.url}/{name}/commit/{found.sha}"}


def object_id(content: bytes, mode: str) -> str:
    """Return the id by which the client recognises content that has not changed."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def read_failure(text: str) -> Failure:
    """Read PATTERN:NTH:STATUS."""
    pattern, nth, status = text.rsplit(":", 2)
    first, _, last = nth.partition("-")
    times = math.inf if nth.endswith("-") else int(last or first) - int(first) + 1
    status, *headers = status.split(",")
    fields = dict(header.split("=", 1) for header in headers)
    return Failure(pattern, int(first), int(status) if status.isdecimal() else status, times, fields)


def main(argv: list[str] | None = None) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__.partition("\n")[0])
    parser.add_argument("--port-file", type=Path, required=True, help="file to write the port's number into")
    parser.add_argument("--record-dir", type=Path, help="folder for requests.jsonl, repositories.json and files/")
    help = "see HubServer.fail; NTH as 2, 1-3 or 2-, STATUS as 500, hang, lost, reset or 429,Retry-After=5"
    parser.add_argument("--fail", metavar="PATTERN:NTH:STATUS", action="append", default=[], help=help)
    args = parser.parse_args(argv)
    server = HubServer(args.record_dir)
    for failure in args.fail:
        server.failures.append(read_failure(failure))
    # Renamed into place: whoever sees the file can read the whole number.
    temporary = args.port_file.with_name(f"{args.port_file.name}.tmp")
    temporary.write_text(str(server.server_port))
    temporary.replace(args.port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
