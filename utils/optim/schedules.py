"""Learning rates as functions of the step alone, so that a resumed run needs no history of them."""

import logging
import math
from typing import Any

from utils.core.errors import UserError
from utils.flags.flag_checks import messages_if

logger = logging.getLogger(__name__)

SCHEDULES = "constant constant_with_warmup linear cosine cosine_with_restarts polynomial one_cycle".split()


def find_rate_problems(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each flag of the learning rates that contradicts another."""
    name, rate, end = (flags[key] for key in ("lr_scheduler", "learning_rate", "lr_end"))
    has_no_end = end is not None and name not in ("one_cycle", "polynomial")
    rises = 0 <= rate < (end or 0) < math.inf
    lacks_text = flags["text_encoder_lr"] is not None and not flags["train_text_encoder"]
    return messages_if(
        (lacks_text, "--text_encoder_lr needs --train_text_encoder."),
        (has_no_end, f"--lr_end needs --lr_scheduler one_cycle or polynomial, not {name}."),
        (rises, f"--lr_end {end} is above --learning_rate {rate}, the highest."),
    )


def check_warmup(name: str, warmup: int, steps: int) -> None:
    """Warn of a warm-up that is as long as the run.

    Raises:
        UserError: The one-cycle schedule would have no way down.
    """
    if name == "constant" or warmup < steps:
        return
    words = f"The warm-up of {warmup} steps is as long as the run of {steps}: see --lr_warmup_steps."
    if name == "one_cycle":
        raise UserError(f"{words} For one_cycle, a third of the run is usual: {math.ceil(steps / 3)}.")
    logger.warning(words)


def rate_of_step(
    name: str, step: int, steps: int, peak: float, warmup: int, cycles: int, power: float, end: float | None
) -> float:
    """Return the learning rate of a step as diffusers' schedules, and torch's OneCycleLR (cosine), have it.

    Args:
        name: One of `SCHEDULES`.
        step: Counted from 0.
        steps: Of the whole run.
        peak: The highest rate.
        warmup: Steps of warm-up; a constant rate has none.
        cycles: Restarts of cosine_with_restarts.
        power: Exponent of polynomial.
        end: Last rate of polynomial (None: 1e-7) and of one_cycle (None: a 250,000th of the highest, as in torch).
    """
    if name == "constant":
        return peak
    if name == "one_cycle":
        return _one_cycle(step, steps, peak, warmup, peak / 25e4 if end is None else end)
    if step < warmup:
        return peak * step / warmup
    if name == "constant_with_warmup":
        return peak
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if name == "linear":
        return peak * (1 - done)
    if name == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if name == "cosine_with_restarts":
        return 0.0 if done == 1 else peak * 0.5 * (1 + math.cos(math.pi * (cycles * done % 1)))
    end = min(1e-7 if end is None else end, peak)
    return end + (peak - end) * (1 - done) ** power


def _one_cycle(step: int, steps: int, peak: float, warmup: int, end: float) -> float:
    """Rise along half a cosine from a 25th of the peak, and fall along another to the end."""
    top = max(warmup - 1, 0)
    if step < top:
        start, done = peak / 25, step / top
        return peak + (start - peak) / 2 * (1 + math.cos(math.pi * done))
    done = min(1.0, (step - top) / max(1, steps - 1 - top))
    return end + (peak - end) / 2 * (1 + math.cos(math.pi * done))
