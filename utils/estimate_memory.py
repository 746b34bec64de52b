"""Tell how much memory a training command would take on a GPU that this machine may lack; no weights are loaded.

    python -m utils.estimate_memory train_dreambooth_lora.py --pretrained_model_name_or_path MODEL \
        --instance_data_dir photos/ --instance_prompt "a photo of sks dog" --mixed_precision bf16

The flags are those of the training command. With --dry_run it tells the same of the device that is there.

    python -m utils.estimate_memory --shape sd15 train_dreambooth_lora.py --train_batch_size 1 --mixed_precision bf16

needs neither a model nor photos. The networks have the given shape; `python -m utils.make_model --help` lists the
shapes. A plain picture stands for the photos.
"""

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from utils.core.errors import exit_status
from utils.devices import accelerator_setup
from utils.flags.command_line import convert_flag
from utils.memory import memory_estimate
from utils.run import run_summary, scripts, tool_names
from utils.synthetic.model_sizes import SHAPES, T5_XXL
from utils.synthetic.random_models import make_model

DEVICES = ("cuda", "xpu", "mps", "cpu")
EDGE = 1024  # pixels of the photo that stands for all


def main(argv: list[str] | None = None) -> int:
    """Print the estimate and return the exit status."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    script = scripts.load_script(args.script)
    tool_names.check_names(script, "utils.estimate_memory")
    with standing_in(args.shape) as stand_ins:
        given = script.parse_args([*stand_ins, *args.flags])
        accelerator = script.make_accelerator(given)
        base = script.detect_model(given)
        plan = script.make_plan(given, accelerator, base, script.list_examples(given, base))
        costs = memory_estimate.estimate_costs(script, vars(given), plan, accelerator, torch.device(args.device))
    run_summary.show_run(accelerator, f"{args.script.name} {' '.join(args.flags)}", costs)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    to_script = functools.partial(convert_flag, scripts.find_script)
    parser = argparse.ArgumentParser(
        prog="python -m utils.estimate_memory", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add, known = parser.add_argument, [name for name, shape in SHAPES.items() if shape["family"] != "x4"]
    add("--device", choices=DEVICES, default="cuda", help="kind of device; default: cuda")
    add("--shape", choices=known, help="of the networks, instead of a model and photos")
    add("script", type=to_script, help="path of the training script")
    add("flags", nargs=argparse.REMAINDER, metavar="...", help="its flags, after its name")
    return parser.parse_args(argv)


@contextlib.contextmanager
def standing_in(shape: str | None) -> Iterator[list[str]]:
    """Write the configs of a shape and a photo for as long as the context lasts; give the flags that name them."""
    if shape is None:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        model, photos = Path(folder, "model"), Path(folder, "photos")
        make_model(model, shape, full_text_encoder=SHAPES[shape]["text"] is T5_XXL, configs_only=True)
        photos.mkdir()
        Image.new("RGB", (EDGE, EDGE)).save(photos / "photo.png")
        paths = {
            "pretrained_model_name_or_path": model,
            "instance_data_dir": photos,
            "output_dir": Path(folder, "out"),
        }
        flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
        yield [*flags, "--instance_prompt", "a photo of sks dog", "--report_to", "none", "--max_train_steps", "1000"]


if __name__ == "__main__":
    sys.exit(exit_status(main))
