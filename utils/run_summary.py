"""A run in words: the start-up screen, and the settings of the model card."""

from typing import Any

from utils.devices import count_parameters


def describe_run(
    flags: dict[str, Any], plan: Any, method: dict[str, Any], examples: list, models: Any, optimizer: Any
) -> dict[str, str]:
    """Return what a person wants to know of a run, by name, in the order of the screen.

    Args:
        flags: As given, by name.
        plan: The script's `Plan`.
        method: What only its method has, such as the rank of adapters.
        examples: The script's `Example`s.
        models: The script's `Models`.
        optimizer: As accelerate wraps it.
    """
    base, photos = plan.base, [example for example in examples if not example.is_prior]
    prompts = dict.fromkeys(repr(prompt) for example in photos for prompt in example.prompts)
    class_images, rates = len(examples) - len(photos), " and ".join(f"{rate:g}" for rate in plan.learning_rates)
    trained, frozen = count_parameters(models.unet, models.vae, models.text_encoder)
    accumulated = f"{flags['gradient_accumulation_steps']} accumulated"
    batch = f"{flags['train_batch_size']} x {plan.processes} processes x {accumulated}"
    prior = f"{class_images} of {flags['class_prompt']!r}, prior weight {flags['prior_loss_weight']:g}"
    variance = "trained" if flags["train_variance"] else "not trained: results draw with fixed_small"
    return {
        "model": base.kind.value + (f", fed by {base.conditioning}" if base.conditioning else ""),
        "resolution": f"{base.resolution} px" + ("" if flags["resolution"] else ", the default for this model"),
        "weights": f"{trained:.2f} M train in float32, {frozen:.2f} M are frozen in {plan.frozen_dtype}",
        **{name: str(value) for name, value in method.items()},
        "text encoder": describe_text_encoder(flags, base),
        **({"variance": variance} if base.learns_variance else {}),
        "photos": f"{len(photos)} of {shorten(list(prompts))}",
        "class images": prior if class_images else "none",
        "batch": f"{batch} = {plan.examples_per_step} pictures a step",
        "steps": f"{plan.steps}, {plan.steps_per_epoch} an epoch; {plan.first_step} are done",
        "loss": f"{base.prediction_type}, min-SNR {flags['snr_gamma'] or 'off'}, noise offset {plan.noise_offset:g}",
        "learning rate": f"{rates}, {flags['lr_scheduler']}, {type(optimizer.optimizer).__name__}",
        "arithmetic": f"{plan.fits['precision']} mixed precision on {models.unet.device.type}, seed {plan.seed}",
    }


def describe_text_encoder(flags: dict[str, Any], base: Any) -> str:
    """Return what becomes of the text encoder, and what it is given.

    Args:
        base: The script's `BaseModel`.
    """
    words = "encoded once and freed" if base.precomputes_text else "frozen"
    words = "trained" if flags["train_text_encoder"] else words
    words += f", {base.tokens} tokens" if base.tokens else ""
    words += ", padding hidden" if base.hides_padding else ""
    return words + (f", {flags['caption_dropout']:.0%} of the captions empty" if flags["caption_dropout"] else "")


def shorten(prompts: list[str], shown: int = 3) -> str:
    """Return the first prompts, and how many others there are."""
    return " or ".join(prompts[:shown]) + (f" or {len(prompts) - shown} others" if len(prompts) > shown else "")
