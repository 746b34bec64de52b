"""What a run will cost: a script's own functions, run with tensors that have shapes but no content."""

import contextlib
import functools
import importlib
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from utils.core.errors import UserError
from utils.devices.device_memory import peak_memory_gb
from utils.flags.flag_checks import is_given, is_installed
from utils.flags.precision import EIGHT_BIT
from utils.memory.memory_tracker import Costs, MemoryTracker
from utils.memory.savings import WORTHWHILE, list_changes
from utils.memory.speed_model import measure_rates
from utils.optim.optimizers import on_each_gradient
from utils.run import run_summary, tool_names

PROCESS = "Python and its libraries"


def show_costs(script: ModuleType, flags: dict[str, Any], plan: Any, accelerator: Accelerator) -> None:
    """Print what a run will need, and which flags would save how much.

    Args:
        script: The module of a training script.
        plan: Its `Plan`.
    """
    if not accelerator.is_main_process:
        return
    try:
        tool_names.check_names(script, "--dry_run")
        costs = estimate_costs(script, flags, plan, accelerator, accelerator.device)
    except (UserError, AttributeError, RuntimeError, TypeError, ValueError) as error:  # needs content, or a name
        costs = {"peak memory": f"not known: {error}"}
    run_summary.show_run(accelerator, "What it would cost, at most and about", costs)


def estimate_costs(
    script: ModuleType, flags: dict[str, Any], plan: Any, accelerator: Accelerator, device: torch.device
) -> dict[str, str]:
    """Return what a run would need, by name, and which flags would save how much.

    Args:
        device: To train on. This machine may lack it; then nothing is said of seconds.
    """
    precision = accelerator.mixed_precision
    flags, is_here = flags | {"mixed_precision": precision}, device.type == accelerator.device.type
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    rates = measure_rates(device, [torch.float32, *([half] if half else [])]) if is_here else None
    # After the measurement, because libraries load their code when it is first used; one is imported then.
    if device.type == "cpu" and any(is_given(flags, words) for words in EIGHT_BIT) and is_installed("bitsandbytes"):
        importlib.import_module("bitsandbytes")
    process = int(resident_bytes()) if device.type == "cpu" else 0
    savings = []
    with no_warnings():  # the run itself has given them
        tracker = MemoryTracker(device.type, precision, plan.processes, rates)
        costs = run_two_steps(script, flags, plan, {}, tracker)
        for words, changes in list_changes(flags):
            tracker = MemoryTracker(device.type, changes.get("mixed_precision", precision), plan.processes)
            with contextlib.suppress(UserError, RuntimeError, TypeError, ValueError):  # this cannot be advised
                gain = costs.peak - run_two_steps(script, flags, plan, changes, tracker).peak
                savings.append((gain, words))
    memory, accumulated = {**costs.memory, PROCESS: process}, flags["gradient_accumulation_steps"]
    seconds = accumulated * costs.seconds[0] + costs.seconds[1] if is_here else None
    return describe_costs(memory, costs.phase, savings, seconds, device.type, plan.steps - plan.first_step)


def describe_costs(
    memory: dict[str, int],
    phase: str,
    savings: list[tuple[int, str]],
    seconds: float | None,
    device: str,
    steps: int,
) -> dict[str, str]:
    """Return the costs in words.

    Args:
        memory: Bytes at the peak, by what they are for.
        phase: When the peak is reached.
        savings: Bytes that a change of flags saves, and the flags.
        seconds: Of a step, None if they are not known.
        device: Its kind.
        steps: Of the run.
    """
    total = sum(memory.values())
    parts = sorted(((size, what) for what, size in memory.items() if size >= 0.005 * total), reverse=True)
    worthwhile = [(gain, words) for gain, words in sorted(savings, reverse=True) if gain > WORTHWHILE * total]
    time = f"very roughly {seconds:.2g} s a step, {seconds * steps / 3600:.2g} h for {steps} steps" if seconds else ""
    return {
        "peak memory": f"about {total / 1e9:.2f} GB on {device}, while {phase}",
        "made up of": ", ".join(f"{size / 1e9:.2f} GB {what}" for size, what in parts),
        **({"time": time} if time else {}),
        "less with": "; ".join(f"{words} (-{gain / 1e9:.2f} GB)" for gain, words in worthwhile) or "no other flag",
    }


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Drop log messages up to warnings."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def resident_bytes() -> float:
    """Return how much memory this process has now, where Linux tells it, or had at most."""
    try:
        status = Path("/proc/self/statm").read_text(encoding="ascii")
    except OSError:
        return peak_memory_gb(torch.device("cpu")) * 1e9
    return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_two_steps(
    script: ModuleType, flags: dict[str, Any], planned: Any, changes: dict, tracker: MemoryTracker
) -> Costs:
    """Run what needs much memory, with some flags changed: prompts, latents, and two steps. Return what it costs.

    Args:
        flags: As given, by name, with the mixed precision that holds.
        planned: The script's `Plan` for these flags.

    Raises:
        UserError: The script would refuse these changes.
    """
    if changes and (problems := script.find_problems(SimpleNamespace(**flags | changes))):
        raise UserError(problems[0])
    first = planned.examples[0].path  # which stands in for class images that are still to be drawn
    examples = [one._replace(path=first) if one.is_missing else one for one in planned.examples]
    given = SimpleNamespace(**flags | changes | {"seed": planned.seed, "resume_from_checkpoint": None})
    plan = script.make_plan(given, tracker, script.detect_model(given), examples)
    prompts = script.tokenize_prompts(given, plan, tracker.device)
    if plan.base.precomputes_text:
        encode_prompts(script, given, plan, prompts, tracker)
    dataset = script.DreamBoothDataset(given, plan, prompts)
    visits, latents = next(iter(script.StepSampler(plan, dataset.order, range(1), 0))), None
    if script.count_crops(given, plan, dataset):
        vae = script.load_vae(given, plan, tracker.device)
        with tracker.watching("caching latents", [vae]):
            pixels = torch.empty(1, 3, *reversed(visits[0].size), device=tracker.device)
            moments = script.encode_images(vae, pixels)[0]
        crops = [(dataset.examples[visit.example].path, dataset.crop(visit)) for visit in visits]
        dataset.latents = latents = dict.fromkeys(crops, torch.zeros(moments.shape))
        del vae
    models = script.load_models(given, plan, prompts, tracker.device, latents)
    script.prepare_training(given, plan, models, tracker.device)
    models.vae = models.vae if latents is None else None  # one for previews waits on the CPU
    train(script, given, plan, models, script.collate([dataset[visit] for visit in visits]), tracker)
    return tracker.costs()


def encode_prompts(
    script: ModuleType, given: SimpleNamespace, plan: Any, prompts: Any, tracker: MemoryTracker
) -> None:
    """Encode one prompt, and let it stand for all."""
    precision = given.text_encoder_precision or tracker.mixed_precision
    # bitsandbytes' layers need content: a byte for each weight is what they come to.
    is_int8 = precision == "int8"
    text_encoder = script.load_text_encoder(given, plan, "bf16" if is_int8 else precision, tracker.device)
    with tracker.watching("encoding the prompts", [] if is_int8 else [text_encoder]), torch.no_grad():
        held = torch.empty(count(text_encoder) * is_int8, dtype=torch.uint8, device=tracker.device)
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
    tracker: MemoryTracker,
) -> None:
    """Take two steps: the optimizer has its state from the first one on, and the second one needs the most."""
    networks, norms = [models.unet, models.vae, models.text_encoder, *models.copies.values()], []
    with tracker.watching("training", networks):
        optimizer = models.optimizer = script.make_optimizer(given, plan, models)
        tracker.wrap(models.trained.values())
        if given.fused_backward:
            on_each_gradient(optimizer, functools.partial(script.update_weight, optimizer, norms))
            on_each_gradient(optimizer, tracker.count_as_weight)
        for micro_steps in (1, min(2, given.gradient_accumulation_steps)):
            for _ in itertools.repeat(None, micro_steps):
                script.compute_loss(given, tracker, plan, models, batch)["loss"].backward()
            script.update_weights(given, tracker, models, 0, norms)
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    tracker.count_as_weight(group, weight)
