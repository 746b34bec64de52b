"""In which precision networks are loaded and saved, and what results and pictures are made of, seen from inside."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth
import train_dreambooth_lora
from tests.inside import BF16, PREVIEWS, watch
from tests.runs import CLASS_PROMPT, WEIGHTS_FILE, differing, read_tensors
from utils.devices import device_memory


@pytest.fixture(params=[train_dreambooth, train_dreambooth_lora], ids=["full", "lora"])
def script(request):
    """Run a test with each script."""
    return request.param


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
    assert "--local_rank" in caplog.text


def test_a_network_is_moved_back():
    """After drawing, a VAE that only previews need makes room again."""
    network, moves = torch.nn.Linear(2, 2), []
    network.to = lambda device: moves.append(device.type)
    for device in ("cpu", "meta"):
        with device_memory.moved_to(torch.device(device), network):
            moves.append("draws")
    assert moves == ["draws", "meta", "draws", "cpu"]
