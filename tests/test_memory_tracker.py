"""What a run will cost: bytes by hand for small networks, and estimates against real runs."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.runs import SCRIPTS, read_metrics
from utils.memory import savings, speed_model
from utils.memory.memory_estimate import PROCESS
from utils.memory.memory_tracker import (
    COPIES,
    FROZEN,
    GRADIENTS,
    HOLES,
    META,
    REST,
    STATE,
    WEIGHTS,
    MemoryTracker,
)
from utils.synthetic.random_models import make_model

SIDE, ROWS = 1000, 500
BYTES = 4 * SIDE * SIDE  # of a layer's weights


def layers(count: int, **options) -> nn.Sequential:
    """Make layers without content."""
    return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False, device=META, **options) for _ in range(count)))


def step(tracker: MemoryTracker, network: nn.Module, optimizer=torch.optim.SGD, **options) -> dict[str, int]:
    """Go through two steps of a network and return the memory at the peak, without the C library's holes."""
    with tracker.watching("training", [network]):
        tracker.wrap([network])
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        trained = optimizer(weights, lr=1.0, **options)
        for _ in range(2):
            network(torch.empty(ROWS, SIDE, device=META)).sum().backward()
            trained.step()
            trained.zero_grad(set_to_none=True)
    return {what: size for what, size in tracker.costs().memory.items() if what != HOLES}


def test_weights_gradients_and_moments_are_counted_to_the_byte():
    """AdamW has two moments of each weight that trains; a frozen one has no gradient either."""
    network = layers(3)
    network[1].requires_grad_(False)
    found = step(MemoryTracker("cpu", "no"), network, torch.optim.AdamW)
    assert found[WEIGHTS] == 2 * BYTES and found[FROZEN] == BYTES
    assert found[GRADIENTS] == 2 * BYTES and found[STATE] == 4 * BYTES


def test_the_peak_of_a_chain_is_where_it_is_by_hand():
    """All gradients are there by then; the peak is in the first layer."""
    network = layers(4).requires_grad_(False)
    found = step(MemoryTracker("cpu", "no"), network.requires_grad_(True))
    # In the first layer's backward: the gradients of all weights, and of its output; its input and its weight's copy.
    row = 4 * ROWS * SIDE
    assert found[WEIGHTS] == 4 * BYTES and found[GRADIENTS] + found[REST] >= 4 * BYTES + row
    assert sum(found.values()) <= 8 * BYTES + 6 * row


def test_checkpointing_keeps_less():
    """What lies between checkpoints is computed again, in the same precision and by the same attention."""

    class Block(nn.Module):
        """Attend, and grow in between."""

        def __init__(self):
            """Make its layers."""
            super().__init__()
            self.inner, self.outer = (nn.Linear(64, 64, device=META) for _ in range(2))

        def forward(self, rows):
            """Return rows of the same shape."""
            heads = self.inner(rows).view(1, 4, -1, 16)
            heads = F.scaled_dot_product_attention(heads, heads, heads).reshape(rows.shape)
            return self.outer(F.silu(F.silu(F.silu(heads))))

    peaks = []
    for checkpoints in (False, True):
        tracker, blocks = MemoryTracker("cpu", "bf16"), nn.ModuleList(Block() for _ in range(8))
        with tracker.watching("training", [blocks]), tracker.autocast():
            rows = torch.empty(4096, 64, device=META)
            for block in blocks:
                options = {"use_reentrant": False}
                rows = torch.utils.checkpoint.checkpoint(block, rows, **options) if checkpoints else block(rows)
            assert rows.dtype is torch.bfloat16
            rows.sum().backward()
        peaks.append(tracker.costs().memory[REST])
    assert peaks[1] < 0.4 * peaks[0]


def test_attention_never_holds_all_pairs():
    """Of 4096 places, the matrix of pairs would take 64 MB."""
    tracker = MemoryTracker("cuda", "no")
    with tracker.watching("training"):
        query = torch.empty(1, 1, 4096, 8, device=META, requires_grad=True)
        F.scaled_dot_product_attention(query, query, query, attn_mask=None).sum().backward()
    assert tracker.costs().peak < 10 * 4 * 4096 * 8


def test_a_gpu_normalises_in_float32_and_a_cpu_does_not():
    """Autocast's lists differ between the two."""
    for kind, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        tracker = MemoryTracker(kind, "bf16")
        with tracker.watching("training"), tracker.autocast():
            rows = F.linear(torch.empty(8, 8, device=META), torch.empty(8, 8, device=META))
            assert rows.dtype is torch.bfloat16
            assert F.layer_norm(rows, (8,)).dtype is dtype
            assert F.layer_norm(rows, (8,), torch.empty(8, dtype=torch.bfloat16, device=META)).dtype is torch.bfloat16


def test_adamw_without_a_fused_kernel_takes_all_weights_together():
    """It then needs as much again as the weights, for a moment; where there is a kernel, it does not."""
    kinds = ("cpu", "cuda", "hpu")
    cpu, gpu, other = (sum(step(MemoryTracker(kind, "no"), layers(8), torch.optim.AdamW).values()) for kind in kinds)
    assert other - cpu > 5 * BYTES > gpu - cpu


def test_a_convolution_on_a_cpu_has_copies():
    """As large as what it is given or makes, whichever is more; a GPU's has none."""
    for kind, expected in (("cpu", 4 * 2 * 64 * 64), ("cuda", 0)):
        tracker = MemoryTracker(kind, "no")
        with tracker.watching("training"), torch.no_grad():
            F.conv2d(torch.empty(1, 1, 64, 64, device=META), torch.empty(2, 1, 3, 3, device=META), padding=1)
        assert tracker.costs().memory.get(COPIES, 0) == expected


def test_products_are_counted_and_timed():
    """One forward and two backward products of 2 × 500 × 1000 × 1000, less one gradient of the input."""
    rates = speed_model.Rates({("product", torch.float32): 1e9}, float("inf"), 0.0)
    tracker = MemoryTracker("cpu", "no", 1, rates)
    step(tracker, layers(1))
    costs = tracker.costs()
    assert costs.flops == 2 * 2 * ROWS * SIDE * SIDE
    assert costs.seconds[0] == pytest.approx(costs.flops / 1e9)


def test_rates_are_measured():
    """They are positive numbers."""
    rates = speed_model.measure_rates(torch.device("cpu"), [torch.float32])
    assert all(rate > 1e6 for rate in rates.flops.values()) and rates.traffic > 1e6 and 0 < rates.overhead < 1


def test_only_changes_that_change_something_are_tried():
    """Flags that are set are not advised."""
    flags = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    flags |= {"mixed_precision": "bf16", "use_8bit_adam": True, "train_text_encoder": True, "text_encoder_lr": None}
    flags |= {"pre_compute_text_embeddings": None, "cache_latents": "on", "optimizer": "adamw", "weight_dtype": "bf16"}
    flags |= {"base_model_precision": "nf4", "fused_backward": False}
    found = [words for words, _ in savings.list_changes(flags)]
    assert found == ["--train_batch_size 1 --gradient_accumulation_steps 8", "--no-train_text_encoder"]


@pytest.mark.parametrize("flags", ["", "--train_text_encoder --gradient_checkpointing --mixed_precision bf16"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_says_what_the_run_would_cost(trainer, tmp_path, script, flags):
    """Memory by what it is for, time, and what would save some; nothing is left switched off."""
    run = trainer.run(script, tmp_path / "dry", f"{flags} --dry_run")
    told = run.stdout.partition("What it would cost")[2]
    assert "GB on cpu, while " in told and PROCESS in told and " s a step, " in told and "less with" in told
    assert not (tmp_path / "dry").exists() and logging.root.manager.disable == 0


@pytest.fixture(scope="session")
def middling(tmp_path_factory):
    """Write a model whose tensors outweigh the libraries."""
    return make_model(tmp_path_factory.mktemp("models") / "small", "small")


@pytest.mark.parametrize(("script", "flags"), [("full", "--cache_latents on"), ("lora", "--cache_latents on")])
def test_the_peak_is_as_told(trainer, middling, tmp_path, script, flags):
    """Within a tenth of what a run of two steps takes, in processes of their own."""
    flags = f"--pretrained_model_name_or_path {middling} --resolution 256 --max_train_steps 3 {flags}"
    real = trainer.start(script, tmp_path / "real", flags, how="python")
    real.finish()
    dry = trainer.run(script, tmp_path / "dry", f"{flags} --dry_run", how="python")
    told = float(dry.stdout.partition("about ")[2].split()[0])
    taken = max(line["memory_gb"] for line in read_metrics(tmp_path / "real"))
    assert told == pytest.approx(taken, rel=0.1)
