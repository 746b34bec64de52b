"""What happens in the steps of a run: both scripts run in this process, with a look at what their parts are given."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator

import train_dreambooth
import train_dreambooth_lora
from tests.inside import BF16, PREVIEWS, as_process, planned, watch
from tests.runs import CLASS_PROMPT, PRIOR_FLAGS, read_metrics
from utils.devices import graceful_stop
from utils.optim import stochastic_rounding
from utils.run import metric_log
from utils.sampling import preview_pipeline

BASE_TARGET = f"--with_prior_preservation --class_prompt '{CLASS_PROMPT}' --prior_target base_prediction"


@pytest.fixture(params=[train_dreambooth, train_dreambooth_lora], ids=["full", "lora"])
def script(request):
    """Run a test with each script."""
    return request.param


# Randomness.


def dropout_masks(monkeypatch, here, process: int, out: str) -> list[torch.Tensor]:
    """Return what the first dropout of a LoRA run drops in each micro-step, for a process of this number."""
    script, masks = train_dreambooth_lora, []

    def hook_first(args, accelerator, plan, models, *rest):
        dropouts = [layer for layer in models.unet.modules() if isinstance(layer, torch.nn.Dropout) and layer.p]
        dropouts[0].register_forward_hook(lambda layer, inputs, output: masks.append(output == 0))

    with monkeypatch.context() as patch:
        as_process(patch, script, process)
        watch(patch, script, "train", hook_first)
        here(script, "--lora_dropout 0.5 --gradient_accumulation_steps 2", out)
    return masks


def test_dropout_differs_between_micro_steps_and_processes(monkeypatch, here):
    """Four micro-steps and two processes: no two draws are alike."""
    masks = dropout_masks(monkeypatch, here, 0, "first") + dropout_masks(monkeypatch, here, 1, "second")
    assert len(masks) == 8 and all(0.3 < mask.float().mean() < 0.7 for mask in masks)
    for number, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:number])


@pytest.mark.parametrize("process", [0, 1])
def test_weights_are_rounded_by_draws_of_the_step_alike_in_all_processes(monkeypatch, here, script, process):
    """Each step has draws of its own, which are neither those of dropout nor those of another process."""
    seeds = watch(monkeypatch, stochastic_rounding, "round_stochastically", lambda values: torch.initial_seed())
    as_process(monkeypatch, script, process)
    here(script, f"{BF16} --weight_dtype bf16 --max_train_steps 3")
    wanted = [script.derive_seed(51, "rounding", step) for step in range(3)]
    assert list(dict.fromkeys(seeds)) == wanted and len(seeds) % 3 == 0


def test_bf16_weights_are_not_rounded_to_the_nearest(monkeypatch, here, script):
    """Both neighbors of what the optimizer wants come: the nearer one often, the other one too."""
    wanted = watch(monkeypatch, stochastic_rounding, "round_stochastically", lambda values: values.clone())
    kept = []
    watch(monkeypatch, script, "save_checkpoint", lambda args, accelerator, plan, models, step: kept.extend(
        weight.detach().clone() for group in models.optimizer.param_groups for weight in group["params"]
    ))  # fmt: skip
    here(script, f"{BF16} --weight_dtype bf16 --max_train_steps 1 --checkpointing_steps 1")
    assert len(kept) == len(wanted) and {weight.dtype for weight in kept} == {torch.bfloat16}
    is_nearest = torch.cat([(weight == want.bfloat16()).flatten() for weight, want in zip(kept, wanted, strict=True)])
    assert 0.5 < is_nearest.float().mean() < 0.99


# Previews and the base's prediction.


def test_previews_are_drawn_by_networks_at_rest_in_the_runs_precision(monkeypatch, here, script):
    """Without dropout and gradients, and under autocast; training goes on with both."""
    modes = []

    def look(pipeline, *rest, **options):
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        modes.append((pipeline.unet.training, torch.is_grad_enabled(), autocast))

    watch(monkeypatch, preview_pipeline, "draw", look)
    texts = watch(monkeypatch, script, "preview_options", lambda args, prompts, text: text.training)
    trained = watch(monkeypatch, script, "compute_loss", lambda args, accelerator, plan, models, batch: [
        model.training for model in models.trained.values()
    ])  # fmt: skip
    here(script, f"{BF16} --train_text_encoder {PREVIEWS} --validation_steps 1")
    assert modes == [(False, False, torch.bfloat16)] * 3 and texts == [False] * 3
    assert trained == [[True, True]] * 2


def test_the_base_predicts_as_it_trains(monkeypatch, here, script):
    """In the run's precision, without gradients, and by none of what was learned."""
    found = []

    def look(*arguments, **options):
        found.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    def hook(accelerator, models, rows, inputs):
        if script is train_dreambooth and not found:
            models.copies["unet"].register_forward_pre_hook(look)

    watch(monkeypatch, script, "predict_as_base", hook)
    targets = watch(monkeypatch, script, "example_losses", lambda prediction, wanted, *rest: (
        prediction.dtype, wanted.dtype, wanted.requires_grad
    ))  # fmt: skip
    here(script, f"{BF16} {BASE_TARGET} --max_train_steps 1")
    assert found == [(True, False)] * (script is train_dreambooth)
    assert targets == [(torch.float32, torch.float32, False)]


@pytest.mark.parametrize("flags", ["", BF16, f"{BF16} --train_text_encoder"])
def test_the_loss_is_computed_in_float32(monkeypatch, here, script, flags):
    """Whatever the arithmetic of the networks: the prediction, the target, and all that is made of them."""
    given = watch(monkeypatch, script, "example_losses", lambda *values: {
        value.dtype for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()
    })  # fmt: skip
    combined = watch(monkeypatch, script, "combine_losses", lambda *values: {value.dtype for value in values[:3]})
    here(script, f"{flags} --max_train_steps 1")
    assert given == combined == [{torch.float32}]


def test_previews_come_when_they_were_asked_for(monkeypatch, here, script):
    """Before the first step, as often as it was said, and after the last step."""
    rounds = watch(monkeypatch, script, "validate", lambda args, accelerator, plan, models, step, stop: step)
    monkeypatch.setattr(script, "save_result", lambda *given: None)
    here(script, f"{PREVIEWS} --max_train_steps 5 --validation_steps 2 --checkpointing_steps 3")
    assert rounds == [0, 2, 4, 5]
    rounds.clear()
    here(script, f"{PREVIEWS} --max_train_steps 6 --validation_steps 9 --resume_from_checkpoint checkpoint-3")
    assert rounds == [6]
    rounds.clear()
    # 5 photos, 2 a batch, 2 batches a step: 2 steps an epoch.
    flags = "--max_train_steps 5 --validation_epochs 1 --gradient_accumulation_steps 2"
    here(script, f"{PREVIEWS} {flags} --validation_steps 1", "epochs")
    assert rounds == [0, 2, 4, 5]


def test_processes_share_the_previews(monkeypatch, here, script, tmp_path):
    """Each draws its own part of the pictures."""
    validate = script.validate

    def as_one_of_two(args, accelerator, plan, *rest):
        validate(args, accelerator, dataclasses.replace(plan, processes=2), *rest)

    monkeypatch.setattr(script, "validate", as_one_of_two)
    here(script, f"{PREVIEWS} --num_validation_images 3 --max_train_steps 1")
    drawn = tmp_path / "out" / "samples" / "step-000001"
    assert [path.name for path in sorted(drawn.iterdir())] == ["00.png", "02.png", "grid.png"]


# Gradients.


def gradients_of(models, loss) -> list[torch.Tensor]:
    """Return the gradients of a loss, which can be followed once more."""
    weights = [weight for group in models.optimizer.param_groups for weight in group["params"]]
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(weight) if one is None else one for one, weight in zip(found, weights, strict=True)]


@pytest.mark.parametrize("longest", [0, 0.01])
def test_a_gradient_is_the_mean_over_micro_steps_before_it_is_clipped(monkeypatch, here, script, tmp_path, longest):
    """The norm that is logged is that of the mean; a step is given the mean, or the part of it that is allowed."""
    found, given, loss_of = [], [], script.compute_loss

    def compute_loss(args, accelerator, plan, models, batch):
        loss = loss_of(args, accelerator, plan, models, batch)
        found.append(gradients_of(models, loss["loss"]))
        return loss

    monkeypatch.setattr(script, "compute_loss", compute_loss)
    watch(monkeypatch, torch.optim.AdamW, "step", lambda optimizer, *rest: given.append(
        [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
    ))  # fmt: skip
    here(script, f"--gradient_accumulation_steps 3 --max_train_steps 1 --max_grad_norm {longest}")
    mean = [torch.stack(parts).mean(dim=0) for parts in zip(*found, strict=True)]
    norm = torch.stack([part.norm() for part in mean]).norm().item()
    assert len(found) == 3 and norm > 0.02
    assert read_metrics(tmp_path / "out")[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for part, own in zip(given[0], mean, strict=True):
        torch.testing.assert_close(part, own * (longest / norm if longest else 1), rtol=1e-3, atol=1e-6)


def test_a_gradient_is_that_of_its_own_step(monkeypatch, here, script):
    """Nothing of the step before is left in it."""
    found, given, loss_of = [], [], script.compute_loss

    def compute_loss(args, accelerator, plan, models, batch):
        loss = loss_of(args, accelerator, plan, models, batch)
        found.append(gradients_of(models, loss["loss"]))
        return loss

    monkeypatch.setattr(script, "compute_loss", compute_loss)
    watch(monkeypatch, torch.optim.AdamW, "step", lambda optimizer, *rest: given.append(
        [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
    ))  # fmt: skip
    here(script, "--max_train_steps 3 --max_grad_norm 0")
    for own, parts in zip(found, given, strict=True):
        for part, wanted in zip(parts, own, strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-6)


def test_gradients_are_freed_by_updates_in_the_backward_pass(monkeypatch, here, script):
    """When a step ends, no weight has one: that is what it saves memory for."""
    left = watch(
        monkeypatch, metric_log.MetricLog, "add", lambda log, *rest: [p for p in log.weights if p.grad is not None]
    )
    here(script, "--fused_backward --max_grad_norm 0")
    assert left == [[], []]


@pytest.mark.parametrize("flags", ["", "--fused_backward --max_grad_norm 0", f"{BF16} --weight_dtype bf16"])
def test_each_network_has_its_own_rate(monkeypatch, here, script, flags):
    """However weights are updated, those of the text encoder do not move at a rate of 0."""
    ends = []

    def look(args, accelerator, plan, models, *rest):
        ends.append([[w.detach().clone() for w in group["params"]] for group in models.optimizer.param_groups])

    watch(monkeypatch, script, "train", look)
    watch(monkeypatch, script, "save_result", look)
    flags = f"{flags} --train_text_encoder --text_encoder_lr 0 --adam_weight_decay 0"
    here(script, f"{flags} --learning_rate 1e-2 --max_train_steps 2")
    (unet, text), (unet_after, text_after) = ends
    assert all(torch.equal(*pair) for pair in zip(text, text_after, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(unet, unet_after, strict=True))


def test_the_scaler_of_fp16_changes_no_step_and_is_saved(monkeypatch, here, script, tmp_path):
    """Gradients are unscaled before they are measured; a resumed run goes on with the scale that was reached."""
    connect, scales = script.make_accelerator, iter([256.0, 2.0])

    def make_accelerator(args):
        accelerator = connect(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=next(scales), growth_interval=3)
        # What a GPU would have; a CPU computes the few layers of the tiny model in fp16, too.
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        return accelerator

    flags = "--checkpointing_steps 2 --max_train_steps"
    here(script, f"{flags} 2", "plain")
    monkeypatch.setattr(script, "make_accelerator", make_accelerator)
    here(script, f"{flags} 2", "scaled")
    for line, other in zip(read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "scaled"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-2)
    scalers = watch(monkeypatch, script, "train", lambda args, accelerator, *rest: accelerator.scaler.state_dict())
    here(script, f"{flags} 3 --resume_from_checkpoint latest", "scaled")
    assert (scalers[0]["scale"], scalers[0]["_growth_tracker"]) == (256, 2)


# The numbers of a run.


@pytest.mark.parametrize(("processes", "factor"), [(1, 6), (3, 18)])
def test_scaled_rates_count_processes(monkeypatch, here, script, processes, factor):
    """--scale_lr multiplies by batch, accumulation and processes."""
    flags = "--scale_lr --gradient_accumulation_steps 3 --train_text_encoder --text_encoder_lr 1e-4"
    plan = planned(monkeypatch, here, script, flags, processes)
    assert plan.learning_rates == pytest.approx({"unet": 1e-3 * factor, "text_encoder": 1e-4 * factor})
    assert planned(monkeypatch, here, script, "", processes).learning_rates == {"unet": 1e-3}


@pytest.mark.parametrize(
    ("flags", "processes", "an_epoch"),
    [("", 1, 3), ("--gradient_accumulation_steps 2", 1, 2), ("", 2, 2), ("--train_batch_size 6", 1, 1)],
)
def test_an_epoch_is_never_short(monkeypatch, here, script, flags, processes, an_epoch):
    """Its steps show every one of the five photos: what does not come out even is rounded up."""
    plan = planned(monkeypatch, here, script, flags, processes)
    assert plan.steps_per_epoch == an_epoch


@pytest.mark.parametrize("processes", [1, 2])
def test_all_pictures_of_a_step_are_counted(monkeypatch, here, script, class_images, processes):
    """Those of every micro-step and process, class images included."""
    plan_of = script.make_plan

    def make_plan(*given):
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "num_processes", processes)
            return plan_of(*given)

    monkeypatch.setattr(script, "make_plan", make_plan)
    examples = watch(monkeypatch, metric_log.MetricLog, "add", lambda log, step, began, count, *rest: count)
    here(script, f"{PRIOR_FLAGS} --class_data_dir {class_images} --gradient_accumulation_steps 2")
    assert examples == [2 * 2 * 2 * processes] * 2


def test_processes_stop_by_agreement(monkeypatch, here, script):
    """What one process alone was told does not stop it before the others know."""
    asked = []
    monkeypatch.setattr(graceful_stop.StopRequest, "check", lambda stop: 15 if asked else None)
    monkeypatch.setattr(graceful_stop.StopRequest, "agree", lambda stop: asked.append(stop) if len(asked) < 2 else 15)
    saved = watch(monkeypatch, script, "save_checkpoint", lambda args, accelerator, plan, models, step: step)
    here(script, "--max_train_steps 5")
    assert saved == [3]
