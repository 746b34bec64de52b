"""The names that tools call of a training script, or of an edited copy of one."""

from pathlib import Path
from types import ModuleType

from utils.core.errors import UserError

# What a tool calls of a script. A copy may change what these do, but not their names and parameters.
PLANNING = ("parse_args", "make_accelerator", "detect_model", "list_examples", "make_plan")
STEPPING = (
    *("find_problems", "detect_model", "make_plan", "tokenize_prompts", "load_text_encoder", "embed_prompts"),
    *("DreamBoothDataset", "StepSampler", "count_crops", "load_vae", "encode_images", "collate"),
    *("load_models", "prepare_training", "make_optimizer", "compute_loss", "update_weights", "update_weight"),
)
NEEDED = {
    "--dry_run": STEPPING,
    "utils.estimate_memory": (*PLANNING, *STEPPING),
    "utils.preview_data": (*PLANNING, "tokenize_prompts", "DreamBoothDataset", "StepSampler"),
    "utils.lab.compare_memory_trackers": ("main", *PLANNING, *STEPPING),
    "utils.lab.step_timing split": (
        "main",
        "exit_status",
        "train",
        "make_loader",
        "metric_log",
        "latents_or_pixels",
        "embed_prompts",
    ),
    "utils.lab.step_timing flops": ("main", "exit_status", "train"),
}


def find_missing_names(script: ModuleType, tool: str) -> list[str]:
    """Return the names that a tool, a key of `NEEDED`, calls and the script lacks."""
    return [name for name in dict.fromkeys(NEEDED[tool]) if not hasattr(script, name)]


def describe_missing_names(script: ModuleType, tool: str) -> str:
    """Return a sentence that says what a script lacks for a tool, "" if nothing."""
    if not (missing := find_missing_names(script, tool)):
        return ""
    name = Path(script.__file__).name
    return f"{name} does not define {', '.join(missing)}, which {tool} calls: a copy must keep such names."


def check_names(script: ModuleType, tool: str) -> None:
    """Check that a script has what a tool calls.

    Raises:
        UserError: It lacks a name.
    """
    if sentence := describe_missing_names(script, tool):
        raise UserError(sentence)
