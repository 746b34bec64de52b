"""Running out of memory for real, by a limit to the process: what is said, what is lost, and that nothing leaks."""

import copy
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests.runs import PRIOR_FLAGS, ROOT, SCRIPTS, Job, differing, names, read_tensors, untimed, wait_until
from utils.core.errors import UserError
from utils.devices import device_memory, network_speed
from utils.memory import out_of_memory


def limit_memory(job: Job, room: int) -> None:
    """Let a run have only so many bytes more than it has when it begins."""
    wait_until((job.out / "args.json").exists, "the start")
    process = psutil.Process(job.pid)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + room, psutil.RLIM_INFINITY))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_that_needs_too_much_says_what_would_need_less(trainer, tmp_path, script):
    """The message has the peak and flags by their gain, and no traceback; there is neither checkpoint nor result."""
    out = tmp_path / "out"
    job = trainer.start(script, out, "--resolution 1024 --train_batch_size 4 --train_text_encoder")
    limit_memory(job, 300_000_000)
    run = job.finish()
    assert run.code == 1 and "Traceback" not in run.text
    head, order, *lines = run.stderr[run.stderr.index("error: ") :].partition("\nOriginal error: ")[0].splitlines()
    assert re.fullmatch(r"error: Memory ran out on cpu: at most 0\.\d GB were in use\.", head)
    assert order == "To use less memory, try (largest saving first):"
    changes, gains = zip(*(re.fullmatch(r"  (.*) \(about (0\.\d) GB\)", line).groups() for line in lines), strict=True)
    assert set(changes) == {
        "--train_batch_size 1 --gradient_accumulation_steps 4",
        "--gradient_checkpointing",
        "--mixed_precision bf16",
        "a --resolution of half the edge",
    }
    assert list(gains) == sorted(gains, reverse=True)
    assert set(names(out)) <= {"args.json", "metrics.jsonl"}


def test_previews_that_need_too_much_are_a_warning(trainer, tmp_path):
    """Each round says so, and the run ends in the bits of one that draws nothing."""
    flags = "--max_train_steps 2 --checkpointing_steps 2"
    plain = trainer.start("lora", tmp_path / "plain", flags)
    flags += " --validation_prompt dog --validation_resolution 1280 --validation_guidance_scale 1"
    flags += " --validation_num_inference_steps 1 --validation_steps 2 --num_validation_images 1"
    job = trainer.start("lora", tmp_path / "out", flags)
    limit_memory(job, 300_000_000)
    runs = [plain.finish(), job.finish()]
    assert [run.code for run in runs] == [0, 0], runs[1].text
    for step in (0, 2):
        assert runs[1].stderr.count(f"Validation at step {step} ran out of memory; the run goes on.") == 1
    assert differing(read_tensors(plain.out), read_tensors(job.out)) == []
    state = [(out / "checkpoint-2" / "optimizer.pt").read_bytes() for out in (plain.out, job.out)]
    assert state[0] == state[1] and untimed(plain.out) == untimed(job.out)


def test_two_thousand_steps_leak_nothing(trainer, class_images, tmp_path):
    """From step 100 on, the process hardly grows, though it saves and draws in between."""
    flags = f"{PRIOR_FLAGS} --class_data_dir {class_images} --resolution 32 --train_batch_size 1"
    flags += " --checkpointing_steps 250 --checkpoints_total_limit 1 --validation_prompt dog --validation_steps 250"
    flags += " --num_validation_images 1 --validation_num_inference_steps 2"
    job = trainer.start("full", tmp_path / "out", f"{flags} --max_train_steps 2000")
    wait_until(lambda: job.steps_logged() >= 100, "step 100")
    process, used = psutil.Process(job.pid), []
    while (steps := job.steps_logged()) < 1990:
        used.append((steps, process.memory_info().rss))
        time.sleep(0.5)
    assert job.finish().code == 0
    assert max(size for _, size in used) < 1.02 * used[0][1], used


# What would save how much.


FLAGS = {
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "mixed_precision": "no",
    **{"use_8bit_adam": False, "optimizer": "adamw", "fused_backward": False, "base_model_precision": "nf4"},
    **{"train_text_encoder": False, "pre_compute_text_embeddings": False},
    **{"weight_dtype": "fp32", "cache_latents": "auto"},
    "text_encoder_precision": None,
    "sample_batch_size": 4,
    "prior_generation_precision": None,
}
RESIDUAL = 2.4  # 10^9 bytes of a peak that are neither weights nor gradients


def encoder() -> CLIPTextModel:
    """Make a text encoder whose weights take 30 kB."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPTextModel(CLIPTextConfig(vocab_size=850, **sizes)).requires_grad_(False)


def savings(networks: list[nn.Module], residual: float, **changes) -> dict[str, float]:
    """Return what is found for networks and a peak of so many bytes above theirs, in bytes."""
    weights = [weight for network in networks for weight in network.parameters()]
    held = sum(weight.nbytes + (weight.grad is not None) * weight.nbytes for weight in weights) / 1e9
    found = out_of_memory.find_savings(FLAGS | changes, networks, held + residual)
    assert [gain for _, gain in found] == sorted((gain for _, gain in found), reverse=True)
    return {change: round(gain * 1e9) for change, gain in found}


def test_activations_shrink_with_the_batch_and_the_picture():
    """Weights are too few to matter, so only flags that change the activations are named."""
    unet = nn.Linear(10, 10).requires_grad_(False)
    assert savings([unet], RESIDUAL) == {
        "--train_batch_size 1 --gradient_accumulation_steps 8": 1_800_000_000,
        "a --resolution of half the edge": 1_800_000_000,
        "--gradient_checkpointing": 1_680_000_000,
        "--mixed_precision bf16": 840_000_220,
    }
    spared = {"gradient_checkpointing": True, "mixed_precision": "bf16", "train_batch_size": 1}
    assert list(savings([unet], RESIDUAL, **spared)) == ["a --resolution of half the edge"]
    fused = spared | {"train_batch_size": 4, "fused_backward": True}  # which excludes accumulation
    assert list(savings([unet], RESIDUAL, **fused)) == ["a --resolution of half the edge"]


def test_weights_that_train_cost_their_gradients_and_moments():
    """A million weights: 8 bytes of moments each, 2 in 8 bits or Adafactor's, and 4 of gradient that adapters save."""
    unet = nn.Linear(1000, 1000, bias=False)
    once = {"gradient_accumulation_steps": 1}
    fused = {"--fused_backward --max_grad_norm 0": 4_000_000}
    whole = {"train_dreambooth_lora.py": 12_000_000, "--optimizer adamw8bit": 6_000_000} | fused
    assert savings([unet], 0.0, **once) == whole
    assert savings([unet], 0.0, **once, use_8bit_adam=True) == {"train_dreambooth_lora.py": 6_000_000} | fused
    adafactor = savings([unet], 0.0, **once, optimizer="adafactor", fused_backward=True)
    assert adafactor == {"train_dreambooth_lora.py": 6_000_000}
    unet.weight.grad = torch.zeros_like(unet.weight)
    assert savings([unet], 0.0, **once) == whole


def test_a_base_under_adapters_can_be_stored_in_fewer_bits():
    """Seven tenths of its frozen weights in bf16, unless they are stored so."""
    unet = nn.Sequential(nn.Linear(1000, 1000, bias=False).requires_grad_(False), nn.Linear(1, 1)).bfloat16()
    found = savings([unet], 0.0, base_model_precision="no_change")
    assert found["--base_model_precision nf4"] == 1_400_000
    assert "--base_model_precision nf4" not in savings([unet], 0.0)


def test_a_text_encoder_can_be_freed_or_left_untrained():
    """A frozen one takes its own bytes, and one that trains its gradients and moments."""
    unet, text_encoder = nn.Linear(10, 10).requires_grad_(False), encoder()
    count = sum(weight.numel() for weight in text_encoder.parameters())
    found = savings([unet, text_encoder], 0.0)
    assert found["--pre_compute_text_embeddings"] == 4 * count
    text_encoder.requires_grad_(True)
    found = savings([unet, text_encoder], 0.0, train_text_encoder=True)
    assert found["--no-train_text_encoder"] == 12 * count and "--pre_compute_text_embeddings" not in found


def test_before_the_networks_are_loaded_other_flags_help():
    """Each of them is named once, and not if it is set."""
    changes = [change.split()[0] for change, _ in out_of_memory.find_early_savings(FLAGS)]
    assert changes == [
        "--text_encoder_precision", "--sample_batch_size", "--prior_generation_precision", "--mixed_precision"
    ]  # fmt: skip
    spared = {"text_encoder_precision": "int8", "sample_batch_size": 1, "prior_generation_precision": "bf16"}
    assert out_of_memory.find_early_savings(FLAGS | spared | {"mixed_precision": "bf16"}) == []


class Setting:
    """Stand where accelerate stands."""

    device = torch.device("cpu")
    mixed_precision = "no"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_what_is_no_lack_of_memory_is_let_through(error):
    """Only that is turned into a message; the networks are not kept alive by the set."""
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory.explain_out_of_memory(Setting, FLAGS):
        raise RuntimeError("shapes cannot be multiplied")
    words = r"Memory ran out on cpu: at most .* GB were in use.\nTo use less memory, try"
    with (
        pytest.raises(UserError, match=words),
        out_of_memory.explain_out_of_memory(Setting, FLAGS) as networks,
    ):
        networks.add(nn.Linear(1, 1))
        assert len(networks) == 0
        raise error


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "could not create a primitive",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_every_devices_words_for_it_are_known(text):
    """They are no exceptions of a class of their own on all devices."""
    assert device_memory.is_out_of_memory(RuntimeError(text))
    assert not device_memory.is_out_of_memory(
        RuntimeError("could not create a primitive descriptor for a convolution")
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone has /proc")
def test_what_the_starting_process_had_does_not_count():
    """A process started by one with 0.6 GB has its own peak; the system's call for it tells the other's."""
    held = torch.ones(150_000_000)
    code = "from utils.devices import device_memory; print(device_memory.most_resident_bytes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1e8 < int(done.stdout) < held.nbytes
    before = device_memory.most_resident_bytes()
    del held
    assert before > 6e8 and device_memory.most_resident_bytes() == pytest.approx(before, rel=0.01)


def test_norms_stay_in_bf16_and_compute_what_they_did():
    """If their weights are: a float32 input is cast as autocast casts that of a convolution."""
    for norm in (nn.GroupNorm(2, 8), nn.LayerNorm(8)):
        nn.init.normal_(norm.weight)
        network, hidden = nn.Sequential(copy.deepcopy(norm)), 3 + torch.randn(4, 8)
        network_speed.keep_norms_in_bf16(network)
        assert torch.equal(network(hidden), norm(hidden))
        network.bfloat16()
        network_speed.keep_norms_in_bf16(network)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = network(hidden), norm.bfloat16()(hidden.bfloat16())
        assert found.dtype is torch.bfloat16 and torch.equal(found, expected)
        assert copy.deepcopy(network)[0].forward.args[0].__self__ is not network[0]


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_each_kind_of_device_tells_its_own_memory(monkeypatch, kind):
    """Not the process's; what is not used any more is given back there, too."""
    asked, emptied = [], []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: asked.append(device) or 5 * 10**12)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: emptied.append(kind))
    assert device_memory.peak_memory_gb(torch.device(kind, 0)) == 5000 and asked == [torch.device(kind, 0)]
    assert 0 < device_memory.peak_memory_gb(torch.device("cpu")) < 1000 and len(asked) == 1
    device_memory.free_memory()
    assert emptied == [kind]
