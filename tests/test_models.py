"""What the scripts make of a checkpoint's config files, on tiny folders that imitate other families of models."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from accelerate import PartialState
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import train_dreambooth
import train_dreambooth_lora
from utils.core.errors import UserError
from utils.models import model_files
from utils.synthetic.random_models import make_model
from utils.synthetic.small_tokenizers import END, build_tokenizer

SUPPORTED = "Supported: Stable Diffusion 1.x/2.x, DeepFloyd IF stage I, DeepFloyd IF stage II."
GONE = "(removed)"  # in a change of a config: the key is taken out


@pytest.fixture(params=[train_dreambooth, train_dreambooth_lora], ids=lambda module: module.__name__)
def script(request):
    """Run a test with each script."""
    return request.param


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Write a tiny Stable Diffusion model once."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", "tiny")


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """Copy the tiny model's configs and tokenizer, not its weights, to be changed by a test."""
    return shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture
def parse(script, tmp_path):
    """Give a function that parses flags for a model."""
    (tmp_path / "photos").mkdir()
    return lambda model, *flags: script.parse_args(
        [
            *("--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(tmp_path / "photos")),
            *("--instance_prompt", "a photo of sks dog", "--output_dir", str(tmp_path / "out"), *flags),
        ]
    )


def change(folder: Path, filename: str, **changes) -> None:
    """Change entries of one of a model's JSON files."""
    path = folder / filename
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != GONE}))


def refuse(script, args) -> str:
    """Let a model be refused and return the message."""
    with pytest.raises(UserError) as refusal:
        script.detect_model(args)
    return str(refusal.value)


# -------------------------------------------------------------------------------------------------- what is recognised


def test_a_stable_diffusion_model_is_recognised(script, parse, tiny):
    """The kind, the prediction and the VAE's factor are read from the configs."""
    base = script.detect_model(parse(tiny))
    assert base.kind is script.ModelKind.STABLE_DIFFUSION and base.kind.value == "Stable Diffusion 1.x/2.x"
    assert (base.prediction_type, base.size_multiple) == ("epsilon", 8)
    assert base.index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert base.scheduler == json.loads((tiny / "scheduler" / "scheduler_config.json").read_text())
    assert base.scheduler["num_train_timesteps"] == 1000
    assert (base.image_noising_scheduler, base.tokens, base.low_res_size) == (None, None, None)
    assert (base.is_if, base.learns_variance, base.uses_attention_mask, base.precomputes_text) == (
        False,
        False,
        False,
        True,
    )


def test_flags_decide_how_a_stable_diffusion_model_reads_prompts(script, parse, tiny, copy):
    """Padding is hidden if a flag or the encoder's config says so; text is precomputed unless its encoder trains."""
    base = script.detect_model(parse(tiny, "--text_encoder_use_attention_mask", "--tokenizer_max_length", "20"))
    assert (base.uses_attention_mask, base.precomputes_text, base.tokens) == (True, True, 20)
    for flag, precomputes in (("--pre_compute_text_embeddings", True), ("--train_text_encoder", False)):
        assert script.detect_model(parse(tiny, flag)).precomputes_text is precomputes
    assert script.detect_model(parse(tiny, "--no-pre_compute_text_embeddings")).precomputes_text is False
    for masks in (True, False):
        change(copy, "text_encoder/config.json", use_attention_mask=masks)
        assert script.detect_model(parse(copy)).uses_attention_mask is masks
    assert script.detect_model(parse(copy, "--no-text_encoder_use_attention_mask")).uses_attention_mask is False


@pytest.mark.parametrize(
    ("prediction_type", "flags", "resolution"),
    [
        ("epsilon", [], 512),
        ("v_prediction", [], 768),
        (GONE, [], 512),
        ("epsilon", ["--resolution", "64"], 64),
        ("epsilon", ["--resolution", "96x64"], (96, 64)),
        ("v_prediction", ["--resolution", "512"], 512),
    ],
)
def test_the_resolution_follows_the_prediction_unless_it_is_given(
    script, parse, copy, prediction_type, flags, resolution
):
    """Models for velocity were trained at 768 pixels, others at 512; a config from before the choice says epsilon."""
    change(copy, "scheduler/scheduler_config.json", prediction_type=prediction_type)
    base = script.detect_model(parse(copy, *flags))
    assert base.resolution == (resolution if isinstance(resolution, tuple) else (resolution, resolution))
    assert base.prediction_type == ("epsilon" if prediction_type == GONE else prediction_type)


@pytest.mark.parametrize(
    ("edge", "flags", "warns"), [(8, [], True), (8, ["--resolution=16"], False), (256, [], False)]
)
def test_a_model_that_draws_much_smaller_pictures_is_named(script, parse, copy, caplog, edge, flags, warns):
    """Its U-Net's own size says so; a model of 16 pixels trained at 512 takes 15 GB."""
    change(copy, "unet/config.json", sample_size=edge)
    args = parse(copy, *flags)
    PartialState()
    Image.new("RGB", (600, 600)).save(Path(args.instance_data_dir, "photo.png"))
    script.list_examples(args, script.detect_model(args))
    told = f"The model draws {8 * edge} px, but trains at 512. See --resolution." in caplog.text
    assert told == warns


@pytest.mark.parametrize("edge", [GONE, None])
def test_a_unet_without_a_size_draws_64_latents(script, parse, copy, edge):
    """As its pipeline does."""
    change(copy, "unet/config.json", sample_size=edge)
    assert str(script.detect_model(parse(copy)).native_size) == "512"


@pytest.mark.parametrize(("widths", "factor"), [([8, 8, 16, 16], 8), ([8, 8, 16], 4), ([8], 1)])
def test_the_factor_is_that_of_the_vae(script, parse, copy, widths, factor):
    """Each level of the VAE but the first halves the picture."""
    change(copy, "vae/config.json", block_out_channels=widths)
    assert script.detect_model(parse(copy)).size_multiple == factor


@pytest.mark.parametrize(("given", "scale"), [(0.13025, 0.13025), (1.0, 1.0), (GONE, 0.18215)])
def test_latents_are_scaled_as_the_vae_says(script, parse, copy, given, scale):
    """A VAE that says nothing is one of Stable Diffusion 1."""
    change(copy, "vae/config.json", scaling_factor=given)
    assert script.detect_model(parse(copy)).scaling_factor == scale


# ---------------------------------------------------------------------------------------------------- what is refused


def unknown(pipeline: str, channels: int, unet="UNet2DConditionModel", embedding="None", vae="AutoencoderKL") -> str:
    """Return what is said of a checkpoint of no known kind."""
    article = "an" if pipeline.startswith("I") else "a"
    rest = f"{channels} input channels, class embedding {embedding}, and VAE {vae}"
    return f"{article} {pipeline} with a {unet}, {rest}"


NO_TEXT = "text encoder (add the base model's, if this is a result of --skip_save_text_encoder)"
STAGE_ONE = {
    "model_index.json": {"vae": GONE, "_class_name": "IFPipeline"},
    "unet/config.json": {"in_channels": 3, "out_channels": 6},
}
STAGE_TWO = {
    "model_index.json": {
        **{"vae": GONE, "_class_name": "IFSuperResolutionPipeline"},
        **{"image_noising_scheduler": ["diffusers", "DDPMScheduler"]},
    },
    "unet/config.json": {"in_channels": 6, "out_channels": 6, "class_embed_type": "timestep"},
}
OTHER_KINDS = {
    "sdxl": (
        {"model_index.json": {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}},
        "a Stable Diffusion XL checkpoint",
    ),
    "sdxl-refiner": (
        {"model_index.json": {"text_encoder": [None, None]}, "unet/config.json": {"addition_embed_type": "text_time"}},
        "a Stable Diffusion XL checkpoint",
    ),
    "inpainting": ({"unet/config.json": {"in_channels": 9}}, "an inpainting checkpoint (9 input channels)"),
    "x4-upscaler": (
        {
            "model_index.json": {"_class_name": "StableDiffusionUpscalePipeline"},
            "unet/config.json": {"in_channels": 7, "num_class_embeds": 1000},
        },
        unknown("StableDiffusionUpscalePipeline", 7),
    ),
    "instruct-pix2pix": (
        {
            "model_index.json": {"_class_name": "StableDiffusionInstructPix2PixPipeline"},
            "unet/config.json": {"in_channels": 8},
        },
        unknown("StableDiffusionInstructPix2PixPipeline", 8),
    ),
    "five-channels": (
        {
            "model_index.json": {"_class_name": "StableDiffusionDepth2ImgPipeline"},
            "unet/config.json": {"in_channels": 5},
        },
        unknown("StableDiffusionDepth2ImgPipeline", 5),
    ),
    "latents-without-vae": (
        {"model_index.json": {"vae": GONE}},
        unknown("StableDiffusionPipeline", 4, vae="None"),
    ),
    "pixels-with-vae": (
        {"unet/config.json": {"in_channels": 3}},
        unknown("StableDiffusionPipeline", 3),
    ),
    "text-to-video": (
        {
            "model_index.json": {
                "_class_name": "TextToVideoSDPipeline",
                "unet": ["diffusers", "UNet3DConditionModel"],
            },
            "unet/config.json": {"_class_name": "UNet3DConditionModel"},
        },
        unknown("TextToVideoSDPipeline", 4, unet="UNet3DConditionModel"),
    ),
    "unclip": (
        {
            "model_index.json": {"_class_name": "StableUnCLIPImg2ImgPipeline"},
            "unet/config.json": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
        },
        unknown("StableUnCLIPImg2ImgPipeline", 4, embedding="projection"),
    ),
    "tiny-vae": (
        {"vae/config.json": {"_class_name": "AutoencoderTiny", "block_out_channels": GONE}},
        unknown("StableDiffusionPipeline", 4, vae="AutoencoderTiny"),
    ),
    "numbered-classes": (
        {"unet/config.json": {"num_class_embeds": 10}},
        "a StableDiffusionPipeline whose U-Net takes numbered classes",
    ),
    "no-scheduler": ({"model_index.json": {"scheduler": GONE}}, "a StableDiffusionPipeline without a scheduler"),
    "if-stage-two-without-class-labels": (
        {**STAGE_TWO, "unet/config.json": {"in_channels": 6}},
        unknown("IFSuperResolutionPipeline", 6, vae="None"),
    ),
    "if-stage-two-without-its-noise": (
        {**STAGE_TWO, "model_index.json": {"vae": GONE, "_class_name": "IFSuperResolutionPipeline"}},
        "an IFSuperResolutionPipeline without an image_noising_scheduler",
    ),
    "if-stage-one-of-velocity": (
        {**STAGE_ONE, "scheduler/scheduler_config.json": {"prediction_type": "v_prediction"}},
        "an IFPipeline that predicts 'v_prediction'",
    ),
    "if-stage-two-of-velocity": (
        {**STAGE_TWO, "scheduler/scheduler_config.json": {"prediction_type": "v_prediction"}},
        "an IFSuperResolutionPipeline that predicts 'v_prediction'",
    ),
    "if-without-text": (
        {"model_index.json": {"vae": GONE, "tokenizer": GONE}, "unet/config.json": {"in_channels": 3}},
        "a StableDiffusionPipeline without a tokenizer",
    ),
    "flux": (
        {
            "model_index.json": {
                **{"_class_name": "FluxPipeline", "unet": GONE},
                **{"transformer": ["diffusers", "FluxTransformer2DModel"]},
            }
        },
        "a FluxPipeline without a U-Net",
    ),
    "no-name": ({"model_index.json": {"_class_name": GONE, "unet": GONE}}, "a pipeline without a U-Net"),
    "image-variations": (
        {
            "model_index.json": {
                **{"_class_name": "StableDiffusionImageVariationPipeline", "text_encoder": GONE, "tokenizer": GONE},
                **{"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]},
            }
        },
        f"a StableDiffusionImageVariationPipeline without a {NO_TEXT} and a tokenizer",
    ),
    "no-text-encoder": (
        {"model_index.json": {"text_encoder": [None, None]}},
        f"a StableDiffusionPipeline without a {NO_TEXT}",
    ),
    "no-tokenizer": (
        {"model_index.json": {"tokenizer": [None, None]}},
        "a StableDiffusionPipeline without a tokenizer",
    ),
    "predicts-sample": (
        {"scheduler/scheduler_config.json": {"prediction_type": "sample"}},
        "a StableDiffusionPipeline that predicts 'sample'",
    ),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_are_refused_by_name(script, parse, copy, kind):
    """The message says what the checkpoint is, and what would be supported."""
    changes, reason = OTHER_KINDS[kind]
    for filename, entries in changes.items():
        change(copy, filename, **entries)
    if "image_noising_scheduler" in changes.get("model_index.json", {}):
        shutil.copytree(copy / "scheduler", copy / "image_noising_scheduler")
    message = refuse(script, parse(copy))
    assert message == f"--pretrained_model_name_or_path {copy} is {reason}: not supported. {SUPPORTED}"


@pytest.mark.parametrize(
    "filename", ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("damage", ["missing", "broken", "empty", "binary"])
def test_configs_that_cannot_be_read_are_named(script, parse, copy, filename, damage):
    """One message names the model and the file."""
    path = copy / filename
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"broken": b'{"a": ', "empty": b"", "binary": b"\xff\xfe\x00"}[damage])
    message = refuse(script, parse(copy))
    assert message.startswith(f"The model {copy} is a folder without a readable {filename}: ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "{}"])
def test_an_index_that_is_no_index_is_refused(script, parse, copy, content):
    """JSON of another kind than an object is a message too, not a traceback."""
    (copy / "model_index.json").write_text(content)
    message = refuse(script, parse(copy))
    assert str(copy) in message


def test_a_folder_that_is_no_model_is_refused(script, parse, tmp_path):
    """An empty folder lacks its index."""
    (tmp_path / "empty").mkdir()
    message = refuse(script, parse(tmp_path / "empty"))
    assert message.startswith(f"The model {tmp_path / 'empty'} is a folder without a readable model_index.json: ")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no/such/folder", "no such model"])
def test_a_name_that_nobody_knows_while_offline(script, parse, monkeypatch, name):
    """A Hub id that cannot be asked for, and a folder that does not exist, give one message."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refuse(script, parse(name, "--revision", "v1"))
    head = f"The model {name} at revision v1 is no folder here, and the Hub gave no such model with a readable "
    assert message.startswith(f"{head}model_index.json: ")


# ----------------------------------------------------------------------------------------------- flags that contradict


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--resolution", "100"],
            "--resolution or --validation_resolution 100: the model needs multiples of 8.",
        ),
        (
            ["--resolution", "4"],
            "--resolution or --validation_resolution 4: the model needs multiples of 8.",
        ),
        (
            ["--resolution", "64x100"],
            "--resolution or --validation_resolution 64x100: the model needs multiples of 8.",
        ),
        (
            ["--validation_resolution", "64,100,64x4"],
            "--resolution or --validation_resolution 100, 64x4: the model needs multiples of 8.",
        ),
        (
            ["--class_labels_conditioning", "timesteps"],
            "--class_labels_conditioning is for DeepFloyd IF's stage II.",
        ),
        (["--validation_images", "low.png"], "--validation_images is for DeepFloyd IF's stage II."),
        (["--num_eval_images", "1"], "--num_eval_images is for DeepFloyd IF's stage II."),
        (["--stage_one_model_name_or_path", "x"], "--stage_one_model_name_or_path is for DeepFloyd IF's stage II."),
        (["--train_variance"], "--train_variance: this U-Net predicts no variance."),
        (
            ["--text_encoder_precision", "bf16", "--train_text_encoder"],
            "--text_encoder_precision needs --pre_compute_text_embeddings.",
        ),
        (["--tokenizer_max_length", "78"], "--tokenizer_max_length 78: the text encoder takes 77."),
    ],
)
def test_flags_that_contradict_the_model(script, parse, copy, tmp_path, monkeypatch, flags, sentence):
    """Each is refused with the model's kind, and the first line says which model."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("low.png")
    message = refuse(script, parse(copy, *flags))
    assert message.splitlines() == [f"these flags cannot be used with {copy} (Stable Diffusion 1.x/2.x):", sentence]


def test_all_contradictions_are_told_at_once(script, parse, copy):
    """Four flags that do not fit are four lines."""
    flags = ["--resolution=9", "--class_labels_conditioning=timesteps", "--num_eval_images=1", "--train_variance"]
    lines = refuse(script, parse(copy, *flags)).splitlines()[1:]
    starts = ("--num_eval_images", "--class_labels_conditioning", "--resolution or", "--train_variance")
    assert len(lines) == 4 and all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


# ------------------------------------------------------------------------------------------------------------ loading


def load(script, args, device="cpu"):
    """Load a model's networks, in float32."""
    fits = {"precision": "no"}
    plan = SimpleNamespace(base=script.detect_model(args), frozen_dtype=torch.float32, resume_keys=fits)
    return script.load_models(args, plan, SimpleNamespace(embeds=None), torch.device(device))


def test_a_variant_is_loaded_in_the_precision_of_training(script, parse, tmp_path):
    """--variant fp16 reads the files of that name; without it they are not found, and the message says what to do."""
    model = make_model(tmp_path / "fp16", "tiny", dtype=torch.float16, variant="fp16")
    models = load(script, parse(model, "--variant", "fp16"))
    stored = load_file(model / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for name, tensor in models.unet.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[name].float())
    stored = load_file(model / "text_encoder" / "model.fp16.safetensors")
    assert next(iter(stored.values())).dtype == torch.float16
    found = {name.removeprefix("text_model."): tensor for name, tensor in models.text_encoder.state_dict().items()}
    assert all(torch.equal(found[name.removeprefix("text_model.")], value.float()) for name, value in stored.items())


def test_weights_that_are_not_there_give_a_message(script, parse, tmp_path):
    """Forgetting --variant is a mistake that a person can mend, so no traceback."""
    model = make_model(tmp_path / "fp16", "tiny", dtype=torch.float16, variant="fp16")
    with pytest.raises(UserError, match="--variant"):
        load(script, parse(model))


@pytest.mark.parametrize("change", ["lacks", "nan"])
def test_weights_that_are_of_no_use_are_named(script, parse, tmp_path, change):
    """A layer that is missing would be random; one number that is none spoils all that is drawn and learned."""
    model = make_model(tmp_path / "model", "tiny")
    (path,) = (model / "unet").glob("*.safetensors")
    weights = load_file(path)
    bias = weights.pop("conv_in.bias")
    save_file(weights if change == "lacks" else weights | {"conv_in.bias": bias * math.nan}, path, {"format": "pt"})
    message = {"lacks": "lacks weights of conv_in.bias", "nan": "not finite in conv_in.bias"}[change]
    with pytest.raises(UserError, match=message):
        load(script, parse(model))


def test_networks_are_frozen_and_only_the_trained_ones_are_listed(script, parse, tiny):
    """Nothing trains before `prepare_training`, and the text encoder is listed only when it will."""
    for flags, count in (([], 1), (["--train_text_encoder"], 2)):
        models = load(script, parse(tiny, *flags))
        assert [type(model).__name__ for model in models.trained.values()] == [
            "UNet2DConditionModel",
            "CLIPTextModel",
        ][:count]
        networks = (models.unet, models.vae, models.text_encoder)
        assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())
        assert models.noise_scheduler.config.num_train_timesteps == 1000


@pytest.mark.parametrize("flags", [[], ["--train_text_encoder"]])
def test_networks_without_weights_are_those_with_them(script, parse, tiny, copy, flags):
    """On the meta device, names, shapes and precisions come from configs alone; the files of weights may be gone."""
    real, empty = load(script, parse(tiny, *flags)), load(script, parse(copy, *flags), "meta")
    assert list(real.trained) == list(empty.trained)
    for name in ("unet", "vae", "text_encoder"):
        one, other = (
            {key: (value.shape, value.dtype, value.requires_grad) for key, value in network.named_parameters()}
            for network in (getattr(real, name), getattr(empty, name))
        )
        assert one == other and {value.device.type for value in getattr(empty, name).parameters()} == {"meta"}


def test_the_text_encoder_is_of_the_class_that_the_index_names(script, parse, tiny, tmp_path):
    """The class comes from model_index.json, not from a guess."""
    device = torch.device("cpu")
    model = shutil.copytree(tiny, tmp_path / "model")
    args = parse(model)
    for name, kind in (("CLIPTextModel", CLIPTextModel), ("CLIPTextModelWithProjection", CLIPTextModelWithProjection)):
        change(model, "model_index.json", text_encoder=["transformers", name])
        kind.from_pretrained(model / "text_encoder").save_pretrained(model / "text_encoder")  # with a projection
        plan = SimpleNamespace(base=script.detect_model(args))
        encoder = script.load_text_encoder(args, plan, "bf16", device)
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert type(encoder) is kind and encoder.dtype == torch.bfloat16 and not encoder.training
    change(model, "model_index.json", text_encoder=["transformers", "NoSuchModel"])
    with pytest.raises(UserError) as refusal:
        script.load_text_encoder(args, SimpleNamespace(base=script.detect_model(args)), "fp32", device)
    named = "model_index.json names transformers.NoSuchModel as its text_encoder; no installed package has it."
    assert str(refusal.value) == named


def test_no_other_module_is_imported_for_a_class():
    """An index may name anything."""
    with pytest.raises(UserError, match=r"model_index\.json names this\.s as its vae; no installed package has it"):
        model_files.component_class({"vae": ["this", "s"]}, "vae")
    assert "this" not in sys.modules


def test_a_class_that_diffusers_keeps_with_a_pipeline_is_found():
    """AltDiffusion's text encoder belongs to a pipeline that diffusers has put aside."""
    index = {"text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"]}
    found = model_files.component_class(index, "text_encoder")
    assert found.__name__ == "RobertaSeriesModelWithTransformation" and hasattr(found, "from_pretrained")


def test_prompts_longer_than_the_text_encoder_takes_are_refused(script, parse, tiny):
    """--tokenizer_max_length ends where the text encoder's positions do."""
    script.detect_model(parse(tiny, "--tokenizer_max_length", "77"))
    message = refuse(script, parse(tiny, "--tokenizer_max_length", "78"))
    assert message.endswith("\n--tokenizer_max_length 78: the text encoder takes 77.")


def test_another_tokenizer_can_be_named(script, parse, tiny, tmp_path):
    """--tokenizer_name replaces the model's own tokenizer, which is taken without it."""
    build_tokenizer(pad_token="!").save_pretrained(tmp_path / "tokenizer")
    own = script.load_tokenizer(parse(tiny), script.detect_model(parse(tiny)))
    args = parse(tiny, "--tokenizer_name", str(tmp_path / "tokenizer"))
    other = script.load_tokenizer(args, script.detect_model(args))
    assert (own.pad_token, other.pad_token) == (END, "!")
    assert own("a photo of sks dog")["input_ids"] == other("a photo of sks dog")["input_ids"]


@pytest.mark.parametrize("shape", ["tiny", "tiny-if1", "tiny-if2"])
def test_attention_is_the_fused_one_everywhere(tmp_path, shape):
    """No U-Net falls back to the matrix of all pairs, IF's attention to text and pictures together included."""
    unet = UNet2DConditionModel.from_pretrained(make_model(tmp_path / "model", shape), subfolder="unet")
    wanted = "AttnProcessor2_0" if shape == "tiny" else "AttnAddedKVProcessor2_0"
    assert {type(processor).__name__ for processor in unet.attn_processors.values()} == {wanted}
