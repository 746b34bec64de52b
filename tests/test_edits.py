"""Five edits of a copy, as docs/changing.md shows them: each in one place; and what tools and flags say to copies."""

import ast
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import draw_picture
from tests.runs import ROOT, SCRIPTS, Trainer, differing, read_metrics, read_tensors
from utils import estimate_memory, preview_data
from utils.core.errors import UserError
from utils.lab import step_timing
from utils.models import layer_names
from utils.run import tool_names
from utils.sampling import preview_pipeline
from utils.synthetic.model_sizes import SHAPES
from utils.synthetic.random_models import build_unet

SIGN = '''
import torch


class SignDescent(torch.optim.Optimizer):
    """Moves each weight by the rate against the sign of its gradient."""

    def __init__(self, groups):
        super().__init__(groups, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.sub_(group["lr"] * weight.grad.sign())
'''
LAST_LINE = "return torch.optim.AdamW(groups, **adam, fused=optimizers.has_fused_kernel(groups))"
# What is replaced, by what: a place in one function, or a constant.
EDITS = {
    "loss": (
        'F.mse_loss(prediction, wanted, reduction="none")',
        'F.huber_loss(prediction, wanted, reduction="none", delta=0.1)',
    ),
    "layers": (
        'UNET_LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")',
        'UNET_LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2", "proj_in")',
    ),
    "optimizer": (LAST_LINE, "return torch.optim.RAdam(groups, **adam)"),
    "own optimizer": (LAST_LINE, "from sign_descent import SignDescent\n\n    return SignDescent(groups)"),
    "sampler": (
        "return getattr(diffusers, args.validation_scheduler).from_config(plan.base.scheduler)",
        "return diffusers.EulerDiscreteScheduler.from_config(plan.base.scheduler)",
    ),
    "captions": (
        "prompts = captions.find_captions(strategy, folder, list(found), *words)",
        """import csv

    with open(folder / "captions.csv", newline="", encoding="utf-8") as file:
        prompts = {folder / name: (caption,) for name, caption in csv.reader(file)}""",
    ),
}
PREVIEW = "--validation_prompt 'a photo of sks dog' --validation_num_inference_steps 2 --num_validation_images 1"


def edit(method: str, name: str, folder: Path) -> str:
    """Write a copy of a script with one edit; return its path."""
    text, (old, new) = (ROOT / SCRIPTS[method]).read_text(), EDITS[name]
    assert text.count(old) == 1
    path = folder / f"my_{method}_{name.replace(' ', '_')}.py"
    path.write_text(text.replace(old, new))
    (folder / "sign_descent.py").write_text(SIGN)
    return str(path)


def run_pair(trainer: Trainer, method: str, name: str, folder: Path, flags: str = "") -> tuple[str, Path, Path]:
    """Run a script and an edited copy of it; return what the copy printed, and both output folders."""
    outs = folder / "edited", folder / "plain"
    jobs = [
        trainer.start(script, out, flags)
        for script, out in zip((edit(method, name, folder), method), outs, strict=True)
    ]
    edited, plain = (job.finish() for job in jobs)
    assert (edited.code, plain.code) == (0, 0), edited.text + plain.text
    return edited.stdout, *outs


@pytest.mark.parametrize("method", SCRIPTS)
def test_another_loss_is_one_call(method, trainer, tmp_path):
    """Huber's loss is at most half the squared error, and less where errors are large."""
    _, edited, plain = run_pair(trainer, method, "loss", tmp_path)
    losses = [read_metrics(out)[0]["loss"] for out in (edited, plain)]
    assert 0 < losses[0] < 0.4 * losses[1]


def test_other_layers_are_one_constant(trainer, tmp_path):
    """Convolutions get adapters, the screen and the card name them, and diffusers' own file has them."""
    said, edited, plain = run_pair(trainer, "lora", "layers", tmp_path)
    kinds = [{key.split(".lora_")[0].rsplit(".", 1)[1] for key in read_tensors(out)} for out in (edited, plain)]
    assert kinds[0] - kinds[1] == {"conv1", "conv2", "proj_in"}
    for text in (said, (edited / "README.md").read_text()):
        assert "to_k,to_q,to_v,to_out.0,conv1,conv2,proj_in" in text
    weights = load_file(edited / "pytorch_lora_weights.safetensors")
    assert any(weight.dim() == 4 and weight.abs().sum() > 0 for key, weight in weights.items() if "lora_B" in key)


@pytest.mark.parametrize(("method", "name"), [("lora", "optimizer"), ("full", "own optimizer")])
def test_another_optimizer_is_one_line(method, name, trainer, tmp_path):
    """No flag refuses it; screen, card and dry run name its class; a run with it resumes."""
    shown = {"optimizer": "RAdam", "own optimizer": "SignDescent"}[name]
    said, edited, plain = run_pair(trainer, method, name, tmp_path, "--checkpointing_steps 1")
    assert f"0.001, constant, {shown}\n" in said and f"constant, {shown} |" in (edited / "README.md").read_text()
    assert differing(read_tensors(edited), read_tensors(plain))
    script = str(tmp_path / f"my_{method}_{name.replace(' ', '_')}.py")
    dry = trainer.run(script, tmp_path / "dry", "--dry_run").stdout
    assert f"constant, {shown}\n" in dry and "peak memory" in dry and "not known" not in dry
    shutil.copytree(edited / "checkpoint-1", tmp_path / "resumed/checkpoint-1")
    trainer.run(script, tmp_path / "resumed", "--resume_from_checkpoint checkpoint-1")
    assert differing(read_tensors(edited), read_tensors(tmp_path / "resumed")) == []


def test_another_sampler_is_one_line(trainer, tmp_path):
    """Screen and card name its class; the pictures are those of the flag that names it, and no others."""
    said, edited, plain = run_pair(trainer, "lora", "sampler", tmp_path, PREVIEW)
    by_flag = trainer.run("lora", tmp_path / "flag", f"{PREVIEW} --validation_scheduler EulerDiscreteScheduler")
    for text in (said, by_flag.stdout, (edited / "README.md").read_text()):
        assert "1 by EulerDiscreteScheduler, 2 steps" in text
    pictures = [(out / "samples/step-000002/00.png").read_bytes() for out in (edited, by_flag.out, plain)]
    assert pictures[0] == pictures[1] != pictures[2]


def test_captions_from_a_csv_are_one_line(trainer, tiny, tmp_path):
    """With the usual command, and without an instance prompt where the flags say that photos have captions."""
    photos, script = tmp_path / "photos", edit("lora", "captions", tmp_path)
    photos.mkdir()
    for number in range(2):
        draw_picture(64, 64, number).save(photos / f"{number}.png")
    (photos / "captions.csv").write_text('0.png,"sks dog, left"\n1.png,sks dog asleep\n')
    flags = f"--pretrained_model_name_or_path {tiny} --instance_data_dir {photos} --resolution 64 --max_train_steps 1"
    flags += " --report_to none --seed 3"
    for out, more in (("one", "--instance_prompt dog"), ("other", "--caption_strategy metadata")):
        words = [*f"{flags} {more} --output_dir".split(), str(tmp_path / out)]
        run = trainer.start_words(script, tmp_path / out, words).finish()
        assert run.code == 0, run.text
        assert "2 of 'sks dog, left' or 'sks dog asleep'" in run.stdout


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_touches_one_definition(name):
    """All that changes lies in one function, or is one constant."""
    old, new = EDITS[name]
    text = (ROOT / SCRIPTS["lora"]).read_text()
    before, after = (ast.parse(one).body for one in (text, text.replace(old, new)))
    changed = [one for one, other in zip(before, after, strict=True) if ast.dump(one) != ast.dump(other)]
    assert [type(one) for one in changed] == [ast.Assign if name == "layers" else ast.FunctionDef]


@pytest.mark.parametrize("name", EDITS)
def test_the_manual_shows_each_edit(name):
    """docs/changing.md has the very lines, so that they stay true."""
    text = (ROOT / "docs/changing.md").read_text()
    for line in "\n".join(EDITS[name]).split("\n"):
        assert line.strip() in text


# An instance prompt is not asked for where each photo has a caption.


@pytest.mark.parametrize("strategy", ["textfile", "filename", "metadata"])
def test_no_instance_prompt_is_needed_with_captions(strategy, trainer, tiny, tmp_path):
    """The run and its card do without."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    draw_picture(64, 64, 0).save(photos / "a_sks_dog.png")
    (photos / "a_sks_dog.txt").write_text("a sks dog")
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "a_sks_dog.png", "text": "a sks dog"}))
    flags = f"--pretrained_model_name_or_path {tiny} --instance_data_dir {photos} --resolution 64 --max_train_steps 1"
    words = [*f"{flags} --report_to none --caption_strategy {strategy} --output_dir".split(), str(out)]
    run = trainer.start_words("lora", out, words).finish()
    assert run.code == 0 and "1 of 'a sks dog'" in run.stdout, run.text
    assert "`a sks dog`" in (out / "README.md").read_text()


# Names that tools call.


def script_names(path: Path) -> set[str]:
    """Return the names that a file of utils/ calls of a script: attributes of what is annotated as a module."""
    found = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        modules = {
            arg.arg for arg in function.args.args if arg.annotation and ast.unparse(arg.annotation) == "ModuleType"
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and re.search(r"load_script\(", ast.unparse(node.value)):
                modules.add(ast.unparse(node.targets[0]))
        found |= {
            node.attr
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
        }
    return {name for name in found if not name.startswith("__")}


def test_tools_call_the_names_of_the_table_and_no_others():
    """So a copy can be checked by the table, and the manual can list it."""
    own = [ROOT / "utils/run" / name for name in ("tool_names.py", "scripts.py")]
    files = [path for path in (ROOT / "utils").rglob("*.py") if path not in own]
    called = {path.stem: names for path in files if (names := script_names(path))}
    rehearsed = called.pop("memory_estimate")
    assert rehearsed == set(tool_names.NEEDED["--dry_run"])
    assert called.pop("estimate_memory") | rehearsed == set(tool_names.NEEDED["utils.estimate_memory"])
    assert called.pop("preview_data") == set(tool_names.NEEDED["utils.preview_data"])
    compared = called.pop("compare_memory_trackers") | rehearsed
    assert compared == set(tool_names.NEEDED["utils.lab.compare_memory_trackers"])
    timing = {name for tool, names in tool_names.NEEDED.items() if "step_timing" in tool for name in names}
    assert called.pop("step_timing") | set(step_timing.ENCODING) == timing
    assert not called


def test_each_tool_checks_the_names():
    """A tool that loads a script asks first whether it has what it calls."""
    for path in (ROOT / "utils").rglob("*.py"):
        text = path.read_text()
        if re.search(r"= (scripts\.)?load_script\(", text):
            assert re.search(r"tool_names\.(check_names|describe_missing_names)\(", text), path


@pytest.mark.parametrize("method", SCRIPTS)
def test_both_scripts_define_what_tools_call(method):
    """And the manual lists every name."""
    module = __import__(SCRIPTS[method].removesuffix(".py"))
    text = (ROOT / "docs/changing.md").read_text()
    for tool, wanted in tool_names.NEEDED.items():
        assert tool_names.find_missing_names(module, tool) == []
        assert [name for name in wanted if f"`{name}`" not in text] == []


@pytest.fixture
def renamed(tmp_path) -> str:
    """Write a copy in which four functions have other names, consistently."""
    text = (ROOT / SCRIPTS["lora"]).read_text()
    for name in ("compute_loss", "list_examples", "latents_or_pixels", "StepSampler"):
        text = re.sub(rf"\b{name}\b", f"my_{name}", text)
    path = tmp_path / "my_renamed.py"
    path.write_text(text)
    return str(path)


def test_a_renamed_function_is_told_in_one_sentence(renamed, trainer, tiny, photos, tmp_path):
    """By each tool that calls it; the copy itself trains."""
    run = trainer.run(renamed, tmp_path / "dry", "--dry_run")
    lacks = (
        "my_renamed.py does not define StepSampler, compute_loss, which --dry_run calls: a copy must keep such names."
    )
    assert f"not known: {lacks}\n" in run.stdout
    start = re.escape("my_renamed.py does not define ")
    for main, tool in ((preview_data.main, "utils.preview_data"), (estimate_memory.main, "utils.estimate_memory")):
        with pytest.raises(UserError, match=f"{start}list_examples, StepSampler.*, which {tool} calls: a copy must"):
            main([renamed])
    with pytest.raises(SystemExit, match=f"error: {start}latents_or_pixels, which utils.lab.step_timing split calls"):
        step_timing.main(["split", str(tmp_path / "out.json"), renamed])
    assert len(read_metrics(trainer.run(renamed, tmp_path / "out").out)) == 2


def test_missing_names_come_in_the_order_of_the_table():
    """Each once."""
    module = ModuleType("empty")
    module.collate = None
    wanted = [name for name in dict.fromkeys(tool_names.NEEDED["utils.estimate_memory"]) if name != "collate"]
    assert tool_names.find_missing_names(module, "utils.estimate_memory") == wanted


# Samplers and layers by flag.

SAMPLERS = (
    *(
        "DDIM",
        "DDPM",
        "PNDM",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "KDPM2Discrete",
        "LCM",
        "TCD",
    ),
    *("KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"),
    *("SASolver", "DDIMParallel", "DDPMParallel"),
)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_of_diffusers_are_accepted(sampler):
    """Each makes a picture from DDPM's config."""
    import diffusers

    name = f"{sampler}Scheduler"
    assert preview_pipeline.find_sampler_problems(name) == []
    scheduler = getattr(diffusers, name).from_config(dict(diffusers.DDPMScheduler(variance_type="fixed_small").config))
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noise = 0.1 * scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(noise, timestep, sample, return_dict=False)[0]
    assert sample.isfinite().all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Euler", "is not a scheduler of diffusers. Near: EulerAncestralDiscreteScheduler, EulerDiscreteScheduler."),
        ("unipc", "is not a scheduler of diffusers. Near: UniPCMultistepScheduler."),
        ("DDMPScheduler", "is not a scheduler of diffusers. Near: DDPMScheduler"),
        ("?", "is not a scheduler of diffusers. Known: "),
        ("", "is not a scheduler of diffusers. Known: "),
        ("UNet2DConditionModel", "cannot draw with these models. Known: "),
        ("FlowMatchEulerDiscreteScheduler", "cannot draw with these models. "),
        ("EDMEulerScheduler", "cannot draw with these models. "),
        ("DDIMInverseScheduler", "cannot draw with these models. "),
        ("CogVideoXDPMScheduler", "cannot draw with these models. "),
        ("DPMSolverSDEScheduler", "needs other packages: pip install torch torchsde. "),
    ],
)
def test_other_words_for_a_sampler_are_refused(name, words):
    """The sentence names those that are near."""
    (sentence,) = preview_pipeline.find_sampler_problems(name)
    assert sentence.startswith(f"--validation_scheduler {name} {words}")
    listed = re.findall(r"\w+Scheduler", sentence.rpartition(": ")[2])
    assert listed and all(preview_pipeline.is_sampler(one) for one in listed)


@pytest.mark.parametrize("how", ["", "--dry_run"])
def test_unknown_layers_are_told_before_anything_is_loaded(how, trainer, tiny, tmp_path):
    """With the names that exist, without the blocks that they lie in; nothing is written, no weights are needed."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    for path in model.rglob("*.safetensors"):
        path.unlink()
    flags = f"--pretrained_model_name_or_path {model} --lora_layers to_q,to_kk,conv9 {how}"
    run = trainer.run("lora", tmp_path / "out", flags, code=1)
    said = (
        "UNet2DConditionModel has no layers named to_kk, conv9. It has the linear layers linear_1, linear_2, net.2, "
        "proj, time_emb_proj, to_k, to_out.0, to_q, to_v and the convolutions conv, conv1, conv2, conv_in, conv_out, "
        "conv_shortcut, proj_in, proj_out. See --lora_layers.\n"
    )
    assert run.stderr.endswith(said) and "Traceback" not in run.stderr and not (tmp_path / "out").exists()


def test_layers_are_found_by_the_ends_of_their_names():
    """One name may end several paths; a part of a word is no end."""
    unet = build_unet({"cross_attention_dim": 32, **SHAPES["tiny"]["unet"]})
    assert layer_names.describe_unknown_layers(unet, ["to_k", "attn1.to_q", "net.2"], "--x") == ""
    assert "no layers named o_k. " in layer_names.describe_unknown_layers(unet, ["to_k", "o_k"], "--x")
    assert layer_names.find_unknown_layers(dict(unet.config), None) == []
    assert layer_names.find_unknown_layers({"down_block_types": ["?"]}, "to_k") == []
