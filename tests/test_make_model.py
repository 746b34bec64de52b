"""Random models: sizes, reproducibility, and that diffusers and transformers read them back."""

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from utils import make_model as tool
from utils.core.errors import UserError
from utils.synthetic import random_models
from utils.synthetic.model_sizes import SHAPES
from utils.synthetic.random_models import make_model
from utils.synthetic.small_tokenizers import END, START, WORDS, build_t5_tokenizer, build_tokenizer

PUBLISHED = {  # U-Net, VAE, text encoder
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sd21": (865_910_724, 83_653_863, 340_387_840),
}
IF_UNETS = {  # parameters; the model cards' figure, which they round down
    "if1-m": (371_605_830, 400e6),
    "if1-l": (935_365_830, 900e6),
    "if1-xl": (4_304_695_110, 4.3e9),
    "if2-m": (458_085_510, 450e6),
    "if2-l": (1_243_277_190, 1.2e9),
}
IF_CLASSES = {"tiny-if1": "IFPipeline", "tiny-if2": "IFSuperResolutionPipeline"}
IF_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Write the tiny model once."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", "tiny")


@pytest.fixture(scope="module")
def cascade(tmp_path_factory) -> dict[str, Path]:
    """Write the tiny models of IF's three stages once."""
    folder = tmp_path_factory.mktemp("cascade")
    return {shape: make_model(folder / shape, shape) for shape in ("tiny-if1", "tiny-if2", "tiny-x4")}


def load_quietly(folder: Path) -> DiffusionPipeline:
    """Load a pipeline that draws without a progress bar."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def count_on_meta(build, config: dict) -> int:
    """Build a network without memory and count its parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())


def count_parameters(shape: dict) -> tuple[int, int, int]:
    """Build a shape's networks without memory and count: U-Net, VAE, text encoder."""
    with torch.device("meta"):
        networks = (
            random_models.build_unet({**shape["unet"], "cross_attention_dim": shape["text"]["hidden_size"]}),
            random_models.build_vae(shape["vae"]),
            random_models.build_text_encoder({"vocab_size": 600, **shape["text"]}),
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
    assert {"photo", "dog", "cat", "sks", "of", "in", "the", "red", "blue"} <= set(WORDS)
    prompt = " ".join(["a", *WORDS])
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
    tokenizer = build_tokenizer(SHAPES["sd21"]["pad_token"])
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
    with pytest.raises(UserError, match="not an empty folder"):
        make_model(folder, "tiny")


@pytest.mark.parametrize("shape", IF_UNETS)
def test_if_shapes_have_the_published_parameter_counts(shape):
    recipe = SHAPES[shape]
    build = random_models.build_if2_unet if recipe["family"] == "if2" else random_models.build_if1_unet
    counted = count_on_meta(build, {**recipe["unet"], "encoder_hid_dim": recipe["text"]["d_model"]})
    exact, rounded = IF_UNETS[shape]
    assert counted == exact and abs(counted / rounded - 1) < 0.08
    assert count_on_meta(random_models.build_t5_encoder, recipe["text"]) == 4_762_310_656


def test_small_if1_is_small_enough_for_a_benchmark():
    recipe = SHAPES["small-if1"]
    assert 20e6 < count_on_meta(random_models.build_if1_unet, {**recipe["unet"], "encoder_hid_dim": 256}) < 40e6
    assert recipe["text"]["d_model"] == 256 and recipe["unet"]["sample_size"] == 64


@pytest.mark.parametrize("shape, sizes", [("if1-xl", (704, 1408, 2112, 2816)), ("if2-l", (160, 320, 640, 960, 1280))])
def test_if_unets_are_configured_as_published(shape, sizes):
    recipe = SHAPES[shape]
    upscales = recipe["family"] == "if2"
    build = random_models.build_if2_unet if upscales else random_models.build_if1_unet
    with torch.device("meta"):
        config = build({**recipe["unet"], "encoder_hid_dim": 4096}).config
    assert config.block_out_channels == sizes and config.cross_attention_dim == sizes[-1]
    assert config.layers_per_block == ((2, 2, 3, 5, 5) if upscales else 3) and not config.only_cross_attention
    attending = 2 if upscales else 3
    blocks = ["ResnetDownsampleBlock2D"] * (len(sizes) - attending) + ["SimpleCrossAttnDownBlock2D"] * attending
    assert list(config.down_block_types) == blocks
    assert list(config.up_block_types) == [name.replace("Down", "Up").replace("down", "up") for name in blocks[::-1]]
    assert config.mid_block_type == "UNetMidBlock2DSimpleCrossAttn" and config.attention_head_dim == 64
    assert (config.encoder_hid_dim_type, config.encoder_hid_dim) == ("text_proj", 4096)
    assert (config.addition_embed_type, config.addition_embed_type_num_heads) == ("text", 64)
    assert (config.cross_attention_norm, config.resnet_time_scale_shift) == ("group_norm", "scale_shift")
    assert config.act_fn == "gelu" and (config.in_channels, config.out_channels) == (6 if upscales else 3, 6)
    assert config.sample_size == (256 if upscales else 64)
    scale = 1.4142271248762552 if upscales else 1
    assert config.resnet_out_scale_factor == config.mid_block_scale_factor == scale
    assert config.class_embed_type == ("timestep" if upscales else None)
    assert config.time_embedding_dim == (1280 if upscales else None)
    assert config.time_embedding_act_fn == ("gelu" if upscales else None) and config.resnet_skip_time_act == upscales


@pytest.mark.parametrize("shape", IF_CLASSES)
def test_the_folder_is_a_small_if_pipeline(cascade, shape):
    folder = cascade[shape]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == IF_CLASSES[shape]
    assert index["safety_checker"] == index["feature_extractor"] == index["watermarker"] == [None, None]
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    assert index["tokenizer"] == ["transformers", "T5Tokenizer"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    assert {path.name for path in (folder / "tokenizer").iterdir()} == {
        *("spiece.model", "special_tokens_map.json", "tokenizer_config.json")
    }


def test_the_schedulers_are_ifs(cascade):
    for shape, largest in (("tiny-if1", 1.5), ("tiny-if2", 1.0)):
        config = DDPMScheduler.from_pretrained(cascade[shape] / "scheduler").config
        assert (config.beta_schedule, config.variance_type) == ("squaredcos_cap_v2", "learned_range")
        assert config.prediction_type == "epsilon" and config.num_train_timesteps == 1000 and config.clip_sample
        assert (config.thresholding, config.dynamic_thresholding_ratio, config.sample_max_value) == (
            True,
            0.95,
            largest,
        )
    noising = DDPMScheduler.from_pretrained(cascade["tiny-if2"] / "image_noising_scheduler").config
    assert (noising.beta_schedule, noising.variance_type) == ("squaredcos_cap_v2", "fixed_small")


def test_the_three_stages_draw_one_after_the_other(cascade):
    first, second, third = (load_quietly(folder) for folder in cascade.values())
    seeds = torch.Generator()
    drawn = []
    for prompt in ("a dog", "a red cat", "a dog"):
        base = first(prompt, num_inference_steps=2, generator=seeds.manual_seed(0), output_type="pt").images
        image = second(
            prompt, image=base, num_inference_steps=2, generator=seeds.manual_seed(0), output_type="pt"
        ).images
        assert base.shape == (1, 3, 16, 16) and image.shape == (1, 3, 64, 64)
        large = third(
            prompt, image=image / 2 + 0.5, num_inference_steps=2, generator=seeds.manual_seed(0), output_type="np"
        ).images
        assert large.shape == (1, 256, 256, 3) and min(part.std() for part in (base, image, large)) > 0.05
        drawn.append((base, image, torch.from_numpy(large)))
    for dog, cat, again in zip(*drawn, strict=True):
        assert torch.equal(dog, again) and (dog - cat).abs().mean() > 1e-5


def test_if_unets_take_multiples_of_4_and_their_text_and_noise_level(cascade):
    first, second = (DiffusionPipeline.from_pretrained(cascade[shape]).unet for shape in IF_CLASSES)
    text = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        noise = first(torch.ones(1, 3, 20, 20), 5, text).sample
        assert noise.shape == (1, 6, 20, 20) and noise.std() > 0.01
        assert (noise - first(torch.ones(1, 3, 20, 20), 5, 2 - text).sample).abs().mean() > 1e-4
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            first(torch.ones(1, 3, 18, 18), 5, text)
        levels = [second(torch.ones(1, 6, 16, 16), 5, text, class_labels=torch.tensor([t])).sample for t in (1, 900)]
    assert (levels[0] - levels[1]).abs().mean() > 1e-4


def test_if_unets_have_enough_layers_for_lora(cascade):
    for shape, layers in (("tiny-if1", 42), ("tiny-if2", 24)):
        unet = DiffusionPipeline.from_pretrained(cascade[shape]).unet
        assert sum(name.endswith(IF_TARGETS) for name, _ in unet.named_modules()) == layers


def test_both_if_stages_share_text_encoder_and_tokenizer(cascade):
    first, second = (cascade[shape] for shape in IF_CLASSES)
    paths = [path for part in ("text_encoder", "tokenizer") for path in (first / part).iterdir()]
    assert {path.name for path in paths} >= {"model.safetensors", "config.json", "spiece.model"}
    assert all(path.read_bytes() == (second / path.relative_to(first)).read_bytes() for path in paths)


@pytest.mark.parametrize("shape", ["tiny-if1", "tiny-if2", "tiny-x4"])
def test_the_same_arguments_give_the_same_files(cascade, tmp_path, shape):
    again, other = make_model(tmp_path / "again", shape), make_model(tmp_path / "other", shape, seed=1)
    names = {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    assert names == {path.relative_to(cascade[shape]) for path in cascade[shape].rglob("*") if path.is_file()}
    assert all((again / name).read_bytes() == (cascade[shape] / name).read_bytes() for name in names)
    weights = [name for name in names if name.suffix == ".safetensors"]
    assert len(weights) >= 2
    assert all((other / name).read_bytes() != (again / name).read_bytes() for name in weights)


@pytest.mark.parametrize("loader", [AutoTokenizer, T5Tokenizer])
def test_the_t5_tokenizer_reads_its_sentencepiece_file(cascade, loader):
    tokenizer = loader.from_pretrained(cascade["tiny-if1"] / "tokenizer")
    assert isinstance(tokenizer, T5Tokenizer) and tokenizer.model_max_length == 512
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    prompt = " ".join(["a", *WORDS])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    assert tokens == [*("▁" + word for word in prompt.split()), "</s>"]
    odd = "Zwx5k's theatre, 100% [dogs]!"
    assert tokenizer.decode(tokenizer(odd).input_ids, skip_special_tokens=True) == odd
    assert tokenizer("").input_ids == [1]
    assert tokenizer("dog 猫").input_ids[-2:] == [2, 1]
    padded = tokenizer("dog", padding="max_length", max_length=4)
    assert padded.input_ids[1:] == [1, 0, 0] and padded.attention_mask == [1, 1, 0, 0]
    assert tokenizer("dog " * 100, max_length=77, truncation=True).input_ids[-2:] == [*tokenizer("dog").input_ids]
    text_encoder = T5EncoderModel.from_pretrained(cascade["tiny-if1"] / "text_encoder")
    assert sorted(tokenizer.get_vocab().values()) == list(range(text_encoder.config.vocab_size))


def test_the_sentencepiece_file_is_a_genuine_one(cascade):
    folder = cascade["tiny-if1"] / "tokenizer"
    genuine, tokenizer = SentencePieceProcessor(str(folder / "spiece.model")), T5Tokenizer.from_pretrained(folder)
    assert (genuine.pad_id(), genuine.eos_id(), genuine.unk_id(), genuine.bos_id()) == (0, 1, 2, -1)
    assert genuine.is_control(0) and genuine.is_control(1) and genuine.is_unknown(2) and not genuine.is_control(3)
    for prompt in ("a photo of sks dog", "Zwx5k's theatre, 猫!"):
        assert [*genuine.encode(prompt), 1] == tokenizer(prompt).input_ids


def test_the_t5_tokenizer_in_memory_is_the_one_on_disk(cascade):
    loaded, built = (
        T5Tokenizer.from_pretrained(cascade["tiny-if1"] / "tokenizer"),
        build_t5_tokenizer(),
    )
    assert loaded.get_vocab() == built.get_vocab()
    for prompt in ("a photo of sks dog", "", "Zwx5k's theatre, 猫!"):
        assert loaded(prompt).input_ids == built(prompt).input_ids


def test_the_x4_upscaler_is_configured_as_published(cascade):
    pipeline = DiffusionPipeline.from_pretrained(cascade["tiny-x4"])
    assert type(pipeline).__name__ == "StableDiffusionUpscalePipeline" and pipeline.config.max_noise_level == 350
    assert pipeline.vae_scale_factor == 4 and pipeline.vae.config.scaling_factor == 0.08333
    config = pipeline.unet.config
    assert (config.in_channels, config.out_channels, config.num_class_embeds) == (7, 4, 1000)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    for schedule in (pipeline.scheduler.config, pipeline.low_res_scheduler.config):
        assert (schedule.beta_schedule, schedule.beta_start, schedule.beta_end) == ("scaled_linear", 0.0001, 0.02)
    assert sum(path.stat().st_size for path in cascade["tiny-x4"].rglob("*") if path.is_file()) < 3e6


def note_dtypes(build, seen: set[torch.dtype], config: dict) -> torch.nn.Module:
    """Build a network and note in which dtypes its parameters were made."""
    network = build(config)
    seen.update(parameter.dtype for parameter in network.parameters())
    return network


def test_if_is_built_directly_in_its_dtype(monkeypatch, tmp_path):
    seen = set()
    for name in ("build_if1_unet", "build_t5_encoder"):
        monkeypatch.setattr(random_models, name, functools.partial(note_dtypes, getattr(random_models, name), seen))
    folder = tmp_path / "bf16"
    tool.main([str(folder), "--shape", "tiny-if1", "--dtype", "bf16"])
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in all_weights(folder).values()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(RuntimeError), random_models.default_dtype(torch.bfloat16):
        raise RuntimeError
    assert torch.get_default_dtype() == torch.float32


def test_a_real_shape_has_a_thin_text_encoder_unless_the_full_one_is_asked_for(monkeypatch, tmp_path, capsys):
    recipes = []
    monkeypatch.setitem(random_models.BUILDERS, "if1", lambda recipe, *rest: recipes.append(recipe) or tool.sys.exit())
    for flags in ([], ["--full_text_encoder"]):
        with pytest.raises(SystemExit):
            tool.main([str(tmp_path / "model"), "--shape", "if1-m", *flags])
    assert recipes[0]["unet"] == recipes[1]["unet"] == SHAPES["if1-m"]["unet"]
    thin, full = ({"vocab_size": 231, **recipe["text"]} for recipe in recipes)
    assert thin["d_model"] == full["d_model"] == 4096
    assert count_on_meta(random_models.build_t5_encoder, thin) < 5e6 and full == SHAPES["if1-m"]["text"]
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "model"), "--shape", "tiny-if1", "--full_text_encoder"])
    assert "--full_text_encoder is for if1-* and if2-*, not for --shape tiny-if1" in capsys.readouterr().err
