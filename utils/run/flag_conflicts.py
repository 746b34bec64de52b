"""Flags that contradict the model, and flags that change nothing: a sentence for each."""

from typing import Any

from utils.data.concepts import find_uneven, find_unused_keys, read_concepts
from utils.data.prompt_cleaning import find_prompt_problems
from utils.flags.flag_checks import find_unused, is_installed, messages_if
from utils.flags.precision import precision_of


def find_model_conflicts(flags: dict[str, Any], base: Any, longest: int) -> list[str]:
    """Return a sentence for each flag that contradicts the model.

    Args:
        base: The script's `ModelInfo`.
        longest: Tokens that its text encoder takes.
    """
    sizes = dict.fromkeys([base.resolution, *base.preview_sizes])
    uneven = ", ".join(str(size) for size in sizes if any(edge % base.size_multiple for edge in size))
    unfits = f"--resolution or --validation_resolution {uneven}: the model needs multiples of {base.size_multiple}."
    no_latents = base.is_if and flags["cache_latents"] == "on"
    no_variance = flags["train_variance"] and not base.learns_variance
    return [
        *_find_misfits_of_stage_two(flags, bool(base.low_res_size)),
        *messages_if((uneven, unfits)),
        *find_uneven(flags, base.resolution, base.size_multiple),
        *_find_misfits_of_text(flags, base, longest),
        *messages_if(
            (no_latents, "--cache_latents on: IF works on pixels and has no latents."),
            (no_variance, "--train_variance: this U-Net predicts no variance."),
        ),
    ]


def _find_misfits_of_stage_two(flags: dict[str, Any], enlarges: bool) -> list[str]:
    """Return a sentence for each flag of stage II that another model is given, or that stage II lacks."""
    sources = ("validation_images", "num_eval_images", "stage_one_model_name_or_path")
    given = [name for name in (*sources, "class_labels_conditioning") if flags[name]]
    blind = f"--validation_prompt needs one of --{', --'.join(sources)}: stage II enlarges pictures."
    if enlarges:
        return messages_if((flags["validation_prompt"] and not set(given) & set(sources), blind))
    return [f"--{name} is for DeepFloyd IF's stage II." for name in given]


def _find_misfits_of_text(flags: dict[str, Any], base: Any, longest: int) -> list[str]:
    """Return a sentence for each flag of the text, or of IF instance prompts, that contradicts the model.

    Args:
        base: The script's `ModelInfo`.
        longest: Tokens that its text encoder takes.
    """
    tokens, is_if = f"--tokenizer_max_length {base.tokens}", base.is_if
    precision = flags["text_encoder_precision"] and not base.precomputes_text
    unmasked = base.uses_attention_mask and flags["text_encoder_use_attention_mask"] is False
    stays = is_if and flags["pre_compute_text_embeddings"] is False
    prompts = {one.flag_name("instance_prompt"): one.instance_prompt or "" for one in read_concepts(flags) if is_if}
    return messages_if(
        ((base.tokens or 0) > longest, f"{tokens}: the text encoder takes {longest}."),
        (precision, "--text_encoder_precision needs --pre_compute_text_embeddings."),
        (is_if and base.tokens != 77, f"{tokens}: IF's pipelines always give 77 tokens."),
        (
            is_if and flags["train_text_encoder"],
            "--train_text_encoder: T5 is never trained, but encoded once and freed.",
        ),
        (stays, "--no-pre_compute_text_embeddings: T5 is always freed."),
        (unmasked, "--no-text_encoder_use_attention_mask: the model's own pipeline hides the padding."),
    ) + [problem for name, prompt in prompts.items() for problem in find_prompt_problems(name, prompt)]


def find_unused_flags(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each flag that changes nothing in this run, or not what one might think."""
    xformers = flags["enable_xformers_memory_efficient_attention"] and not is_installed("xformers")
    published = "--class_labels_conditioning timesteps: stage II never sees the low-resolution image. Use noise_level."
    needs = dict.fromkeys(("validation_images", "num_eval_images", "validation_resolution"), "validation_prompt")
    has_small = not flags["validation_prompt"] or flags["validation_images"] or flags["num_eval_images"]
    unused = flags["stage_one_model_name_or_path"] and has_small and not flags["with_prior_preservation"]
    stored = flags.get("base_model_precision") == "bf16" and precision_of(flags) in ("bf16", "fp16")
    idle = "has no effect"
    return [
        *messages_if(
            (flags["set_grads_to_none"], f"--set_grads_to_none {idle}: gradients are always set to None."),
            (flags["local_rank"] != -1, f"--local_rank {idle}: the launcher's environment sets it."),
            (flags["hub_token"], "--hub_token is visible in the process list; HF_TOKEN or `hf auth login` is not."),
            (xformers, "xformers is not installed: torch's own attention serves instead."),
        ),
        *find_unused(flags, needs | {"bucket_step": "crop_aspect preserve"}),
        *find_unused_keys(flags),
        *messages_if(
            (unused, "--stage_one_model_name_or_path has neither class images nor previews to draw."),
            (flags["class_labels_conditioning"] == "timesteps", published),
            (
                stored,
                "--base_model_precision bf16 changes nothing: by --mixed_precision, the base is in 16 bits anyway.",
            ),
        ),
    ]
