"""Checks of the learning rate's flags. The curves themselves are in the scripts (`learning_rate`)."""

import logging
import math
from typing import Any

from utils.core.errors import UserError
from utils.flags.flag_checks import messages_if

logger = logging.getLogger(__name__)


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
