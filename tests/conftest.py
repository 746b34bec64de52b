"""What several test modules share: tiny models, photos, class images, and the process that runs the scripts."""

import os
import tempfile

os.environ |= {
    "XDG_CACHE_HOME": tempfile.mkdtemp(prefix="dreambooth-cache-"),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import atexit
import logging
import shlex
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.inside import forget_processes
from tests.runs import BASE_FLAGS, Trainer
from utils.data.concepts import Concept
from utils.data.geometry import Size
from utils.synthetic.random_models import make_model

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
if hasattr(signal, "SIGHUP"):
    # Under nohup it is ignored, and every process that a test starts would ignore it, too.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # the number of threads decides the last bits

# Files that take longest, the longest first: what begins early keeps no worker waiting for the other at the end.
SLOW = """test_fidelity test_memory_tracker test_compile test_estimate_memory test_faults test_benchmark test_data_runs
test_disk test_kill_and_resume test_signals test_memory test_hub_data test_training test_if_equalities""".split()
ORIENTATION = 0x0112
PHOTOS = {  # width, height; one is smaller than the resolution
    "beach.png": (80, 64),
    "grass.jpg": (64, 112),
    "more/table.png": (100, 90),
    "snow.webp": (72, 72),
    "turned.jpg": (96, 70),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring slow files to the front, so that two workers end at about the same time."""
    if unknown := [name for name in SLOW if not Path(__file__).with_name(f"{name}.py").exists()]:
        raise pytest.UsageError(f"tests/conftest.py calls files slow that do not exist: {' '.join(unknown)}")
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))


def draw_picture(width: int, height: int, number: int) -> Image.Image:
    """Draw a smooth pattern that differs between numbers and has neither symmetry nor two equal parts."""
    y, x = np.mgrid[0:height, 0:width] / 32
    waves = [
        np.sin((1 + number / 3) * x + channel) * np.cos(0.7 * y + number + 0.3 * x * channel) for channel in range(3)
    ]
    return Image.fromarray(np.uint8(127.5 + 120 * np.stack(waves, axis=-1)))


def make_concept(**values) -> Concept:
    """Return a concept as the flags give it that have defaults, but for some values."""
    defaults = {"image_column": "image", "caption_strategy": "instanceprompt", "prepend_instance_prompt": False}
    defaults |= {"num_class_images": 100, "repeats": 1, "prior_loss_weight": 1.0, "crop_style": "random"}
    return Concept(
        **dict.fromkeys(Concept._fields) | Concept._field_defaults | defaults | {"random_flip": False} | values
    )


def make_dataset(script, paths, resolution=16, seed=0, is_if=False, **flags):
    """Make a dataset of photos of a subject; flags are those of its concept, too."""
    size, of_concept = Size.parse(resolution), {key: flags[key] for key in Concept._fields if key in flags}
    texts, concept = ["", "a photo of sks dog"], make_concept(**of_concept)
    examples = [script.Example(path, tuple(texts[1:]), concept, size) for path in paths]
    base = SimpleNamespace(is_if=is_if, vae_scale_factor=1 if is_if else 8)
    plan = SimpleNamespace(seed=seed, base=base, examples=examples, processes=1)
    args = Namespace(**vars(script.make_parser().parse_args([])) | flags)
    return script.DreamBoothDataset(args, plan, SimpleNamespace(texts=texts))


def visit_of(dataset, example, visit, seed=0):
    """Return what a visit to an example gives."""
    kind = sys.modules[type(dataset).__module__].ExampleVisit
    return dataset[kind(example, visit, dataset.examples[example].size, 1.0, seed)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Write the tiny model that predicts noise."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", "tiny")


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory) -> Path:
    """Write the tiny model that predicts velocity."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-v", "tiny", "v_prediction")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Draw five photos, one of them turned by its EXIF data and one in a subfolder, among files that are none."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "notes.txt").write_text("Taken last summer.")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for number, (name, size) in enumerate(PHOTOS.items()):
        options = {"exif": exif} if name == "turned.jpg" else {"lossless": True} if name == "snow.webp" else {}
        draw_picture(*size, number).save(folder / name, **options)
    return folder


@pytest.fixture(scope="session")
def class_images(tmp_path_factory) -> Path:
    """Draw four class images."""
    folder = tmp_path_factory.mktemp("data") / "class"
    folder.mkdir()
    for number in range(4):
        draw_picture(64, 64, 10 + number).save(folder / f"{number:05d}.png")
    return folder


@pytest.fixture(scope="session")
def trainer(tmp_path_factory, tiny, photos):
    """Start the process that runs the scripts."""
    trainer = Trainer(tmp_path_factory.mktemp("runs"), tiny, photos)
    yield trainer
    trainer.close()


@pytest.fixture
def here(tiny, photos, tmp_path, monkeypatch):
    """Give a function that runs a script in this process, into `out`, and returns its exit status."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    handlers = logging.root.handlers[:]
    words = ["--pretrained_model_name_or_path", str(tiny), "--instance_data_dir", str(photos)]

    def run(script, flags: str = "", out: str = "out") -> int:
        forget_processes()
        return script.main([*words, *shlex.split(f"{BASE_FLAGS} {flags}"), "--output_dir", str(tmp_path / out)])

    yield run
    forget_processes()
    logging.root.handlers[:] = handlers
