"""The training commands of the README run as they are written, on tiny models under the names that they give."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from tests.runs import ROOT, SCRIPTS
from utils.synthetic.random_models import make_model

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(accelerate launch .*?)\n```$", TEXT, re.DOTALL | re.MULTILINE)
SAMPLES = re.findall(r"^```bash\npython (-m utils.sample .*?)\n```$", TEXT, re.DOTALL | re.MULTILINE)
CONCEPTS = re.findall(r"^```json\n(\[.*?\])\n```$", TEXT, re.DOTALL | re.MULTILINE)
PLACES = ("photos", "cat", "masks", "classes", "class-dog", "concepts.json")  # that commands name beside their output
SHA = "89abcdef0123456789abcdef0123456789abcdef"
# Wins over what the README says: a CPU has no fp16, and a test no hours and no Hub.
SMALL = "--max_train_steps 1 --resolution 64 --mixed_precision no --num_validation_images 1 --no-push_to_hub"
SMALL += " --validation_num_inference_steps 1 --num_class_images 2 --checkpointing_steps 1 --report_to none"


# The pictures of both models, and for the cascade of further stages.
QUICK = ("--num_inference_steps 2", "--num_inference_steps 2 --height 16 --width 16")
CASCADE = "--stage_two_num_inference_steps 1 --upscaler_num_inference_steps 1"


def with_variant(folder: Path, shape: str) -> Path:
    """Write a model whose weights are there in float32 and, as another variant, in float16, as DeepFloyd has them."""
    model = make_model(folder / shape, shape)
    half = make_model(folder / f"{shape}-fp16", shape, dtype=torch.float16, variant="fp16")
    for path in half.rglob("*.fp16.*"):
        shutil.copy(path, model / path.relative_to(half))
    return model


@pytest.fixture(scope="module")
def home(trainer, tiny, tiny_v, photos, tmp_path_factory):
    """Put tiny models into the Hub's cache under the README's names, and photos where its commands look for them."""
    made = tmp_path_factory.mktemp("models")
    stages = {f"if{number}": with_variant(made, f"tiny-if{number}") for number in (1, 2)}
    for name, model in (
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", tiny),
        ("stabilityai/stable-diffusion-2-1", tiny_v),
        ("DeepFloyd/IF-I-XL-v1.0", stages["if1"]),
        ("DeepFloyd/IF-I-L-v1.0", stages["if1"]),
        ("DeepFloyd/IF-II-L-v1.0", stages["if2"]),
        ("stabilityai/stable-diffusion-x4-upscaler", make_model(made / "x4", "tiny-x4")),
    ):
        cached = trainer.home / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(model, cached / "snapshots" / SHA)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(SHA)
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(photos, folder / "photos")
    shutil.copytree(photos, folder / "cat")
    (concepts,) = CONCEPTS
    (folder / "concepts.json").write_text(
        re.sub('": "(photos|cat)"', lambda found: f'": "{folder / found[1]}"', concepts)
    )
    for path in [path for path in (folder / "photos").rglob("*.*") if path.suffix in (".png", ".jpg", ".webp")]:
        path.with_suffix(".txt").write_text("a photo of sks dog on a beach\nsks dog")
        # The command that draws masks keeps those that are there; of these patterns it finds no subject.
        mask = folder / "masks" / path.relative_to(folder / "photos").with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", ImageOps.exif_transpose(Image.open(path)).size, 255).save(mask)
    return folder


def run_tool(home: Path, trainer, words: list[str]) -> str:
    """Run a tool in the folder of photos, and return what it prints."""
    environment = os.environ | {"HF_HOME": str(trainer.home), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, *words], cwd=home, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"{words}\n{run.stderr}"
    return run.stdout


def test_masks_are_drawn_by_the_command_that_is_given(trainer, home):
    """It finds the photos, leaves what is there, and draws the sheet."""
    (command,) = re.findall(r"^```bash\npython (-m utils.make_masks .*?)\n```$", TEXT, re.DOTALL | re.MULTILINE)
    assert "5 kept" in run_tool(home, trainer, shlex.split(command))
    assert (home / "masks-sheet.png").is_file()


def test_the_commands_run_in_their_order(trainer, home):
    """Each writes its own folder; resuming, repeating and drawing find what the first ones left."""
    assert len(BLOCKS) == 18
    for block in BLOCKS:
        words = shlex.split(block.replace("\\\n", " "))
        place = next(index for index, word in enumerate(words) if word in SCRIPTS.values())
        script = next(name for name, file in SCRIPTS.items() if file == words[place])
        flags = [*words[place + 1 :], *SMALL.split()]
        out = home / flags[flags.index("--output_dir") + 1]
        inside = [str(home / word) if word in (*PLACES, out.name) else word for word in flags]
        inside = [str(home / word) if word.startswith("my-dog-lora/") else word for word in inside]
        run = trainer.start_words(script, out, inside).finish()
        assert run.code == 0, f"{block}\n{run.text}"
        assert (out / "metrics.jsonl").read_text().count("\n") == 1
    assert len(SAMPLES) == 2
    for block, quick, count in zip(SAMPLES, (QUICK[0], f"{QUICK[1]} {CASCADE}"), (8, 4), strict=True):
        printed = run_tool(home, trainer, [*shlex.split(block.replace("\\\n", " ")), *quick.split()])
        assert f"Wrote {count} pictures and grid.png to pictures" in printed


def test_what_can_go_wrong_has_a_module_for_each_line():
    """Every line of the table names modules that are there and hold tests."""
    section = TEXT.partition("## What can go wrong, and what happens then\n")[2].partition("\n## ")[0]
    rows = [row.rpartition(" | ")[2] for row in re.findall(r"^\| (.*) \|$", section, re.MULTILINE)][1:]
    assert len(rows) > 15
    for row in rows:
        modules = [ROOT / "tests" / f"{name}.py" for name in re.findall(r"`(test_\w+)`", row)]
        assert modules and all("\ndef test_" in module.read_text(encoding="utf-8") for module in modules), row
