"""Random models: sizes, reproducibility, and that diffusers and transformers read them back."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTokenizer

from utils import make_model as tool
from utils.errors import InputError
from utils.make_model import END, SHAPES, START, WORDS, make_model

PUBLISHED = {  # U-Net, VAE, text encoder
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sd21": (865_910_724, 83_653_863, 340_387_840),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Write the tiny model once."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", "tiny")


def count_parameters(shape: dict) -> tuple[int, int, int]:
    """Build a shape's networks without memory and count: U-Net, VAE, text encoder."""
    with torch.device("meta"):
        networks = (
            tool.build_unet({**shape["unet"], "cross_attention_dim": shape["text"]["hidden_size"]}),
            tool.build_vae(shape["vae"]),
            tool.build_text_encoder({"vocab_size": 600, **shape["text"]}),
        )
    return tuple(sum(parameter.numel() for parameter in network.parameters()) for network in networks)


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a pipeline folder."""
    return {
        f"{file.parent.name}/{name}": tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("shape", PUBLISHED)
def test_real_shapes_have_the_published_parameter_counts(shape):
    assert count_parameters(SHAPES[shape]) == PUBLISHED[shape]


def test_small_is_small_enough_for_a_benchmark():
    assert 20e6 < count_parameters(SHAPES["small"])[0] < 40e6


def test_sd21_is_configured_as_published():
    unet = SHAPES["sd21"]["unet"]
    assert unet["sample_size"] == 96 and unet["attention_head_dim"] == (5, 10, 20, 20)
    assert unet["use_linear_projection"] and unet["upcast_attention"]
    assert SHAPES["sd21"]["prediction_type"] == "v_prediction" and SHAPES["sd21"]["text"]["hidden_act"] == "gelu"


def test_the_folder_is_a_small_stable_diffusion_pipeline(tiny):
    index = json.loads((tiny / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    files = [path for path in tiny.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth")]


def test_a_loaded_pipeline_draws_64_pixels_that_depend_on_seed_and_prompt(tiny):
    pipeline = DiffusionPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae_scale_factor == 8 and pipeline.vae.config.scaling_factor == 0.18215
    images = [
        pipeline(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(seed), output_type="np").images
        for prompt, seed in (("a dog", 0), ("a dog", 0), ("a dog", 1), ("a red cat", 0))
    ]
    assert images[0].shape == (1, 64, 64, 3) and images[0].std() > 0.05
    assert (images[0] == images[1]).all()
    assert abs(images[0] - images[2]).mean() > 0.01 and abs(images[0] - images[3]).mean() > 1e-4


def test_no_network_starts_with_a_zero_output(tiny):
    pipeline = DiffusionPipeline.from_pretrained(tiny)
    with torch.no_grad():
        text = pipeline.text_encoder(torch.tensor([[1, 2, 3]]))[0]
        noise = pipeline.unet(torch.ones(1, 4, 8, 8), 5, text).sample
        latents = pipeline.vae.encode(torch.ones(1, 3, 64, 64)).latent_dist.mean
    for output, shape in ((text, (1, 3, 32)), (noise, (1, 4, 8, 8)), (latents, (1, 4, 8, 8))):
        assert output.shape == shape and output.std() > 0.01


@pytest.mark.parametrize("loader", [AutoTokenizer, CLIPTokenizer])
def test_common_words_are_one_token_and_everything_else_survives(tiny, loader):
    tokenizer = loader.from_pretrained(tiny / "tokenizer")
    assert isinstance(tokenizer, CLIPTokenizer) and tokenizer.model_max_length == 77
    assert {"photo", "dog", "cat", "sks", "of", "in", "the", "red", "blue"} <= set(WORDS.split())
    prompt = " ".join(["a", *WORDS.split()])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    assert tokens == [START, *(word + "</w>" for word in prompt.split()), END]
    odd = "zwx5k's ñandú, 猫!"
    assert tokenizer.decode(tokenizer(odd).input_ids, skip_special_tokens=True).replace(" ", "") == odd.replace(
        " ", ""
    )
    padded = tokenizer("dog " * 100, padding="max_length", truncation=True).input_ids
    assert len(padded) == 77 and padded[-1] == tokenizer.eos_token_id == max(tokenizer.get_vocab().values())
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_sd21_pads_with_an_exclamation_mark():
    tokenizer = tool.build_tokenizer(SHAPES["sd21"]["pad_token"])
    assert tokenizer("dog", padding="max_length", max_length=4).input_ids[-1] == tokenizer.get_vocab()["!"] == 0


@pytest.mark.parametrize(
    "shape, given, expected", [("tiny", None, "epsilon"), ("tiny", "v_prediction", "v_prediction")]
)
def test_the_scheduler_is_stable_diffusions(tmp_path, shape, given, expected):
    make_model(tmp_path / "model", shape, given)
    config = DDPMScheduler.from_pretrained(tmp_path / "model" / "scheduler").config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert config.num_train_timesteps == 1000 and config.steps_offset == 1 and config.clip_sample is False
    assert config.prediction_type == expected


def test_weights_depend_on_the_seed_alone(tiny, tmp_path):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    again = all_weights(make_model(tmp_path / "again", "tiny"))
    assert torch.equal(torch.rand(3), expected)
    other = all_weights(make_model(tmp_path / "other", "tiny", seed=1))
    first = all_weights(tiny)
    assert first.keys() == again.keys() == other.keys() and len(first) > 200
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["unet/conv_in.weight"], other["unet/conv_in.weight"])


def test_the_command_line_writes_a_variant_and_refuses_a_folder_with_files(tmp_path, capsys):
    folder = tmp_path / "half"
    tool.main([str(folder), "--shape", "tiny", "--dtype", "fp16", "--variant", "fp16"])
    assert "shape tiny" in capsys.readouterr().out
    assert all("fp16" in path.name for path in folder.rglob("*.safetensors"))
    assert {tensor.dtype for name, tensor in all_weights(folder).items()} == {torch.float16}
    pipeline = DiffusionPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float16)
    assert pipeline.unet.dtype == torch.float16
    with pytest.raises(SystemExit):
        tool.main([str(folder), "--shape", "tiny"])
    assert "already exists" in capsys.readouterr().err
    with pytest.raises(InputError, match="not an empty folder"):
        make_model(folder, "tiny")
