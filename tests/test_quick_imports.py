"""What the scripts import before they read a flag, in interpreters of their own."""

import subprocess
import sys

import pytest

from tests.runs import ROOT, SCRIPTS

BEGINNING = "import gc, sys, {script}\n"


def run(script: str, code: str) -> str:
    """Import a script in a new interpreter, run some code there, and return what it prints."""
    code = BEGINNING.format(script=SCRIPTS[script].removesuffix(".py")) + code
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_seldom_needed_is_not_imported(script):
    """Neither bitsandbytes nor torch's compiler, whose imports take seconds; garbage is collected as ever."""
    slow = "'bitsandbytes', 'torch._inductor.compile_fx', 'torch.utils.tensorboard', 'datasets', 'wandb', 'cv2'"
    code = f"print([name for name in ({slow}) if name in sys.modules], gc.isenabled(), gc.get_freeze_count() > 1e5)"
    assert run(script, code) == "[] True True"


def test_diffusers_has_bitsandbytes_once_it_needs_it():
    """The placeholder that diffusers has been given answers for the module, and the module can be imported."""
    pytest.importorskip("bitsandbytes")
    code = (
        "from diffusers.quantizers.bitsandbytes import utils\n"
        "print(hasattr(utils.bnb, '__path__'), 'bitsandbytes' in sys.modules)\n"
        "print(utils.bnb.nn.Linear4bit.__name__)\n"
        "import bitsandbytes\n"
        "print(utils.bnb.nn is bitsandbytes.nn, hasattr(utils.bnb, 'nonsense'))"
    )
    assert run("full", code).split() == ["False", "False", "Linear4bit", "True", "False"]


def test_adapters_do_not_look_for_layers_of_bitsandbytes():
    """Where nothing has imported it, there are none; peft itself is left as it was."""
    code = (
        "import torch\n"
        "from utils.models import adapters\n"
        "from utils.synthetic.model_sizes import SHAPES\n"
        "from utils.synthetic.random_models import build_unet\n"
        "unet = build_unet({'cross_attention_dim': 32, **SHAPES['tiny']['unet']})\n"
        "adapters.add(unet, ['to_k'], '--lora_layers', r=2)\n"
        "count = sum(weight.requires_grad for weight in unet.parameters())\n"
        "print(count > 0, 'bitsandbytes' in sys.modules, adapters.peft.tuners.lora.model.is_bnb_available.__name__)\n"
    )
    assert run("lora", code) == "True False is_bnb_available"
