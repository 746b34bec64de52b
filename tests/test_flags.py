"""Flags: defaults, ranges, every mistake's own sentence, --config, and that none is accepted and ignored."""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

import pytest
from accelerate import tracking
from PIL import Image

import train_dreambooth
import train_dreambooth_lora
from utils.core.errors import UserError
from utils.data import batch_order, concepts
from utils.flags import command_line
from utils.hub import hub_datasets, model_card
from utils.optim import schedules
from utils.run import checkpoints, flag_conflicts, metric_log, resume_checks, run_summary
from utils.run.flag_conflicts import find_unused_flags

FULL, LORA = train_dreambooth, train_dreambooth_lora

# The flags of the diffusers examples, with the defaults that commands written for those examples rely on.
EXAMPLES_DEFAULTS = {
    **{"pretrained_model_name_or_path": None, "revision": None, "variant": None, "tokenizer_name": None},
    **{"instance_data_dir": None, "instance_prompt": None, "class_data_dir": None, "class_prompt": None},
    **{"resolution": None, "center_crop": False, "image_interpolation_mode": None, "dataloader_num_workers": 0},
    **{"with_prior_preservation": False, "prior_loss_weight": 1.0, "num_class_images": 100, "sample_batch_size": 4},
    **{"prior_generation_precision": None, "train_text_encoder": False, "pre_compute_text_embeddings": None},
    **{"tokenizer_max_length": None, "text_encoder_use_attention_mask": None, "class_labels_conditioning": None},
    **{"seed": None, "train_batch_size": 4, "num_train_epochs": 1, "max_train_steps": None},
    **{"gradient_accumulation_steps": 1, "gradient_checkpointing": False, "scale_lr": False},
    **{"lr_scheduler": "constant", "lr_warmup_steps": 500, "lr_num_cycles": 1, "lr_power": 1.0},
    **{"use_8bit_adam": False, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2},
    **{"adam_epsilon": 1e-8, "max_grad_norm": 1.0, "snr_gamma": None, "offset_noise": False},
    **{"set_grads_to_none": False, "local_rank": -1, "mixed_precision": None, "allow_tf32": False},
    **{"enable_xformers_memory_efficient_attention": False, "checkpointing_steps": 500},
    **{"checkpoints_total_limit": None, "resume_from_checkpoint": None, "validation_prompt": None},
    **{"num_validation_images": 4, "validation_steps": 100, "validation_epochs": None, "validation_images": None},
    **{"validation_scheduler": "DPMSolverMultistepScheduler", "push_to_hub": False, "hub_token": None},
    **{"hub_model_id": None, "report_to": "tensorboard", "logging_dir": "logs"},
}
OUR_DEFAULTS = {
    **{"caption_strategy": "instanceprompt", "prepend_instance_prompt": False},
    **{"config": None, "deterministic": False, "random_flip": False, "skip_bad_images": False, "noise_offset": None},
    **{"text_encoder_lr": None, "validation_guidance_scale": 7.5, "validation_negative_prompt": ""},
    **{"validation_num_inference_steps": 25, "hub_private_repo": False, "crop_style": None, "caption_dropout": 0.0},
    **{"cache_dir": None, "text_encoder_precision": None, "stage_one_model_name_or_path": None, "lr_end": None},
    **{"validation_resolution": None, "num_eval_images": None, "train_variance": False, "class_guidance_scale": None},
    **{"dataset_name": None, "image_column": "image", "caption_column": None, "concepts_list": None, "repeats": 1},
    **{"mask_data_dir": None, "crop_aspect": "square", "resolution_type": "pixel_area", "bucket_step": None},
    **{"minimum_image_size": None, "maximum_image_size": None, "target_downsample_size": None},
    **{"stepwise_downsampling": False, "cache_latents": "auto", "latent_variants": None, "prior_target": "images"},
    **{"dry_run": False, "optimizer": "adamw", "fused_backward": False, "weight_dtype": "fp32", "compile": False},
}
OWN_DEFAULTS = {
    FULL: {
        "output_dir": "dreambooth-model",
        "learning_rate": 5e-6,
        "skip_save_text_encoder": False,
        "use_bitfit": False,
    },
    LORA: {
        **{"output_dir": "lora-dreambooth-model", "learning_rate": 5e-4, "rank": 4, "lora_dropout": 0.0},
        **{"lora_alpha": None, "lora_layers": None, "base_model_precision": "no_change"},
    },
}

AT_LEAST_1 = (
    *("num_eval_images", "num_class_images", "sample_batch_size", "tokenizer_max_length", "train_batch_size"),
    *("num_train_epochs", "max_train_steps", "gradient_accumulation_steps", "lr_num_cycles", "checkpointing_steps"),
    *("checkpoints_total_limit", "num_validation_images", "validation_steps", "validation_epochs"),
    *("validation_num_inference_steps", "rank", "lora_alpha", "latent_variants", "bucket_step"),
    *("minimum_image_size", "maximum_image_size", "target_downsample_size"),
)
INTEGERS_FROM_0 = ("seed", "dataloader_num_workers", "lr_warmup_steps")
FROM_0 = (
    *("prior_loss_weight", "learning_rate", "text_encoder_lr", "lr_power", "adam_weight_decay", "max_grad_norm"),
    *("noise_offset", "validation_guidance_scale", "class_guidance_scale", "lr_end"),
)
ABOVE_0 = ("adam_epsilon", "snr_gamma")
BELOW_1 = ("adam_beta1", "adam_beta2", "lora_dropout", "caption_dropout")
RANGE_CASES = [
    *(("repeats", value, "from 1 to 10,000") for value in ("0", "-3", "10001")),
    *((name, value, "1 or more") for name in AT_LEAST_1 for value in ("0", "-3")),
    *((name, "-1", "0 or more") for name in INTEGERS_FROM_0),
    *((name, value, "0 or more") for name in FROM_0 for value in ("-0.5", "nan", "inf", "-inf")),
    *((name, value, "above 0") for name in ABOVE_0 for value in ("0.0", "-1e-08", "nan", "inf")),
    *((name, value, "in [0, 1)") for name in BELOW_1 for value in ("1.0", "-0.1", "nan", "inf")),
]
ALLOWING = ["--train_text_encoder", "--lr_scheduler=polynomial"]  # what some of these flags need beside them
ALLOWING_OF = {
    "maximum_image_size": ["--target_downsample_size=1"],
    "target_downsample_size": ["--maximum_image_size=64"],
}
GOOD_EDGES = [
    *((name, "1") for name in AT_LEAST_1),
    *((name, "0") for name in (*INTEGERS_FROM_0, *FROM_0, *BELOW_1)),
    *((name, "1e-30") for name in ABOVE_0),
    *((name, "0.999999") for name in BELOW_1),
]


SWITCH = argparse.BooleanOptionalAction


@pytest.fixture(params=[FULL, LORA], ids=lambda module: module.__name__)
def script(request):
    """Run a test with each script."""
    return request.param


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Let every machine give the answers of one without a GPU, as accelerate is told to do without one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def needed(tmp_path):
    """Give the flags that every run needs, with folders below the test's own."""
    (tmp_path / "photos").mkdir()
    return [
        *("--pretrained_model_name_or_path", "nobody/nothing", "--instance_data_dir", str(tmp_path / "photos")),
        *("--instance_prompt", "a photo of sks dog", "--output_dir", str(tmp_path / "out")),
    ]


@pytest.fixture
def small_images(tmp_path):
    """Write pictures that may be enlarged, and return their paths."""
    paths = [tmp_path / name for name in ("one.png", "two b.png", "three.png")]
    for path in paths:
        Image.new("RGB", (16, 16)).save(path)
    return [str(path) for path in paths]


def known_flags(script) -> dict[str, argparse.Action]:
    """Return the parser's flags by name, but --help."""
    return {action.dest: action for action in script.make_parser()._actions if action.dest != "help"}


def refuse(script, argv, capsys) -> str:
    """Parse flags that must be refused with status 2, and return what is said after the usage."""
    with pytest.raises(SystemExit) as stop:
        script.parse_args(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    return captured.err.partition("error: ")[2].rstrip("\n")


def refuse_one(script, argv, capsys) -> str:
    """Parse flags with one mistake and return its sentence."""
    head, *problems = refuse(script, argv, capsys).split("\n")
    assert head == "these flags cannot be used:" and len(problems) == 1, problems
    return problems[0].removeprefix("  - ")


# ------------------------------------------------------------------------------------------------ what flags there are


def test_every_flag_has_its_default(script):
    """Neither a flag nor a default is missing, changed, or left out of the table above."""
    expected = EXAMPLES_DEFAULTS | OUR_DEFAULTS | OWN_DEFAULTS[script]
    assert {name: action.default for name, action in known_flags(script).items()} == expected


def test_flags_of_one_script_are_unknown_to_the_other(script, needed, capsys):
    """A flag that would do nothing is refused."""
    for name in OWN_DEFAULTS[LORA if script is FULL else FULL].keys() - OWN_DEFAULTS[script].keys():
        assert f"unrecognized arguments: --{name}" in refuse(script, [*needed, f"--{name}"], capsys)
    assert "unrecognized arguments: --center" in refuse(script, [*needed, "--center"], capsys), "no abbreviations"


def test_help_tells_of_every_flag(script, capsys):
    """Each flag has a help text of its own, and --help prints them all and ends with status 0."""
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    flags = known_flags(script)
    for name, action in flags.items():
        assert f"--{name}" in printed and len(action.help or "") > 10, name
    assert len({action.help for action in flags.values()}) == len(flags), "no two flags share a text"
    assert "(default: polynomial)" not in printed and "(default: constant)" in printed and "(default: 500)" in printed
    titles = [action.title for action in script.make_parser()._action_groups[2:]]
    assert len(set(titles)) == len(titles) == 7 and all(f"\n{title}:\n" in printed for title in titles)


def test_the_examples_way_of_writing_a_command_is_understood(script, needed, small_images):
    """A command with the flags of the diffusers examples parses to their values."""
    command = [
        *("--with_prior_preservation", "--class_prompt=a photo of dog", "--resolution=512", "--train_batch_size=1"),
        *("--sample_batch_size=1", "--gradient_accumulation_steps=1", "--gradient_checkpointing"),
        *("--learning_rate=2e-6", "--lr_scheduler=constant", "--lr_warmup_steps=0", "--num_class_images=200"),
        *("--max_train_steps=800", "--checkpointing_steps", "250", "--seed=0", "--snr_gamma=5.0"),
        *("--validation_prompt", "A photo of sks dog in a bucket", "--report_to", "none", "--prior_loss_weight=1.0"),
        *("--validation_images", *small_images, "--class_labels_conditioning=timesteps", "--local_rank=0"),
    ]
    args = script.parse_args([*needed, *command])
    assert args.with_prior_preservation and args.gradient_checkpointing and not args.center_crop
    assert (args.learning_rate, args.max_train_steps, args.checkpointing_steps) == (2e-6, 800, 250)
    assert args.validation_images == small_images and args.snr_gamma == 5.0 and args.local_rank == 0
    assert args.resolution == "512"


def names_read(node: ast.AST) -> list[str]:
    """Return the flag that an expression reads, if it reads one."""
    if isinstance(node, ast.Attribute):
        owner = ast.unparse(node.value)
        of_concept = node.attr in concepts.Concept._fields and re.search(r"(^|\.)concept$|^self$", owner)
        return [node.attr] if owner in ("args", "self.args") or of_concept else []
    is_item = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    return [node.slice.value] if is_item and ast.unparse(node.value) == "flags" else []


def test_no_flag_is_accepted_and_ignored(script):
    """Every flag is read outside the functions that define or check flags, --config by its reader.

    One that has no effect is read by what says so.
    As args.NAME or, where that is given on, as flags["NAME"]; those of each subject from its `Concept`.
    """
    modules = (
        script,
        batch_order,
        concepts,
        command_line,
        resume_checks,
        hub_datasets,
        flag_conflicts,
        model_card,
        run_summary,
    )
    trees = [ast.parse(Path(module.__file__).read_text(encoding="utf-8")) for module in modules]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    readers = [node for node in functions if not re.fullmatch("add_.*_args|_?find_(?!unused_flags).*", node.name)]
    read = {name for function in readers for node in ast.walk(function) for name in names_read(node)}
    assert sorted(known_flags(script).keys() - read) == []
    (reader,) = [node for node in functions if node.name == "parse_args"]
    assert "parse_with_config(" in ast.unparse(reader)


# ------------------------------------------------------------------------------------------------------------ ranges


def test_every_number_has_a_range_case(script):
    """No flag that takes a number is missing in the cases below."""
    numbers = {name for name, action in known_flags(script).items() if action.type in (int, float)}
    assert numbers - {name for name, _, _ in RANGE_CASES} == {"local_rank"}


@pytest.mark.parametrize(
    ("owner", "name", "value", "words"),
    [(owner, *case) for owner in (FULL, LORA) for case in RANGE_CASES if case[0] in known_flags(owner)],
)
def test_numbers_out_of_range_are_refused(owner, name, value, words, needed, capsys):
    """Zero, negative, infinite and undefined numbers get the sentence that names the range."""
    sentence = refuse_one(owner, [*needed, *ALLOWING, *ALLOWING_OF.get(name, []), f"--{name}={value}"], capsys)
    assert sentence == f"--{name} {value} is out of range: it must be {words}."


def test_the_ends_of_the_ranges_are_accepted(script, needed):
    """The smallest and largest numbers of each range pass."""
    flags = known_flags(script)
    for name, value in GOOD_EDGES:
        if name in flags:
            args = script.parse_args([*needed, *ALLOWING, *ALLOWING_OF.get(name, []), f"--{name}={value}"])
            assert getattr(args, name) == float(value)


SIZE_WORDS = "is no size: give the edge of a square in pixels, such as 512, or WIDTHxHEIGHT, such as 96x64."


@pytest.mark.parametrize("value", ["0", "-3", "6.5", "many", "64x", "x64", "0x64", "64x0", "6x6x6", "64,96", "nan"])
def test_a_resolution_that_is_no_size_is_refused(script, needed, capsys, value):
    """The sentence names the flag and the text, and says what a size looks like."""
    sentence = refuse_one(script, [*needed, f"--resolution={value}"], capsys)
    assert sentence == f"--resolution {value} {SIZE_WORDS}"


def test_an_empty_resolution_is_refused(script, needed, capsys):
    """It is not taken for an unset one."""
    assert refuse_one(script, [*needed, "--resolution="], capsys) == f"--resolution an empty text {SIZE_WORDS}"


@pytest.mark.parametrize(
    ("value", "part"), [("0", "0"), ("64x", "64x"), ("64,many", "many"), ("64;96", "64;96"), ("64,", "an empty text")]
)
def test_a_list_of_resolutions_names_what_is_no_size(script, needed, capsys, value, part):
    """The sentence has the whole text, the part that is none, and how sizes are listed."""
    sentence = refuse_one(script, [*needed, f"--validation_resolution={value}"], capsys)
    assert sentence == f"--validation_resolution {value}: {part} {SIZE_WORDS} Put a comma between two sizes."


@pytest.mark.parametrize(
    ("text", "size"),
    [("64", (64, 64)), ("96x64", (96, 64)), ("64X96", (64, 96)), (" 64×96 ", (64, 96)), ("1", (1, 1))],
)
def test_a_resolution_is_a_text_of_width_and_height(script, needed, tmp_path, text, size):
    """The flag keeps the text, which a config's number is as well."""
    assert script.parse_args([*needed, f"--resolution={text}"]).resolution == text
    assert script.Size.parse(text) == size
    config = write_config(tmp_path, {"resolution": 64})
    args = script.parse_args([*needed, *config, f"--validation_resolution={text},8"])
    assert args.resolution == "64" and args.validation_resolution == f"{text},8"


@pytest.mark.parametrize("value", ["1.5", "nan", "inf", "many", ""])
def test_whole_numbers_must_be_whole(script, needed, capsys, value):
    """A flag that counts takes no fraction."""
    found = refuse(script, [*needed, f"--train_batch_size={value}"], capsys)
    assert found == f"argument --train_batch_size: invalid int value: {value!r}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("image_interpolation_mode", "sharp"), ("prior_generation_precision", "fp8"), ("mixed_precision", "fp32")),
        *(("class_labels_conditioning", "noise"), ("lr_scheduler", "zigzag")),
        *(("crop_style", "left"), ("text_encoder_precision", "no"), ("text_encoder_precision", "int4")),
        *(("crop_aspect", "keep"), ("resolution_type", "area"), ("cache_latents", "yes"), ("prior_target", "none")),
    ],
)
def test_words_outside_a_closed_set_are_refused(script, needed, capsys, name, value):
    """The sentence lists the words that there are."""
    found = refuse(script, [*needed, f"--{name}", value], capsys)
    assert found.startswith(f"argument --{name}: invalid choice: {value!r} (choose from ")
    assert all(word in found for word in known_flags(script)[name].choices)


# ------------------------------------------------------------------------------------------------- one case a mistake


CONTRADICTIONS = {
    "--with_prior_preservation": "--with_prior_preservation needs --class_prompt, such as 'a photo of dog'.",
    "--train_text_encoder --pre_compute_text_embeddings": (
        "--pre_compute_text_embeddings excludes --train_text_encoder, which changes the embeddings at each step."
    ),
    "--text_encoder_lr 1e-6": "--text_encoder_lr needs --train_text_encoder.",
    "--validation_scheduler Euler": (
        "--validation_scheduler Euler is not a scheduler of diffusers. "
        "Near: EulerAncestralDiscreteScheduler, EulerDiscreteScheduler."
    ),
    "--mixed_precision fp16": (
        "--mixed_precision fp16 needs a GPU: a CPU lacks fp16 arithmetic for some layers. Use bf16."
    ),
    "--with_prior_preservation --class_prompt dog --prior_generation_precision fp16": (
        "--prior_generation_precision fp16 needs a GPU: a CPU lacks fp16 arithmetic for some layers. Use bf16."
    ),
    "--pre_compute_text_embeddings --text_encoder_precision fp16": (
        "--text_encoder_precision fp16 needs a GPU: a CPU lacks fp16 arithmetic for some layers. Use bf16."
    ),
    "--pre_compute_text_embeddings --text_encoder_precision int8": (
        "--text_encoder_precision int8 needs bitsandbytes: pip install bitsandbytes."
    ),
    "--use_8bit_adam": "--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.",
    "--lr_end 1e-6": "--lr_end needs --lr_scheduler one_cycle or polynomial, not constant.",
    "--lr_end 1e-3 --learning_rate 1e-4 --lr_scheduler one_cycle": (
        "--lr_end 0.001 is above --learning_rate 0.0001, the highest."
    ),
    "--lr_end 0 --lr_scheduler cosine": "--lr_end needs --lr_scheduler one_cycle or polynomial, not cosine.",
    "--center_crop --crop_style random": "--center_crop excludes --crop_style random.",
    "--center_crop --crop_style shifted_center": "--center_crop excludes --crop_style shifted_center.",
    "--num_eval_images 2 --validation_images HERE": "--validation_images excludes --num_eval_images.",
    "--maximum_image_size 64": "--maximum_image_size and --target_downsample_size need each other.",
    "--target_downsample_size 64": "--maximum_image_size and --target_downsample_size need each other.",
    "--maximum_image_size 64 --target_downsample_size 65": (
        "--target_downsample_size 65 is above --maximum_image_size 64: nothing would shrink."
    ),
    "--dataset_name me/dogs": "--dataset_name excludes --instance_data_dir.",
    "--dataset_name me/dogs --instance_data_dir= --mask_data_dir .": "--mask_data_dir needs --instance_data_dir.",
    "--dataset_name me/dogs --instance_data_dir= --caption_column text --caption_strategy filename": (
        "--caption_column excludes captions by filename."
    ),
    "--caption_column text": "--caption_column needs --dataset_name.",
    "--mask_data_dir missing": "--mask_data_dir missing does not exist.",
}
METHOD_PROBLEMS = [
    (
        FULL,
        "--skip_save_text_encoder --train_text_encoder",
        "--skip_save_text_encoder would lose what --train_text_encoder has trained. Leave one of them out.",
    ),
    *(
        (
            LORA,
            f"--lora_layers={value}",
            f"--lora_layers {value!r} holds an empty name. Example: to_k,to_q,to_v,to_out.0.",
        )
        for value in ("", "to_k,", ",to_k", "to_k,,to_q")
    ),
]


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "instance_data_dir", "instance_prompt"])
def test_a_flag_that_is_needed(script, needed, capsys, name):
    """A flag that is left out or empty is asked for."""
    place = needed.index(f"--{name}")
    assert refuse_one(script, needed[:place] + needed[place + 2 :], capsys) == f"--{name} is required."
    assert refuse_one(script, [*needed, f"--{name}="], capsys) == f"--{name} is required."


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_flags_that_lack_or_exclude_something(script, needed, capsys, monkeypatch, small_images, flags):
    """Each contradiction has a sentence of its own."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    words = [word.replace("HERE", small_images[0]) for word in flags.split()]
    assert refuse_one(script, [*needed, *words], capsys) == CONTRADICTIONS[flags]


@pytest.mark.parametrize(
    "flags",
    [
        *("--lr_end 0 --lr_scheduler one_cycle", "--lr_end 1e-6 --lr_scheduler polynomial", "--num_eval_images 2"),
        *("--center_crop --crop_style center", "--no-center_crop --crop_style random", "--validation_images HERE"),
        *("--no-pre_compute_text_embeddings --train_text_encoder", "--text_encoder_precision bf16"),
    ],
)
def test_flags_that_go_together(script, needed, small_images, flags):
    """What is next to a contradiction and none is accepted."""
    script.parse_args([*needed, *(word.replace("HERE", small_images[0]) for word in flags.split())])


def test_pictures_to_enlarge_must_be_there(script, needed, capsys, tmp_path, small_images):
    """Those that are missing or none are named, each with the reason."""
    (tmp_path / "none.png").write_text("no picture")
    paths = [str(tmp_path / "missing.png"), small_images[0], str(tmp_path / "none.png")]
    head, *problems = refuse(script, [*needed, "--validation_images", *paths], capsys).split("\n")
    assert head == "these flags cannot be used:" and len(problems) == 2
    assert problems[0] == f"  - --validation_images {paths[0]}: No such file or directory"
    assert problems[1].startswith(f"  - --validation_images {paths[2]}: ") and len(problems[1]) > len(paths[2]) + 35


@pytest.mark.parametrize("warmup", [4, 5, 500])
def test_one_cycle_needs_steps_after_its_warm_up(warmup, caplog):
    """Without a way down there is no cycle; other schedules are only warned, and a constant rate has no warm-up."""
    words = f"The warm-up of {warmup} steps is as long as the run of 4: see --lr_warmup_steps."
    with pytest.raises(UserError) as refusal:
        schedules.check_warmup("one_cycle", warmup, 4)
    assert str(refusal.value) == f"{words} For one_cycle, a third of the run is usual: 2."
    assert caplog.messages == []
    schedules.check_warmup("constant", warmup, 4)
    assert caplog.messages == []
    schedules.check_warmup("cosine", warmup, 4)
    assert caplog.messages == [words]
    schedules.check_warmup("one_cycle", 3, 4)
    assert len(caplog.messages) == 1


def test_fp16_of_accelerates_own_setting_is_refused_too(script, needed, capsys, monkeypatch):
    """Without the flag, the launcher's environment decides; with it, the flag."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert refuse_one(script, needed, capsys) == CONTRADICTIONS["--mixed_precision fp16"]
    assert script.parse_args([*needed, "--mixed_precision", "bf16"]).mixed_precision == "bf16"


@pytest.mark.parametrize(("owner", "flags", "sentence"), METHOD_PROBLEMS)
def test_mistakes_of_one_method(owner, flags, sentence, needed, capsys):
    """Each mistake that only one script knows has a sentence of its own."""
    assert refuse_one(owner, [*needed, *flags.split()], capsys) == sentence


def test_folders_that_are_not_there(script, needed, capsys, tmp_path):
    """A missing folder, a file in its place, and a file where the output goes are told apart."""
    (tmp_path / "file").touch()
    there, missing = tmp_path / "file", tmp_path / "missing"
    for flag, path, sentence in (
        ("--instance_data_dir", missing, f"--instance_data_dir {missing} does not exist."),
        ("--instance_data_dir", there, f"--instance_data_dir {there} is not a folder."),
        ("--output_dir", there, f"--output_dir {there} is a file. Use another name."),
    ):
        assert refuse_one(script, [*needed, flag, str(path)], capsys) == sentence


def test_output_among_the_photos_is_refused(script, needed, capsys, tmp_path):
    """What a run writes must not be learned as the subject by the next."""
    photos = tmp_path / "photos"
    why = f"in --instance_data_dir {photos}: its images would be trained on as photos. Choose a folder outside."
    prior = ["--with_prior_preservation", "--class_prompt", "a photo of dog"]
    for flags, named in (
        (["--output_dir", str(photos)], "--output_dir"),
        (["--output_dir", str(photos / "out")], "--output_dir"),
        (["--output_dir", str(photos / "out"), *prior], "--output_dir and --class_data_dir"),
        ([*prior, "--class_data_dir", str(photos / "class")], "--class_data_dir"),
    ):
        assert refuse_one(script, [*needed, *flags], capsys) == f"{named} {why}"
    script.parse_args([*needed, "--class_data_dir", str(photos / "class")])
    script.parse_args([*needed, "--output_dir", str(tmp_path / "photos-out")])


def test_photos_among_the_class_images_are_refused(script, needed, capsys, tmp_path):
    """Photos must not be learned as class images, whose folder is read recursively too."""
    prior = ["--with_prior_preservation", "--class_prompt", "a photo of dog", "--class_data_dir", str(tmp_path)]
    sentence = refuse_one(script, [*needed, *prior], capsys)
    assert "--class_data_dir" in sentence and "--instance_data_dir" in sentence


def test_checkpoints_of_an_earlier_run_are_not_mixed_with(script, needed, capsys, tmp_path):
    """An output folder with complete checkpoints is refused unless one of them is resumed."""
    out = tmp_path / "out"
    for step in (20, 100, 3):
        (out / f"checkpoint-{step}").mkdir(parents=True)
        checkpoints.write_state(out / f"checkpoint-{step}", step, {})
    (out / "checkpoint-best").mkdir()
    sentence = refuse_one(script, needed, capsys)
    assert sentence == (
        f"--output_dir {out} holds checkpoint-3, checkpoint-20, checkpoint-100 of an earlier run. Use "
        "another, or --resume_from_checkpoint latest."
    )
    assert script.parse_args([*needed, "--resume_from_checkpoint", "latest"]).resume_from_checkpoint == "latest"


def test_trackers_must_be_known_and_installed(script, needed, capsys):
    """An unknown tracker is told from one whose package is missing."""
    known = sorted(str(name) for name in tracking.LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in tracking.get_available_trackers()}
    listed = ", ".join(["all", "none", *known])
    assert refuse_one(script, [*needed, "--report_to", "tensorbored"], capsys) == (
        f"--report_to tensorbored is unknown. Known are {listed}."
    )
    missing = next(name for name in known if name not in available)
    assert refuse_one(script, [*needed, "--report_to", f"tensorboard,{missing}"], capsys) == (
        f"--report_to {missing} needs its package: pip install {missing}."
    )
    for words, names in (("none", []), ("", []), ("all", ["all"]), ("tensorboard", ["tensorboard"])):
        assert metric_log.tracker_names(script.parse_args([*needed, "--report_to", words]).report_to) == names


def test_all_mistakes_are_told_at_once_and_nothing_is_written(script, capsys, tmp_path, monkeypatch):
    """One attempt is enough to learn of every mistake, and it leaves no trace on the disk."""
    monkeypatch.chdir(tmp_path)
    flags = [
        *("--instance_data_dir", "missing", "--resolution", "0", "--learning_rate", "nan", "--adam_beta1", "1"),
        *("--snr_gamma", "0", "--with_prior_preservation", "--text_encoder_lr", "1", "--report_to", "paper"),
        *(["--skip_save_text_encoder"] if script is FULL else ["--rank", "0", "--lora_layers", ","]),
    ]
    head, *problems = refuse(script, flags, capsys).split("\n")
    assert head == "these flags cannot be used:" and all(problem.startswith("  - --") for problem in problems)
    named = [problem.split()[1] for problem in problems]
    expected = [
        *("--pretrained_model_name_or_path", "--instance_prompt", "--adam_beta1", "--snr_gamma", "--learning_rate"),
        *("--resolution", "--with_prior_preservation", "--text_encoder_lr", "--instance_data_dir", "--report_to"),
        *(["--rank", "--lora_layers"] if script is LORA else []),
    ]
    assert sorted(named) == sorted(expected)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- --config


def write_config(tmp_path, content) -> list[str]:
    """Write a file of flags, given as an object or as text, and return the flag that names it."""
    path = tmp_path / "args.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return ["--config", str(path)]


def test_a_config_repeats_every_kind_of_value(script, needed, tmp_path, small_images):
    """What one run was given, another one reads from its file: numbers, words, switches, lists and unset flags."""
    prompt = '--"sks" dog = ä\n|'
    given = [
        *("--center_crop", "--learning_rate", "3e-7", "--train_batch_size", "2", "--snr_gamma", "5", "--seed", "0"),
        *(f"--validation_prompt={prompt}", "--validation_negative_prompt=-", "--max_train_steps", "7"),
        *("--validation_images", *small_images[:2], "--report_to", "none", "--local_rank", "-1"),
        *("--resolution", "96x64", "--validation_resolution", "64,64x96", "--no-pre_compute_text_embeddings"),
    ]
    first = script.parse_args([*needed, *given])
    config = write_config(tmp_path, {name: value for name, value in vars(first).items() if name != "config"})
    assert first.validation_prompt == prompt and first.center_crop
    assert vars(script.parse_args(config)) == vars(first) | {"config": config[1]}


def test_the_command_line_wins_over_the_config(script, needed, tmp_path, small_images):
    """Flags beside --config replace those of the file, switches and lists included, wherever they stand."""
    values = {"train_batch_size": 2, "seed": 9, "random_flip": True, "center_crop": False, "push_to_hub": True}
    config = write_config(tmp_path, values | {"validation_images": small_images[:2], "snr_gamma": None})
    flags = ["--train_batch_size=3", "--no-random_flip", "--center_crop", "--validation_images", small_images[2]]
    for argv in ([*config, *needed, *flags], [*needed, *flags, *config]):
        args = script.parse_args(argv)
        assert (args.train_batch_size, args.seed, args.random_flip, args.center_crop) == (3, 9, False, True)
        assert args.validation_images == small_images[2:] and args.snr_gamma is None and args.push_to_hub


def test_every_switch_can_be_switched_off(script, needed, tmp_path):
    """`--no-flag` undoes a switch that the config sets."""
    switches = [name for name, action in known_flags(script).items() if isinstance(action, SWITCH)]
    assert len(switches) > 15
    config = write_config(tmp_path, dict.fromkeys(switches, True))
    args = script.parse_args([*needed, *config, *(f"--no-{name}" for name in switches)])
    assert not any(getattr(args, name) for name in switches)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"learning_rat": 1}, "has the unknown key 'learning_rat'. Meant: 'learning_rate'?"),
        ({"resoluton": 64}, "has the unknown key 'resoluton'. Meant: 'resolution'?"),
        ({"--seed": 1}, "has the unknown key '--seed'. Meant: 'seed'?"),
        ({"xyzzy": 1}, "has the unknown key 'xyzzy'."),
        ({"center_crop": 1}, "has 'center_crop': 1, but that flag takes true or false."),
        ({"center_crop": "false"}, "has 'center_crop': \"false\", but that flag takes true or false."),
        ({"seed": True}, "has 'seed': true, but that flag takes a value."),
        ({"seed": {"a": 1}}, "has 'seed': {\"a\": 1}, but that flag takes a value."),
        ([1, 2], "holds no JSON object of flags and values."),
        ("null", "holds no JSON object of flags and values."),
    ],
)
def test_mistakes_in_a_config(script, needed, capsys, tmp_path, content, sentence):
    """The sentence names the file, the key and the value."""
    config = write_config(tmp_path, content)
    assert refuse(script, [*needed, *config], capsys) == f"--config {config[1]} {sentence}"


@pytest.mark.parametrize("content", ['{"seed": 1', "", "\xff"])
def test_a_config_that_cannot_be_read(script, needed, capsys, tmp_path, content):
    """Broken JSON, an empty file, odd bytes, a missing file and a folder are all said to be unreadable."""
    path = tmp_path / "args.json"
    path.write_bytes(content.encode("latin-1"))
    for name in (path, tmp_path / "missing.json", tmp_path):
        found = refuse(script, [*needed, "--config", str(name)], capsys)
        assert found.startswith(f"--config {name} cannot be read: ") and len(found.splitlines()) == 1


def test_values_of_a_config_are_checked_like_flags(script, needed, capsys, tmp_path):
    """Types, closed sets and ranges hold for the file as for the command line."""
    for values, sentence in (
        ({"train_batch_size": "four"}, "argument --train_batch_size: invalid int value: 'four'"),
        ({"train_batch_size": 2.5}, "argument --train_batch_size: invalid int value: '2.5'"),
        ({"lr_scheduler": "zigzag"}, "argument --lr_scheduler: invalid choice: 'zigzag' (choose from "),
    ):
        assert refuse(script, [*needed, *write_config(tmp_path, values)], capsys).startswith(sentence)
    for text, sentence in (
        ('{"snr_gamma": NaN}', "--snr_gamma nan is out of range: it must be above 0."),
        ('{"learning_rate": -1}', "--learning_rate -1.0 is out of range: it must be 0 or more."),
    ):
        assert refuse_one(script, [*needed, *write_config(tmp_path, text)], capsys) == sentence


# --------------------------------------------------------------------------------------- secrets, and what has no work


@pytest.mark.parametrize("words", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_the_token_is_taken_out_of_the_command_line(script, needed, monkeypatch, words):
    """Trackers that copy sys.argv find a placeholder; the flag keeps its value."""
    monkeypatch.setattr(sys, "argv", ["train.py", *needed, *words, "--seed", "1"])
    assert script.parse_args().hub_token == "hf_secret"
    assert sys.argv[:-2] == ["train.py", *needed, *(word.replace("hf_secret", "<token>") for word in words)]


def test_the_token_is_in_no_message(script, needed, capsys, monkeypatch):
    """Mistakes in other flags are told without the token."""
    monkeypatch.setattr(sys, "argv", ["train.py", *needed, "--hub_token", "hf_secret", "--seed", "-1"])
    with pytest.raises(SystemExit):
        script.parse_args()
    assert "hf_secret" not in capsys.readouterr().err and "hf_secret" not in sys.argv


IDLE = {
    "--set_grads_to_none": "--set_grads_to_none has no effect: gradients are always set to None.",
    "--local_rank=0": "--local_rank has no effect: the launcher's environment sets it.",
    "--hub_token=hf_x": "--hub_token is visible in the process list; HF_TOKEN or `hf auth login` is not.",
    "--enable_xformers_memory_efficient_attention": "xformers is not installed: torch's own attention serves instead.",
    "--prepend_instance_prompt": "--prepend_instance_prompt has no effect with --caption_strategy instanceprompt.",
    "--class_prompt=dog": "--class_prompt has no effect without --with_prior_preservation.",
    "--class_data_dir=dogs": "--class_data_dir has no effect without --with_prior_preservation.",
    "--class_guidance_scale=2": "--class_guidance_scale has no effect without --with_prior_preservation.",
    "--prior_target=base_prediction": (
        "--prior_target base_prediction has no effect without --with_prior_preservation."
    ),
    "--bucket_step=64": "--bucket_step has no effect without --crop_aspect preserve.",
    "--validation_images=HERE": "--validation_images has no effect without --validation_prompt.",
    "--num_eval_images=2": "--num_eval_images has no effect without --validation_prompt.",
    "--validation_resolution=64,96": "--validation_resolution has no effect without --validation_prompt.",
    "--class_labels_conditioning=timesteps": (
        "--class_labels_conditioning timesteps: stage II never sees the low-resolution image. Use noise_level."
    ),
}


@pytest.mark.parametrize("flag", IDLE)
def test_a_flag_without_work_says_so(script, needed, monkeypatch, small_images, flag):
    """Each such flag has one sentence, and without it there is none."""
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert find_unused_flags(vars(script.parse_args(needed))) == []
    assert find_unused_flags(vars(script.parse_args([*needed, flag.replace("HERE", small_images[0])]))) == [IDLE[flag]]


def test_flags_that_have_work_to_do_are_not_called_idle(script, needed):
    """With prior preservation, the class images' flags are no news, nor are those of previews with a prompt."""
    flags = ["--with_prior_preservation", "--class_prompt=dog", "--class_data_dir=dogs"]
    flags += [
        "--class_guidance_scale=2",
        "--prior_target=base_prediction",
        "--crop_aspect=preserve",
        "--bucket_step=8",
    ]
    flags += ["--validation_prompt=dog", "--num_eval_images=2", "--validation_resolution=64"]
    assert find_unused_flags(vars(script.parse_args([*needed, *flags]))) == []


def test_what_is_kept_repeats_a_run_and_does_not_continue_it():
    """Neither the file that was read, nor the checkpoint, nor the secret is repeated."""
    given = {"config": "args.json", "resume_from_checkpoint": "latest", "hub_token": "hf_x", "seed": 1, "rank": None}
    assert command_line.flags_to_repeat(given) == {"seed": 1, "rank": None}
