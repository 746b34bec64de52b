"""Compiled blocks: the losses of uncompiled ones, and what is said. Compiling is slow, so each case runs once."""

import copy

import peft
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from tests.runs import SCRIPTS, read_metrics, read_tensors
from utils.devices.network_speed import compile_blocks, list_blocks
from utils.models.quantize import quantize_layers
from utils.synthetic.model_sizes import SHAPES
from utils.synthetic.random_models import build_if1_unet, build_unet, make_model

CASES = {
    "full": "--gradient_checkpointing",
    "lora": "--center_crop",
}
# One level, so that blocks repeat in few shapes: each shape is compiled.
FLAT = SHAPES["tiny"] | {"unet": SHAPES["tiny"]["unet"] | {"widths": (24,)}}


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory):
    """Keep what is compiled for all tests of this module, and for none after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder := tmp_path_factory.mktemp("kernels")))
        yield folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Write the tiny model with a U-Net of one level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "flat", FLAT)
        return make_model(tmp_path_factory.mktemp("models") / "flat", "flat")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_compiled_run_is_the_plain_one(trainer, flat, kernels, tmp_path, monkeypatch, script):
    """Losses and weights are those of an uncompiled run but for rounding, and it says how long compiling took."""
    monkeypatch.setattr("tests.runs.TIMEOUT", 900)
    flags = f"--pretrained_model_name_or_path {flat} --max_train_steps 2 --train_batch_size 1 {CASES[script]}"
    plain = trainer.run(script, tmp_path / "plain", flags)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(kernels)}
    run = trainer.start(script, tmp_path / "compiled-run", f"{flags} --compile", how="python", **cache).finish()
    assert run.code == 0, run.text
    (first, second), compiled = read_metrics(plain.out), read_metrics(run.out)
    assert compiled[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert compiled[0]["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    # AdamW's first step is as long as the rate whatever the gradient: rounding turns it where that is near zero.
    assert compiled[1]["loss"] == pytest.approx(second["loss"], rel=1e-3)
    before, after = read_tensors(plain.out), read_tensors(run.out)
    assert before.keys() == after.keys()
    apart = torch.cat([(before[name] - after[name]).abs().flatten() > 2e-4 for name in before])
    assert apart.double().mean() < 1e-3
    assert "blocks are compiled as they are first used" in run.stderr and "Compiling took" in run.stderr


@pytest.mark.parametrize("shape", ["tiny", "tiny-if1"])
def test_every_layer_with_weights_is_in_a_block_or_known(shape):
    """Beside the blocks there are only what comes first and last, embeddings, and changes of size."""
    build, width = {"tiny": (build_unet, {}), "tiny-if1": (build_if1_unet, {"encoder_hid_dim": 48})}[shape]
    unet = build({"cross_attention_dim": 32, **width, **SHAPES[shape]["unet"]})
    blocks, names = list_blocks(unet), set(unet.state_dict())
    assert len(blocks) == compile_blocks(unet) > 5
    assert set(unet.state_dict()) == names
    inside = {weight for block in blocks for weight in block.parameters()}
    others = {name.split(".")[0] for name, weight in unet.named_parameters() if weight not in inside}
    known = {"conv_in", "conv_out", "conv_norm_out", "time_embedding", "down_blocks", "up_blocks", "mid_block"}
    assert others <= known | {"encoder_hid_proj", "add_embedding", "class_embedding"}


@pytest.mark.parametrize("stored", ["no_change", "nf4"])
def test_gradients_of_one_picture_are_those_of_uncompiled_blocks(stored):
    """A U-Net hands them over as transposed views, for which the compiler makes layer norms that are percents off."""
    torch.manual_seed(0)
    block = BasicTransformerBlock(64, 8, 8, cross_attention_dim=32).requires_grad_(False)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    plain = torch.nn.ModuleList([peft.inject_adapter_in_model(config, block)])
    quantize_layers(plain, stored, torch.device("cpu"))
    compiled = copy.deepcopy(plain)
    assert compile_blocks(compiled) == 1
    picture, text, wanted = torch.randn(1, 64, 8, 8), torch.randn(1, 7, 32), torch.randn(1, 64, 64)
    found = []
    for network in (plain, compiled):
        inputs = picture.clone().requires_grad_()
        rows = inputs.permute(0, 2, 3, 1).reshape(1, 64, 64)
        (network[0](rows, encoder_hidden_states=text) * wanted).sum().backward()
        weights = {name: weight.grad for name, weight in network.named_parameters() if weight.requires_grad}
        found.append(weights | {"picture": inputs.grad})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() < 1e-4 * gradient.norm(), name
