"""Write a pipeline folder with random weights: small ones for tests, real sizes for measurements.

    python -m utils.make_model /tmp/tiny --shape tiny

The shapes are listed in `utils.synthetic.model_sizes`. No download is needed.

The text encoder of a real IF, T5 v1.1 XXL, holds 4.76 billion parameters. The IF shapes of real size get one thin
layer of its width instead, so that the U-Net takes its embeddings; `--full_text_encoder` writes the real one.
"""

import argparse
import sys
from pathlib import Path

import torch

from utils.core.errors import UserError
from utils.synthetic.model_sizes import SHAPES
from utils.synthetic.random_models import make_model

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(argv: list[str] | None = None) -> None:
    """Read the command line, write the folder, say what it holds."""
    parser = argparse.ArgumentParser(prog="python -m utils.make_model", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--shape", choices=SHAPES, required=True, help="sizes of the networks")
    parser.add_argument("--prediction_type", choices=["epsilon", "v_prediction"], help="default: the shape's own")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights; default: 0")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights; default: fp32")
    parser.add_argument("--variant", help="put this into the weights' file names, as in model.fp16.safetensors")
    parser.add_argument(
        "--full_text_encoder",
        action="store_true",
        help="if1-* and if2-*: write T5 v1.1 XXL, 4.76 billion parameters; default: one thin layer of its width",
    )
    parser.add_argument("--configs_only", action="store_true", help="write no weights: enough for --dry_run")
    args = parser.parse_args(argv)
    options = {"variant": args.variant, "configs_only": args.configs_only, "full_text_encoder": args.full_text_encoder}
    try:
        make_model(args.out, args.shape, args.prediction_type, args.seed, DTYPES[args.dtype], **options)
    except UserError as error:
        parser.error(str(error))
    megabytes = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file()) / 1e6
    weights = "no weights" if args.configs_only else "random weights"
    print(f"Wrote {args.out}: shape {args.shape}, {weights}, {megabytes:.1f} MB.")


if __name__ == "__main__":
    sys.exit(main())
