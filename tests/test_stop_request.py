"""Stopping: signals, the launcher's death, agreement between processes; all with real processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from utils.devices.graceful_stop import BEFORE, IN_LOOP, LAUNCHER_VARIABLES, SIGNALS, StopRequest, ignore_signals

ROOT = Path(__file__).parents[1]

# A training loop: waits for the wish to stop, "saves" for so many seconds, says its exit code.
TRAINER = """
import os, sys, time
from utils.devices.graceful_stop import StopRequest

with StopRequest() as stop:
    stop.begin_loop()
    print("ready", os.getpid(), flush=True)
    end = time.monotonic() + 30
    while not stop.check() and time.monotonic() < end:
        time.sleep(0.01)
    print("stopping", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saved", stop.exit_code, flush=True)
sys.exit(stop.exit_code)
"""

RANK = """
import sys, time
import torch.distributed as dist
from utils.devices.graceful_stop import StopRequest

dist.init_process_group("gloo")
with StopRequest() as stop:
    stop.begin_loop()
    for step in range(3000):
        if stop.agree():
            break
        if step == 1:
            print("ready", flush=True)
        time.sleep(0.01)
print(step, stop.exit_code, flush=True)
dist.destroy_process_group()
sys.exit(stop.exit_code)
"""

# What comes before the loop, and what comes after: "work" in Python, and a thread that goes on whatever happens.
OTHER_PHASES = """
import sys, threading, time
from utils.devices.graceful_stop import StopRequest

threading.Thread(target=time.sleep, args=(3,), daemon=sys.argv[1] == "before").start()
with StopRequest() as stop:
    if sys.argv[1] != "before":
        stop.begin_loop()
    if sys.argv[1] == "result":
        print("ready", flush=True)
        while not stop.check():
            time.sleep(0.01)
        print("saved", flush=True)
    if sys.argv[1] != "before":
        stop.begin_upload("the result is safe.")
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        print("tidy", flush=True)
"""

LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], '0'])"


def start(code: str, *arguments: str, **variables: str) -> subprocess.Popen:
    """Start a Python process without any launcher's variables but the given ones."""
    kept = {name: value for name, value in os.environ.items() if name not in (*LAUNCHER_VARIABLES, "RANK")}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**kept, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, word: str) -> list[str]:
    """Read the process's next line, which must start with the word, and return the line's other words."""
    line = process.stdout.readline().split()
    assert line and line[0] == word, (line, process.stderr.read())
    return line[1:]


@pytest.fixture(scope="module")
def trainers():
    """Start all the trainers of this module at once, because importing torch takes their longest time."""
    saving = {"SIGINT": "0", "SIGTERM": "0", "SIGUSR1": "0", "soon": "0.6", "late": "30"}
    started = {name: start(TRAINER, seconds) for name, seconds in saving.items()}
    started["orphan"] = start(LAUNCHER, TRAINER, ACCELERATE_MIXED_PRECISION="no")
    started["nohup"] = start(LAUNCHER, TRAINER)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_the_first_signal_lets_the_loop_save(trainers, name, code):
    trainer = trainers[name]
    wait_for(trainer, "ready")
    trainer.send_signal(getattr(signal, name))
    output, errors = trainer.communicate(timeout=20)
    assert output == f"stopping\nsaved {code}\n" and trainer.returncode == code
    assert errors.count("\n") == 1 and "saving" in errors and "at once" in errors


@pytest.mark.parametrize(
    ("phase", "output", "words"),
    [
        ("before", "ready\ntidy\n", f"Stopping: {BEFORE}\n"),
        ("upload", "ready\n", "Stopping: the result is safe.\n"),
        ("result", "ready\nsaved\n", f"Stopping: {IN_LOOP}\nStopping: the result is safe.\n"),
    ],
)
def test_a_signal_outside_of_the_loop_ends_the_process(phase, output, words):
    """Before there is anything to save it unwinds; an upload, whose threads it could not end, it leaves at once."""
    process = start(OTHER_PHASES, phase)
    wait_for(process, "ready")
    process.send_signal(signal.SIGTERM)
    told, errors = process.communicate(timeout=20)
    assert (f"ready\n{told}", errors, process.returncode) == (output, words, 143)


def test_items_come_until_there_is_a_wish_to_stop(capfd):
    """What is begun is finished; what is left is left out."""
    with StopRequest() as stop:
        stop.begin_loop()
        seen = []
        for item in stop.until_asked(range(5)):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGINT)
        stop_code = stop.exit_code
        with pytest.raises(SystemExit, match="130"):
            stop.leave_if_asked()
    assert seen == [0, 1, 2] and stop_code == 130 and IN_LOOP in capfd.readouterr().err


def test_signals_within_a_second_count_as_one(trainers):
    trainer = trainers["soon"]
    wait_for(trainer, "ready")
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        trainer.send_signal(number)
        time.sleep(0.15)
    output, errors = trainer.communicate(timeout=20)
    assert output == "stopping\nsaved 130\n" and trainer.returncode == 130 and errors.count("\n") == 1


def test_a_later_signal_ends_the_process_at_once(trainers):
    trainer = trainers["late"]
    wait_for(trainer, "ready")
    trainer.send_signal(signal.SIGINT)
    wait_for(trainer, "stopping")
    time.sleep(1.1)
    trainer.send_signal(signal.SIGTERM)
    output, _ = trainer.communicate(timeout=5)
    assert output == "" and trainer.returncode == 143


def test_the_death_of_the_launcher_counts_as_sigterm(trainers):
    launcher = trainers["orphan"]
    wait_for(launcher, "ready")
    launcher.kill()
    output, errors = launcher.communicate(timeout=20)
    assert output == "stopping\nsaved 143\n" and "launcher has ended" in errors


def test_the_death_of_a_shell_counts_for_nothing(trainers):
    shell = trainers["nohup"]
    trainer = int(wait_for(shell, "ready")[0])
    shell.kill()
    shell.wait()
    time.sleep(0.3)
    os.kill(trainer, signal.SIGINT)
    output, errors = shell.communicate(timeout=20)
    assert output == "stopping\nsaved 130\n" and "launcher" not in errors


def test_two_processes_stop_at_the_same_step_for_the_same_reason():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [start(RANK, RANK=rank, **variables) for rank in "01"]
    for process in ranks:
        wait_for(process, "ready")
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=20)[0].split() for process in ranks]
    assert outputs[0] == outputs[1] and 1 < int(outputs[0][0]) < 2999 and outputs[0][1] == "143"
    assert [process.returncode for process in ranks] == [143, 143]


def test_a_signal_that_comes_while_processes_agree_is_kept_for_the_next_time(monkeypatch, capfd):
    """It was not part of what they agreed on, and must not be forgotten for that."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda backend: None)
    calls = []

    def all_reduce(tensor, operation, group):
        calls.append(int(tensor))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with StopRequest() as stop:
        stop.begin_loop()
        assert [stop.agree() for _ in range(3)] == [None, None, signal.SIGTERM] and stop.exit_code == 143
    assert calls == [0, 0, 15] and IN_LOOP in capfd.readouterr().err


def test_the_old_handlers_come_back(monkeypatch, capfd):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        stop.begin_loop()
        assert [signal.getsignal(number) for number in SIGNALS] != before
        assert stop.check() is None and stop.agree() is None and stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.check() == stop.agree() == signal.SIGTERM and stop.exit_code == 143
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert capfd.readouterr().err.count("\n") == 1


class ProcessIds:
    """A data set whose examples are the loading process's id."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_loader_workers_outlive_the_signals():
    loader = DataLoader(ProcessIds(), batch_size=1, num_workers=1, prefetch_factor=1, worker_init_fn=ignore_signals)
    seen = []
    for batch in loader:
        seen.append(int(batch))
        for number in SIGNALS:
            os.kill(seen[-1], number)
    assert len(seen) == 8 and len(set(seen)) == 1 and seen[0] != os.getpid()
