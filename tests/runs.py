"""Running the two scripts in tests, and reading what they leave behind.

Importing torch, diffusers and transformers takes most of a short run. So one process imports them once and forks a
child for each run, which calls the script's `main`; a run that is about processes is launched for real.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from utils.devices import accelerator_setup
from utils.run.scripts import load_script

ROOT = Path(__file__).parents[1]
SCRIPTS = {"full": "train_dreambooth.py", "lora": "train_dreambooth_lora.py"}
LAUNCH = "-m accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no --num_processes"
HOWS = {  # words between the interpreter and the script
    "python": "",
    "accelerate": f"{LAUNCH} 1",
    "two processes": f"{LAUNCH} 2 --multi_gpu --main_process_port 0",
    "unprivileged": "-m tests.unprivileged",
}
PROMPT = "a photo of sks dog"
CLASS_PROMPT = "a photo of dog"
SIZE = 64
SEED = 51  # its first batch holds a photo and a class image of timesteps that Min-SNR weighs down, and one of others
BASE_FLAGS = (
    f"--instance_prompt '{PROMPT}' --resolution {SIZE} --train_batch_size 2 --max_train_steps 2 --seed {SEED} "
    "--learning_rate 1e-3 --report_to none"
)
PRIOR_FLAGS = f"--with_prior_preservation --class_prompt '{CLASS_PROMPT}' --num_class_images 4"
STEP_KEYS = "step epoch loss loss_instance lr grad_norm seconds samples_per_second memory_gb".split()
TIMINGS = ("seconds", "samples_per_second", "memory_gb")
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
TIMEOUT = 120  # seconds after which a run counts as hung


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Return the variables of a run: those of this process without any settings of launchers, Hub and trackers."""
    settings = ("ACCELERATE_", "HF_", "HUGGING", "WANDB_", "TORCHELASTIC_", "FORK_")
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(settings) and key not in launched}
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "TOKENIZERS_PARALLELISM": "false"}
    # Pinned numbers are those of a CPU.
    return kept | fixed | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} | variables


@dataclasses.dataclass(frozen=True)
class Run:
    """How a run ended; a negative code is the signal that killed it."""

    code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def text(self) -> str:
        """Return all that it printed."""
        return self.stdout + self.stderr


class Job:
    """A run that goes on."""

    def __init__(self, log: Path, out: Path, process: subprocess.Popen | None):
        """Remember where it writes, and its process if it is a child of this one."""
        self.log, self.out, self.process = log, out, process

    @property
    def pid(self) -> int:
        """Return the number of its process."""
        return self.process.pid if self.process else int(self.wait_for("pid"))

    def wait_for(self, name: str) -> str:
        """Return the content of a file that its keeper writes."""
        wait_until((self.log / name).exists, f"{self.log / name}\n{self.printed('stderr')}")
        return (self.log / name).read_text()

    def finish(self) -> Run:
        """Wait for its end; kill it if that does not come."""
        try:
            code = self.process.wait(TIMEOUT) if self.process else int(self.wait_for("code"))
        except (subprocess.TimeoutExpired, TimeoutError):
            self.kill()
            raise
        return Run(code, self.printed("stdout"), self.printed("stderr"), self.out)

    def kill(self) -> None:
        """End its process and those that it started, if any of them is left."""
        # The number of a fork may belong to another process once its keeper has seen it end.
        if self.process or not (self.log / "code").exists():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def printed(self, stream: str) -> str:
        """Return what it has printed so far."""
        path = self.log / stream
        return path.read_text(errors="replace") if path.exists() else ""

    def steps_logged(self) -> int:
        """Return how many steps are in its metrics."""
        return len(read_metrics(self.out)) if (self.out / "metrics.jsonl").exists() else 0


class Trainer:
    """Starts runs of the scripts on one model and one folder of photos."""

    def __init__(self, home: Path, model: Path, photos: Path):
        """Start the process that forks."""
        self.home, self.model, self.photos, self.count = home, model, photos, 0
        self.jobs: list[Job] = []
        self.variables = environment(home)
        self.server = start_server(self.variables)

    def close(self) -> None:
        """End the process that forks, and whatever a failed test has left running."""
        self.server.stdin.close()
        self.server.wait(TIMEOUT)
        for job in self.jobs:
            job.kill()

    def start(self, script: str, out: Path, flags: str = "", how: str = "fork", **variables: str) -> Job:
        """Start a run.

        Args:
            script: "full" or "lora", or the path of a copy.
            out: its output folder.
            flags: added to `BASE_FLAGS`, over which they win.
            how: "fork", or a key of `HOWS` for a process of its own.
            variables: of its environment, on top of the fixed ones.
        """
        paths = ["--pretrained_model_name_or_path", self.model, "--instance_data_dir", self.photos]
        words = [*map(str, paths), *shlex.split(f"{BASE_FLAGS} {flags}"), "--output_dir", str(out)]
        return self.start_words(script, out, words, how, **variables)

    def start_words(self, script: str, out: Path, words: list[str], how: str = "fork", **variables: str) -> Job:
        """Start a run with these words of a command line and no others."""
        self.count += 1
        log = self.home / f"run-{self.count}"
        (log / "cwd").mkdir(parents=True)
        if how == "fork":
            request = {"script": SCRIPTS.get(script, script), "words": words, "log": str(log), "variables": variables}
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            return self.remember(Job(log, out, None))
        command = [sys.executable, *HOWS[how].split(), str(ROOT / SCRIPTS.get(script, script)), *words]
        with (log / "stdout").open("w") as stdout, (log / "stderr").open("w") as stderr:
            streams = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
            variables = self.variables | {"PYTHONPATH": str(ROOT)} | variables
            process = subprocess.Popen(command, cwd=log / "cwd", env=variables, start_new_session=True, **streams)
        return self.remember(Job(log, out, process))

    def remember(self, job: Job) -> Job:
        """Keep a run in mind until the end, so that nothing outlives the tests."""
        self.jobs.append(job)
        return job

    def run(self, script: str, out: Path, flags: str = "", code: int = 0, how: str = "fork", **variables: str) -> Run:
        """Run to the end, and check the exit code."""
        run = self.start(script, out, flags, how, **variables).finish()
        assert run.code == code, run.text
        return run

    def run_all(self, runs: dict[Path, tuple[str, str]]) -> list[Path]:
        """Run scripts at the same time, as (script, flags) by output folder; return the folders."""
        jobs = [self.start(script, out, flags) for out, (script, flags) in runs.items()]
        for run in [job.finish() for job in jobs]:
            assert run.code == 0, run.text
        return list(runs)


def wait_until(holds, what: str, seconds: float = TIMEOUT) -> None:
    """Wait until a function returns true."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.01)


def list_sources() -> list[str]:
    """Return the Python files that git tracks, or all without git; untracked ones are people's own experiments."""
    found = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("[!.]*/**/*.py")]
    if shutil.which("git"):
        tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split(
            "\n"
        )
        found = [name for name in found if name in tracked] or found
    return found


# What a run leaves behind.


def first_loss(flags: str, photos: Path, class_images: Path, loss_of: Callable) -> float:
    """Return the loss of a run's first step by another way.

    Args:
        loss_of: Returns the mean loss of one kind ("instance" or "class") in a micro-step, from the paths of all
            pictures of the kind and the place of the first of them in the run's list.
    """
    paths = sorted(path for path in photos.rglob("*") if path.suffix in (".png", ".jpg", ".webp"))
    of_kind, weights = {"instance": (paths, 0)}, {"instance": 1.0}
    if "--with_prior_preservation" in flags:
        of_kind["class"] = (sorted(class_images.iterdir()), len(paths))
        weights["class"] = 0.5 if "--prior_loss_weight 0.5" in flags else 1.0
    micro_steps = range(2 if "--gradient_accumulation_steps 2" in flags else 1)
    losses = [weights[kind] * loss_of(kind, step, *of_kind[kind]) for kind in weights for step in micro_steps]
    return sum(losses) / len(micro_steps)


def read_metrics(out: Path) -> list[dict]:
    """Read the whole lines of a run's metrics."""
    text = (out / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def untimed(out: Path) -> list[dict]:
    """Read a run's metrics without what differs from run to run."""
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in read_metrics(out)]


def read_tensors(folder: Path) -> dict:
    """Read all tensors of a result or a checkpoint, by file and name; checkpoints within the folder do not count."""
    from safetensors.torch import load_file

    files = [path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path.relative_to(folder))]
    read = ((path.relative_to(folder).parent.as_posix(), load_file(path)) for path in sorted(files))
    return {f"{parent}/{name}": tensor for parent, tensors in read for name, tensor in tensors.items()}


def read_optimizer(checkpoint: Path) -> dict:
    """Read the optimizer's state of a checkpoint as one flat dictionary."""
    import torch

    return flatten(torch.load(checkpoint / "optimizer.pt", weights_only=True))


def flatten(value, name: str = "") -> dict:
    """Turn nested dictionaries and lists into one dictionary of their leaves."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for part, inner in items for key, leaf in flatten(inner, f"{name}/{part}").items()}


def differing(one: dict, other: dict) -> list[str]:
    """Return the names under which two dictionaries of tensors and numbers differ in a bit."""
    return sorted(name for name in one.keys() | other.keys() if not same(one.get(name), other.get(name)))


def same(one, other) -> bool:
    """Tell whether two values are equal to the bit."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def names(folder: Path) -> list[str]:
    """Return the names of a folder's entries."""
    return sorted(path.name for path in folder.iterdir())


# The process that forks: reads one request per line.


class ForkedServer:
    """The process that forks, as a fork of this one: for a process that has imported the libraries already."""

    def __init__(self, variables: dict[str, str]):
        """Start it with these variables as its environment."""
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(writing)
                os.dup2(reading, 0)
                # pytest has put its own streams there, which do not end where a run's output is wanted.
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
                os.chdir(ROOT)
                os.environ.clear()
                os.environ |= variables
                forget_tests()
                serve()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(reading)
        self.stdin = os.fdopen(writing, "w")

    def wait(self, seconds: float) -> None:
        """Wait for its end."""
        wait_until(lambda: os.waitpid(self.pid, os.WNOHANG)[0], f"process {self.pid}", seconds)


def start_server(variables: dict[str, str]) -> subprocess.Popen | ForkedServer:
    """Start the process that forks; `utils.lab.mutants` has imported the libraries, and wants to save the seconds."""
    if os.environ.get("MUTANTS_FORK"):
        return ForkedServer(variables)
    command = [sys.executable, "-m", "tests.runs"]
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, text=True)


def forget_tests() -> None:
    """Forget what tests have told accelerate and logging: runs would go by it, and print no messages."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)


def serve() -> None:
    """Import everything once, then fork for each request."""
    sys.path.insert(0, str(ROOT))
    modules = {script: __import__(Path(script).stem) for script in SCRIPTS.values()}
    accelerator_setup.import_what_is_imported_late()
    gc.freeze()  # children need not search what is imported here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which closes the pipe
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the children
    for line in sys.stdin:
        request = json.loads(line)
        if os.fork() == 0:
            keep(modules.get(request["script"]), request)


def keep(module, request: dict) -> None:
    """Run in a child of one's own, and write down its number and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    pid = os.fork()
    if pid == 0:
        os._exit(run_main(module, request))
    log = Path(request["log"])
    write_whole(log / "pid", str(pid))
    write_whole(log / "code", str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    os._exit(0)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears with its content in it."""
    path.with_suffix(".partial").write_text(text)
    path.with_suffix(".partial").rename(path)


def run_main(module, request: dict) -> int:
    """Call a script's `main` as the interpreter would, and return the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)  # a signal to its group reaches its data workers, and not its keeper
    log = Path(request["log"])
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, log / "stdout", None), (2, log / "stderr", None)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT if mode is None else mode), number)
    os.chdir(log / "cwd")
    os.environ.update(request["variables"])
    sys.argv = [str(ROOT / request["script"]), *request["words"]]
    try:
        module = module or load_script(request["script"])  # of a copy, which is imported by its own run alone
        code = module.exit_status(module.main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        traceback.print_exc()
    return code


if __name__ == "__main__":
    serve()
