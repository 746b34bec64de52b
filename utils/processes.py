"""Work that one of several processes does for all."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from utils.errors import InputError


def on_main_process(accelerator: Accelerator, function: Callable, *arguments) -> Any:
    """Call a function in the main process and return its answer, or raise its InputError, in every process.

    So that a refusal ends all of them, and none waits for the others for ever.
    """
    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function(*arguments)
        except InputError as error:
            answer[1] = str(error)
    value, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise InputError(refusal)
    return value
