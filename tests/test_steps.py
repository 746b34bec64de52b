"""What happens inside of a run: both scripts' `main` in this process, with a look at what its parts are given."""

import dataclasses
import json
import logging
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth
import train_dreambooth_lora
from tests.conftest import draw_picture
from tests.runs import BASE_FLAGS, CLASS_PROMPT, PRIOR_FLAGS, WEIGHTS_FILE, differing, read_metrics, read_tensors
from utils.core.errors import UserError
from utils.devices import device_memory, graceful_stop
from utils.make_model import make_model
from utils.optim import stochastic_rounding
from utils.run import metric_log, resume_checks
from utils.sampling import preview_pipeline

BF16 = "--mixed_precision bf16"
PREVIEWS = "--validation_prompt dog --num_validation_images 1 --validation_num_inference_steps 1"
BASE_TARGET = f"--with_prior_preservation --class_prompt '{CLASS_PROMPT}' --prior_target base_prediction"


@pytest.fixture(params=[train_dreambooth, train_dreambooth_lora], ids=["full", "lora"])
def script(request):
    """Run a test with each script."""
    return request.param


@pytest.fixture
def here(tiny, photos, tmp_path, monkeypatch):
    """Give a function that runs a script in this process, into `out`, and returns its exit status."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    handlers = logging.root.handlers[:]
    words = ["--pretrained_model_name_or_path", str(tiny), "--instance_data_dir", str(photos)]

    def run(script, flags: str = "", out: str = "out") -> int:
        forget_processes()
        return script.main([*words, *shlex.split(f"{BASE_FLAGS} {flags}"), "--output_dir", str(tmp_path / out)])

    yield run
    forget_processes()
    logging.root.handlers[:] = handlers


def forget_processes() -> None:
    """Let accelerate connect anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def watch(monkeypatch, owner, name: str, look) -> list:
    """Have a function's arguments looked at whenever it is called; return the list of what was seen."""
    seen, function = [], getattr(owner, name)

    def watched(*arguments, **options):
        seen.append(look(*arguments, **options))
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, watched)
    return seen


def planned(monkeypatch, here, script, flags: str = "", processes: int = 1):
    """Return the plan of a run with these flags, of which nothing else is done."""
    with monkeypatch.context() as patch:
        plans = []
        patch.setattr(script, "print_dry_run", lambda args, accelerator, plan: plans.append(plan) or 0)
        patch.setattr(Accelerator, "num_processes", processes)
        assert here(script, f"{flags} --dry_run") == 0
    return plans[0]


def as_process(monkeypatch, script, number: int) -> None:
    """Have a run take itself for the process of a number, once it has the batches of the only one."""
    watch(monkeypatch, script, "make_loader", lambda *given: monkeypatch.setattr(Accelerator, "process_index", number))


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


# What a resumed run must have in common with its checkpoint's.

COMMON = set(
    "script seed processes precision resolution photos captions sizes concepts revision instance_prompt class_prompt "
    "repeats prior_target tokenizer_name train_text_encoder optimizer use_8bit_adam weight_dtype train_batch_size "
    "gradient_accumulation_steps train_variance".split()
) | {"fed by", "base model", "content of the base model", "class images", "content of the pictures"}
OWN = {"full": {"trained weights"}, "lora": {"rank", "alpha", "layers", "base precision"}}
PRIOR = f"{PRIOR_FLAGS} --class_data_dir {{class_images}}"
IF2 = "--pretrained_model_name_or_path {if2} --resolution 16"
DIFFERENCES = {  # by entry: the flags of a run and of another one, and the scripts
    "seed": ("", "--seed 52"),
    "precision": ("", BF16),
    "resolution": ("", "--resolution 32"),
    "base model": ("", "--pretrained_model_name_or_path {other}"),
    "content of the base model": ("", "--pretrained_model_name_or_path {changed}"),
    "photos": ("", "--instance_data_dir {fewer}"),
    "content of the pictures": ("", "--instance_data_dir {redrawn}"),
    "class images": (PRIOR, f"{PRIOR} --num_class_images 3"),
    "captions": ("", "--caption_strategy filename"),
    "sizes": ("", "--crop_aspect preserve"),
    "revision": ("", "--revision main"),
    "instance_prompt": ("", "--instance_prompt 'a dog'"),
    "class_prompt": (PRIOR, f"{PRIOR} --class_prompt 'a dog'"),
    "repeats": ("", "--repeats 2"),
    "prior_target": (PRIOR, f"{PRIOR} --prior_target base_prediction"),
    "tokenizer_name": ("", "--tokenizer_name {tiny}/tokenizer"),
    "train_text_encoder": ("", "--train_text_encoder"),
    "optimizer": ("", "--optimizer adafactor"),
    "use_8bit_adam": ("", "--use_8bit_adam"),
    "weight_dtype": (BF16, f"{BF16} --weight_dtype bf16"),
    "train_batch_size": ("", "--train_batch_size 1"),
    "gradient_accumulation_steps": ("", "--gradient_accumulation_steps 2"),
    "train_variance": (IF2, f"{IF2} --train_variance"),
    "fed by": (IF2, f"{IF2} --class_labels_conditioning timesteps"),
    "trained weights": ("", "--use_bitfit", "full"),
    "rank": ("", "--rank 2", "lora"),
    "alpha": ("", "--lora_alpha 8", "lora"),
    "layers": ("", "--lora_layers to_k", "lora"),
    "base precision": ("", "--base_model_precision int8", "lora"),
}
SCRIPTS = {"full": train_dreambooth, "lora": train_dreambooth_lora}


@pytest.fixture(scope="module")
def places(tiny, photos, class_images, tmp_path_factory) -> dict:
    """Make the folders that runs differ by."""
    folder = tmp_path_factory.mktemp("places")
    found = {"tiny": tiny, "class_images": class_images, "if2": make_model(folder / "if2", "tiny-if2")}
    for name in ("other", "changed/tiny"):
        found[name.partition("/")[0]] = shutil.copytree(tiny, folder / name)
    weights = next((folder / "changed" / "tiny" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    for name in ("fewer", "redrawn"):
        found[name] = shutil.copytree(photos, folder / name)
    (folder / "fewer" / "beach.png").unlink()
    draw_picture(80, 64, 9).save(folder / "redrawn" / "beach.png")
    return found


@pytest.mark.parametrize("entry", DIFFERENCES)
def test_a_resumed_run_has_this_in_common(monkeypatch, here, places, entry):
    """Runs that differ in it write down that they do, and the one does not go on with the checkpoint of the other."""
    *flags, only = DIFFERENCES[entry] if len(DIFFERENCES[entry]) == 3 else (*DIFFERENCES[entry], "")
    for name, script in SCRIPTS.items():
        if only not in ("", name):
            continue
        theirs, ours = (planned(monkeypatch, here, script, text.format(**places)).resume_keys for text in flags)
        assert theirs[entry] != ours[entry]
        with pytest.raises(UserError, match=rf"\n  {entry}: "):
            resume_checks.check_resume_keys(Path("checkpoint-1"), theirs, ours)


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_left_out_of_what_runs_have_in_common(monkeypatch, here, name):
    """Each entry is there, and each is compared; those of masks and settings may change and are said."""
    script = SCRIPTS[name]
    plan = planned(monkeypatch, here, script)
    may_change = {resume_checks.MASKS, resume_checks.SETTINGS}
    assert plan.resume_keys.keys() == COMMON | OWN[name] | may_change
    assert (
        plan.resume_keys["processes"] == 1 and planned(monkeypatch, here, script, "", 2).resume_keys["processes"] == 2
    )
    assert plan.resume_keys["script"] == script.METHOD
    for entry in plan.resume_keys.keys() - may_change:
        with pytest.raises(UserError, match=rf"\n  {entry}: "):
            resume_checks.check_resume_keys(
                Path("checkpoint-1"), plan.resume_keys | {entry: "another"}, plan.resume_keys
            )
    resume_checks.check_resume_keys(
        Path("checkpoint-1"), plan.resume_keys | {key: {} for key in may_change}, plan.resume_keys
    )


@pytest.mark.parametrize("entry", ["repeats", "prior_target", "optimizer", "weight_dtype", "trained weights"])
def test_checkpoints_from_before_a_flag_are_of_its_default(monkeypatch, here, entry):
    """They do not know of it; a run that sets it does not go on with them."""
    ours = planned(monkeypatch, here, train_dreambooth).resume_keys
    theirs = {key: value for key, value in ours.items() if key != entry}
    resume_checks.check_resume_keys(Path("checkpoint-1"), theirs, ours)
    with pytest.raises(UserError, match=rf"\n  {entry}: "):
        resume_checks.check_resume_keys(Path("checkpoint-1"), theirs, ours | {entry: "another"})


# The result.


@pytest.mark.parametrize("flags", ["", "--no-pre_compute_text_embeddings", "--train_text_encoder"])
def test_a_result_says_how_prompts_are_read_and_not_where_the_base_lay(here, tiny, tmp_path, flags):
    """Its tokenizer has the run's length, its text encoder hides padding, and no file has the base's path."""
    here(train_dreambooth, f"--tokenizer_max_length 20 --text_encoder_use_attention_mask --max_train_steps 1 {flags}")
    out = tmp_path / "out"
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert pipeline.tokenizer.model_max_length == 20 and pipeline.text_encoder.config.use_attention_mask is True
    files = [path for part in pipeline.components for path in (out / part).rglob("*.json")] + [
        out / "model_index.json"
    ]
    assert len(files) > 6 and [path for path in files if str(tiny) in path.read_text()] == []
    assert [path for path in files if str(tiny.parent) in path.read_text()] == []
    assert json.loads((out / "model_index.json").read_text())["_name_or_path"] == tiny.name


@pytest.mark.parametrize("flags", ["", "--train_text_encoder"])
def test_adapters_are_float32_on_a_base_in_the_runs_precision(monkeypatch, here, flags):
    """Weights that train keep all their digits, in memory and in the file; the frozen ones are in bf16."""
    kinds = []
    watch(monkeypatch, train_dreambooth_lora, "train", lambda args, accelerator, plan, models, *rest: kinds.extend(
        (weight.dtype, weight.requires_grad) for model in models.trained.values() for weight in model.parameters()
    ))  # fmt: skip
    here(train_dreambooth_lora, f"{BF16} {flags} --max_train_steps 1")
    assert set(kinds) == {(torch.float32, True), (torch.bfloat16, False)}


def test_adapters_in_bf16_are_saved_in_float32(here, tmp_path):
    """A file has one precision, whatever the memory held."""
    here(train_dreambooth_lora, f"{BF16} --weight_dtype bf16 --max_train_steps 1 --checkpointing_steps 1")
    for folder in ("out", "out/checkpoint-1"):
        assert {tensor.dtype for tensor in read_tensors(tmp_path / folder).values()} == {torch.float32}


def test_adapters_have_the_names_that_older_versions_know(here, tmp_path):
    """transformers 4 has a level more in CLIP's names, without which it finds no layer to adapt."""
    here(train_dreambooth_lora, "--train_text_encoder --max_train_steps 1")
    names = load_file(tmp_path / "out" / WEIGHTS_FILE)
    text = {name for name in names if name.startswith("text_encoder.")}
    assert text and all(name.startswith("text_encoder.text_model.encoder.layers.") for name in text)
    assert all(name.startswith("unet.") for name in names.keys() - text)


def test_adapters_begin_by_the_seed(here, tmp_path):
    """The first run of a process and the next one begin alike; another seed begins elsewhere."""
    for out, flags in {"one": "", "two": "", "three": "--seed 52"}.items():
        here(train_dreambooth_lora, f"--learning_rate 0 --max_train_steps 1 {flags}", out)
    one, two, three = (read_tensors(tmp_path / out) for out in ("one", "two", "three"))
    assert differing(one, two) == []
    assert all(name.endswith("lora_A.weight") for name in differing(one, three)) and differing(one, three)


@pytest.mark.parametrize("flags", ["", "--train_text_encoder"])
def test_networks_are_in_the_runs_precision_or_in_float32_if_they_train(monkeypatch, here, script, flags):
    """What is frozen computes in bf16, and at rest; what trains keeps all of its digits."""
    seen = []

    def look(args, accelerator, plan, models, *rest):
        networks = {"unet": models.unet, "vae": models.vae, "text_encoder": models.text_encoder}
        for name, network in networks.items():
            kinds = {(weight.dtype, weight.requires_grad) for weight in network.parameters()}
            seen.append((name, kinds, network.training))

    watch(monkeypatch, script, "train", look)
    here(script, f"{BF16} --no-pre_compute_text_embeddings {flags} --max_train_steps 1")
    frozen, trains = (torch.bfloat16, False), (torch.float32, True)
    trained = {trains} if script is train_dreambooth else {trains, frozen}
    text = (trained, True) if flags else ({frozen}, False)
    assert seen == [("unet", trained, True), ("vae", {frozen}, False), ("text_encoder", *text)]


def test_a_result_has_the_tokenizer_that_was_given(here, tiny, tmp_path):
    """It is another one than the base's, and people would feed the text encoder other words."""
    other = shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((other / "tokenizer_config.json").read_text()) | {"model_max_length": 33}
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    here(train_dreambooth, f"--tokenizer_name {other} --max_train_steps 1")
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").tokenizer.model_max_length == 33


def test_a_result_and_a_checkpoint_have_the_sampler_as_the_base_has_it(here, script, tiny, tmp_path):
    """No defaults are written out, which another sampler would take over. A checkpoint says its own step."""
    base, out, name = shutil.copytree(tiny, tmp_path / "base"), tmp_path / "out", "scheduler/scheduler_config.json"
    config = {key: value for key, value in json.loads((tiny / name).read_text()).items() if key != "timestep_spacing"}
    (base / name).write_text(json.dumps(config))
    here(script, f"--pretrained_model_name_or_path {base} --max_train_steps 3 --checkpointing_steps 2")
    for folder in (out, out / "checkpoint-2"):
        assert json.loads((folder / name).read_text()) == config
    assert json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["step"] == 2


def test_previews_come_from_their_seeds_and_are_as_wide_as_asked(here, script, tmp_path):
    """Rounds without training in between draw the same pictures, no two in a round alike."""
    flags = "--validation_resolution 64x32 --num_validation_images 2 --learning_rate 0 --adam_weight_decay 0"
    here(script, f"{PREVIEWS} {flags} --max_train_steps 1")
    rounds = [
        [Image.open(tmp_path / "out" / "samples" / f"step-00000{step}" / f"0{index}.png") for index in (0, 1)]
        for step in (0, 1)
    ]
    assert [[picture.size for picture in drawn] for drawn in rounds] == [[(64, 32)] * 2] * 2
    (one, two), again = ([picture.tobytes() for picture in drawn] for drawn in rounds)
    assert again == [one, two] and one != two


def test_class_images_are_drawn_as_asked(monkeypatch, here, script):
    """Each from a seed of its own, with the guidance of the flag, in batches of that size."""
    calls = []

    def look(pipeline, *given, **options):
        seeds = [generator.initial_seed() for generator in options["generator"]]
        calls.append((options["guidance_scale"], seeds))

    watch(monkeypatch, StableDiffusionPipeline, "__call__", look)
    flags = "--num_class_images 3 --sample_batch_size 2 --class_guidance_scale 2.5 --max_train_steps 1"
    here(script, f"--with_prior_preservation --class_prompt '{CLASS_PROMPT}' {flags}")
    seeds = [script.derive_seed("class image", index) for index in range(3)]
    assert calls == [(2.5, seeds[:2]), (2.5, seeds[2:])]


def test_flags_without_effect_are_told_at_the_start(here, script, caplog):
    """By name, in a run as well as by the function that finds them."""
    here(script, "--local_rank 0 --max_train_steps 1")
    assert "--local_rank has no work left to do" in caplog.text


def test_a_network_is_moved_back():
    """After drawing, a VAE that only previews need makes room again."""
    network, moves = torch.nn.Linear(2, 2), []
    network.to = lambda device: moves.append(device.type)
    for device in ("cpu", "meta"):
        with device_memory.moved_to(torch.device(device), network):
            moves.append("draws")
    assert moves == ["draws", "meta", "draws", "cpu"]
