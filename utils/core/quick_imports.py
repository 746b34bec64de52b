"""Importing the libraries in little more than half the time; to be imported before any of them.

Two things take the time. Python looks for garbage again and again among what is being made, none of which is garbage.
And diffusers imports bitsandbytes, which imports torch's compiler, for models that are stored in 8 or 4 bits by it.
"""

import gc
import importlib
import importlib.util
import sys
import types
from typing import Any

LATE = "bitsandbytes"


class Placeholder(types.ModuleType):
    """Stands for a module until one of its names is asked for."""

    def __getattr__(self, name: str) -> Any:
        """Import the module and return what it has by that name."""
        if name.startswith("__"):  # which tools ask of every module that there is
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


def import_libraries() -> None:
    """Import the libraries of both scripts, with a placeholder in diffusers for what is imported late."""
    spec = None if LATE in sys.modules else importlib.util.find_spec(LATE)
    if spec:
        sys.modules[LATE] = Placeholder(LATE)
        sys.modules[LATE].__spec__ = spec
    gc.disable()
    try:
        for name in ("diffusers", "transformers", "accelerate"):
            importlib.import_module(name)
        for name in ("DDPMScheduler", "DiffusionPipeline", "UNet2DConditionModel"):
            getattr(sys.modules["diffusers"], name)
    finally:
        gc.enable()
        if spec:
            del sys.modules[LATE]
    gc.freeze()  # nor is any of it garbage later


import_libraries()
