"""The words of the start-up screen, which are also the settings of the model card; its lines are in the scripts."""

from collections import Counter
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from utils.models.quantize import count_frozen

_LONGEST = 80  # characters of a prompt that are shown


def show_run(accelerator: Accelerator, title: str, summary: dict[str, str]) -> None:
    """Print the start-up screen."""
    accelerator.print(title)
    accelerator.print(*(f"  {name + ' ':.<15} {text}" for name, text in summary.items()), sep="\n", flush=True)


def describe_pictures(flags: dict[str, Any], plan: Any, order: Any, models: Any) -> dict[str, str]:
    """Return what is said of photos, their sizes and masks, and of class images.

    Args:
        flags: As given, by name.
        plan: The script's `Plan`.
        order: The `BatchOrder` of its examples.
        models: The script's `Models`, or None if they are not to be described.
    """
    photos = [example for example in plan.examples if not example.is_prior]
    priors = [example for example in plan.examples if example.is_prior]
    found = {"photos": f"{len(photos)} of {shorten(list_prompts(photos))}"}
    if len({example.concept for example in plan.examples}) > 1:
        subjects = Counter(example.concept for example in photos)
        listed = [
            f"{count} x {one.repeats} of {one.instance_prompt or Path(one.instance_data_dir or one.dataset_name).name}"
            for one, count in subjects.items()
        ]
        found["concepts"] = "; ".join(listed)
    if masked := sum(example.mask is not None for example in photos):
        found["masks"] = f"{masked} of {len(photos)} photos"
    if list(order.counts) != [plan.base.resolution]:
        found["sizes"] = describe_sizes(order)
    weights = shorten(list(dict.fromkeys(f"{example.concept.prior_loss_weight:g}" for example in priors)))
    missing = len({example.path for example in priors if example.is_missing})
    found["class images"] = (
        f"{len(priors)} of {shorten(list_prompts(priors))}, prior weight {weights}" if priors else "none"
    )
    found["class images"] += f", {missing} yet to be drawn" if missing and flags["dry_run"] else ""
    if priors and models and flags["prior_target"] == "base_prediction":
        held = sum(weight.nbytes for network in models.copies.values() for weight in network.parameters()) / 1e9
        found["prior target"] = "the base model's prediction" + (f", a copy of {held:.2f} GB" if held else "")
    return found


def describe_batch(flags: dict[str, Any], processes: int, order: Any) -> str:
    """Return how many images an optimizer step takes, those of all processes; `order` is the run's `BatchOrder`."""
    accumulated = f"{flags['gradient_accumulation_steps']} accumulated"
    pictures = order.batch * flags["gradient_accumulation_steps"] * (2 if order.has_partners else 1)
    return f"{flags['train_batch_size']} x {processes} processes x {accumulated} = {pictures} pictures a step"


def describe_frozen(flags: dict[str, Any], plan: Any) -> str:
    """Return the precision of frozen weights, and that of the U-Net's if it is another."""
    precision, stored = str(plan.frozen_dtype).removeprefix("torch."), flags.get("base_model_precision", "no_change")
    return precision + ("" if stored == "no_change" else f", the U-Net's in {stored}")


def describe_sizes(order: Any) -> str:
    """Return how many photos a pass of a `BatchOrder` has of each size, and how many batches they make."""
    counts, batch = order.counts, order.batch
    listed = [f"{count} x {size} in {-(-count // batch)}" for size, count in sorted(counts.items())]
    share = sum(counts.values()) / (batch * order.pass_length)  # 1 if there is one size, whose passes run on
    words = f"{', '.join(listed)}; batches of up to {batch}, {float(share):.0%} full"
    return words + (". A smaller --train_batch_size, accumulated, wastes less" if share < 0.75 else "")


def list_prompts(examples: list[Any]) -> list[str]:
    """Return the distinct prompts of some examples, quoted; of long ones the beginning, lest they fill the screen."""
    found = dict.fromkeys(prompt for example in examples for prompt in example.prompts)
    return [repr(text if len(text) <= _LONGEST else text[: _LONGEST - 1].rstrip() + "…") for text in found]


def describe_text_encoder(flags: dict[str, Any], base: Any) -> str:
    """Return what becomes of the text encoder, and what it is given.

    Args:
        base: The script's `ModelInfo`.
    """
    words = "encoded once and freed" if base.precomputes_text else "frozen"
    words = "trained" if flags["train_text_encoder"] else words
    words += f", {base.tokens} tokens" if base.tokens else ""
    words += ", padding hidden" if base.uses_attention_mask else ""
    return words + (f", {flags['caption_dropout']:.0%} of the captions empty" if flags["caption_dropout"] else "")


def shorten(prompts: list[str], shown: int = 3) -> str:
    """Return the first prompts, and how many others there are."""
    return " or ".join(prompts[:shown]) + (f" or {len(prompts) - shown} others" if len(prompts) > shown else "")


def count_parameters(*networks: nn.Module | None) -> tuple[float, float]:
    """Return how many million parameters train, and how many are frozen."""
    there = [network for network in networks if network is not None]
    trained = sum(weight.numel() for network in there for weight in network.parameters() if weight.requires_grad)
    return trained / 1e6, sum(map(count_frozen, there)) / 1e6
