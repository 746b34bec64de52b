"""Change the code in one place at a time and say which changes the tests meant for them do not notice.

    python -m utils.lab.mutants

The changes are in tests/mutants/*.toml. Each has a file or a pattern of files, an old text that each of the files has
exactly once, the new text, the tests that must notice it, and a few words on what breaks:

    [[mutant]]
    breaks = "the seed of dropout is the same in all steps"
    file = "train_dreambooth*.py"
    old = '"dropout", micro_step'
    new = '"dropout", 0'
    tests = "tests/test_steps.py::test_seeds"

The modules of the list `imports` in these files are imported once. "module:function" calls a function as well. Each
change is made in a copy of the working tree. A fork of this process runs pytest there, which saves the time of the
imports. First, all tests run without a change: they must pass.
"""

import argparse
import contextlib
import dataclasses
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

from utils.core.errors import UserError, list_first
from utils.flags.flag_checks import find_out_of_range

ROOT = Path(__file__).parents[2]
LISTS = "tests/mutants"
PATIENCE = 300  # seconds after which tests count as hung
POLL = 0.05  # seconds between two looks at the running tests
ENDS = {0: "survived", 1: "killed", -signal.SIGKILL: "killed"}  # by pytest's exit status; the last: hung
FAILED = "did not run"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of behavior and the tests that must notice it."""

    breaks: str
    file: str
    old: str
    new: str
    tests: str

    def apply(self, root: Path) -> dict[Path, str]:
        """Return the changed text of each file below a folder, or nothing if the old text is not there just once."""
        texts = {path: path.read_text(encoding="utf-8") for path in sorted(root.glob(self.file))}
        if not texts or self.old == self.new or any(text.count(self.old) != 1 for text in texts.values()):
            return {}
        return {path: text.replace(self.old, self.new) for path, text in texts.items()}


@dataclasses.dataclass
class Job:
    """A fork that runs tests."""

    mutant: Mutant | None  # None: without a change
    name: str
    copy: Path
    pid: int
    began: float
    end: str = ""
    seconds: float = 0.0

    @property
    def log(self) -> Path:
        """Return where its output goes."""
        return self.copy.with_name(f"{self.copy.name}.log")


def main(argv: list[str] | None = None) -> int:
    """Run the tests of each change; return 1 if one survives, is stale, or does not run."""
    args = parse_args(argv)
    try:
        imports, mutants = read_lists(args.root)
        mutants = [one for one in mutants if args.only in f"{one.breaks}\n{one.file}\n{one.tests}"]
        stale = [one for one in mutants if not one.apply(args.root)]
        for one in mutants if args.list else stale:
            print(f"{'stale' if one in stale else 'ready':12}{one.file}: {one.breaks}")
        if args.list:
            print(f"{len(mutants)} changes, {len(stale)} stale")
            return int(bool(stale))
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            return run(args, imports, [one for one in mutants if one not in stale], Path(folder)) or int(bool(stale))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.mutants", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="changes with this text in their words, file or tests")
    add("--list", action="store_true", help="list the changes, say which are stale, and run nothing")
    add("--jobs", type=int, default=2, help="tests of how many changes run side by side; default: 2")
    add("--keep_going", action="store_true", help="leave out changes whose tests fail without them; off: end there")
    add("--root", type=Path, default=ROOT, metavar="DIR", help="repository; default: the one of this tool")
    args = parser.parse_args(argv)
    if not hasattr(os, "fork"):
        parser.error("this system has no fork, by which the tests are started.")
    if problems := find_out_of_range(vars(args), {"jobs": "1 or more"}):
        parser.error(" ".join(problems))
    args.root = args.root.resolve()
    return args


def read_lists(root: Path) -> tuple[list[str], list[Mutant]]:
    """Return the modules to import once, and the changes.

    Raises:
        UserError: There are none, an entry lacks a key or has an unknown one, or two have the same words.
    """
    imports, mutants, keys = [], [], {field.name for field in dataclasses.fields(Mutant)}
    for path in sorted((root / LISTS).glob("*.toml")):
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
        imports += content.get("imports", [])
        for entry in content.get("mutant", []):
            if entry.keys() != keys:
                raise UserError(f"{path}: {entry} must have the keys {', '.join(sorted(keys))} and no others.")
            mutants.append(Mutant(**entry))
    words = [one.breaks for one in mutants]
    if twice := sorted({one for one in words if words.count(one) > 1}):
        raise UserError(f"Several changes have the same words: {list_first(twice)}.")
    if not mutants:
        raise UserError(f"{root / LISTS} has no changes.")
    return imports, mutants


def run(args: argparse.Namespace, imports: list[str], mutants: list[Mutant], folder: Path) -> int:
    """Run all tests without a change, then those of each change; say how each ends and return the exit status."""
    began = time.monotonic()
    files = list_files(args.root)
    import_once(args.root, imports)
    for path in files:  # what is edited in the meantime changes nothing
        (folder / "start" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(args.root / path, folder / "start" / path)
    start = Starter(args.root, files, folder)
    plain = {}
    for name in (name for one in mutants for name in shlex.split(one.tests)):
        plain.setdefault(name.partition("::")[0], {})[name] = None
    jobs = [(None, shlex.join(names)) for names in plain.values()]
    failing = []
    for job in side_by_side(start, jobs, args.jobs):
        if job.end != ENDS[0]:
            failing.append(shlex.split(job.name)[0].partition("::")[0])
            print(f"Without a change, these tests fail: {job.name}\n{read_end(job)}", flush=True)
        clear(job)
    if failing and not args.keep_going:
        return 1
    chosen = [one for one in mutants if not any(name in one.tests for name in failing)]
    print(f"{len(plain) - len(failing)} of {len(plain)} test files pass unchanged: {minutes(began)}", flush=True)
    ends = {}
    for job in side_by_side(start, [(one, one.tests) for one in chosen], args.jobs):
        ends[job.mutant] = job.end
        print(f"{job.end:12}{job.seconds:5.0f} s  {job.mutant.file}: {job.mutant.breaks}", flush=True)
        if job.end == FAILED:
            print(read_end(job), flush=True)
        clear(job)
    wrong = [one for one in chosen if ends[one] != ENDS[1]]
    print(f"{len(chosen)} changes, {len(chosen) - len(wrong)} killed, {len(wrong)} not: {minutes(began)}")
    for one in wrong:
        print(f"{ends[one]:12}{one.file}: {one.breaks}\n{'':12}{one.tests}")
    return int(bool(wrong or failing))


def list_files(root: Path) -> list[Path]:
    """Return the paths of the repository's files below its folder, those that git does not know yet included.

    Raises:
        UserError: It is no repository.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"git cannot list the files of {root}: {getattr(error, 'stderr', '') or error}") from error
    return [Path(name) for name in listing.split("\0") if name and (root / name).is_file()]


def import_once(root: Path, entries: list[str]) -> None:
    """Import modules of the repository, and with them the libraries that its tests need."""
    sys.path.insert(0, str(root))
    for entry in entries:
        module, _, function = entry.partition(":")
        loaded = importlib.import_module(module)
        if function:
            getattr(loaded, function)()
    importlib.import_module("pytest")
    sys.path.remove(str(root))


@dataclasses.dataclass
class Starter:
    """Starts tests, each time in a copy of the repository of its own."""

    root: Path
    files: list[Path]
    folder: Path
    count: int = 0

    def __call__(self, mutant: Mutant | None, tests: str) -> Job:
        """Make a copy, change it, and fork a process that runs the tests in it."""
        self.count += 1
        copy = shutil.copytree(self.folder / "start", self.folder / str(self.count))
        for path, text in (mutant.apply(copy) if mutant else {}).items():
            path.write_text(text, encoding="utf-8")
        sys.stdout.flush()
        job = Job(mutant, tests, copy, 0, time.monotonic())
        job.pid = os.fork()
        if job.pid == 0:
            os._exit(run_tests(self.root, self.files, job))
        return job


def run_tests(root: Path, files: list[Path], job: Job) -> int:
    """Run pytest on a copy in a fork, which forgets what was imported of the repository itself."""
    os.setsid()
    output = os.open(job.log, os.O_WRONLY | os.O_CREAT)
    for number, handle in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(handle, number)
    os.chdir(job.copy)
    own = {str(root / path) for path in files} | {str(Path.cwd() / path) for path in files}
    for name, module in list(sys.modules.items()):
        if name != "__main__" and getattr(module, "__file__", None) in own:
            del sys.modules[name]
    sys.path[:] = [str(job.copy), *(path for path in sys.path if path and Path(path).resolve() != root)]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "MUTANTS_FORK": "1"}
    pytest = importlib.import_module("pytest")
    try:
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={job.copy}.tmp", f"--rootdir={job.copy}"]
        return int(pytest.main([*options, *shlex.split(job.name)]))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 3
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()


def side_by_side(start: Callable[[Mutant | None, str], Job], waiting: list[tuple], limit: int):
    """Start jobs, at most so many at a time, and yield each when it has ended; a hung one is killed."""
    waiting, running = list(reversed(waiting)), []
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                running.append(start(*waiting.pop()))
            for job in [job for job in running if has_ended(job)]:
                running.remove(job)
                yield job
            time.sleep(POLL)
    finally:
        for job in running:
            kill(job)


def has_ended(job: Job) -> bool:
    """Say whether a job has ended, and note how."""
    pid, status = os.waitpid(job.pid, os.WNOHANG)
    job.seconds = time.monotonic() - job.began
    if not pid and job.seconds < PATIENCE:
        return False
    code = os.waitstatus_to_exitcode(status) if pid else -signal.SIGKILL
    if not pid:
        kill(job)
    job.end = ENDS.get(code, FAILED)
    return True


def kill(job: Job) -> None:
    """End a job and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.pid, signal.SIGKILL)
    os.waitpid(job.pid, 0)


def clear(job: Job) -> None:
    """Remove what a job has written."""
    for path in (job.copy, Path(f"{job.copy}.tmp")):
        shutil.rmtree(path, ignore_errors=True)
    job.log.unlink(missing_ok=True)


def read_end(job: Job) -> str:
    """Return the last lines that a job has printed, indented."""
    lines = job.log.read_text(errors="replace").splitlines()[-25:]
    return "\n".join(f"    {line}" for line in lines)


def minutes(began: float) -> str:
    """Return the time since a moment in words."""
    return f"{(time.monotonic() - began) / 60:.1f} minutes"


if __name__ == "__main__":
    sys.exit(main())
