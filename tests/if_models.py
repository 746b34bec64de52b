"""Tiny models of DeepFloyd IF's two stages, and what the tests that train them have in common."""

import json
from pathlib import Path

import diffusers
import torch

from utils.synthetic.random_models import make_model

STAGES = ("if1", "if2")
PAIRS = tuple((script, stage) for stage in STAGES for script in ("full", "lora"))
SIZE = 16  # pixels, of the tests' runs; stage II enlarges from 4
SIDES = {"if1": 4, "if2": 16}  # pixels, of pictures that are drawn without saying a size
PIPELINES = {"if1": diffusers.IFPipeline, "if2": diffusers.IFSuperResolutionPipeline}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")  # all that IF's attention has


def write_models(folder: Path) -> dict[str, Path]:
    """Write the tiny models of both stages, of small pictures by default; return their folders."""
    models = {stage: make_model(folder / stage, f"tiny-{stage}") for stage in STAGES}
    for stage, size in SIDES.items():
        path = models[stage] / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
    return models


def flags_of(models: dict[str, Path], stage: str, flags: str = "") -> str:
    """Return the flags of a run on a stage, added to those that every run of the tests has."""
    return f"--pretrained_model_name_or_path {models[stage]} --resolution {SIZE} {flags}"


def read_scheduler(folder: Path) -> dict:
    """Read the scheduler's config of a model, a result or a checkpoint."""
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def load_result(base: Path, out: Path, **parts) -> diffusers.DiffusionPipeline:
    """Load a run's result as a stranger would: a pipeline, or an adapter on the base and the scheduler beside it."""
    if (out / "model_index.json").exists():
        return quiet(diffusers.DiffusionPipeline.from_pretrained(out, **parts))
    pipeline = quiet(diffusers.DiffusionPipeline.from_pretrained(base, **parts))
    pipeline.load_lora_weights(out)
    pipeline.scheduler = type(pipeline.scheduler).from_pretrained(out / "scheduler")
    return pipeline


def quiet(pipeline: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    """Hide the progress bar of a pipeline's call."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator_of(seed: int) -> torch.Generator:
    """Return a generator that starts from a seed."""
    return torch.Generator().manual_seed(seed)
