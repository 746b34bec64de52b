"""Bad flags, folders, pictures, models and checkpoints: each run by a script, with the whole of what it must say.

To add a case, put an entry into the table of its subject:

    FLAGS, OF_ONE_SCRIPT, PARSER, UNFIT     flags, and the sentence about the one mistake in them
    CONFIGS                                 the content of a --config, and what is said of it
    PHOTOS                                  the name of a photo, what is wrong with it, and what is in it
    FOLDERS, MODELS, CHECKPOINTS, OTHERS    a name and a `Case` that is refused before anything is written
    LOADED                                  the same for what loading a model finds, once args.json is written
    FINE                                    a name and a `Case` that is taken, with warnings or without a word

A `Case` is the message, the makers of the input, which are called in their order, and flags on top of the usual ones.
The scripts take turns; `pytest tests/test_bad_input.py -k 'part of the name'` runs one case. In flags and messages,
{root}, {photos}, {model} and {out} are paths of the case's `Place`. Between « and » a message holds a regular
expression for a library's own words; all else is compared letter by letter.
"""

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import draw_picture
from tests.runs import BASE_FLAGS, SCRIPTS, WEIGHTS_FILE, Run, Trainer
from utils.synthetic.small_tokenizers import build_tokenizer


class Place:
    """The paths of a case; the model and one good photo are there before its makers are called."""

    def __init__(self, root: Path):
        """Name what is below a folder."""
        self.root, self.model, self.photos = root, root / "model", root / "photos"
        self.out = root / "out"  # does not exist
        self.executed = root / "executed"  # exists once evil code has run

    def fill(self, text: str) -> str:
        """Put the paths into a message or into flags."""
        for name in ("root", "photos", "model", "out"):
            text = text.replace(f"{{{name}}}", str(getattr(self, name)))
        return text


Maker = Callable[[Place], object]


@dataclasses.dataclass(frozen=True)
class Case:
    """An input, and what is said of it."""

    message: str  # of a refusal what follows "error: "; else the whole of the warnings and notes
    makers: Sequence[Maker] = ()
    flags: str = ""
    status: int = 1  # 2: the flags are wrong
    left: tuple[str, ...] = ()  # what the output folder holds afterwards, beside what it held
    script: str | None = None  # None: either will do
    told: str = ""  # what stands before the error

    def make(self, at: Place) -> None:
        """Call the makers."""
        for maker in self.makers:
            maker(at)


# Makers of files and folders; names are paths below the root.


def write(name: str, content: bytes | str) -> Maker:
    """Write a file, in a folder that is made for it if need be."""
    content = content.encode() if isinstance(content, str) else content
    return lambda at: [make_parents(at.root / name), (at.root / name).write_bytes(content)]


def make_parents(path: Path) -> None:
    """Make the folder that something is to be in."""
    path.parent.mkdir(parents=True, exist_ok=True)


def folder(name: str) -> Maker:
    """Make an empty folder."""
    return lambda at: (at.root / name).mkdir(parents=True)


def link(name: str, target: str) -> Maker:
    """Make a link."""
    return lambda at: [make_parents(at.root / name), (at.root / name).symlink_to(at.fill(target))]


def remove(name: str) -> Maker:
    """Remove a file or folder."""
    return lambda at: (shutil.rmtree if (at.root / name).is_dir() else os.unlink)(at.root / name)


def empty(name: str) -> Maker:
    """Empty a folder."""
    return lambda at: [remove(name)(at), folder(name)(at)]


def cut_off(name: str, size: int | None = None) -> Maker:
    """Cut a file off after some bytes, or near its end."""
    return lambda at: os.truncate(at.root / name, size or (at.root / name).stat().st_size - 999)


def lock(name: str, mode: int) -> Maker:
    """Change what may be done with a file or folder, or skip the case if nobody minds."""

    def make(at: Place) -> None:
        (at.root / name).chmod(mode)
        if os.access(at.root / name, os.R_OK | os.W_OK):
            pytest.skip("this user may read and write everything")

    return make


# Makers of photos.

PICTURE = draw_picture(64, 64, 1)


def photo(name: str, content: bytes | str) -> Maker:
    """Put a file among the photos."""
    return write(f"photos/{name}", content)


def encoded(kind: str) -> bytes:
    """Return the bytes of a picture."""
    file = io.BytesIO()
    PICTURE.save(file, kind)
    return file.getvalue()


def picture(name: str, image: Image.Image, **options) -> Maker:
    """Put a picture among the photos."""
    return lambda at: image.save(at.photos / name, **options)


def blank(name: str, mode: str, width: int, height: int) -> Maker:
    """Put a picture of one colour among the photos; some are too large to be kept in memory until their turn."""
    return lambda at: Image.new(mode, (width, height)).save(at.photos / name)


def heic(name: str) -> Maker:
    """Put a photo as a phone writes it among the photos, or skip the case if it cannot be written."""
    return lambda at: pytest.importorskip("pillow_heif").from_pillow(PICTURE).save(at.photos / name)


def captions(count: int) -> Maker:
    """Put empty text files among the photos."""
    return lambda at: [(at.photos / f"{number:04d}.txt").touch() for number in range(count)]


# Makers of models.

UNET, VAE, TEXT_ENCODER = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
LAYER = {"unet": "conv_in.bias", "vae": "encoder.conv_in.bias", "text_encoder": "final_layer_norm.bias"}
EVIL = "open({!r}, 'w').close()\n"  # code that leaves a file behind


def config(filename: str, removed: tuple[str, ...] = (), **changes) -> Maker:
    """Change entries of one of the model's JSON files."""

    def make(at: Place) -> None:
        path = at.model / filename
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in removed}))

    return make


def index(**changes) -> Maker:
    """Change entries of the model's index."""
    return config("model_index.json", **changes)


def scheduler(*removed: str, **changes) -> Maker:
    """Change entries of the scheduler's config."""
    return config(SCHEDULER, removed, **changes)


def tensors(part: str, change: Callable[[dict], object]) -> Maker:
    """Change the weights of a part of the model."""

    def make(at: Place) -> None:
        weights = load_file(at.model / WEIGHTS[part])
        change(weights)
        save_file(weights, at.model / WEIGHTS[part], {"format": "pt"})

    return make


def without_layer(part: str) -> Maker:
    """Remove a layer."""
    return tensors(part, lambda weights: weights.pop(LAYER[part]))


def other_shape(part: str) -> Maker:
    """Give a layer three numbers."""
    return tensors(part, lambda weights: weights.update({LAYER[part]: torch.zeros(3)}))


def not_finite(part: str, value: float) -> Maker:
    """Put one number that is none into a layer."""
    return tensors(part, lambda weights: weights[LAYER[part]].view(-1)[:1].fill_(value))


def pickled(part: str, content: Callable[[dict, Place], object] = lambda weights, at: weights) -> Maker:
    """Replace the weights of a part by a pickle, of the same weights or of what is made in their place."""

    def make(at: Place) -> None:
        path = at.model / WEIGHTS[part]
        bare = path.with_name("pytorch_model.bin" if part == "text_encoder" else f"{path.stem}.bin")
        torch.save(content(load_file(path), at), bare)
        path.unlink()

    return make


class Evil:
    """What runs code where it is unpickled."""

    def __init__(self, at: Place):
        """Remember which file to make."""
        self.code = EVIL.format(str(at.executed))

    def __reduce__(self):
        """Let the unpickler execute the code."""
        return exec, (self.code,)


def code(name: str) -> Maker:
    """Put a Python file into the model that leaves a trace where it is executed."""
    return lambda at: (at.model / name).write_text(EVIL.format(str(at.executed)))


def more_words(at: Place) -> None:
    """Write a tokenizer that knows one word more than the model's."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["wombat"])
    tokenizer.save_pretrained(at.root / "words")


# The tables.

SIZE_WORDS = "is no size: give the edge of a square in pixels, such as 512, or WIDTHxHEIGHT, such as 96x64."
PRIOR = "--with_prior_preservation --class_prompt 'a dog' --num_class_images 1"
FLAGS = {  # by flags, the sentence of the one mistake in them
    "--resolution 0": f"--resolution 0 {SIZE_WORDS}",
    "--resolution 64x": f"--resolution 64x {SIZE_WORDS}",
    "--validation_resolution '64;96'": (
        f"--validation_resolution 64;96: 64;96 {SIZE_WORDS} Put a comma between two sizes."
    ),
    "--train_batch_size 0": "--train_batch_size 0 is out of range: it must be 1 or more.",
    "--max_train_steps -1": "--max_train_steps -1 is out of range: it must be 1 or more.",
    "--learning_rate nan": "--learning_rate nan is out of range: it must be 0 or more.",
    "--caption_dropout 1": "--caption_dropout 1.0 is out of range: it must be in [0, 1).",
    "--snr_gamma 0": "--snr_gamma 0.0 is out of range: it must be above 0.",
    "--center_crop --crop_style random": "--center_crop excludes --crop_style random.",
    "--with_prior_preservation": "--with_prior_preservation needs --class_prompt, such as 'a photo of dog'.",
    "--train_text_encoder --pre_compute_text_embeddings": (
        "--pre_compute_text_embeddings excludes --train_text_encoder, which changes the embeddings at each step."
    ),
    "--text_encoder_lr 1e-6": "--text_encoder_lr needs --train_text_encoder.",
    "--lr_end 1e-6": "--lr_end needs --lr_scheduler one_cycle or polynomial, not constant.",
    "--mixed_precision fp16": (
        "--mixed_precision fp16 needs a GPU: a CPU lacks fp16 arithmetic for some layers. Use bf16."
    ),
    "--report_to tensorbored": "--report_to tensorbored is unknown. Known are all, none, «[a-z_, ]+».",
    "--instance_prompt ''": "--instance_prompt is required.",
    "--instance_data_dir ''": "--instance_data_dir is required.",
    "--pretrained_model_name_or_path ''": "--pretrained_model_name_or_path is required.",
    "--instance_data_dir {root}/none": "--instance_data_dir {root}/none does not exist.",
    "--instance_data_dir {photos}/good.png": "--instance_data_dir {photos}/good.png is not a folder.",
    "--output_dir {photos}/good.png --instance_data_dir {model}": (
        "--output_dir {photos}/good.png is a file. Use another name."
    ),
    "--output_dir {photos}/out": (
        "--output_dir in --instance_data_dir {photos}: its images would be trained on as photos. Choose a folder "
        "outside."
    ),
    f"{PRIOR} --class_data_dir {{photos}}": (
        "--class_data_dir in --instance_data_dir {photos}: its images would be trained on as photos. Choose a folder "
        "outside.\n"
        "  - --instance_data_dir in --class_data_dir: its images would be trained on as class images. Choose a folder "
        "outside."
    ),
    f"{PRIOR} --class_data_dir {{model}}/model_index.json": (
        "--class_data_dir {model}/model_index.json is not a folder."
    ),
    f"{PRIOR} --class_data_dir {{model}}/model_index.json/dogs": (
        "--class_data_dir {model}/model_index.json/dogs cannot be used: Not a directory. Use another."
    ),
    "--output_dir {model}/model_index.json/out": (
        "--output_dir {model}/model_index.json/out cannot be used: Not a directory. Use another."
    ),
    f"--output_dir {{root}}/{'long' * 70}": (
        f"--output_dir {{root}}/{'long' * 70} cannot be used: File name too long. Use another."
    ),
    f"--instance_data_dir {{root}}/{'long' * 70}": (
        f"--instance_data_dir {{root}}/{'long' * 70} cannot be used: File name too long. Use another."
    ),
    "--validation_prompt x --validation_images {photos}/none.png": (
        "--validation_images {photos}/none.png: No such file or directory"
    ),
    "--instance_prompt ' '": "--instance_prompt is required.",
    "--instance_prompt 'a \udcff dog'": "--instance_prompt 'a \\udcff dog' is not written in UTF-8.",
}
OF_ONE_SCRIPT = {
    "--skip_save_text_encoder --train_text_encoder": (
        "full",
        "--skip_save_text_encoder would lose what --train_text_encoder has trained. Leave one of them out.",
    ),
    "--rank 0": ("lora", "--rank 0 is out of range: it must be 1 or more."),
}
PARSER = {  # what the parser itself refuses
    "--train_batch_size 1.5": "argument --train_batch_size: invalid int value: '1.5'",
    "--lr_scheduler zigzag": "argument --lr_scheduler: invalid choice: 'zigzag' (choose from «[a-z_', ]+»)",
    "--seed": "argument --seed: expected one argument",
    "--center": "unrecognized arguments: --center",
    "--config {root}/none.json": (
        "--config {root}/none.json cannot be read: [Errno 2] No such file or directory: '{root}/none.json'"
    ),
    "--config {photos}": "--config {photos} cannot be read: [Errno 21] Is a directory: '{photos}'",
}
CONFIGS = {  # a file of flags, and what is said of it
    '{"learning_rat": 1}': "has the unknown key 'learning_rat'. Meant: 'learning_rate'?",
    '{"xyzzy": 1}': "has the unknown key 'xyzzy'.",
    '{"center_crop": 1}': "has 'center_crop': 1, but that flag takes true or false.",
    '{"seed": true}': "has 'seed': true, but that flag takes a value.",
    '{"seed": {"a": 1}}': "has 'seed': {\"a\": 1}, but that flag takes a value.",
    '{"seed": [1, 2]}': "has 'seed': [1, 2], but that flag takes a value.",
    '{"validation_images": [["a"]]}': "has 'validation_images': [[\"a\"]], but that flag takes a list of values.",
    "[1]": "holds no JSON object of flags and values.",
    '{"seed": 1': "cannot be read: Expecting ',' delimiter: line 1 column 11 (char 10)",
    "": "cannot be read: Expecting value: line 1 column 1 (char 0)",
    "[" * 100_000: "cannot be read: «maximum recursion depth exceeded.*»",
}
UNSUPPORTED = {  # by flags, what is said of them once the model is known
    "--resolution 100": "--resolution or --validation_resolution 100: the model needs multiples of 8.",
    "--train_variance": "--train_variance: this U-Net predicts no variance.",
    "--tokenizer_max_length 78": "--tokenizer_max_length 78: the text encoder takes 77.",
    "--num_eval_images 1 --validation_prompt x": "--num_eval_images is for DeepFloyd IF's stage II.",
}
DAMAGED = "it is cut off or damaged («.+»)"
NO_FORMAT = "it is damaged, or in no format that is read here (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF, HEIC)"
PHOTOS = {  # by name, what is said of the photo, and its content or makers
    "truncated.jpg": (DAMAGED, encoded("JPEG")[:700]),
    "truncated.png": (DAMAGED, encoded("PNG")[:-500]),
    "truncated.webp": (DAMAGED, encoded("WEBP")[:-100]),
    "empty.png": ("the file is empty", ""),
    "drawing.png": (NO_FORMAT, "<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "page.jpg": (NO_FORMAT, "<!DOCTYPE html><title>404</title>"),
    "script.jpg": (NO_FORMAT, "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "phone.heic": (NO_FORMAT, b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)),
    "pointer.png": (NO_FORMAT, "version https://git-lfs.github.com/spec/v1\n"),
    "deep.tiff": (
        "its pixels are of mode F, without a fixed range; save it with 8 bits per colour",
        [blank("deep.tiff", "F", 64, 64)],
    ),
    "long.png": (
        "it is 30000 x 1 pixels, more than 100 times as long as wide",
        [blank("long.png", "RGB", 30_000, 1)],
    ),
    "bomb.png": (
        "Image size (400000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack",
        [blank("bomb.png", "1", 20_000, 20_000)],
    ),
    "gone.png": ("No such file or directory", [link("photos/gone.png", "{root}/nowhere.png")]),
    "loop.png": ("Too many levels of symbolic links", [link("photos/loop.png", "{photos}/loop.png")]),
    "pipe.png": ("it is no file", [lambda at: os.mkfifo(at.photos / "pipe.png")]),
    "device.png": ("it is no file", [link("photos/device.png", "/dev/zero")]),
    "locked.png": ("Permission denied", [photo("locked.png", encoded("PNG")), lock("photos/locked.png", 0)]),
    "two\nlines.png": ("the file is empty", ""),
}
SUFFIXES = ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .heic .heif .avif"
NO_IMAGES = f"--instance_data_dir {{photos}} holds no images (looked for {SUFFIXES}). "
NOT_FITTING = "these flags cannot be used:\n  - "
FOLDERS = {
    "an empty folder": Case(NO_IMAGES + "It is empty.", [empty("photos")]),
    "captions alone": Case(
        NO_IMAGES + "Found: a.caption, a.txt.",
        [empty("photos"), photo("a.txt", "a dog"), photo("a.caption", "a dog")],
    ),
    "an SVG alone": Case(NO_IMAGES + "Found: dog.svg.", [empty("photos"), photo("dog.svg", "<svg/>")]),
    "a folder that is named like a picture": Case(
        NO_IMAGES + "It is empty.", [empty("photos"), folder("photos/x.png")]
    ),
    "10,000 captions": Case(
        NO_IMAGES + f"Found: {', '.join(f'{number:04d}.txt' for number in range(10))} and 9990 more.",
        [empty("photos"), captions(10_000)],
    ),
    "a link to itself in place of the folder": Case(
        NOT_FITTING + "--instance_data_dir {photos} cannot be used: Too many levels of symbolic links. Use another.",
        [remove("photos"), link("photos", "{photos}")],
        status=2,
    ),
    "all photos bad, and none to go on with": Case(
        "1 of 1 images in --instance_data_dir {photos} cannot be read:\n  {photos}/good.png: the file is empty\n"
        "Mend or remove them.",
        [photo("good.png", "")],
        "--skip_bad_images",
    ),
    "a folder that may not be read": Case(
        "The image folder {photos}/locked cannot be listed: Permission denied. Name a folder that you may read.",
        [folder("photos/locked"), lock("photos/locked", 0)],
    ),
    "a folder in the place of a file, and a file in that of a folder": Case(
        NOT_FITTING + "--output_dir {out} has metrics.jsonl, samples, which a run would write itself. Move it, or use "
        "another.",
        [folder("out/metrics.jsonl"), write("out/samples", "mine")],
        status=2,
    ),
    "an output folder that may not be written": Case(
        "--output_dir {root}/locked/out cannot be used: Permission denied. Use another folder.",
        [folder("locked"), lock("locked", 0o500)],
        "--output_dir {root}/locked/out",
    ),
    "an output folder where nobody can make one": Case(
        "--output_dir /proc/out cannot be used: No such file or directory. Use another folder.",
        flags="--output_dir /proc/out",
    ),
    "a link to nowhere as output folder": Case(
        NOT_FITTING + "--output_dir {root}/link cannot be used: it is a link to nowhere. Use another.",
        [link("link", "{root}/nowhere")],
        "--output_dir {root}/link",
        status=2,
    ),
    "a name with a zero byte": Case(
        NOT_FITTING + "--class_data_dir a\0b cannot be used: embedded null byte. Use another.",
        [write("args.json", '{"class_data_dir": "a\\u0000b"}')],
        f"{PRIOR} --config {{root}}/args.json",
        status=2,
    ),
    "class images of another prompt": Case(
        "The images in {root}/class were drawn from 'a cat', not 'a dog'. Use another folder.",
        [write("class/.prompt", "a cat")],
        f"{PRIOR} --class_data_dir {{root}}/class",
    ),
    "a note of bytes beside the class images": Case(
        "{root}/class/.prompt cannot be read: «.+invalid start byte». Use another folder.",
        [write("class/.prompt", b"\xff\xfe")],
        f"{PRIOR} --class_data_dir {{root}}/class",
    ),
}
SUPPORTED = "Supported: Stable Diffusion 1.x/2.x, DeepFloyd IF stage I, DeepFloyd IF stage II."
NOT_THIS = "--pretrained_model_name_or_path {model} is "
DOWNLOAD = "Download the model again, or use another."


def no_readable(name: str, reason: str) -> str:
    """Return what is said of a model without one of its configs."""
    return f"The model {{model}} is a folder without a readable {name}: {reason}"


def bad_value(filename: str, key: str, value: object, needed: str) -> Case:
    """Return the case of a value that no config has."""
    message = f'{{model}}/{filename} has "{key}": {json.dumps(value)}; it must be {needed}.'
    return Case(message, [config(filename, **{key: value})])


def no_value(filename: str, key: str) -> Case:
    """Return the case of a config that lacks a value."""
    return Case(f"{{model}}/{filename} has no {key}. {DOWNLOAD}", [config(filename, (key,))])


def bad_class(part: str, library: str, name: str, why: str) -> Case:
    """Return the case of an index that names a class that cannot be."""
    return Case(f"model_index.json names {library}.{name} as its {part}{why}", [index(**{part: [library, name]})])


NOT_INSTALLED, NOT_SUCH = "; no installed package has it.", ", which it is not."
MODELS = {
    "a name that is neither here nor on the Hub": Case(
        "The model nobody/nothing is no folder here, and the Hub gave no such model with a readable model_index.json: "
        "«.+»",
        flags="--pretrained_model_name_or_path nobody/nothing",
    ),
    "a folder without a model": Case(
        no_readable("model_index.json", "[Errno 2] No such file or directory: '{model}/model_index.json'"),
        [empty("model")],
    ),
    "a name that is too long": Case(
        f"The model {'long' * 70} is no folder here, and the Hub gave no such model with a readable "
        "model_index.json: «.+»",
        flags=f"--pretrained_model_name_or_path {'long' * 70}",
    ),
    "a single file of weights": Case(
        "The model {model}/unet/diffusion_pytorch_model.safetensors is a single file. Turn it into a folder with a "
        "model_index.json by diffusers' script convert_original_stable_diffusion_to_diffusers.py.",
        flags="--pretrained_model_name_or_path {model}/unet/diffusion_pytorch_model.safetensors",
    ),
    "no config of the U-Net": Case(
        no_readable("unet/config.json", "[Errno 2] No such file or directory: '{model}/unet/config.json'"),
        [remove("model/unet/config.json")],
    ),
    "a config that is cut off": Case(
        no_readable("vae/config.json", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        [write("model/vae/config.json", "{")],
    ),
    "an index that is a list": Case(
        no_readable("model_index.json", "it holds a list, not an object"), [write("model/model_index.json", "[]")]
    ),
    "an index without an end": Case(
        no_readable("model_index.json", "«maximum recursion depth exceeded.*»"),
        [write("model/model_index.json", "[" * 100_000)],
    ),
    "an index of another pipeline": Case(
        f"{NOT_THIS}a Stable Diffusion XL checkpoint: not supported. {SUPPORTED}",
        [index(text_encoder_2=["transformers", "CLIPTextModelWithProjection"])],
    ),
    "an index whose pipeline is no name": Case(
        '{model}/model_index.json has "_class_name": ["evil", "Evil"]; it must be a name.',
        [index(_class_name=["evil", "Evil"]), code("evil.py")],
    ),
    "an index with a component that is no pair": bad_value(
        "model_index.json", "text_encoder", "CLIPTextModel", "a library and a class"
    ),
    "an index with a component of numbers": bad_value(
        "model_index.json", "tokenizer", [1, 2], "a library and a class"
    ),
    "a component outside of the folder": Case(
        "{model}/model_index.json has a component '../evil'; it must be the name of a folder of the model.",
        [index(**{"../evil": ["diffusers", "UNet2DConditionModel"]})],
    ),
    "a component of a file of the model's own": Case(
        '{model}/model_index.json has "scheduler": ["evil", "Evil"]; only classes of diffusers and transformers are '
        "loaded, and no code that comes with a model.",
        [index(scheduler=["evil", "Evil"]), code("scheduler/evil.py"), code("evil.py")],
    ),
    "a component of Python's own": Case(
        '{model}/model_index.json has "text_encoder": ["os", "system"]; only classes of diffusers and transformers '
        "are loaded, and no code that comes with a model.",
        [index(text_encoder=["os", "system"])],
    ),
    "a text encoder of no class": bad_class("text_encoder", "transformers", "NoSuchModel", NOT_INSTALLED),
    "a scheduler of no class": bad_class("scheduler", "diffusers", "NoSuchScheduler", NOT_INSTALLED),
    "a class that is no model": bad_class("text_encoder", "transformers", "logging", NOT_SUCH),
    "a model in place of a tokenizer": bad_class("tokenizer", "transformers", "CLIPTextModel", NOT_SUCH),
    "a scheduler of noise that nobody knows": Case(
        "The model's scheduler/scheduler_config.json says no noise levels: NotImplementedError: zigzag is not "
        "implemented for «.+».",
        [scheduler(beta_schedule="zigzag")],
    ),
    "a scheduler of noise in words": Case(
        "The model's scheduler/scheduler_config.json says no noise levels: «.+».", [scheduler(beta_end="0.02")]
    ),
    "a scheduler's config of no class": bad_value(
        SCHEDULER, "_class_name", "NoSuchScheduler", "one of diffusers' schedulers"
    ),
    "a scheduler of no steps": bad_value(SCHEDULER, "num_train_timesteps", "1000", "a whole number"),
    "a scheduler that predicts nothing known": Case(
        f"{NOT_THIS}a StableDiffusionPipeline that predicts 'sample': not supported. {SUPPORTED}",
        [scheduler(prediction_type="sample")],
    ),
    "a U-Net of channels in words": bad_value(UNET, "in_channels", "4", "a whole number"),
    "a U-Net without channels": no_value(UNET, "in_channels"),
    "a U-Net without widths": no_value(UNET, "block_out_channels"),
    "a VAE without widths": no_value(VAE, "block_out_channels"),
    "a VAE of one width": bad_value(VAE, "block_out_channels", 8, "a list of whole numbers"),
    "a U-Net of a size in words": bad_value(UNET, "sample_size", "8", "one whole number or two"),
    "a U-Net of another class": Case(
        f"{NOT_THIS}a StableDiffusionPipeline with a UNet3DConditionModel, 4 input channels, class embedding None, "
        f"and VAE AutoencoderKL: not supported. {SUPPORTED}",
        [config(UNET, _class_name="UNet3DConditionModel")],
    ),
    "a text encoder of length in words": bad_value(TEXT_ENCODER, "max_position_embeddings", "77", "a whole number"),
    "a text encoder of code": Case(
        "{model}/text_encoder/config.json has an auto_map, so it needs code that comes with the model: none "
        "is ever run.",
        [
            config(TEXT_ENCODER, auto_map={"AutoModel": "evil.Evil"}, model_type="evil"),
            code("text_encoder/evil.py"),
        ],
    ),
}
TOKENIZER_OF_CODE = (
    config("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"),
    code("tokenizer/evil.py"),
)
NO_WORDS = (
    "The tokenizer of {model} knows no words: it lacks its files (merges.txt, tokenizer.json, vocab.json). Download "
    "the model again."
)
CUT_OFF = "Error while deserializing header: incomplete metadata, file not fully covered."
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1822064\n"


def not_loaded(part: str, reason: str, advice: str = DOWNLOAD) -> str:
    """Return what is said of a part of the model that cannot be loaded."""
    return f"The {part} of {{model}} cannot be loaded: {reason} {advice}"


def lacking(part: str, layers: str) -> str:
    """Return what is said of weights that are not complete."""
    return f"The {part} of {{model}} lacks weights of {layers}. {DOWNLOAD}"


def no_weights(part: str, held: str = "neither .safetensors nor .bin files", variant: str = "") -> str:
    """Return what is said of a part without weights of a variant."""
    return f"The {part} of {{model}} has no weights{variant}: {{model}}/{part} holds {held}."


def rotten(part: str, layer: str) -> str:
    """Return what is said of weights that are not finite."""
    why = "it is damaged, was saved by a run that diverged, or is too large for this precision"
    return f"The {part} holds numbers that are not finite in {layer}: {why}. Use another model."


def pickle_warning(part: str, model: str = "{model}") -> str:
    """Return what is said of weights in a pickle."""
    words = "is read from a pickle, by weights_only=True: numbers, no code. Safetensors are safer."
    return f"WARNING: The {part} of {model} {words}\n"


def not_finite_part(part: str, value: float, flags: str = "", told: str = "") -> Case:
    """Return the case of a part of which one layer holds a number that is none."""
    return Case(rotten(f"{part} of {{model}}", LAYER[part]), [not_finite(part, value)], flags, told=told)


def evil(part: str) -> Case:
    """Return the case of a part whose pickle runs code."""
    what = "its pickle holds more than weights, perhaps code, so it is not read (Unsupported global: «.+»)."
    message = not_loaded(part, what, "Use a model with safetensors.")
    return Case(message, [pickled(part, lambda weights, at: Evil(at))], told=pickle_warning(part))


LOADED = {
    "a U-Net of blocks that nobody knows": Case(
        not_loaded("unet", "EvilBlock does not exist."),
        [config(UNET, down_block_types=["EvilBlock"] * 2)],
    ),
    "a tokenizer of code": Case(
        "The tokenizer of {model} needs code that comes with the model (auto_map), and none is ever run.",
        TOKENIZER_OF_CODE,
    ),
    "another tokenizer of code": Case(
        "The tokenizer of {model}/tokenizer cannot be loaded: it needs code that comes with the model, and none is "
        f"ever run. {DOWNLOAD}",
        TOKENIZER_OF_CODE,
        "--tokenizer_name {model}/tokenizer",
    ),
    "a tokenizer that is not there": Case(NO_WORDS, [remove("model/tokenizer")]),
    "a tokenizer without its words": Case(NO_WORDS, [remove("model/tokenizer/tokenizer.json")]),
    "a tokenizer that is cut off": Case(
        not_loaded("tokenizer", "Unterminated string starting at: line «.+»."),
        [cut_off("model/tokenizer/tokenizer.json", 900)],
    ),
    "a tokenizer that does not say how long prompts are": Case(
        "The tokenizer of {model} does not say how many tokens a prompt may have: give --tokenizer_max_length.",
        [remove("model/tokenizer/tokenizer_config.json")],
    ),
    "another tokenizer that is not there": Case(
        "The tokenizer of {root}/none cannot be loaded: «.+» There is no such folder here; for a model of the Hub, "
        "check its name, its files and --variant.",
        flags="--tokenizer_name {root}/none",
    ),
    "another tokenizer of more words than the text encoder": Case(
        "The tokenizer of {root}/words has 618 words, the text encoder 617. Use another.",
        [more_words],
        "--tokenizer_name {root}/words --instance_prompt 'a wombat'",
    ),
    "a text encoder of other sizes than its config says": Case(
        "The text_encoder of {model} has weights of other shapes than its config says: encoder.layers.0.mlp.fc1.bias "
        "(64,), not (7,) and 5 more.",
        [config(TEXT_ENCODER, intermediate_size=7)],
    ),
    "no weights of the U-Net": Case(no_weights("unet"), [remove(f"model/{WEIGHTS['unet']}")]),
    "no weights of the text encoder": Case(no_weights("text_encoder"), [remove(f"model/{WEIGHTS['text_encoder']}")]),
    "weights of a variant that is not named": Case(
        no_weights("unet", "diffusion_pytorch_model.fp16.safetensors: see --variant"),
        [lambda at: (at.model / WEIGHTS["unet"]).rename(at.model / "unet/diffusion_pytorch_model.fp16.safetensors")],
    ),
    "weights of a variant that is not there": Case(
        no_weights("text_encoder", "model.safetensors: see --variant", " of variant fp16"),
        flags="--variant fp16 --pre_compute_text_embeddings",
    ),
    "weights of the U-Net that are cut off": Case(not_loaded("unet", CUT_OFF), [cut_off(f"model/{WEIGHTS['unet']}")]),
    "weights of the VAE that are cut off": Case(not_loaded("vae", CUT_OFF), [cut_off(f"model/{WEIGHTS['vae']}")]),
    "weights of the text encoder that are cut off": Case(
        not_loaded("text_encoder", CUT_OFF), [cut_off(f"model/{WEIGHTS['text_encoder']}")]
    ),
    "weights of no bytes": Case(
        not_loaded("unet", "Error while deserializing header: header too small."),
        [write(f"model/{WEIGHTS['unet']}", "")],
    ),
    "weights that are a pointer of git": Case(
        not_loaded("unet", "«.+git lfs pull.+»"), [write(f"model/{WEIGHTS['unet']}", LFS)]
    ),
    "weights of another shape": Case(
        not_loaded("unet", "Cannot load because conv_in.bias expected shape torch.Size([24]), but got «.+»"),
        [other_shape("unet")],
    ),
    "a text encoder's weights of another shape": Case(
        "The text_encoder of {model} has weights of other shapes than its config says: "
        "final_layer_norm.bias (3,), not (32,).",
        [other_shape("text_encoder")],
    ),
    "weights that lack a layer": Case(lacking("unet", LAYER["unet"]), [without_layer("unet")]),
    "a VAE's weights that lack a layer": Case(lacking("vae", LAYER["vae"]), [without_layer("vae")]),
    "a text encoder's weights that lack a layer": Case(
        lacking("text_encoder", LAYER["text_encoder"]), [without_layer("text_encoder")]
    ),
    "a U-Net of NaN": not_finite_part("unet", float("nan")),
    "a VAE of infinity": not_finite_part("vae", float("inf")),
    "a text encoder of NaN": not_finite_part("text_encoder", float("nan")),
    "a text encoder of NaN that is encoded first": not_finite_part(
        "text_encoder", float("nan"), "--pre_compute_text_embeddings"
    ),
    "a pickled U-Net that runs code": evil("unet"),
    "a pickled VAE that runs code": evil("vae"),
    "a pickled text encoder that runs code": evil("text_encoder"),
    "a pickle that holds no weights": Case(
        not_loaded("unet", "AttributeError: 'list' object has no attribute 'keys'.", "Use a model with safetensors."),
        [pickled("unet", lambda weights, at: [1, 2])],
        told=pickle_warning("unet"),
    ),
    "a pickle of words": Case(
        lacking("text_encoder", "embeddings.position_embedding.weight and 35 more"),
        [pickled("text_encoder", lambda weights, at: {"a": "b"})],
        told=pickle_warning("text_encoder"),
    ),
    "a pipeline of NaN that is to draw class images": Case(
        rotten("model of {model}, unet,", "conv_in.bias"),
        [not_finite("unet", float("nan"))],
        f"{PRIOR} --class_data_dir {{out}}/class",
        told="INFO: [RANK 0] Drawing 1 class images of 'a dog'.\n",
    ),
}


def no_checkpoint(name: str, why: str, *makers: Maker) -> Case:
    """Return the case of a checkpoint that is asked for and cannot be used."""
    message = f"The checkpoint {name} {why}. Complete checkpoints in {{out}}: none."
    return Case(message, makers, f"--resume_from_checkpoint {name}")


def bad_state(why: str, content: object) -> Case:
    """Return the case of a checkpoint that holds nothing but its state, with a text or what becomes JSON in it."""
    text = content if isinstance(content, str) else json.dumps(content)
    return no_checkpoint("checkpoint-1", why, write("out/checkpoint-1/trainer_state.json", text))


CHECKPOINTS = {
    "a checkpoint that is not there": no_checkpoint("checkpoint-7", "does not exist"),
    "a file in place of a checkpoint": no_checkpoint("checkpoint-7", "is no folder", write("out/checkpoint-7", "")),
    "a link to nowhere in place of a checkpoint": no_checkpoint(
        "checkpoint-7", "does not exist", link("out/checkpoint-7", "{root}/nowhere")
    ),
    "a link to itself in place of a checkpoint": no_checkpoint(
        "checkpoint-7", "does not exist", link("out/checkpoint-7", "{out}/checkpoint-7")
    ),
    "a checkpoint of too long a name": no_checkpoint("long" * 70, "does not exist"),
    "a state without an end": bad_state("is incomplete: its trainer_state.json is no valid JSON", "[" * 100_000),
    "a state that is not there": no_checkpoint(
        "checkpoint-1",
        "is incomplete: it has no readable trainer_state.json",
        lambda at: (at.out / "checkpoint-1").mkdir(parents=True),
    ),
    "a state that is a list": bad_state("is incomplete: its trainer_state.json is no JSON object", []),
    "a state that is cut off": bad_state("is incomplete: its trainer_state.json is no valid JSON", '{"step": 1'),
    "a state whose files are a list": bad_state(
        "is damaged: its trainer_state.json has no usable files", {"step": 1, "fits": {}, "files": ["optimizer.pt"]}
    ),
    "a state that names a file that is gone": bad_state(
        "is damaged: it lacks optimizer.pt", {"step": 1, "fits": {}, "files": {"optimizer.pt": 9}}
    ),
    "a state without a step": bad_state(
        "is damaged: its trainer_state.json has no usable step", {"fits": {}, "files": {}}
    ),
    "a state of a step in words": bad_state(
        "is damaged: its trainer_state.json has no usable step", {"step": "1", "fits": {}, "files": {}}
    ),
    "a state that does not say what fits": bad_state(
        "is damaged: its trainer_state.json has no usable fits", {"step": 1, "files": {}}
    ),
}
OTHERS = {
    "no login": Case(
        "there is no login for the Hub. Make a token with write role at https://huggingface.co/settings/tokens and "
        "log in: `hf auth login`, or set HF_TOKEN.",
        flags="--push_to_hub",
    ),
    "a token that cannot be tried": Case(
        "the login cannot be checked: «.+offline mode is enabled.+».",
        flags="--push_to_hub --hub_token hf_none",
        told="WARNING: [RANK 0] --hub_token is visible in the process list; HF_TOKEN or `hf auth login` is not.\n",
    ),
    "a loss that is no number": Case(
        "Training has diverged«.+»",
        flags="--noise_offset 1e38 --checkpointing_steps 1",
        left=("args.json", "metrics.jsonl"),
    ),
}
SMALLER = "WARNING: 1 of 2 photos are smaller than 64 px: enlarged.\n"
LONG = "a photo of sks dog " + " ".join(f"number {number}" for number in range(40))
TOO_LONG = (  # the first word is seen in part
    f"WARNING: The prompt '{LONG}' is longer than 77 tokens; "
    f"the model will not see '{LONG[LONG.index('number 11') :]}'.\n"
)
FRAMES = [draw_picture(64, 64, number) for number in (2, 3)]
DEEP = Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)
LATEST = "--resume_from_checkpoint latest"


def good(name: str) -> Case:
    """Return the case of a good photo of which there is nothing to say."""
    return Case("", [photo(name, encoded("PNG"))])


FINE = {
    "spaces and quotes in a name": good("a \"photo\" of 'my' dog.png"),
    "a name in other letters": good("собака 犬 🐕 é.png"),
    "a name of two lines": good("two\nlines.png"),
    "a name that is no UTF-8": good(os.fsdecode(b"\xff.png")),
    "a name like a flag": good("--resolution=0.png"),
    "a suffix of another format": good("really-a-png.jpg"),
    "capital letters in a suffix": good("DOG.PNG"),
    "an animation": Case("", [picture("dog.gif", PICTURE, save_all=True, append_images=FRAMES)]),
    "16 bits": Case("", [picture("deep.png", DEEP)]),
    "CMYK": Case("", [picture("print.jpg", PICTURE.convert("CMYK"))]),
    "a real HEIC": Case("", [heic("phone.heic")]),
    "a transparent picture": Case(
        "INFO: 1 images in {photos} are transparent in parts: put on white.\n", [blank("cut-out.png", "RGBA", 64, 64)]
    ),
    "one pixel": Case(SMALLER, [blank("dot.png", "RGB", 1, 1)]),
    "a panorama": Case(SMALLER, [blank("wide.png", "RGB", 1900, 20)]),
    "a very large picture": Case("", [blank("large.png", "1", 9_500, 9_500)]),
    "a bad photo passed over": Case(
        "INFO: 1 of 2 images in --instance_data_dir {photos} cannot be read:\n"
        "  {photos}/empty.png: the file is empty\n",
        [photo("empty.png", "")],
        "--skip_bad_images",
    ),
    "a folder that links to itself": Case(
        "INFO: Not read as images in {photos}: again.\n", [link("photos/again", "{photos}")]
    ),
    "10,000 captions": Case(
        f"INFO: Not read as images in {{photos}}: {', '.join(f'{n:04d}.txt' for n in range(10))} and 9990 more.\n",
        [captions(10_000)],
    ),
    "a pickled U-Net": Case(pickle_warning("unet"), [pickled("unet")]),
    "a pickled VAE": Case(pickle_warning("vae"), [pickled("vae")]),
    "a pickled text encoder": Case(pickle_warning("text_encoder"), [pickled("text_encoder")]),
    "a prompt that is too long": Case(TOO_LONG, flags=f"--instance_prompt '{LONG}'"),
    "a class prompt that is too long": Case(
        f"{TOO_LONG}INFO: [RANK 0] Drawing 1 class images of '{LONG}'.\n",
        flags=f"--with_prior_preservation --num_class_images 1 --class_prompt '{LONG}'",
    ),
    "metadata that are damaged": Case("", [picture("exif.jpg", PICTURE, exif=b"Exif\0\0II*\0\x08\0\0\0\xff")]),
    "a link to nowhere beside the text encoder": Case(
        "", [link("model/text_encoder/notes", "{root}/nowhere")], "--pre_compute_text_embeddings"
    ),
    "a scheduler's config without a prediction": Case("", [scheduler("prediction_type")]),
    "a cache that is a file": Case(
        "WARNING: Embeddings cannot be cached in {model}/model_index.json: [Errno 17] File exists: "
        "'{model}/model_index.json'. The run goes on without.\n"
        "WARNING: Latents cannot be cached in {model}/model_index.json: [Errno 17] File exists: "
        "'{model}/model_index.json'. The run goes on without.\n",
        flags="--pre_compute_text_embeddings --cache_dir {model}/model_index.json",
    ),
    "a class image that is none": Case(
        "WARNING: Class image {out}/class_images/broken.png does not count: the file is empty\n"
        "INFO: [RANK 0] Drawing 1 class images of 'a dog'.\n",
        [write("out/class_images/broken.png", "")],
        PRIOR,
    ),
    "a code file that nothing names": Case("", [code("evil.py")]),
    "a latest checkpoint where there is none": Case(
        "WARNING: {out} holds no complete checkpoint: starting at step 0.\n", flags=LATEST
    ),
    "a latest checkpoint that is a file": Case(
        "WARNING: Passed over {out}/checkpoint-7: it is no folder.\n"
        "WARNING: {out} holds no complete checkpoint: starting at step 0.\n",
        [write("out/checkpoint-7", "")],
        LATEST,
    ),
}


def refusals() -> dict[str, Case]:
    """Return all cases that must be refused, by name."""
    unfit = "these flags cannot be used with {model} (Stable Diffusion 1.x/2.x):\n"
    table = {flags: Case(NOT_FITTING + words, flags=flags, status=2) for flags, words in FLAGS.items()}
    for flags, (script, words) in OF_ONE_SCRIPT.items():
        table[flags] = Case(NOT_FITTING + words, flags=flags, status=2, script=script)
    table |= {flags: Case(words, flags=flags, status=2) for flags, words in PARSER.items()}
    for content, words in CONFIGS.items():
        words, flags = f"--config {{root}}/args.json {words}", "--config {root}/args.json"
        table[f"--config {content}"] = Case(words, [write("args.json", content)], flags, status=2)
    table |= {flags: Case(unfit + words, flags=flags) for flags, words in UNSUPPORTED.items()}
    for name, (reason, content) in PHOTOS.items():
        makers = content if isinstance(content, list) else [photo(name, content)]
        table[f"a photo {name}"] = Case(unreadable(name, reason), makers)
    loaded = {name: dataclasses.replace(case, left=("args.json", *case.left)) for name, case in LOADED.items()}
    return table | FOLDERS | MODELS | loaded | CHECKPOINTS | OTHERS


def unreadable(name: str, reason: str) -> str:
    """Return what is said of one photo of two that cannot be read."""
    return (
        f"1 of 2 images in --instance_data_dir {{photos}} cannot be read:\n  {{photos}}/{name}: {reason}\n"
        "Mend or remove them, or go on without them by --skip_bad_images."
    )


# Running the cases.

USAGE = "--pretrained_model_name_or_path MODEL --instance_data_dir DIR --instance_prompt PROMPT [...]"


@pytest.fixture
def place(tiny, tmp_path) -> Place:
    """Copy the tiny model, and draw one good photo."""
    at = Place(tmp_path)
    shutil.copytree(tiny, at.model)
    at.photos.mkdir()
    (at.photos / "good.png").write_bytes(encoded("PNG"))
    return at


def cases(table: dict[str, Case]) -> list:
    """Return the cases as parameters, the scripts taking turns."""
    scripts = list(SCRIPTS)
    return [
        pytest.param(case, case.script or scripts[number % 2], id=name[:80])
        for number, (name, case) in enumerate(table.items())
    ]


@pytest.mark.parametrize(("case", "script"), cases(refusals()))
def test_bad_input_is_refused_with_one_message(trainer, place, case, script):
    """The message is the whole of stderr, the exit status tells flags from data, and the input is left as it was."""
    case.make(place)
    held = set(place.out.rglob("*"))
    run = run_case(trainer, place, case, script)
    name = SCRIPTS[script]
    head = f"usage: {name} {USAGE}\n{name}: " if case.status == 2 else case.told
    printed = without_bar(run.stderr)
    assert said(place, f"{head}error: {case.message}\n").fullmatch(printed), printed
    assert run.code == case.status and printed.count("error: ") == 1
    assert {path.relative_to(place.out).as_posix() for path in set(place.out.rglob("*")) - held} == set(case.left)
    assert place.out.exists() == bool(held or case.left)


@pytest.mark.parametrize(("case", "script"), cases(FINE))
def test_odd_input_is_taken_with_these_warnings(trainer, place, case, script):
    """A run ends well, and says what a person should know and nothing more."""
    case.make(place)
    run = run_case(trainer, place, case, script)
    result = "The trained pipeline is in {out}." if script == "full" else f"The adapter is {{out}}/{WEIGHTS_FILE}."
    printed = without_bar(run.stderr)
    assert said(place, f"{case.message}INFO: [RANK 0] {result}\n").fullmatch(printed), printed
    assert run.code == 0


def test_a_pickle_of_the_hub_is_named_too(trainer, place):
    """The warning is that of a folder; here the copy of a model that was downloaded before has no connection."""
    pickled("unet")(place)
    cache = trainer.home / "hub" / "models--nobody--pickled"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(place.model, cache / "snapshots" / ("0" * 40))
    case = Case("", flags="--pretrained_model_name_or_path nobody/pickled")
    run = run_case(trainer, place, case, "lora")
    assert run.code == 0 and run.stderr.count(pickle_warning("unet", "nobody/pickled")) == 1, run.stderr


def run_case(trainer: Trainer, at: Place, case: Case, script: str) -> Run:
    """Run a script on a case's input, and check that it changed none of it and ran no code of it."""
    before = snapshot(at.root)
    flags = (
        "--pretrained_model_name_or_path {model} --instance_data_dir {photos} --output_dir {out} --max_train_steps 1"
    )
    job = trainer.start_words(script, at.out, shlex.split(at.fill(f"{BASE_FLAGS} {flags} {case.flags}")))
    run, after = job.finish(), snapshot(at.root)
    assert "Traceback" not in run.text, run.text
    assert {name: after.get(name) for name in before} == before
    assert [name for name in after.keys() - before.keys() if Path(name).parts[0] != "out"] == []
    assert list((job.log / "cwd").iterdir()) == []
    return run


def snapshot(folder: Path) -> dict[str, tuple]:
    """Return the kind, size and time of change of everything below a folder but the output's own folders."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*")}
    inputs = {name: path.lstat() for name, path in paths.items() if name.parts[0] != "out" or not path.is_dir()}
    return {name.as_posix(): (state.st_mode, state.st_size, state.st_mtime_ns) for name, state in inputs.items()}


def said(at: Place, message: str) -> re.Pattern:
    """Return what matches a message and nothing else."""
    pieces = re.split("[«»]", at.fill(message))
    return re.compile("".join(text if place % 2 else re.escape(text) for place, text in enumerate(pieces)), re.DOTALL)


def without_bar(printed: str) -> str:
    """Return what was printed beside progress bars and what is encoded once."""
    printed = re.sub(r"(\n(steps|latents|class images): [^]\n]*\])+(\n( +\n)?)?", "", printed)
    return re.sub(r"INFO: (\[RANK 0\] )?(Encoding \d+ of|Cached the latents|Latents are not) [^\n]*\n?", "", printed)
