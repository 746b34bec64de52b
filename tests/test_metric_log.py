"""metrics.jsonl as it grows: one step late, complete before a checkpoint, cut at a resume, JSON throughout."""

import json
import math
import re
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from accelerate import PartialState, tracking
from PIL import Image

from tests.runs import ROOT
from utils.core.errors import UserError
from utils.run import checkpoints, metric_log
from utils.run.metric_log import MetricLog, start_trackers, track_images


class Recorder:
    """Stand where accelerate stands: keep what goes to the trackers."""

    def __init__(self, is_main: bool = True):
        """Play the main process, or another one."""
        self.device = torch.device("cpu")
        self.is_main_process = self.is_local_main_process = is_main
        self.scaler = None
        self.logged = []
        self.elsewhere = {}  # what another process has, by name; without an entry it has the same

    def reduce(self, values: dict, reduction: str) -> dict:
        """Average with another process."""
        assert reduction == "mean"
        return {name: (value + self.elsewhere.get(name, value)) / 2 for name, value in values.items()}

    def log(self, values: dict, step: int) -> None:
        """Keep what accelerate would hand to the trackers."""
        self.logged.append((step, values))


@pytest.fixture
def recorder():
    """Make a recorder for the main process."""
    return Recorder()


def micro_step(total, instance, prior=None):
    """Return the losses of a micro-step as training has them."""
    values = {"loss": total, "loss_instance": instance, "loss_prior": prior}
    return {name: torch.as_tensor(value) for name, value in values.items() if value is not None}


def add(log, step, loss=0.5, prior=None, **values):
    """Log a step of one micro-step, half a second and 8 examples."""
    losses = [micro_step(loss, 0.25, prior)]
    log.add(step, time.perf_counter() - 0.5, 8, losses, {"epoch": step / 4, "lr": 1e-4} | values)


def read(path) -> list[dict]:
    """Read the lines, refusing what JSON has no word for."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def steps_in(path) -> list[int]:
    """Return the steps that the file holds."""
    return [line["step"] for line in read(path)]


def test_lines_come_one_step_late_and_the_last_one_at_the_end(recorder, tmp_path):
    """A step is written when the next one is done, so that nobody waits for its numbers."""
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(recorder, path, 0, 3)
    seen = []
    for step in (1, 2, 3):
        add(log, step)
        seen.append(steps_in(path))
    log.close()
    assert seen == [[], [1], [1, 2]] and steps_in(path) == [1, 2, 3]
    assert [step for step, _ in recorder.logged] == [1, 2, 3]


def test_a_line_holds_its_own_steps_values(recorder, tmp_path):
    """Tensors become numbers; time, speed and memory are added; trackers get the same numbers."""
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(recorder, path, 0, 2)
    add(log, 1, torch.tensor(0.25), torch.tensor(3.0, dtype=torch.bfloat16), grad_norm=torch.tensor(2.0))
    add(log, 2, 0.125)
    log.close()
    first, second = read(path)
    names = {"step", "epoch", "loss", "loss_instance", "lr", "seconds", "samples_per_second", "memory_gb"}
    assert set(first) == names | {"loss_prior", "grad_norm"} and set(second) == names
    assert (first["epoch"], first["loss"], first["loss_prior"], first["lr"], first["grad_norm"]) == (
        0.25,
        0.25,
        3,
        1e-4,
        2,
    )
    assert (second["step"], second["epoch"], second["loss"], second["loss_instance"]) == (2, 0.5, 0.125, 0.25)
    assert 0.5 <= first["seconds"] < 5
    assert first["samples_per_second"] == pytest.approx(8 / first["seconds"])
    assert 0.05 < first["memory_gb"] < 1000
    assert recorder.logged == [(line.pop("step"), line) for line in (first, second)]


def test_losses_are_means_over_micro_steps_and_processes(recorder, tmp_path):
    """Each part is averaged on its own; what is kept until it is written holds no graph."""
    recorder.elsewhere = {"loss_prior": 8.0}
    log = MetricLog(recorder, tmp_path / "metrics.jsonl", 0, 2)
    weight = torch.tensor(1.0, requires_grad=True)
    losses = [micro_step(weight * total, total / 2, total * 2) for total in (1.0, 2.0, 6.0)]
    log.add(1, time.perf_counter(), 8, losses, {"lr": 1e-4})
    assert not any(value.requires_grad for value in log.waiting[1].values() if isinstance(value, torch.Tensor))
    log.add(2, time.perf_counter(), 8, [micro_step(1.0, 1.0), micro_step(4.0, 2.0)], {"lr": 1e-4})
    log.close()
    first, second = read(tmp_path / "metrics.jsonl")
    assert (first["loss"], first["loss_instance"], first["loss_prior"]) == (3, 1.5, 7)
    assert (second["loss"], second["loss_instance"]) == (2.5, 1.5) and "loss_prior" not in second


def test_a_flush_writes_what_waits_to_the_disk(recorder, tmp_path, monkeypatch):
    """Before a checkpoint, its own step's line is in the file and synced, and it is not written again."""
    path, synced = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr(metric_log.os, "fsync", lambda handle: synced.append(steps_in(path)))
    log = MetricLog(recorder, path, 0, 3)
    add(log, 1)
    log.flush()
    assert steps_in(path) == [1] and synced == [[1]]
    log.flush()
    add(log, 2)
    assert steps_in(path) == [1]
    log.close()
    assert steps_in(path) == [1, 2] and synced[-1] == [1, 2]


def test_a_resumed_run_cuts_what_lies_beyond_its_checkpoint(recorder, tmp_path):
    """Lines after the step, and a torn one, go; the new run's lines follow without a gap."""
    path = tmp_path / "metrics.jsonl"
    before = "".join(json.dumps({"step": step, "loss": 9.0}) + "\n" for step in range(1, 6))
    path.write_text(before + '{"step": 6, "lo')
    log = MetricLog(recorder, path, 3, 5)
    assert steps_in(path) == [1, 2, 3]
    add(log, 4)
    add(log, 5)
    log.close()
    assert [line["loss"] for line in read(path)] == [9, 9, 9, 0.5, 0.5] and steps_in(path) == [1, 2, 3, 4, 5]
    assert log.progress.n == 5 and log.progress.total == 5


def test_a_torn_line_at_the_end_of_the_checkpoints_step_is_repaired(recorder, tmp_path):
    """A last line without its newline does not swallow the next."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    log = MetricLog(recorder, path, 2, 3)
    add(log, 3)
    log.close()
    assert steps_in(path) == [1, 2, 3]


def test_a_new_run_starts_a_new_file(recorder, tmp_path):
    """Numbers of an earlier run in the same folder do not stay."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n{"step": 1}\nrubbish\n')
    log = MetricLog(recorder, path, 0, 2)
    add(log, 1)
    log.close()
    assert steps_in(path) == [1] and read(path)[0]["loss"] == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_diverged_step_ends_the_run_before_anything_is_saved(recorder, tmp_path, kind, value, key):
    """The flush that comes before a save raises, and names the step."""
    log = MetricLog(recorder, tmp_path / "metrics.jsonl", 0, 1)
    add(log, 1, **({"loss": 0.5} | {key: kind(value)}))
    with pytest.raises(
        UserError, match=f"diverged: {key} {value} at step 1\\. Nothing is saved from here on. Start anew"
    ):
        log.flush()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_diverged_step_names_its_pictures_and_the_last_good_checkpoint(recorder, tmp_path):
    """Pictures are named once each, and checkpoints of the step itself or later ones do not count as good."""
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        checkpoints.write_state(tmp_path / f"checkpoint-{step}", step, {})
    log = MetricLog(recorder, tmp_path / "metrics.jsonl", 0, 9)
    names = [f"{number}.png" for number in (3, 1, 3, 0, 2, 4, 5, 6, 7, 8)]
    log.add(4, time.perf_counter(), 8, [micro_step(math.nan, 0.25)], {}, names)
    with pytest.raises(UserError) as refusal:
        log.add(5, time.perf_counter(), 8, [micro_step(0.5, 0.25)], {}, [])
    assert str(refusal.value) == (
        "Training has diverged: loss nan at step 4 (its pictures: 3.png, 1.png, 0.png, 2.png, 4.png, 5.png, 6.png, "
        "7.png, …). Nothing is saved from here on. Go on by --resume_from_checkpoint checkpoint-2, the last good one, "
        "with a lower --learning_rate, in bf16 instead of fp16, or without these pictures."
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_saved(recorder, tmp_path, value):
    """An update may overflow though its loss and gradient did not; the step's own line is still good."""
    weights = [torch.ones(3), torch.ones(2)]
    log = MetricLog(recorder, tmp_path / "metrics.jsonl", 0, 1, weights)
    add(log, 1)
    log.flush()
    add(log, 2)
    weights[1][0] = value
    with pytest.raises(UserError, match="diverged: weights that are not finite at step 2"):
        log.flush()
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_overflows_under_a_scaler_is_left_out(recorder, tmp_path, value):
    """With fp16 it is normal, costs its own key and not the line, and neither file nor trackers get it."""
    recorder.scaler = object()
    log = MetricLog(recorder, tmp_path / "metrics.jsonl", 0, 1)
    add(log, 1, prior=0.5, grad_norm=torch.tensor(value))
    log.close()
    (line,) = read(tmp_path / "metrics.jsonl")
    assert line["loss_prior"] == 0.5 and "grad_norm" not in line
    assert "grad_norm" not in recorder.logged[0][1]


def test_only_the_main_process_writes(tmp_path):
    """The other processes log to trackers, which know their rank, and touch no file."""
    other = Recorder(is_main=False)
    log = MetricLog(other, tmp_path / "metrics.jsonl", 0, 1)
    add(log, 1)
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == [] and other.logged[0][0] == 1


def test_the_progress_bar_counts_steps_and_shows_the_loss(recorder, tmp_path, capsys):
    """The bar goes on from the resumed step and names loss, rate and seconds of the last step written."""
    log = MetricLog(recorder, tmp_path / "metrics.jsonl", 2, 4)
    assert log.progress.n == 2
    add(log, 3, 0.12345)
    add(log, 4)
    assert log.progress.n == 4 and "loss=0.1235" in log.progress.postfix.replace("0.1234,", "0.1235,")
    log.close()
    assert "4/4" in capsys.readouterr().err


def test_a_message_does_not_stand_in_the_line_of_the_progress_bar():
    """It has a line of its own, and the bar follows it."""
    code = (
        "import logging, sys; from accelerate import Accelerator; from tqdm.auto import tqdm\n"
        "from utils.devices.accelerator_setup import set_up_logging\n"
        "set_up_logging(Accelerator(cpu=True)); bar = tqdm(total=3, desc='steps'); bar.update()\n"
        "logging.getLogger('utils.run').info('half of it'); bar.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert re.search(r"steps: .*\r +\rINFO: half of it\n\rsteps: ", text := done.stderr.decode()), text


def test_pictures_go_to_those_trackers_that_take_them():
    """TensorBoard gets one stack of pixels, others a list, and the rest nothing."""
    taken = []
    trackers = [
        SimpleNamespace(
            name=name, log_images=lambda values, step, name=name, **options: taken.append((name, values, options))
        )
        for name in ("tensorboard", "wandb")
    ]
    trackers.append(SimpleNamespace(name="mlflow"))
    pictures = [Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "blue")]
    track_images(SimpleNamespace(trackers=trackers), "validation", pictures, 3)
    (board, stack, options), (wandb, listed, _) = taken
    assert board == "tensorboard" and stack["validation"].shape == (2, 2, 4, 3) and options == {"dataformats": "NHWC"}
    assert stack["validation"][1, 0, 0].tolist() == [0, 0, 255]
    assert wandb == "wandb" and listed == {"validation": pictures}


class AnyModule(ModuleType):
    """Stand for a tracker's package: whatever is asked of it can be called and asked again."""

    def __getattr__(self, name: str):
        """Return a stand-in for everything."""
        return MagicMock()


@pytest.mark.parametrize("name", sorted(map(str, tracking.LOGGER_TYPE_TO_CLASS)))
def test_each_tracker_that_accelerate_knows_takes_pictures_or_is_left_alone(monkeypatch, name):
    """Its class of accelerate's gets what it takes: a list, a picture at a time, or nothing."""
    for package in ("aim", "clearml", "swanlab", "wandb"):
        monkeypatch.setitem(sys.modules, package, AnyModule(package))
    tracker, pictures = make_tracker(name), [Image.new("RGB", (4, 2), color) for color in ("red", "blue")]
    shown = take_pictures(monkeypatch, tracker)
    track_images(SimpleNamespace(trackers=[tracker]), "validation", pictures, 3)
    assert len(shown) == (2 if hasattr(tracker, "log_images") else 0)
    assert all(np.asarray(picture).shape == (2, 4, 3) for picture in shown)


def make_tracker(name: str):
    """Make a tracker of accelerate's without its package and without starting a run."""
    PartialState()  # trackers ask whether this is the main process
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    tracker = kind.__new__(kind)
    tracker.writer = tracker.task = tracker.run = tracker.live = MagicMock()
    return tracker


def take_pictures(monkeypatch, tracker) -> list:
    """Return a list that fills with the pictures that reach a tracker's own package."""
    shown = []
    for package in ("aim", "swanlab", "wandb"):
        monkeypatch.setattr(sys.modules[package], "Image", lambda picture, **options: shown.append(picture))
    if tracker.name == "tensorboard":
        tracker.writer.add_images = lambda title, stack, **options: shown.extend(stack)
    if tracker.name == "clearml":
        tracker.task.get_logger().report_image = lambda image, **options: shown.append(image)
    return shown


def test_pictures_of_several_sizes_are_told_apart():
    """Those of another size than the first have it in their name, because a stack has one size."""
    taken = []
    trackers = [
        SimpleNamespace(name=name, log_images=lambda values, step, **options: taken.append((values, step)))
        for name in ("tensorboard", "wandb")
    ]
    sizes = [(4, 2), (2, 6), (4, 2)]
    pictures = [Image.new("RGB", size, (10 * number, 0, 0)) for number, size in enumerate(sizes)]
    track_images(SimpleNamespace(trackers=trackers), "validation", pictures, 3)
    first, second, third, fourth = (values for values, step in taken if step == 3)
    assert [list(values) for values in (first, second, third, fourth)] == [["validation"], ["validation 2x6"]] * 2
    assert first["validation"].shape == (2, 2, 4, 3) and first["validation"][:, 0, 0, 0].tolist() == [0, 20]
    assert second["validation 2x6"].shape == (1, 6, 2, 3)
    assert third["validation"] == [pictures[0], pictures[2]] and fourth["validation 2x6"] == [pictures[1]]


def test_settings_that_a_tracker_cannot_store_are_left_out(tmp_path):
    """Numbers, words and switches stay; without trackers nothing is started."""
    settings = {"a": 1, "b": 0.5, "c": "x", "d": True, "e": None, "f": [1], "g": {}}
    started = []
    for trackers in (["wandb"], [], None):
        accelerator = SimpleNamespace(log_with=trackers, init_trackers=lambda *values: started.append(values))
        start_trackers(accelerator, settings, tmp_path)
    kept = {"a": 1, "b": 0.5, "c": "x", "d": True}
    assert started == [("dreambooth", kept, {"wandb": {"dir": str(tmp_path)}})]
