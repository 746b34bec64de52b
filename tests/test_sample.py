"""Drawing with results and checkpoints: the same pictures as the live model's, to the bit, and every tensor there."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from utils import sample
from utils.core.errors import UserError
from utils.sampling import results
from utils.synthetic.random_models import make_model

PROMPT, SEED, STEPS = "a photo of sks dog on the beach, at night", 3, 2
RUNS = {  # name: script and flags
    "full": ("full", "--learning_rate 1e-2"),
    "full text": ("full", "--learning_rate 1e-2 --train_text_encoder"),
    "lora": ("lora", "--learning_rate 1e-1 --rank 4 --lora_alpha 8"),
    "lora text": ("lora", "--learning_rate 1e-1 --rank 4 --lora_alpha 8 --train_text_encoder"),
    "masked": ("lora", "--learning_rate 1e-1 --tokenizer_max_length 9 --text_encoder_use_attention_mask"),
    "short": ("full", "--learning_rate 1e-2 --tokenizer_max_length 9 --skip_save_text_encoder"),
}
TRAINED = [name for name, (_, flags) in RUNS.items() if "tokenizer" not in flags]
ADAPTERS = ["lora", "lora text"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Write a tiny model whose scheduler config leaves out what is default, as those of published models do."""
    model = make_model(tmp_path_factory.mktemp("models") / "base", "tiny")
    path = model / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["timestep_spacing"], config["trained_betas"]
    path.write_text(json.dumps(config))
    return model


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, trainer, base, photos) -> dict[str, Path]:
    """Train every run for two steps, with previews and checkpoints, and return their output folders."""
    home, jobs = tmp_path_factory.mktemp("outputs"), {}
    for name, (script, flags) in RUNS.items():
        jobs[name] = trainer.start_words(
            script,
            home / name.replace(" ", "-"),
            [
                *("--pretrained_model_name_or_path", str(base), "--instance_data_dir", str(photos)),
                *("--output_dir", str(home / name.replace(" ", "-")), "--instance_prompt", "a photo of sks dog"),
                *("--validation_prompt", PROMPT, "--validation_negative_prompt", "red", "--seed", str(SEED)),
                *"--resolution 64 --train_batch_size 1 --max_train_steps 2 --checkpointing_steps 1".split(),
                *f"--num_validation_images 2 --validation_num_inference_steps {STEPS} --report_to none".split(),
                *flags.split(),
            ],
        )
    runs = {name: job.finish() for name, job in jobs.items()}
    assert not [run.text for run in runs.values() if run.code]
    return {name: run.out for name, run in runs.items()}


@pytest.fixture
def adapter(outputs, tmp_path) -> Path:
    """Copy an adapter away from its run, to be changed by a test."""
    return shutil.copytree(outputs["lora text"] / "checkpoint-2", tmp_path / "adapter")


def pixels(images) -> np.ndarray:
    """Return pictures or their files as one array of numbers that can be subtracted."""
    opened = [image if isinstance(image, Image.Image) else Image.open(image) for image in images]
    return np.stack([np.asarray(image) for image in opened]).astype(int)


def redraw(pipeline, **options) -> np.ndarray:
    """Draw what training drew."""
    options = {"negative_prompt": "red", "num_inference_steps": STEPS, "size": (64, 64)} | options
    return pixels(sample.draw(pipeline, [PROMPT], [SEED, SEED + 1], **options))


def previews_of(output: Path, step: int = 2) -> np.ndarray:
    """Read the previews of a step."""
    return pixels(output / "samples" / f"step-{step:06d}" / f"{index:02d}.png" for index in range(2))


def loaded_adapter(pipeline) -> dict[str, torch.Tensor]:
    """Return the tensors of a pipeline's only adapter under the names that a file has for them."""
    found = {}
    for name, level in (("unet", ""), ("text_encoder", "text_model.")):
        network = getattr(pipeline, name)
        for adapter_name in getattr(network, "peft_config", {}):
            state = peft.get_peft_model_state_dict(network, adapter_name=adapter_name, save_embedding_layers=False)
            found |= {f"{name}.{level}{key}": value for key, value in state.items()}
    return found


# What was trained comes back.


@pytest.mark.parametrize("folder", ["", "checkpoint-2"])
@pytest.mark.parametrize("run", RUNS)
def test_a_result_draws_what_the_live_model_drew(outputs, run, folder):
    """The last previews come out again, to the bit; not those from before the training."""
    drawn = redraw(sample.load_pipeline(outputs[run] / folder))
    assert np.array_equal(drawn, previews_of(outputs[run]))
    assert np.abs(drawn - previews_of(outputs[run], 0)).max() > 8


@pytest.mark.parametrize("run", TRAINED)
def test_an_earlier_checkpoint_draws_something_else(outputs, run):
    """A checkpoint holds its own step's weights."""
    drawn = redraw(sample.load_pipeline(outputs[run] / "checkpoint-1"))
    assert np.abs(drawn - previews_of(outputs[run])).max() > 8


def test_the_base_model_draws_the_first_previews(outputs, base):
    """Before the first step the model is the base model, with an adapter too."""
    for drawn in (redraw(sample.load_pipeline(base)), redraw(sample.load_pipeline(outputs["lora"], lora_scale=0))):
        assert np.array_equal(drawn, previews_of(outputs["lora"], 0))


@pytest.mark.parametrize("run", ADAPTERS)
def test_every_tensor_of_an_adapter_loads(outputs, base, run):
    """Plain diffusers reads the file: every tensor to the bit, and the alpha."""
    saved = safetensors.torch.load_file(outputs[run] / results.ADAPTER)
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(outputs[run])
    loaded = loaded_adapter(pipeline)
    assert loaded.keys() == saved.keys() and {key.split(".")[0] for key in saved} >= {"unet"}
    assert any(key.startswith("text_encoder") for key in saved) == ("text" in run)
    assert all(torch.equal(loaded[key], saved[key]) and saved[key].dtype == torch.float32 for key in saved)
    configs = [c for n in (pipeline.unet, pipeline.text_encoder) for c in getattr(n, "peft_config", {}).values()]
    assert [(config.r, config.lora_alpha) for config in configs] == [(4, 8)] * (2 if "text" in run else 1)


@pytest.mark.parametrize("run", ["full", "full text"])
def test_a_full_result_is_a_pipeline_in_float32(outputs, base, run):
    """Plain diffusers loads it; what was not trained is the base model's."""
    pipeline, original = DiffusionPipeline.from_pretrained(outputs[run]), DiffusionPipeline.from_pretrained(base)
    assert isinstance(pipeline, StableDiffusionPipeline)
    for name in ("unet", "text_encoder", "vae"):
        ours, theirs = getattr(pipeline, name).state_dict(), getattr(original, name).state_dict()
        changed = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
        assert all(value.dtype == torch.float32 for value in ours.values() if value.is_floating_point())
        assert bool(changed) == (name == "unet" or (name, run) == ("text_encoder", "full text"))


@pytest.mark.parametrize("run", ["full", "lora"])
def test_the_saved_sampler_has_the_base_models_settings(outputs, base, run):
    """A saved default counts as chosen: another sampler made from it would draw other pictures than the base's."""
    saved, original = (
        json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) for folder in (outputs[run], base)
    )
    assert {key: value for key, value in saved.items() if key[0] != "_"} == {
        key: value for key, value in original.items() if key[0] != "_"
    }
    pipeline = sample.load_pipeline(outputs[run], scheduler="saved")
    assert type(pipeline.scheduler).__name__ == original["_class_name"]


# How it is drawn.


def test_batches_draw_nearly_the_same(outputs):
    """Only rounding tells a batch of two from two batches of one."""
    difference = redraw(sample.load_pipeline(outputs["full"]), batch_size=2) - previews_of(outputs["full"])
    assert np.abs(difference).max() <= 2


def test_options_reach_the_model(outputs):
    """Sampler, guidance, negative prompt, steps and strength each change the picture; the size is as asked."""
    load = partial(sample.load_pipeline, outputs["lora"])
    pipeline, usual = load(), previews_of(outputs["lora"])
    for options in ({"negative_prompt": ""}, {"guidance_scale": 1.0}, {"num_inference_steps": 3}):
        assert np.abs(redraw(pipeline, **options) - usual).max() > 0
    assert np.abs(redraw(load(lora_scale=0.5)) - usual).max() > 0
    drawn = [redraw(load(scheduler=name), num_inference_steps=4) for name in sample.SCHEDULERS]
    assert len({picture.tobytes() for picture in drawn}) == len(sample.SCHEDULERS)
    assert redraw(pipeline, size=(48, 72)).shape == (2, 48, 72, 3)
    assert sample.draw(pipeline, ["x"], [0], num_inference_steps=1)[0].size == (64, 64)


def test_bf16_reaches_every_network(outputs):
    """Nothing stays in another precision, the adapter included."""
    pipeline = sample.load_pipeline(outputs["lora text"], dtype=torch.bfloat16)
    networks = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.bfloat16}
    assert redraw(pipeline).shape == (2, 64, 64, 3)


def test_an_adapter_away_from_its_run_needs_its_base_model(outputs, adapter, base):
    """Without args.json the base model is named by hand, and gives the same picture."""
    with pytest.raises(UserError, match=r"needs its base model, and no args.json names it"):
        sample.load_pipeline(adapter)
    assert np.array_equal(redraw(sample.load_pipeline(adapter, base)), previews_of(outputs["lora text"]))


def test_the_command_writes_pictures_and_a_grid(outputs, tmp_path, monkeypatch, capsys):
    """Each pair has a file with a readable name, at the resolution of the training, and the sheet shows all."""
    monkeypatch.chdir(tmp_path)
    flags = ["--prompt", PROMPT, "../白い 犬?", "--seed", "3", "4", "--negative_prompt", "red"]
    assert sample.main([str(outputs["lora"] / "checkpoint-2"), *flags, "--num_inference_steps", str(STEPS)]) == 0
    folder = Path("samples", "lora-checkpoint-2")
    assert f"Wrote 4 pictures and grid.png to {folder}" in capsys.readouterr().out
    own = [f"00-a-photo-of-sks-dog-on-the-beach-at-night-seed{seed}.png" for seed in (3, 4)]
    assert {path.name for path in folder.iterdir()} == {*own, "01-seed3.png", "01-seed4.png", "grid.png"}
    assert np.array_equal(pixels(folder / name for name in own), previews_of(outputs["lora"]))
    assert Image.open(folder / "grid.png").width > 2 * 64


# What goes wrong is said.


def test_words_that_are_too_many_are_said(base, tmp_path, caplog):
    """The text encoder does not see what comes after 77 tokens."""
    flags = ["--num_inference_steps", "1", "--output", str(tmp_path)]
    assert sample.main([str(base), "--prompt", "dog " * 80 + "zebra", *flags]) == 0
    assert "truncated" in caplog.text


def test_a_layer_that_the_model_lacks_is_an_error(adapter, base):
    """Diffusers loads the other layers and warns."""
    path = adapter / results.ADAPTER
    state = safetensors.torch.load_file(path)
    state |= {
        key.replace("mid_block", "end_block"): value.clone() for key, value in state.items() if "mid_block" in key
    }
    safetensors.torch.save_file(state, path)
    with pytest.raises(UserError, match=r"does not fit .*: it lacks \d+ of \d+ layers, the first being unet.end_blo"):
        sample.load_pipeline(adapter, base)


def test_an_adapter_of_another_shape_is_an_error(adapter, base):
    """Layers of the same names and other widths do not fit."""
    path = adapter / results.ADAPTER
    state = safetensors.torch.load_file(path)
    state = {key: value if "lora_B" in key else torch.cat([value, value], 1) for key, value in state.items()}
    safetensors.torch.save_file(state, path)
    with pytest.raises(UserError, match=r"does not fit the base model .*size mismatch"):
        sample.load_pipeline(adapter, base)


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("full", {"base_model": "x"}, "is a whole pipeline: --base_model x would have no effect"),
        ("full", {"lora_scale": 0.5}, "--lora_scale 0.5: .* is no adapter"),
        ("lora", {"base_model": "nobody/nothing"}, "nobody/nothing has no model_index.json .from --base_model"),
        ("lora", {"dtype": torch.float16, "device": "cpu"}, "--dtype fp16 needs a GPU"),
    ],
)
def test_flags_that_do_not_fit_are_errors(outputs, run, options, message):
    """What cannot be done or changes nothing is refused."""
    with pytest.raises(UserError, match=message):
        sample.load_pipeline(outputs[run], **options)


def test_a_stopped_runs_folder_points_to_its_checkpoints(outputs, tmp_path):
    """A run without a result has checkpoints."""
    folder = shutil.copytree(outputs["lora"], tmp_path / "stopped")
    (folder / results.ADAPTER).unlink()
    with pytest.raises(UserError, match=r"It has checkpoint-1, checkpoint-2: name one of them, as .*checkpoint-2"):
        sample.load_pipeline(folder)


def test_other_mistakes_are_told(outputs, tmp_path, capsys):
    """The command ends with a message and exit status 1 or 2."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "args.json").write_text("[1")
    for words, message in (
        (["nobody/nothing"], "nobody/nothing is no folder, and as a Hub id it gave neither model_index.json nor"),
        ([str(tmp_path)], "args.json cannot be read"),
        ([str(outputs["full"]), "--height", "60"], "--height 60 is no multiple of 8"),
    ):
        assert sample.main([*words, "--prompt", "x", "--output", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        sample.main(["x", "--prompt", "x", "--seed", "-1", "--num_inference_steps", "0", "--lora_scale", "-1"])
    text = capsys.readouterr().err
    assert "--num_inference_steps 0" in text and "--lora_scale -1.0" in text and "--seed -1 is negative" in text


def test_a_base_model_that_has_moved_is_told(outputs, tmp_path):
    """The args.json of a run may name a folder that is no longer there."""
    folder = shutil.copytree(outputs["lora"] / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    (folder.parent / "args.json").write_text(json.dumps({"pretrained_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"gone has no model_index.json .from its args.json: if it has moved"):
        sample.load_pipeline(folder)
