"""Optimizers, updates in the backward pass, and weights in bf16: what they refuse, and what they must not change."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from prodigyopt import Prodigy
from transformers import Adafactor

import train_dreambooth
import train_dreambooth_lora
from tests.runs import SCRIPTS, differing, read_metrics, read_tensors
from tests.test_equalities import RANDOM, assert_resumed, assert_same_end, continue_from
from utils.optim.optimizers import find_optimizer_problems, has_fused_kernel, narrowed_to, on_each_gradient
from utils.optim.stochastic_rounding import in_float32, round_stochastically

FLAGS = {
    **{"optimizer": "adamw", "use_8bit_adam": False, "fused_backward": False, "weight_dtype": "fp32"},
    **{"learning_rate": 1e-4, "text_encoder_lr": None, "mixed_precision": "bf16", "max_grad_norm": 0.0},
    "gradient_accumulation_steps": 1,
}
START = "--fused_backward"
ALONE = "--optimizer prodigy estimates one rate from all weights together, which excludes"
REFUSED = {
    "accumulation": (
        {"fused_backward": True, "gradient_accumulation_steps": 2},
        f"{START} excludes --gradient_accumulation_steps 2: gradients are freed before the next micro-step.",
    ),
    "clipping": (
        {"fused_backward": True, "max_grad_norm": 1.0},
        f"{START} updates weights before the whole gradient is known: it needs --max_grad_norm 0, not 1.",
    ),
    "fp16": (
        {"fused_backward": True, "mixed_precision": "fp16"},
        f"{START} excludes fp16, whose scaler must see all gradients first. Use bf16.",
    ),
    "bf16 weights, float32 inputs": (
        {"weight_dtype": "bf16", "mixed_precision": "no"},
        "--weight_dtype bf16 needs --mixed_precision bf16.",
    ),
    "two optimizers": (
        {"use_8bit_adam": True, "optimizer": "adafactor"},
        "--use_8bit_adam excludes --optimizer adafactor.",
    ),
    "prodigy, weight by weight": (
        {"optimizer": "prodigy", "learning_rate": 1.0, "fused_backward": True},
        f"{ALONE} --fused_backward.",
    ),
    "prodigy in bf16": (
        {"optimizer": "prodigy", "learning_rate": 1.0, "weight_dtype": "bf16"},
        f"{ALONE} --weight_dtype bf16.",
    ),
    "prodigy with two rates": (
        {"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 0.5},
        f"{ALONE} a --text_encoder_lr of its own.",
    ),
    "prodigy with the usual rate": (
        {"optimizer": "prodigy", "learning_rate": 5e-6},
        "--optimizer prodigy multiplies the rate that it finds by --learning_rate: give 1, not 5e-06.",
    ),
}
FUSED, BF16 = "--fused_backward --max_grad_norm 0", "--weight_dtype bf16 --mixed_precision bf16"
RESUMED = {
    "adafactor": "--optimizer adafactor",
    "8-bit": "--optimizer adamw8bit",
    "prodigy": "--optimizer prodigy --learning_rate 1",
    "fused": FUSED,
    "fused 8-bit in bf16": f"{FUSED} {BF16} --optimizer adamw8bit --train_text_encoder",
    "bf16": BF16,
    "fused adafactor": f"{FUSED} --optimizer adafactor",
}


# The cosine between its movement and AdamW's, at least, and the range of their ratio. Prodigy begins a million times
# slower than its rate of 1, and takes some hundred steps to find how far to go.
LIKE_ADAMW = {"bf16": (0.95, 0.95, 1.05), "adafactor": (0.4, 0.5, 1.5), "prodigy": (0.4, 1e-4, 1.5)}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_optimizer_cannot_do_is_refused(case):
    """Each has one sentence; the flags without it have none."""
    changes, sentence = REFUSED[case]
    assert find_optimizer_problems(FLAGS | changes) == [sentence]
    assert find_optimizer_problems(FLAGS) == []


def test_updates_in_the_backward_pass_are_for_one_process(monkeypatch):
    """With several, gradients are added up between backward and the update."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    sentence = f"{START} runs in one process: several add up their gradients before weights are updated."
    assert find_optimizer_problems(FLAGS | {"fused_backward": True}) == [sentence]


SETTINGS = "--adam_beta1 0.7 --adam_beta2 0.8 --adam_weight_decay 0.3 --adam_epsilon 1e-4 --learning_rate 2.0"
GIVEN = {  # by flags: the class, and what each group of weights must have
    "": (torch.optim.AdamW, {"betas": (0.7, 0.8), "weight_decay": 0.3, "eps": 1e-4}),
    "--use_8bit_adam": (AdamW8bit, {"betas": (0.7, 0.8), "weight_decay": 0.3, "eps": 1e-4}),
    "--optimizer adamw8bit": (AdamW8bit, {"betas": (0.7, 0.8), "weight_decay": 0.3, "eps": 1e-4}),
    "--optimizer adafactor": (
        Adafactor,
        {"weight_decay": 0.3, "scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
    "--optimizer prodigy": (
        Prodigy,
        {
            **{"betas": (0.7, 0.8), "weight_decay": 0.3, "eps": 1e-4},
            **{"safeguard_warmup": True, "use_bias_correction": True},
        },
    ),
}


@pytest.mark.parametrize("script", [train_dreambooth, train_dreambooth_lora])
@pytest.mark.parametrize("flags", GIVEN)
def test_each_optimizer_is_given_its_flags(script, flags):
    """A group for each network, at its own rate, with weight decay, betas and epsilon as they were asked for."""
    args = script.make_parser().parse_args(f"{SETTINGS} {flags}".split())
    models = SimpleNamespace(trained={"unet": torch.nn.Linear(2, 3), "text_encoder": torch.nn.Linear(4, 5)})
    models.trained["unet"].bias.requires_grad_(False)
    optimizer = script.make_optimizer(args, SimpleNamespace(learning_rates={"unet": 2.0, "text_encoder": 1.0}), models)
    kind, wanted = GIVEN[flags]
    assert type(optimizer) is kind and [group["lr"] for group in optimizer.param_groups] == [2.0, 1.0]
    for group in optimizer.param_groups:
        assert {name: group[name] for name in wanted} == wanted
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]


@pytest.mark.parametrize("script", [train_dreambooth, train_dreambooth_lora])
@pytest.mark.parametrize("name", train_dreambooth.SCHEDULES)
def test_rates_stay_at_their_end(script, name):
    """Beyond the end of a schedule there is the last rate, and no other one."""
    args = script.make_parser().parse_args(f"--lr_scheduler {name} --lr_warmup_steps 2".split())
    rates = [script.learning_rate(args, step, 10, 1.0) for step in (10, 11, 25)]
    assert rates == [rates[0]] * 3 and 0 <= rates[0] <= 1


# Stochastic rounding.


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0078125), (2**-130, 9 * 2**-133)])
def test_rounding_takes_one_of_two_neighbours_and_keeps_the_mean(low, high):
    """Of a value a quarter of the way between two, also the smallest ones, a quarter of the draws take the upper."""
    torch.manual_seed(0)
    for sign in (1, -1):
        values = torch.full((100_000,), sign * (low + (high - low) / 4))
        rounded = round_stochastically(values)
        assert rounded.dtype == torch.bfloat16 and set(rounded.float().abs().tolist()) == {low, high}
        share = (rounded.float().abs() == high).float().mean().item()
        assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 100_000)


def test_what_bfloat16_can_hold_is_not_changed():
    """Zero, powers of two, every bfloat16 number in between, infinity; NaN stays NaN."""
    values = torch.cat(
        [torch.randn(10_000).bfloat16().float(), torch.tensor([0.0, -2.0, 2**-126, math.inf, -math.inf])]
    )
    assert torch.equal(round_stochastically(values).float(), values)
    assert round_stochastically(torch.tensor([math.nan])).isnan().all()


def test_small_steps_add_up_in_bf16():
    """At a rate of 1e-6, AdamW moves float32 weights by 1e-3 in 1,000 steps; plain bfloat16 ones stay."""
    torch.manual_seed(0)
    moved = {}
    for kind in ("float32", "plain bf16", "rounded"):
        weight = torch.nn.Parameter(torch.ones(500, dtype=torch.float32 if kind == "float32" else torch.bfloat16))
        optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
        for _ in range(1000):
            weight.grad = torch.ones_like(weight)
            if kind == "rounded":
                with in_float32(optimizer, weight) as wide, narrowed_to(optimizer, optimizer.param_groups[0], wide):
                    optimizer.step()
            else:
                optimizer.step()
        moved[kind] = 1 - weight.detach().float().mean().item()
    assert abs(moved["float32"] - 1e-3) < 2e-5  # a step is 16.8 units of float32's last place
    assert moved["plain bf16"] == 0.0
    # A step below 1 is one of 2^-8 by chance: 1,000 x 500 draws, each with a variance of 1e-6 x 2^-8.
    assert abs(moved["rounded"] - 1e-3) < 5 * math.sqrt(1000 / 500 * 1e-6 * 2**-8)


def test_a_weight_in_bf16_stays_the_one_that_others_wait_for():
    """Data parallelism hooks onto the node that adds up a gradient: a weight that changes its dtype gets another."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer, seen = torch.optim.AdamW([weight], lr=0.1), []
    node = weight.expand(3).grad_fn.next_functions[0][0]
    node.register_hook(lambda *gradients: seen.append(1))
    for _ in range(3):
        weight.square().sum().backward()
        with in_float32(optimizer, weight) as wide, narrowed_to(optimizer, optimizer.param_groups[0], wide):
            optimizer.step()
        assert weight.dtype == torch.bfloat16 and weight.grad is None
    assert len(seen) == 3 and [*optimizer.state] == [weight] and optimizer.state[weight]["step"] == 3


# Updates in the backward pass.


def test_a_gradient_is_freed_before_the_next_one_is_there():
    """With ten layers in a row, backward never holds more than one weight's gradient, and the result is the same."""
    plain = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(10)))
    fused, held = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(10))), []
    fused.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.AdamW(network.parameters(), lr=0.1) for network in (plain, fused)]
    update = functools.partial(step_alone, optimizers[1], list(fused.parameters()), held)
    on_each_gradient(optimizers[1], update)
    for _ in range(3):
        for network in (plain, fused):
            network(torch.ones(2, 8)).square().sum().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    assert held == [1] * 30
    assert differing(plain.state_dict(), fused.state_dict()) == []


def step_alone(optimizer, weights, held, group, weight):
    """Do what the scripts do as soon as a gradient is there, and count those that are held."""
    held.append(sum(one.grad is not None for one in weights))
    with narrowed_to(optimizer, group, weight):
        optimizer.step()
    weight.grad = None


def test_fused_kernels_are_for_devices_that_have_them():
    """CPU weights yes, those of the meta device no."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]}]
    assert has_fused_kernel(groups)
    assert not has_fused_kernel([*groups, {"params": [torch.nn.Parameter(torch.ones(1, device="meta"))]}])


# Runs.


@pytest.mark.parametrize("script", SCRIPTS)
def test_updates_in_the_backward_pass_change_no_bit(trainer, tmp_path, script):
    """Nor the norm of the gradient in the metrics, but for its last digits: it is added up in another order."""
    flags = f"{RANDOM} --max_train_steps 4 --max_grad_norm 0 --train_text_encoder"
    plain, fused = trainer.run_all(
        {tmp_path / "plain": (script, flags), tmp_path / "fused": (script, f"{flags} --fused_backward")}
    )
    assert differing(read_tensors(plain), read_tensors(fused)) == []
    for one, other in zip(read_metrics(plain), read_metrics(fused), strict=True):
        assert one["loss"] == other["loss"] and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_equals_uninterrupted(trainer, tmp_path, case):
    """Whatever the optimizer keeps, in whatever precision, is saved and read back to the bit."""
    flags = f"{RANDOM} --max_train_steps 5 --checkpointing_steps 2 {RESUMED[case]}"
    wholes = trainer.run_all({tmp_path / script: (script, flags) for script in SCRIPTS})
    parts = [continue_from(whole, 2, tmp_path / f"{whole.name}-part") for whole in wholes]
    jobs = [
        trainer.start(*pair, f"{flags} --resume_from_checkpoint latest") for pair in zip(SCRIPTS, parts, strict=True)
    ]
    for whole, job in zip(wholes, jobs, strict=True):
        assert_resumed(whole, job.finish())


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_optimizers_learn_what_adamw_does(trainer, tmp_path, tiny, script):
    """After 20 steps, the weights have moved in the directions in which AdamW moves them, and about as far."""
    common = f"--learning_rate 1e-3 --max_train_steps 20 --adam_weight_decay 0 {'--rank 8' * (script == 'lora')}"
    others = {"bf16": BF16, "adafactor": "--optimizer adafactor", "prodigy": "--optimizer prodigy --learning_rate 1"}
    runs = {"plain": (script, common)} | {name: (script, f"{common} {flags}") for name, flags in others.items()}
    plain, *changed = trainer.run_all({tmp_path / name: run for name, run in runs.items()})
    wanted = movement(plain, tiny)
    for out in changed:
        moved = movement(out, tiny)
        cosine = torch.nn.functional.cosine_similarity(moved, wanted, dim=0).item()
        assert cosine > LIKE_ADAMW[out.name][0]
        assert LIKE_ADAMW[out.name][1] < (moved.norm() / wanted.norm()).item() < LIKE_ADAMW[out.name][2]


def movement(out, model):
    """Return how far each weight has moved that trains, as one vector; adapters start where they change nothing."""
    before, after = read_tensors(model), read_tensors(out)
    names = [name for name in sorted(after) if name.startswith("unet/") or name.endswith("lora_B.weight")]
    return torch.cat([(after[name] - before.get(name, 0)).flatten() for name in names])


def test_a_result_of_bf16_weights_is_float32_and_on_its_grid(trainer, tmp_path):
    """A full result has one precision throughout, and its U-Net holds what was trained."""
    out = trainer.run("full", tmp_path / "out", f"--max_train_steps 2 --checkpointing_steps 2 {BF16}").out
    result, saved = read_tensors(out), read_tensors(out / "checkpoint-2")
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(result[name], tensor.float()) for name, tensor in saved.items())


def test_bitfit_trains_biases_alone(trainer, tmp_path, tiny):
    """Every bias of the U-Net moves, nothing else does, and the optimizer keeps state for biases only."""
    out = trainer.run("full", tmp_path / "out", "--use_bitfit --max_train_steps 3 --checkpointing_steps 3").out
    before, after = read_tensors(tiny), read_tensors(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("unet/") and name.endswith(".bias")}
    run = trainer.run("full", out, "--max_train_steps 4 --resume_from_checkpoint latest", code=1)
    assert "trained weights: biases there, all here" in run.stderr


def test_the_shared_end_of_two_equal_runs_is_what_is_compared(trainer, tmp_path):
    """The comparison above finds a difference where there is one: plain rounding of another seed."""
    flags = f"--max_train_steps 2 {BF16}"
    runs = {tmp_path / seed: ("lora", f"{flags} --seed {seed}") for seed in ("1", "2")}
    with pytest.raises(AssertionError):
        assert_same_end(*trainer.run_all(runs))
