"""Drawing with DeepFloyd IF: each stage as diffusers draws it, to the bit, and never two of them in memory."""

import functools
import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    ModelMixin,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from PIL import Image

from tests.conftest import draw_picture
from utils import sample
from utils.data import prompt_cleaning
from utils.models import adapters, model_files
from utils.sampling import cascade, results
from utils.synthetic.random_models import make_model

PROMPT, OWN = "A photo of sks dog, on the (sunny) beach!", "a photo of a dog"
LAYERS = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
KINDS = {"if1": IFPipeline, "if2": IFSuperResolutionPipeline, "x4": StableDiffusionUpscalePipeline}
RESULTS = ["base", "full", "full/checkpoint-2", "lora", "lora/checkpoint-2"]
STEPS = {"num_inference_steps": 2}
SMALL = ["--width", "8", "--height", "8"]
FEW = ["--num_inference_steps", "2"]
FEW_TWO, FEW_X4 = ["--stage_two_num_inference_steps", "2"], ["--upscaler_num_inference_steps", "2"]


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Spare the garbage collector the libraries' own objects, which it would look through after every stage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Write the three models, and for each stage of IF what a full and a LoRA run leave behind."""
    home = tmp_path_factory.mktemp("cascade")
    for name in KINDS:
        make_model(home / name / "base", f"tiny-{name}")
    for name in ("if1", "if2"):
        write_full_run(home / name)
        write_lora_run(home / name)
    for number, size in enumerate(((16, 16), (40, 24), (24, 24))):
        draw_picture(*size, number).save(home / f"{number}.png")
    return home


def write_full_run(folder: Path) -> None:
    """Write a result without text encoder and a checkpoint, both with a fixed variance."""
    run, unet = folder / "full", disturb(UNet2DConditionModel.from_pretrained(folder / "base", subfolder="unet"))
    skipped = ["text_encoder"] if folder.name == "if1" else ["text_encoder", "tokenizer"]
    pipeline = DiffusionPipeline.from_pretrained(folder / "base", unet=unet, **dict.fromkeys(skipped))
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, variance_type="fixed_small")
    pipeline.save_pretrained(run)
    unet.save_pretrained(run / "checkpoint-2" / "unet")
    write_run(folder, run)


def write_lora_run(folder: Path) -> None:
    """Write an adapter and a checkpoint, both with a fixed variance."""
    run, unet = folder / "lora", UNet2DConditionModel.from_pretrained(folder / "base", subfolder="unet")
    run.mkdir()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS))
    disturb(unet, "lora_")
    (run / "checkpoint-2").mkdir()
    for place in (run, run / "checkpoint-2"):
        adapters.save(place / results.ADAPTER, {"unet": unet})
    torch.save(unet, folder / "lora.pt")
    write_run(folder, run)


def write_run(folder: Path, run: Path) -> None:
    """Write the flags of a run, and the scheduler beside the weights."""
    config = json.loads((folder / "base" / "scheduler" / "scheduler_config.json").read_text())
    for place in (run, run / "checkpoint-2"):
        model_files.write_scheduler_config(place, config | {"variance_type": "fixed_small"})
    (run / "args.json").write_text(json.dumps({"pretrained_model_name_or_path": str(folder / "base")}))


def disturb(unet, part: str = "") -> UNet2DConditionModel:
    """Change the weights whose names have a part, as much as is seen in pictures."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in unet.named_parameters():
        if part in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return unet


def reference(home: Path, kind: str, result: str = "base", scheduler=None) -> DiffusionPipeline:
    """Build the pipeline of a result by hand: the live networks, and the variance that was trained."""
    parts = {}
    if result.startswith("full"):
        parts["unet"] = UNet2DConditionModel.from_pretrained(home / kind / "full", subfolder="unet")
    if result.startswith("lora"):
        parts["unet"] = torch.load(home / kind / "lora.pt", weights_only=False)
    pipeline = KINDS[kind].from_pretrained(home / kind / "base", **parts)
    if parts:
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, variance_type="fixed_small")
    if scheduler:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return pipeline


def seeded(seed: int = 0) -> dict:
    """Return what a picture of a seed is drawn with."""
    return STEPS | {"generator": torch.Generator().manual_seed(seed)}


def run(*words, output: Path, status: int = 0) -> list[Image.Image]:
    """Run the command and return the pictures of the last stage, by name."""
    assert sample.main([*map(str, words), "--output", str(output)]) == status
    return read(output)


def read(folder: Path) -> list[Image.Image]:
    """Read the pictures of a folder, by name, without the sheet."""
    return [Image.open(path) for path in sorted(folder.glob("*.png")) if path.name != "grid.png"]


def same(one: Image.Image, other: Image.Image) -> bool:
    """Say whether two pictures are equal to the bit."""
    return one.size == other.size and one.tobytes() == other.tobytes()


# Each stage draws as diffusers does.


@pytest.mark.parametrize("result", RESULTS)
def test_stage_one_draws_as_diffusers_does(home, tmp_path, result):
    """Base model, results and checkpoints draw with their own variance, at the model's size."""
    flags = ["--prompt", PROMPT, "--seed", 3, 4, "--negative_prompt", "red", *FEW]
    drawn = run(home / "if1" / result, *flags, output=tmp_path)
    pipeline = reference(home, "if1", result)
    expected = [pipeline(PROMPT, negative_prompt="red", **seeded(seed)).images[0] for seed in (3, 4)]
    assert [picture.size for picture in drawn] == [(16, 16)] * 2 and not same(*drawn)
    assert all(map(same, drawn, expected))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set()


@pytest.mark.parametrize("result", RESULTS)
def test_stage_two_draws_as_diffusers_does(home, tmp_path, result):
    """A stage II alone enlarges pictures that are given."""
    flags = ["--prompt", PROMPT, "--images", home / "0.png", "--stage_two_noise_level", 100, *FEW]
    drawn = run(home / "if2" / result, *flags, output=tmp_path)
    picture, call = Image.open(home / "0.png"), reference(home, "if2", result)
    expected = [call(PROMPT, image=picture, noise_level=level, **seeded()).images[0] for level in (100, 250)]
    assert drawn[0].size == (64, 64) and same(drawn[0], expected[0]) and not same(drawn[0], expected[1])


def test_the_upscaler_draws_as_diffusers_does(home, tmp_path):
    """The upscaler alone enlarges each picture from its own size."""
    flags = ["--prompt", PROMPT, "--images", *(home / f"{number}.png" for number in range(3)), *FEW]
    drawn = run(home / "x4" / "base", *flags, output=tmp_path)
    call = reference(home, "x4")
    pictures = [Image.open(home / f"{number}.png") for number in range(3)]
    expected = [call(PROMPT, image=picture, noise_level=100, **seeded()).images[0] for picture in pictures]
    assert [picture.size for picture in drawn] == [(64, 64), (160, 96), (96, 96)]
    assert all(map(same, drawn, expected))
    assert [path.name for path in sorted(tmp_path.glob("0*"))] == [f"0{n}-{n}-seed0.png" for n in range(3)]


@pytest.mark.parametrize("scheduler", ["saved", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("kind", ["if1", "if2"])
def test_previews_come_out_again(home, tmp_path, kind, scheduler):
    """What training draws from embeddings, with its own sampler and guidance, is drawn to the bit."""
    chosen = {"saved": None, "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler}[scheduler]
    pipeline = reference(home, kind, "lora", chosen)
    clean = [pipeline.encode_prompt(text, False, clean_caption=True)[0] for text in (PROMPT, "red")]
    options = {"prompt_embeds": clean[0], "negative_prompt_embeds": clean[1], "guidance_scale": 5.5} | seeded(7)
    small = {"image": Image.open(home / "0.png")} if kind == "if2" else {}
    flags = ["--prompt", PROMPT, "--negative_prompt", "red", "--seed", 7, "--guidance_scale", 5.5, *FEW]
    flags += ["--scheduler", scheduler, *(["--images", home / "0.png"] if small else [])]
    drawn = run(home / kind / "lora" / "checkpoint-2", *flags, output=tmp_path)
    assert same(drawn[0], pipeline(**options, **small).images[0])


def test_guidance_and_steps_are_the_published_ones(home, tmp_path, monkeypatch):
    """Unless told otherwise, each stage draws as DeepFloyd's and the upscaler's pages say."""
    seen = {}
    for name, kind in KINDS.items():
        monkeypatch.setattr(kind, "__call__", spy_on_call(kind.__call__, name, seen))
    words = [home / "if1" / "base", "--prompt", PROMPT, "--stage_two", home / "if2" / "base"]
    run(*words, "--upscaler", home / "x4" / "base", output=tmp_path)
    found = {name: [seen[name].get(key) for key in ("num_inference_steps", "guidance_scale")] for name in KINDS}
    assert found == {"if1": [100, 7.0], "if2": [50, 4.0], "x4": [75, 9.0]}
    assert [seen[name].get("noise_level") for name in KINDS] == [None, 250, 100]
    assert {name: seen[name]["scheduler"] for name in KINDS} == {
        "if1": "DDPMScheduler",
        "if2": "DDPMScheduler",
        "x4": "DDIMScheduler",
    }


def spy_on_call(call, name: str, seen: dict):
    """Return a pipeline's call that writes down its arguments, and takes one step."""

    def spied(self, **options):
        seen[name] = options | {"scheduler": type(self.scheduler).__name__}
        return call(self, **options | {"num_inference_steps": 1})

    return spied


# One stage after another.


def test_the_cascade_is_three_calls(home, tmp_path, capsys, caplog):
    """Each stage enlarges the picture before it, with its own prompt, and every stage's pictures are kept."""
    flags = ["--prompt", PROMPT, "two cats", "--stage_two_prompt", OWN, "--seed", 0, 5, *FEW, *FEW_TWO, *FEW_X4]
    chain = ["--stage_two", home / "if2" / "lora", "--upscaler", home / "x4" / "base"]
    drawn = run(home / "if1" / "full", *chain, *flags, "--stage_two_guidance_scale", 3, output=tmp_path)
    assert not caplog.records  # of what is left out on purpose
    first, second, third = reference(home, "if1", "full"), reference(home, "if2", "lora"), reference(home, "x4")
    one = [first(text, **seeded(seed)).images[0] for text in (PROMPT, "two cats") for seed in (0, 5)]
    two = [
        second(OWN, image=picture, guidance_scale=3.0, **seeded(seed)).images[0]
        for picture, seed in zip(one, (0, 5, 0, 5), strict=True)
    ]
    three = [
        third(OWN, image=picture, noise_level=100, **seeded(seed)).images[0]
        for picture, seed in zip(two, (0, 5, 0, 5), strict=True)
    ]
    names = [f"0{n}-{words}-seed{seed}.png" for n, words in enumerate(WORDS) for seed in (0, 5)]
    for folder, expected in (("stage-1", one), ("stage-2", two), ("", three)):
        files = {path.name for path in (tmp_path / folder).iterdir() if path.is_file()}
        assert files == {*names, "grid.png"}
        assert all(map(same, read(tmp_path / folder), expected))
    assert [picture.size for picture in drawn] == [(256, 256)] * 4
    text = capsys.readouterr().out
    assert (
        f"Wrote 4 pictures and grid.png to {tmp_path}, and those of earlier stages to {tmp_path}/stage-1 and" in text
    )
    assert Image.open(tmp_path / "stage-1" / "grid.png").width > 512  # 16 pixels would not be seen


WORDS = ("a-photo-of-sks-dog-on-the-sunny-beach", "two-cats")


def test_a_stage_alone_goes_on_from_a_stages_picture(home, tmp_path):
    """What lies in a stage's folder is all that the next one saw."""
    words = [home / "if1" / "base", "--stage_two", home / "if2" / "full", "--prompt", PROMPT, "--seed", 6]
    together = run(*words, *FEW, *FEW_TWO, output=tmp_path)
    (picture,) = (tmp_path / "stage-1").glob("*seed6.png")
    words = [home / "if2" / "full", "--images", picture, "--prompt", PROMPT, "--seed", 6]
    assert same(run(*words, *FEW, output=tmp_path / "alone")[0], together[0])


def test_each_stage_reads_its_own_prompt(home, tmp_path):
    """The prompt of stage II changes stage II alone; each goes to its own row; the default is the one before."""
    words = [home / "if1" / "base", "--stage_two", home / "if2" / "base", "--prompt", PROMPT, *FEW, *FEW_TWO, *SMALL]
    usual = run(*words, output=tmp_path / "usual")
    other = run(*words, "--stage_two_prompt", OWN, output=tmp_path / "other")
    equal = run(*words, "--stage_two_prompt", PROMPT, output=tmp_path / "equal")
    assert same(usual[0], equal[0]) and not same(usual[0], other[0])
    assert same(read(tmp_path / "usual" / "stage-1")[0], read(tmp_path / "other" / "stage-1")[0])
    rows = run(*words, "--prompt", PROMPT, "again", "--stage_two_prompt", OWN, PROMPT, output=tmp_path / "rows")
    assert same(rows[0], other[0]) and not same(rows[1], usual[0])
    words += ["--upscaler", home / "x4" / "base", *FEW_X4, "--stage_two_prompt", OWN]
    three = [
        run(*words, *more, output=tmp_path / str(index))[0]
        for index, more in enumerate(([], ["--upscaler_prompt", OWN], ["--upscaler_prompt", PROMPT]))
    ]
    assert same(three[0], three[1]) and not same(three[0], three[2])


def test_other_chains(home, tmp_path, tiny):
    """The upscaler follows a stage I, a stage II with pictures, and Stable Diffusion."""
    more = ["--prompt", PROMPT, *FEW, "--upscaler", home / "x4" / "base", *FEW_X4]
    assert run(home / "if1" / "base", *more, output=tmp_path / "1")[0].size == (64, 64)
    two = [home / "if2" / "base", "--images", home / "0.png", "--width", 32, "--height", 32]
    drawn = run(*two, *more, output=tmp_path / "2")
    assert drawn[0].size == (128, 128) and read(tmp_path / "2" / "stage-2")[0].size == (32, 32)
    assert run(tiny, *more, output=tmp_path / "3")[0].size == (256, 256)
    assert read(tmp_path / "3" / "stage-1")[0].size == (64, 64)


def test_one_network_is_in_memory_at_a_time(home, tmp_path, monkeypatch):
    """T5 is read once and gone before the first U-Net comes; every U-Net before the next one."""
    gc.collect()  # what other tests left
    born = []
    for kind in (UNet2DConditionModel, transformers.T5EncoderModel):
        monkeypatch.setattr(kind, "__init__", spy_on_birth(kind.__init__, born))
    words = [home / "if1" / "lora", "--stage_two", home / "if2" / "lora", "--upscaler", home / "x4" / "base"]
    prompts = ["--prompt", PROMPT, "x", "--stage_two_prompt", OWN, "--negative_prompt", "red"]
    run(*words, *prompts, *FEW, *FEW_TWO, *FEW_X4, *SMALL, output=tmp_path)
    assert born == [("T5EncoderModel", 0)] + [("UNet2DConditionModel", 0)] * 3
    assert networks() == 0


def spy_on_birth(initialise, born: list):
    """Return a constructor that writes down how many networks there are already."""

    @functools.wraps(initialise)
    def spied(self, *arguments, **options):
        born.append((type(self).__name__, networks() - 1))
        return initialise(self, *arguments, **options)

    return spied


def networks() -> int:
    """Count the large networks that take memory, those included that only the garbage collector would still find."""
    return sum(type(thing) in (UNet2DConditionModel, transformers.T5EncoderModel) for thing in gc.get_objects())


def test_only_stage_one_needs_a_text_encoder(home, tmp_path):
    """A stage II without T5, whose base model is gone, still follows; the other way round T5 comes from stage II."""
    two = shutil.copytree(home / "if2" / "full", tmp_path / "two")
    (two / "args.json").write_text(json.dumps({"pretrained_model_name_or_path": str(tmp_path / "gone")}))
    words = ["--prompt", PROMPT, *FEW, *FEW_TWO]
    chain = run(home / "if1" / "base", "--stage_two", two, *words, output=tmp_path / "a")
    kept = run(home / "if1" / "base", "--stage_two", home / "if2" / "full", *words, output=tmp_path / "b")
    assert same(chain[0], kept[0])


# Options.


def test_pictures_are_cut_and_resized_and_that_is_said(home, tmp_path, capsys):
    """Stage II enlarges a quarter of what it draws: of the training's size, or the one that is asked for."""
    words = [home / "if2" / "lora", "--prompt", PROMPT, "--images", home / "1.png", *FEW]
    drawn = run(*words, output=tmp_path / "a")
    assert f"{home / '1.png'}, 40 x 24 pixels: its middle resized to 16 x 16" in capsys.readouterr().out
    middle = Image.open(home / "1.png").resize((16, 16), Image.Resampling.BICUBIC, box=(8, 0, 32, 24))
    assert same(drawn[0], reference(home, "if2", "lora")(PROMPT, image=middle, **seeded()).images[0])
    run(home / "if2" / "lora", "--prompt", PROMPT, "--images", home / "2.png", *FEW, output=tmp_path / "b")
    assert f"{home / '2.png'}, 24 x 24 pixels: resized to 16 x 16" in capsys.readouterr().out
    wide = run(*words, "--width", 160, "--height", 96, output=tmp_path / "c")
    assert wide[0].size == (160, 96) and "resized" not in capsys.readouterr().out
    picture, size = Image.open(home / "1.png"), {"width": 160, "height": 96}
    assert same(wide[0], reference(home, "if2", "lora")(PROMPT, image=picture, **size, **seeded()).images[0])


@pytest.mark.parametrize(("trained", "flags", "size"), [
    ("24x16", [], (24, 16)),
    (24, [], (24, 24)),
    ("24x16", ["--height", "32"], (24, 32)),
])  # fmt: skip
def test_the_size_is_the_trainings(home, tmp_path, trained, flags, size):
    """A resolution is a number or WIDTHxHEIGHT; stage II follows with four times that."""
    result = shutil.copytree(home / "if1" / "lora", tmp_path / "run")
    settings = json.loads((result / "args.json").read_text())
    (result / "args.json").write_text(json.dumps(settings | {"resolution": trained}))
    chain = ["--stage_two", home / "if2" / "base", *FEW_TWO]
    drawn = run(result, "--prompt", PROMPT, *flags, *FEW, *chain, output=tmp_path / "out")
    assert drawn[0].size == (4 * size[0], 4 * size[1])
    assert read(tmp_path / "out" / "stage-1")[0].size == size


def test_stage_two_needs_multiples_of_its_own_pictures_alone(home, tmp_path):
    """What comes out of stage II has to fit its U-Net, not what goes in."""
    deep = shutil.copytree(home / "if2" / "base", tmp_path / "deep")
    path = deep / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [8] * 5}))
    words = [str(home / "if1" / "base"), "--stage_two", str(deep), "--prompt", PROMPT]
    chain = sample.list_stages(sample.parse_args(words), 1)
    assert cascade.plan_sizes(chain, 12, 8, []) == [[(12, 8)], [(48, 32)]]


def test_tokens_are_the_trainings(home, tmp_path):
    """A run that read fewer tokens of a prompt is drawn with as many."""
    result = shutil.copytree(home / "if1" / "lora", tmp_path / "run")
    settings = json.loads((result / "args.json").read_text())
    (result / "args.json").write_text(json.dumps(settings | {"tokenizer_max_length": 9}))
    pipeline = reference(home, "if1", "lora")
    texts = [prompt_cleaning.clean(PROMPT), ""]
    ids = [
        pipeline.tokenizer(t, padding="max_length", max_length=9, truncation=True, return_tensors="pt") for t in texts
    ]
    with torch.no_grad():
        embeds = [pipeline.text_encoder(**row)[0] for row in ids]
    expected = pipeline(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], **seeded()).images[0]
    assert same(run(result, "--prompt", PROMPT, *FEW, output=tmp_path / "out")[0], expected)


def test_every_sampler_draws(home, tmp_path):
    """Each draws something else, also from a base model that predicts variance; two do not fit stage II."""
    words = [home / "if1" / "base", "--prompt", PROMPT, "--num_inference_steps", 4, *SMALL, "--scheduler"]
    drawn = {name: run(*words, name, output=tmp_path / name)[0].tobytes() for name in sample.SCHEDULERS}
    assert len(set(drawn.values())) == len(drawn)
    words = [home / "if2" / "base", "--images", home / "0.png", *words[1:-5], "--scheduler"]
    for name in set(sample.SCHEDULERS) - {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"}:
        assert run(*words, name, output=tmp_path / f"two-{name}")[0].size == (64, 64)


def test_each_stage_has_its_sampler_and_strength(home, tmp_path):
    """Flags with a stage's prefix are that stage's."""
    words = [home / "if1" / "lora", "--stage_two", home / "if2" / "lora", "--prompt", PROMPT, *FEW, *FEW_TWO]
    words += ["--upscaler", home / "x4" / "base", *FEW_X4, *SMALL]
    flags = [
        [],
        ["--lora_scale", "0"],
        ["--stage_two_lora_scale", "0"],
        ["--stage_two_scheduler", "DDIMScheduler"],
        ["--stage_two_noise_level", "9"],
        ["--upscaler_scheduler", "DDPMScheduler"],
        ["--upscaler_noise_level", "9"],
        ["--upscaler_guidance_scale", "2"],
        ["--negative_prompt", "red"],
    ]
    outputs = [tmp_path / str(number) for number in range(len(flags))]
    for more, output in zip(flags, outputs, strict=True):
        run(*words, *more, output=output)
    pictures = [[read(output / stage)[0].tobytes() for stage in ("stage-1", "stage-2", "")] for output in outputs]
    first_changed = [next(i for i in range(3) if other[i] != pictures[0][i]) for other in pictures[1:]]
    assert first_changed == [0, 1, 1, 1, 2, 2, 2, 0]


def test_batches_precision_and_no_guidance(home, tmp_path):
    """Batches draw nearly the same; bf16 and guidance 1 draw through all stages."""
    words = [home / "if1" / "full", "--stage_two", home / "if2" / "lora", "--upscaler", home / "x4" / "base"]
    words += ["--prompt", PROMPT, "--seed", 0, 1, 2, *FEW, *FEW_TWO, *FEW_X4, *SMALL]
    single, batched = (run(*words, "--batch_size", size, output=tmp_path / str(size)) for size in (1, 2))
    for one, other in zip(single, batched, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 4
    guidance = [f"--{prefix}guidance_scale=1" for prefix in ("", "stage_two_", "upscaler_")]
    drawn = run(*words, "--dtype", "bf16", *guidance, output=tmp_path / "bf16")
    assert [picture.size for picture in drawn] == [(128, 128)] * 3


def test_a_pipeline_for_other_code(home):
    """`load_pipeline` and `draw` take a stage I as well."""
    for result in RESULTS:
        pipeline = sample.load_pipeline(home / "if1" / result, scheduler="saved")
        drawn = sample.draw(pipeline, [PROMPT], [4], num_inference_steps=2, guidance_scale=7.0)
        assert same(drawn[0], reference(home, "if1", result)(PROMPT, **seeded(4)).images[0])


@pytest.mark.parametrize("kind", ["if1", "if2"])
def test_every_tensor_of_an_adapter_loads(home, kind):
    """All layers arrive with all tensors, those that IF adds for text included, and without a text encoder."""
    origin = results.locate(str(home / kind / "lora"))
    live = torch.load(home / kind / "lora.pt", weights_only=False)
    loaded = results.load(origin, "saved", 1.0, torch.float32, torch.device("cpu"), ("text_encoder", "tokenizer")).unet
    ours, theirs = ({n: p for n, p in unet.named_parameters() if "lora_" in n} for unet in (loaded, live))
    assert len(ours) == len(theirs) and any("add_k_proj" in name for name in theirs)
    renamed = {name.replace("result", "default"): value for name, value in ours.items()}
    assert all(torch.equal(renamed[name], theirs[name]) for name in theirs)


# What is told.


def test_what_the_cleaning_takes_and_what_is_too_long_is_said(home, tmp_path, caplog):
    """Words that T5 never sees are named."""
    long = "dog " * 80 + "zebra"
    run(home / "if1" / "base", "--prompt", "a photo of p3rs0n", long, *FEW, output=tmp_path)
    assert "'a photo of p3rs0n' loses 'p3rs0n' when IF's pipelines clean it: T5 reads 'a photo of'." in caplog.text
    assert "longer than 77 tokens" in caplog.text and "zebra" in caplog.text.rpartition("will not see")[2]


CASES = {  # words, in which names of folders in the home stand; what the message says
    "stage II alone": (
        "if2/base",
        "is DeepFloyd IF stage II, which enlarges pictures: give them by --images, or draw by a stage I as RESULT "
        "with --stage_two {home}/if2/base.",
    ),
    "upscaler alone": ("x4/base", "x4/base is the x4 upscaler, which enlarges pictures: give them by --images."),
    "images for stage I": (
        "if1/lora --images 0.png",
        "--images are for models that enlarge: {home}/if1/lora is DeepFloyd IF stage I, which draws from noise.",
    ),
    "a stage I as stage II": (
        "if1/base --stage_two if1/lora",
        "--stage_two {home}/if1/lora is DeepFloyd IF stage I, not DeepFloyd IF stage II.",
    ),
    "a stage II as upscaler": (
        "if1/base --upscaler if2/base",
        "--upscaler {home}/if2/base is DeepFloyd IF stage II, not the x4 upscaler.",
    ),
    "stage II twice": (
        "if2/base --images 0.png --stage_two if2/full",
        "--stage_two enlarges what DeepFloyd IF stage I draws, and {home}/if2/base is DeepFloyd IF stage II.",
    ),
    "upscaler twice": ("x4/base --images 0.png --upscaler x4/base", "x4/base is the x4 upscaler itself"),
    "no stage II": ("if1/base --stage_two_noise_level 9", "has no effect without DeepFloyd IF stage II."),
    "no upscaler": ("if1/base --upscaler_noise_level 9", "has no effect without the x4 upscaler."),
    "too much noise": ("if2/base --images 0.png --stage_two_noise_level 1000", "Noise level 1000 is beyond 999, the"),
    "too much in the upscaler": ("if1/base --upscaler x4/base --upscaler_noise_level 351", "351 is beyond 350"),
    "no multiple": ("if1/base --height 18", "--height 18 is no multiple of 4, the U-Net's factor."),
    "no multiple in stage II": ("if2/base --images 0.png --width 66", "--width 66 is no multiple of 4, the U-Net's"),
    "no multiple in the upscaler": (
        "x4/base --images 0.png --width 40",
        "--width 40 is no multiple of 16, the U-Net's factor times 4.",
    ),
    "no multiple further on": (
        "if1/base --stage_two deep",
        "deep cannot enlarge the 16 x 16 pixels of {home}/if1/base: its U-Net needs multiples of 128.",
    ),
    "prompts": (
        "if2/base --images 0.png 1.png 2.png --prompt a b",
        "--prompt has 2 values for 3 rows of pictures: give one, or one for each row.",
    ),
    "images": ("if2/base --images 0.png 1.png --prompt a b c", "--images has 2 values for 3 rows"),
    "prompts of stage II": (
        "if1/base --stage_two if2/base --stage_two_prompt a b",
        "two_prompt has 2 values for 1 row",
    ),
    "no picture": ("if2/base --images none.png", "none.png cannot be read as an image"),
    "Euler": ("if2/base --images 0.png --scheduler EulerDiscreteScheduler", "EulerDiscreteScheduler does not fit"),
    "Euler in the chain": (
        "if1/base --stage_two if2/lora --stage_two_scheduler EulerAncestralDiscreteScheduler",
        "would scale the picture that it enlarges. Take another scheduler.",
    ),
    "another width": (
        "if1/base --stage_two wide",
        "wide reads text of width 40; the text encoder of {home}/if1/base gives 48.",
    ),
    "no adapter": (
        "if1/base --stage_two if2/full --stage_two_lora_scale 0.5",
        "--stage_two_lora_scale 0.5: {home}/if2/full is no adapter.",
    ),
    "no base model": ("if1/base --stage_two lone", "no args.json names it. Give it by --stage_two_base_model."),
    "no text encoder": ("mute --stage_two mute2", "Neither {home}/mute nor {home}/mute2 has a text encoder."),
    "other channels": ("odd", "odd has no VAE and 4 input channels; IF's stages have 3 or 6."),
    "fp16": ("if1/base --dtype fp16 --device cpu", "--dtype fp16 needs a GPU"),
    "neither": ("empty", "empty holds neither model_index.json"),
}


@pytest.fixture(scope="module")
def faulty(home) -> Path:
    """Add folders that something is wrong with to the home."""
    for name, source, edits in (
        ("wide", "if2/base", {"encoder_hid_dim": 40}),
        ("deep", "if2/base", {"block_out_channels": [8] * 8}),
        ("odd", "if1/base", {"in_channels": 4}),
        ("mute", "if1/base", {}),
        ("mute2", "if2/base", {}),
    ):
        folder = shutil.copytree(home / source, home / name)
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | edits))
    for name in ("mute", "mute2"):
        path = home / name / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"text_encoder": [None, None]}))
    # A text encoder's base model that has none itself.
    (home / "mute" / "args.json").write_text(json.dumps({"pretrained_model_name_or_path": str(home / "mute")}))
    (home / "lone").mkdir()
    shutil.copy(home / "if2" / "lora" / results.ADAPTER, home / "lone")
    (home / "empty").mkdir()
    return home


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_told_before_anything_large_is_read(faulty, tmp_path, monkeypatch, capsys, case):
    """Exit status 1, one message, no weights read and nothing written."""
    for kind in (ModelMixin, transformers.PreTrainedModel, DiffusionPipeline):
        monkeypatch.setattr(kind, "from_pretrained", None)
    words, message = CASES[case]
    words = [str(faulty / word) if (faulty / word).exists() else word for word in words.split()]
    words += [] if "--prompt" in words else ["--prompt", PROMPT]
    run(*words, output=tmp_path / "out", status=1)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.format(home=faulty) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_told(home, tmp_path, monkeypatch, capsys):
    """Without them diffusers would not clean, and draw from other words than were trained."""
    monkeypatch.setattr(prompt_cleaning, "is_ftfy_available", bool)
    run(home / "if1" / "base", "--prompt", PROMPT, output=tmp_path, status=1)
    assert "run `pip install ftfy`" in capsys.readouterr().err


def test_a_stage_that_lacks_layers_is_told(home, tmp_path, capsys):
    """An adapter of stage I, put on stage II, does not draw with half of its layers."""
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(home / "if1" / "lora" / results.ADAPTER, lone)
    words = ["--base_model", home / "if2" / "base", "--images", home / "0.png", "--prompt", PROMPT, *FEW]
    run(lone, *words, output=tmp_path / "out", status=1)
    assert f"lone/{results.ADAPTER} does not fit the base model {home / 'if2' / 'base'}" in capsys.readouterr().err


def test_flags_without_their_stage_are_told(capsys):
    """What belongs to a stage that the command does not have is a mistake in the flags, and so are numbers."""
    words = ["x", "--prompt", "x", "--stage_two_prompt", "y", "--upscaler_guidance_scale", "3"]
    with pytest.raises(SystemExit, match="2"):
        sample.main([*words, "--stage_two_lora_scale", "-1", "--upscaler_num_inference_steps", "0"])
    text = capsys.readouterr().err
    assert "--stage_two_prompt has no effect without --stage_two." in text
    assert "--upscaler_guidance_scale has no effect without --upscaler." in text
    assert "--stage_two_lora_scale -1.0 is out of range" in text and "--upscaler_num_inference_steps 0 is" in text
