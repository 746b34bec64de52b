"""What a dry run says of costs: a script's own functions, gone through with tensors that have no content."""

import functools
import itertools
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from utils.core.errors import UserError
from utils.memory import memory_tracker
from utils.optim.optimizers import on_each_gradient
from utils.run import run_summary


def show_costs(script: ModuleType, flags: dict[str, Any], plan: Any, accelerator: Accelerator) -> None:
    """Print what a run will need, and which flags would save how much.

    Args:
        script: One of the two training scripts.
        plan: Its `Plan`.
    """
    if not accelerator.is_main_process:
        return
    try:
        costs = foretell(script, flags, plan, accelerator, accelerator.device)
    except (UserError, RuntimeError, TypeError, ValueError) as error:  # a library that cannot do without content
        costs = {"peak memory": f"not known: {error}"}
    run_summary.show_run(accelerator, "What it would cost, at most and about", costs)


def foretell(
    script: ModuleType, flags: dict[str, Any], plan: Any, accelerator: Accelerator, device: torch.device
) -> dict[str, str]:
    """Return what a run would need on a device, also on one that this machine lacks."""
    flags = flags | {"mixed_precision": accelerator.mixed_precision}
    go, steps = functools.partial(go_through, script, flags, plan), plan.steps - plan.first_step
    is_here = device.type == accelerator.device.type
    return memory_tracker.describe_costs(go, flags, device, plan.processes, steps, is_here)


def go_through(
    script: ModuleType, flags: dict[str, Any], planned: Any, changes: dict, rehearsal: memory_tracker.MemoryTracker
) -> None:
    """Go through what needs much memory in a run, some flags changed: prompts, latents, and two steps.

    Raises:
        UserError: The script would refuse these changes.
    """
    if changes and (problems := script.find_problems(SimpleNamespace(**flags | changes))):
        raise UserError(problems[0])
    first = planned.examples[0].path  # which stands in for class images that are still to be drawn
    examples = [one._replace(path=first) if one.is_missing else one for one in planned.examples]
    given = SimpleNamespace(**flags | changes | {"seed": planned.seed, "resume_from_checkpoint": None})
    plan = script.make_plan(given, rehearsal, script.detect_model(given), examples)
    prompts = script.tokenize_prompts(given, plan, rehearsal.device)
    if plan.base.precomputes_text:
        encode_prompts(script, given, plan, prompts, rehearsal)
    dataset = script.DreamBoothDataset(given, plan, prompts)
    visits, latents = next(iter(script.StepSampler(plan, dataset.order, range(1), 0))), None
    if script.count_crops(given, plan, dataset):
        vae = script.load_vae(given, plan, rehearsal.device)
        with rehearsal.watching("caching latents", [vae]):
            pixels = torch.empty(1, 3, *reversed(visits[0].size), device=rehearsal.device)
            moments = script.encode_images(vae, pixels)[0]
        cuts = [(dataset.examples[visit.example].path, dataset.crop(visit)) for visit in visits]
        dataset.latents = latents = dict.fromkeys(cuts, torch.zeros(moments.shape))
        del vae
    models = script.load_models(given, plan, prompts, rehearsal.device, latents)
    script.prepare_training(given, plan, models, rehearsal.device)
    models.vae = models.vae if latents is None else None  # one for previews waits on the CPU
    train(script, given, plan, models, script.collate([dataset[visit] for visit in visits]), rehearsal)


def encode_prompts(
    script: ModuleType, given: SimpleNamespace, plan: Any, prompts: Any, rehearsal: memory_tracker.MemoryTracker
) -> None:
    """Encode one prompt, and let it stand for all."""
    precision = given.text_encoder_precision or rehearsal.mixed_precision
    # bitsandbytes' layers need content: a byte for each weight is what they come to.
    is_int8 = precision == "int8"
    text_encoder = script.load_text_encoder(given, plan, "bf16" if is_int8 else precision, rehearsal.device)
    with rehearsal.watching("encoding the prompts", [] if is_int8 else [text_encoder]), torch.no_grad():
        held = torch.empty(count(text_encoder) * is_int8, dtype=torch.uint8, device=rehearsal.device)
        embeds = script.embed_prompts(prompts, text_encoder, torch.tensor([0]), together=False)
        prompts.embeds = embeds.expand(len(prompts.texts), -1, -1).to(plan.frozen_dtype)
        del held


def count(network: nn.Module) -> int:
    """Return how many weights a network has."""
    return sum(weight.numel() for weight in network.parameters())


def train(
    script: ModuleType,
    given: SimpleNamespace,
    plan: Any,
    models: Any,
    batch: dict[str, Any],
    rehearsal: memory_tracker.MemoryTracker,
) -> None:
    """Take two steps: the optimizer has its state from the first one on, and the second one needs the most."""
    networks, norms = [models.unet, models.vae, models.text_encoder, *models.copies.values()], []
    with rehearsal.watching("training", networks):
        optimizer = models.optimizer = script.make_optimizer(given, plan, models)
        rehearsal.wrap(models.trained.values())
        if given.fused_backward:
            on_each_gradient(optimizer, functools.partial(script.update_weight, optimizer, norms))
            on_each_gradient(optimizer, rehearsal.recognise)
        for micro_steps in (1, min(2, given.gradient_accumulation_steps)):
            for _ in itertools.repeat(None, micro_steps):
                script.compute_loss(given, rehearsal, plan, models, batch)["loss"].backward()
            script.update_weights(given, rehearsal, models, 0, norms)
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    rehearsal.recognise(group, weight)
