"""Memory on a GPU that is not there: of a training command, and of shapes without weights."""

import re

import pytest
from accelerate.state import AcceleratorState

from tests.runs import PROMPT, SCRIPTS
from utils import estimate_memory, make_model


@pytest.fixture(autouse=True)
def connection():
    """Let each estimate begin as a process of its own would, in a precision of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def peak(text: str) -> tuple[float, str]:
    """Return the gigabytes and the device that were printed."""
    found = re.search(r"peak memory .* about ([\d.]+) GB on (\w+), while", text)
    return float(found[1]), found[2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_training_command_on_a_gpu(tiny, photos, tmp_path, capfd, script):
    """Its flags are the command's; nothing is said of seconds that nobody can measure here, and nothing is written."""
    flags = ["--pretrained_model_name_or_path", tiny, "--instance_data_dir", photos, "--instance_prompt", PROMPT]
    flags += ["--output_dir", tmp_path / "out", "--resolution", "64"]
    assert estimate_memory.main([SCRIPTS[script], *map(str, flags)]) == 0
    printed = capfd.readouterr().out
    gigabytes, device = peak(printed)
    assert 0 < gigabytes < 0.2 and device == "cuda" and "s a step" not in printed and "Python" not in printed
    assert not list(tmp_path.iterdir())


def test_a_shape_needs_neither_weights_nor_photos(capfd):
    """SD 1.5's 860 million weights take 1.7 GB in bf16 under adapters; 4 bits for most of them save over a GB."""
    found = {}
    for more in ("", "--base_model_precision nf4"):
        words = f"--shape sd15 train_dreambooth_lora.py --mixed_precision bf16 --gradient_checkpointing {more}"
        assert estimate_memory.main([*words.split(), "--train_batch_size", "1", "--center_crop"]) == 0
        found[more] = peak(capfd.readouterr().out)[0]
        AcceleratorState._reset_state(reset_partial_state=True)
    assert 1.7 < found[""] < 2.5 and found["--base_model_precision nf4"] < found[""] - 1


def test_what_the_script_would_refuse_is_not_advised(capfd):
    """A fused backward pass excludes accumulation, so smaller batches that are accumulated are no advice."""
    words = "--shape small train_dreambooth.py --train_batch_size 4 --center_crop --max_grad_norm 0"
    found = {}
    for more in ("", "--fused_backward"):
        assert estimate_memory.main([*words.split(), *more.split()]) == 0
        found[more] = "--gradient_accumulation_steps 4" in capfd.readouterr().out
        AcceleratorState._reset_state(reset_partial_state=True)
    assert found == {"": True, "--fused_backward": False}


def test_a_flag_that_is_wrong_is_the_scripts_to_refuse(capfd):
    """With its own message."""
    with pytest.raises(SystemExit):
        estimate_memory.main(["--shape", "tiny", "train_dreambooth.py", "--train_batch_size", "0"])
    assert "--train_batch_size 0" in capfd.readouterr().err


@pytest.mark.parametrize("shape", ["tiny", "tiny-if1", "tiny-if2"])
def test_configs_are_those_of_the_whole_model(tmp_path, capfd, shape):
    """All files are there and alike, but for the weights."""
    make_model.main([str(tmp_path / "configs"), "--shape", shape, "--configs_only"])
    assert "no weights" in capfd.readouterr().out
    make_model.main([str(tmp_path / "whole"), "--shape", shape])
    whole, configs = (
        {f.relative_to(d): f for f in d.rglob("*") if f.is_file()} for d in (tmp_path / "whole", tmp_path / "configs")
    )
    assert {path for path in whole if path.suffix != ".safetensors"} == set(configs)
    dtype = re.compile(r'\n *"(torch_)?dtype": "\w+",?')
    for path in configs:
        one, other = (folder[path].read_bytes().decode("latin-1") for folder in (whole, configs))
        assert dtype.sub("", one) == dtype.sub("", other), path
