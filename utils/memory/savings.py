"""Which flags lower the memory of training: what a dry run tries, and what is advised when memory ran out."""

from typing import Any

from utils.flags.flag_checks import is_installed
from utils.optim.optimizers import optimizer_of

WORTHWHILE = 0.02  # of the peak; a change that saves less is not named


def list_changes(flags: dict[str, Any]) -> list[tuple[str, dict]]:
    """Return the changes of flags that may lower the memory of training, in words and by name."""
    batch, accumulated = flags["train_batch_size"], flags["gradient_accumulation_steps"]
    smaller = {"train_batch_size": 1, "gradient_accumulation_steps": batch * accumulated}
    trains_text, eight_bit = flags["train_text_encoder"], {"optimizer": "adamw8bit"}
    is_prodigy, is_fused = flags["optimizer"] == "prodigy", flags["fused_backward"]
    is_large = optimizer_of(flags) in ("adamw", "prodigy")
    fused, halves = {"fused_backward": True, "max_grad_norm": 0.0}, {"weight_dtype": "bf16", "mixed_precision": "bf16"}
    found = [
        ("--gradient_checkpointing", {"gradient_checkpointing": True}, True),
        (" ".join(f"--{name} {value}" for name, value in smaller.items()), smaller, batch > 1 and not is_fused),
        ("--mixed_precision bf16", {"mixed_precision": "bf16"}, flags["mixed_precision"] == "no"),
        ("--optimizer adamw8bit", eight_bit, is_large and is_installed("bitsandbytes")),
        ("--fused_backward --max_grad_norm 0", fused, accumulated == 1 and not is_fused and not is_prodigy),
        ("--weight_dtype bf16 --mixed_precision bf16", halves, not is_prodigy),
        ("--base_model_precision nf4", {"base_model_precision": "nf4"}, "base_model_precision" in flags),
        ("--use_bitfit", {"use_bitfit": True}, "use_bitfit" in flags),
        ("--pre_compute_text_embeddings", {"pre_compute_text_embeddings": True}, not trains_text),
        ("--cache_latents on", {"cache_latents": "on"}, flags["cache_latents"] != "on"),
        ("--no-train_text_encoder", {"train_text_encoder": False, "text_encoder_lr": None}, trains_text),
    ]
    return [
        (words, changes)
        for words, changes, holds in found
        if holds and any(flags.get(name) != value for name, value in changes.items())
    ]
