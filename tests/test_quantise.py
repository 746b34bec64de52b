"""Frozen weights in fewer bits: how near they are, what autograd keeps, what stays as it was, and training on them.

Bounds are about 1.5 times what was measured on weights of a normal distribution, unless a test says otherwise.
"""

import copy
import functools
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import nn

from utils.models import adapters, quantize
from utils.synthetic import random_models
from utils.synthetic.model_sizes import SHAPES

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own layer pads even kernels apart

CPU, META = torch.device("cpu"), torch.device("meta")
REDUCED = ("bf16", "int8", "nf4")
ERRORS = {"bf16": 0.0025, "int8": 0.009, "nf4": 0.14}  # of a layer's outputs; 0.0016, 0.006 and 0.092 were measured
SHARES = {"bf16": 0.5, "int8": 0.28, "nf4": 0.16}  # of float32's bytes
LAYERS = {  # and the shape of its inputs
    "linear": (functools.partial(nn.Linear, 96, 80), (2, 5, 96)),
    "linear-vectors": (functools.partial(nn.Linear, 96, 80, bias=False), (3, 96)),
    "convolution": (functools.partial(nn.Conv2d, 32, 48, 3, padding=1), (2, 32, 7, 6)),
    "strided": (functools.partial(nn.Conv2d, 32, 48, 3, stride=2, padding=(1, 2), bias=False), (2, 32, 9, 8)),
    "pointwise": (functools.partial(nn.Conv2d, 64, 80, 1), (2, 64, 4, 4)),
    "grouped": (functools.partial(nn.Conv2d, 64, 48, 3, groups=4, dilation=2, padding=2), (2, 64, 8, 8)),
    "same": (functools.partial(nn.Conv2d, 32, 48, (4, 3), padding="same"), (2, 32, 7, 7)),
    "reflecting": (functools.partial(nn.Conv2d, 32, 48, 3, padding=2, padding_mode="reflect"), (1, 32, 8, 8)),
    "odd": (functools.partial(nn.Conv2d, 33, 35, 3), (1, 33, 5, 5)),  # does not fill its last block
}
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "ff.net.2", "add_k_proj"]
every_layer = pytest.mark.parametrize("name", LAYERS)
every_precision = pytest.mark.parametrize("precision", REDUCED)


def make_layer(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a frozen layer of `LAYERS` with weights of a normal distribution, and inputs for it."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().requires_grad_(False)
    nn.init.normal_(layer.weight, std=0.05)
    return layer, torch.randn(shape)


def quantized(layer: nn.Module, precision: str, device: torch.device = CPU) -> nn.Module:
    """Return a layer's quantized copy."""
    network = nn.Sequential(copy.deepcopy(layer))
    quantize.quantize_layers(network, precision, device)
    assert type(network[0]) in quantize.KINDS.values()
    return network[0]


def dequantized(layer: nn.Module, reduced: nn.Module) -> nn.Module:
    """Return a copy of a layer with the weights that its quantized one computes with."""
    reference = copy.deepcopy(layer)
    reference.weight.data = reduced.dequantize()
    return reference


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return by how much a tensor differs from another, relative to that."""
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def gradient_of(layer: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's outputs and the gradient for its inputs of a loss that is not linear."""
    inputs = inputs.clone().requires_grad_()
    outputs = layer(inputs)
    outputs.float().pow(2).sum().backward()
    return outputs.detach(), inputs.grad


def build_unet(shape: str) -> UNet2DConditionModel:
    """Build the frozen U-Net of a shape, on the default device."""
    recipe = SHAPES[shape]
    build = {"sd": random_models.build_unet, "if1": random_models.build_if1_unet, "if2": random_models.build_if2_unet}
    text = recipe["text"]
    width = {"cross_attention_dim": text["hidden_size"]} if "hidden_size" in text else {}
    width = width or {"encoder_hid_dim": text["d_model"]}
    torch.manual_seed(0)
    return build[recipe["family"]]({**recipe["unet"], **width}).requires_grad_(False)


def build_adapted(shape: str, precision: str, seen: float = 0.0) -> UNet2DConditionModel:
    """Build a U-Net with adapters, and quantize it.

    Args:
        seen: Deviation of the adapters' second weights; at 0 they change nothing.
    """
    unet = build_unet(shape)
    layers = [end for end in ADAPTED if any(name.endswith(f".{end}") for name, _ in unet.named_modules())]
    adapters.add(unet, layers, "--lora_layers", r=4, lora_alpha=4)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=seen)
    quantize.quantize_layers(unet.train(), precision, CPU)
    return unet


def feed(unet: UNet2DConditionModel) -> dict:
    """Return inputs for a U-Net: two examples, and what its kind asks for."""
    config, generator, levels = unet.config, torch.Generator().manual_seed(1), torch.tensor([30, 700])
    size, text = (config.sample_size,) * 2, config.encoder_hid_dim or config.cross_attention_dim
    return {
        "sample": torch.randn(2, config.in_channels, *size, generator=generator),
        "timestep": levels,
        "encoder_hidden_states": torch.randn(2, 5, text, generator=generator),
        "class_labels": levels if config.class_embed_type else None,
    }


def trained_step(unet: UNet2DConditionModel, is_mixed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a U-Net's outputs and all gradients of a loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        outputs = unet(**feed(unet)).sample
    outputs.float().pow(2).mean().backward()
    gradients = {name: value.grad for name, value in unet.named_parameters() if value.grad is not None}
    return outputs.detach(), gradients


@pytest.fixture
def all_layers(monkeypatch):
    """Quantize a tiny network's layers as well, all but the smallest."""
    monkeypatch.setattr(quantize, "FEWEST_WEIGHTS", 256)


# One layer.


@every_layer
@every_precision
def test_outputs_are_near(precision, name):
    """What a quantized layer computes differs from the original by what its precision costs."""
    layer, inputs = make_layer(name)
    reduced = quantized(layer, precision)
    assert difference(reduced.dequantize(), layer.weight) < ERRORS[precision]
    bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (inputs.ndim - 2) if inputs.ndim == 4 else [])
    assert difference(reduced(inputs) - bias, layer(inputs) - bias) < ERRORS[precision]


@every_layer
@every_precision
def test_gradients_are_those_of_the_dequantised_weight(precision, name):
    """Forward and backward pass use one and the same weight, which gets no gradient; neither does the bias."""
    layer, inputs = make_layer(name)
    reduced = quantized(layer, precision)
    expected = gradient_of(dequantized(layer, reduced), inputs)
    for found, wanted in zip(gradient_of(reduced, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reduced.parameters())


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_a_bias_may_train(name):
    """A trainable bias of a frozen weight stays the parameter that it was, and gets its gradient."""
    layer, inputs = make_layer(name)
    layer.bias.requires_grad_()
    network = nn.Sequential(layer)
    quantize.quantize_layers(network, "nf4", CPU)
    assert network[0].bias is layer.bias and type(network[0]) is not type(layer)
    network(inputs).pow(2).sum().backward()
    reference = copy.deepcopy(layer)
    reference.weight.data, reference.bias.grad = network[0].dequantize(), None
    reference(inputs).pow(2).sum().backward()
    torch.testing.assert_close(layer.bias.grad, reference.bias.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_mixed", [False, True], ids=["float32", "autocast"])
@every_layer
@every_precision
def test_autograd_keeps_what_is_stored_and_nothing_else(precision, name, is_mixed):
    """Between the passes, no unpacked weight is alive; nor are the inputs, but for what mirrors their edges."""
    layer, inputs = make_layer(name)
    reduced, kept = quantized(layer, precision), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
    ):
        reduced(inputs.requires_grad_())
    wanted = [parameter for parameter in reduced.parameters() if parameter is not reduced.bias]
    wanted += [inputs] if name == "reflecting" else []
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in wanted}
    floating = [tensor.dtype for tensor in kept if tensor.is_floating_point() and tensor.shape != inputs.shape]
    assert floating == ([torch.bfloat16] if precision == "bf16" else [])


@every_layer
@every_precision
def test_autocast_decides_the_dtype(precision, name, monkeypatch):
    """Under autocast a layer computes as with inputs in its dtype; the gradient comes back in the inputs' own."""
    layer, inputs = make_layer(name)
    reduced, unpack, dtypes = quantized(layer, precision), quantize._unpack, []
    with torch.autocast("cpu", torch.bfloat16), monkeypatch.context() as patch:
        patch.setattr(quantize, "_unpack", lambda *given: dtypes.append(given[-1]) or unpack(*given))
        outputs, gradient = gradient_of(reduced, inputs)
    assert dtypes == [torch.bfloat16] * 2  # in one go, without a copy of twice the size
    with torch.autocast("cpu", torch.bfloat16):
        expected = dequantized(layer, reduced)(inputs)
    assert outputs.dtype is torch.bfloat16 and gradient.dtype is torch.float32
    assert torch.equal(outputs, reduced(inputs.bfloat16()))
    assert difference(outputs, expected) < 0.005  # the unpacked weight is rounded once more
    assert reduced(inputs.half()).dtype is torch.float16
    with pytest.raises(TypeError, match=r"16 or 32 bits; its inputs are torch\.uint8"):
        reduced(inputs.to(reduced.weight.dtype) if precision != "bf16" else inputs.byte())


@pytest.mark.parametrize(("kind", "sizes"), [(nn.Linear, (640, 640)), (nn.Conv2d, (320, 320, 3))])
@every_precision
def test_bytes(precision, kind, sizes):
    """Layers of real size take the bytes that their precision promises, scales included."""
    layer = kind(*sizes, bias=False).requires_grad_(False)
    reduced = quantized(layer, precision)
    share = quantize.stored_bytes(reduced) / quantize.stored_bytes(layer)
    assert 0.8 * SHARES[precision] < share <= SHARES[precision]
    assert quantize.stored_bytes(layer) == 4 * sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zeros(precision, dtype):
    """Blocks without any number but 0 make no NaN, wherever they are, and their neighbours do not suffer."""
    layer = nn.Linear(64, 64, dtype=dtype).requires_grad_(False)
    layer.weight[::2] = 0
    weight = quantized(layer, precision).dequantize()
    assert not weight[::2].any() and difference(weight, layer.weight) < ERRORS[precision]
    layer.weight.zero_()
    assert not quantized(layer, precision).dequantize().any()


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_zeros_among_others_stay_zeros(precision):
    """Zero is one of the levels, whatever the largest weight of its block."""
    layer = nn.Linear(64, 64).requires_grad_(False)
    layer.weight[:, ::2] = 0
    weight = quantized(layer, precision).dequantize()
    assert not weight[:, ::2].any() and weight[:, 1::2].any()


@every_precision
def test_compiled_layers_compute_the_same(precision):
    """torch.compile traces layers whole, with and without gradients, under autocast and without it."""
    layers, inputs = zip(*map(make_layer, ("reflecting", "odd", "linear")), strict=True)
    for layer, given in zip([quantized(layer, precision) for layer in layers], inputs, strict=True):
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for found, wanted in zip(gradient_of(compiled, given), gradient_of(layer, given), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(given), layer(given))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_layer
@every_precision
def test_gpu(precision, name):
    """A GPU stores the same, but for ties, and computes with what it stores."""
    layer, inputs = make_layer(name)
    reduced = quantized(layer, precision, torch.device("cuda"))
    assert {parameter.device.type for parameter in reduced.parameters()} == {"cuda"}
    assert difference(reduced.dequantize().cpu(), quantized(layer, precision).dequantize()) < 0.002
    assert difference(copy.deepcopy(reduced).cpu().dequantize(), reduced.dequantize().cpu()) < 1e-6
    reference = dequantized(layer.cuda(), reduced)
    for found, wanted in zip(gradient_of(reduced, inputs.cuda()), gradient_of(reference, inputs.cuda()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)  # TF32 may be on


# A network.


class Mixed(nn.Module):
    """One layer of each kind that stays as it is, and one that does not, under two names."""

    def __init__(self):
        """Build the layers."""
        super().__init__()
        self.shared = self.again = nn.Linear(64, 64)
        self.small = nn.Linear(63, 64)
        self.first = nn.Conv2d(4, 256, 3)
        self.last = nn.Conv2d(256, 4, 3)
        self.embedding = nn.Embedding(100, 64)
        self.norm = nn.LayerNorm(8192)
        self.attention = nn.MultiheadAttention(64, 2)  # hands the weight of a linear layer to a function
        self.transposed = nn.ConvTranspose2d(64, 64, 3)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(2048, 4, bias=False), "other": nn.Linear(2048, 32)})
        self.requires_grad_(False)
        self.trained = nn.Linear(64, 64)
        self.nested = nn.ModuleList([nn.Sequential(nn.Conv2d(64, 64, 1)).requires_grad_(False)])


@every_precision
def test_only_large_frozen_layers_are_replaced(precision):
    """All other modules and parameters are the same objects as before; a layer with two names still has both."""
    network = Mixed().eval()
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    quantize.quantize_layers(network, precision, CPU)
    replaced = {name for name, module in network.named_modules() if modules[name] is not module}
    assert replaced == {"shared", "nested.0.0"} and network.shared is network.again
    assert not any(module.training for module in network.modules())
    kept = {name for name, parameter in network.named_parameters() if parameters.get(name) is parameter}
    assert kept == parameters.keys() - {f"{name}.weight" for name in replaced}
    assert network.shared.in_features == network.shared.out_features == 64
    convolution = network.nested[0][0]
    assert (convolution.in_channels, convolution.kernel_size, convolution.stride) == (64, (1, 1), (1, 1))
    assert f"{precision}, weight=(64, 64)" in repr(network) and not list(network.buffers())
    state = {name: value.clone() for name, value in network.state_dict().items()}
    quantize.quantize_layers(network, "nf4", CPU)  # again: nothing is left to do
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_no_change_moves_only():
    """All weights stay what and where they are, on another device."""
    network = Mixed()
    quantize.quantize_layers(network, "no_change", META)
    assert {parameter.device for parameter in network.parameters()} == {META} and type(network.shared) is nn.Linear


@every_precision
def test_layers_are_let_go_one_by_one(precision, monkeypatch):
    """While a layer is packed, those before it no longer exist: the device holds one unpacked weight at a time."""
    network = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)]).requires_grad_(False)
    weights, counts = [weakref.ref(layer.weight) for layer in network], []
    monkeypatch.setattr(quantize, "_pack", functools.partial(pack_and_count, quantize._pack, weights, counts))
    quantize.quantize_layers(network, precision, CPU)
    assert counts == [5, 4, 3, 2, 1] and not any(weight() is not None for weight in weights)


def pack_and_count(pack, weights: list, counts: list[int], *given):
    """Pack a weight, and note how many of some are alive before."""
    counts.append(sum(weight() is not None for weight in weights))
    return pack(*given)


@pytest.mark.parametrize("shape", ["tiny", "tiny-if1"])
@every_precision
def test_meta_gives_the_sizes(precision, shape, all_layers):
    """A network without weights becomes one with the same tensors, by name, shape and dtype."""
    with_weights = build_unet(shape)
    without = copy.deepcopy(with_weights).to(META)
    quantize.quantize_layers(with_weights, precision, CPU)
    quantize.quantize_layers(without, precision, META)
    found, wanted = (
        {name: (value.shape, value.dtype, value.requires_grad) for name, value in network.named_parameters()}
        for network in (without, with_weights)
    )
    assert found == wanted and {parameter.device for parameter in without.parameters()} == {META}
    assert quantize.stored_bytes(without) == quantize.stored_bytes(with_weights)


@pytest.mark.parametrize(
    ("shape", "gigabytes"),
    [("sd15", (1.719, 0.914, 0.444)), ("if1-xl", (8.609, 4.575, 2.223))],
)
def test_real_networks_are_covered(shape, gigabytes):
    """Of published sizes, 0.1 % of the weights stay in 16 bits: norms, biases, the first and the last layer."""
    with META:
        unet = build_unet(shape).bfloat16()
    for precision, expected in zip(REDUCED, gigabytes, strict=True):
        network = copy.deepcopy(unet)
        quantize.quantize_layers(network, precision, META)
        assert quantize.stored_bytes(network) / 1e9 == pytest.approx(expected, abs=6e-4)
    left = [name for name, module in network.named_modules() if type(module) in quantize.KINDS]
    assert left == ["conv_in", "conv_out"]
    reduced = [module for module in network.modules() if type(module) in quantize.KINDS.values()]
    assert {type(module) for module in reduced} == set(quantize.KINDS.values())
    everything = sum(parameter.numel() for parameter in unet.parameters())
    assert sum(torch.Size(module.form.shape).numel() for module in reduced) / everything > 0.999


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_casts_and_copies_leave_what_is_stored(precision):
    """`to` casts what is left of a network, not what is packed; copies, pickles and states are whole."""
    layer, inputs = make_layer("convolution")
    network = nn.Sequential(layer, nn.GroupNorm(4, 48))
    quantize.quantize_layers(network, precision, CPU)
    cast = copy.deepcopy(network).to(torch.bfloat16)
    assert cast[1].weight.dtype is cast[0].bias.dtype is cast(inputs.bfloat16()).dtype is torch.bfloat16
    assert torch.equal(cast[0].dequantize(), network[0].dequantize())
    other = nn.Sequential(make_layer("convolution")[0], nn.GroupNorm(4, 48))
    nn.init.zeros_(other[0].weight)
    quantize.quantize_layers(other, precision, CPU)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(inputs), network(inputs))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_misuse_does_not_pass(precision):
    """Original weights do not load over packed ones, adapters are not merged into them, and they never train."""
    layer, _ = make_layer("convolution")
    reduced = quantized(layer, precision)
    with pytest.raises(RuntimeError, match="size mismatch"):
        reduced.load_state_dict(layer.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="floating point"):
        reduced.requires_grad_()
    unet = build_adapted("tiny", precision)
    adapted = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    packed = [module for module in adapted if type(module.base_layer) in quantize.KINDS.values()]
    assert packed
    for module in packed:
        with pytest.raises(RuntimeError, match="size of tensor"):
            module.merge()


def test_problems_are_named(monkeypatch):
    """An unknown precision and a missing package are errors, before anything is changed."""
    network = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    with pytest.raises(ValueError, match="'fp4' is none of the precisions no_change, bf16, int8, nf4"):
        quantize.quantize_layers(network, "fp4", CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="int8 need bitsandbytes: pip install bitsandbytes"):
        quantize.quantize_layers(network, "int8", CPU)
    assert type(network[0]) is nn.Linear
    quantize.quantize_layers(network, "bf16", CPU)
    assert type(network[0]) is quantize.QuantizedLinear


# Adapters on a quantized U-Net.


@pytest.mark.parametrize("is_mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("shape", ["tiny", "tiny-if1", "tiny-if2"])
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_adapters_alone_get_gradients(precision, shape, is_mixed, all_layers):
    """All of the adapters do, and the same ones with gradient checkpointing."""
    unet = build_adapted(shape, precision, seen=0.05)
    outputs, gradients = trained_step(unet, is_mixed)
    assert gradients.keys() == {name for name, value in unet.named_parameters() if "lora_" in name}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
    layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    assert {type(layer.base_layer) for layer in layers} == set(quantize.KINDS.values())
    assert unet.dtype is torch.float32
    unet.zero_grad()
    unet.enable_gradient_checkpointing()
    again, recomputed = trained_step(unet, is_mixed)
    assert torch.equal(again, outputs)
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())


@every_precision
def test_new_adapters_change_nothing(precision, all_layers):
    """At step 0, adapters on a quantized base are the quantized base, bit for bit."""
    unet, plain = build_adapted("tiny", precision), build_unet("tiny")
    quantize.quantize_layers(plain, precision, CPU)
    inputs = feed(unet)
    with torch.no_grad():
        expected = plain(**inputs).sample
        assert torch.equal(unet(**inputs).sample, expected)
        with adapters.switched_off([unet]):
            assert torch.equal(unet(**inputs).sample, expected)


@every_precision
def test_saved_adapters_come_back(precision, tmp_path, all_layers):
    """A file holds the adapters and nothing of the base, and gives another network on that base the same outputs."""
    unet, other = build_adapted("tiny", precision, seen=0.05), build_adapted("tiny", precision)
    adapters.save(tmp_path / "adapters.safetensors", {"unet": unet})
    adapters.load(tmp_path / "adapters.safetensors", {"unet": other})
    assert all(".lora_" in name for name in adapters.tensors(unet))
    inputs = feed(unet)
    with torch.no_grad():
        assert torch.equal(other(**inputs).sample, unet(**inputs).sample)


@pytest.mark.parametrize("shape", ["tiny", "tiny-if1"])
def test_previews_are_drawn(shape, all_layers):
    """The pipeline takes the network as any other."""
    pipeline = random_models.BUILDERS[SHAPES[shape]["family"]](SHAPES[shape])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_modules(unet=build_adapted(shape, "nf4", seen=0.05).eval())
    options = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 2.0}
    images = pipeline("a dog", generator=torch.Generator().manual_seed(0), **options).images
    assert images.shape[-1] == 3 and images.std() > 0


def test_training_follows_bf16(all_layers):
    """Sixty steps under autocast on each base fall as they do in bf16, at nearly the same losses.

    Of the mean loss, the largest difference of a step was 0.004 in int8 and 0.021 in nf4, and 0.001 and 0.007 on
    average. Autocast rounds weights to bfloat16 anyway, so there is none between bf16 and no change at all.
    """
    curves = {precision: train(precision, 60) for precision in REDUCED}
    assert torch.equal(train("no_change", 4), curves["bf16"][:4])
    for curve in curves.values():
        assert curve[-10:].mean() < 0.85 * curve[:10].mean()
    for precision, tolerance in (("int8", 0.01), ("nf4", 0.04)):
        gap = (curves[precision] - curves["bf16"]).abs().max() / curves["bf16"].mean()
        assert 0 < gap < tolerance


def train(precision: str, steps: int) -> torch.Tensor:
    """Return the losses of steps that teach a tiny U-Net one picture, (steps,)."""
    unet, losses = build_adapted("tiny", precision), []
    optimizer = torch.optim.AdamW([value for value in unet.parameters() if value.requires_grad], lr=3e-3)
    generator, inputs = torch.Generator().manual_seed(2), feed(unet)
    clean = inputs["sample"][:1]
    for _ in range(steps):
        noise = torch.randn(inputs["sample"].shape, generator=generator)
        timestep = torch.randint(1000, (2,), generator=generator)
        kept = 1 - timestep.view(-1, 1, 1, 1) / 1000
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(**inputs | {"sample": noisy, "timestep": timestep}).sample
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("precision", quantize.BASE_PRECISIONS)
def test_each_weight_counts_once_however_it_is_stored(precision):
    """Codes that hold two weights, scales and levels are no weights."""
    layers = nn.Sequential(nn.Linear(96, 64), nn.Conv2d(32, 64, 3), nn.GroupNorm(4, 64)).requires_grad_(False)
    count = sum(weight.numel() for weight in layers.parameters())
    quantize.quantize_layers(layers, precision, torch.device("cpu"))
    assert quantize.count_frozen(layers) == count
