"""Bad flags, folders, pictures, models and checkpoints: each run by a script, with the whole of what it must say.

Between « and » a message holds a regular expression for a library's own words; all else is compared letter by letter.
"""

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import draw_picture
from tests.runs import BASE_FLAGS, SCRIPTS, WEIGHTS_FILE, Run, Trainer
from utils.make_model import build_tokenizer

USAGE = "--pretrained_model_name_or_path MODEL --instance_data_dir DIR --instance_prompt PROMPT [...]"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
LAYER = {"unet": "conv_in.bias", "vae": "encoder.conv_in.bias", "text_encoder": "final_layer_norm.bias"}
SIZE_WORDS = "is no size: give the edge of a square in pixels, such as 512, or WIDTHxHEIGHT, such as 96x64."
SUFFIXES = ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .heic .heif .avif"
EVIL = "open({!r}, 'w').close()\n"  # code that leaves a file behind


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a case lies; the photos, a good one among them, and the model are there before it is made."""

    root: Path

    @property
    def photos(self) -> Path:
        """Return the folder of photos."""
        return self.root / "photos"

    @property
    def model(self) -> Path:
        """Return the folder of the model."""
        return self.root / "model"

    @property
    def out(self) -> Path:
        """Return the output folder, which does not exist."""
        return self.root / "out"

    @property
    def executed(self) -> Path:
        """Return the file that exists once evil code has run."""
        return self.root / "executed"

    def fill(self, text: str) -> str:
        """Put the paths into a message or into flags."""
        for name in ("root", "photos", "model", "out"):
            text = text.replace(f"{{{name}}}", str(getattr(self, name)))
        return text


@dataclasses.dataclass(frozen=True)
class Case:
    """An input, and what is said of it."""

    message: str  # of a refusal what follows "error: "; else the whole of the warnings and notes
    make: Callable[[Place], object] = lambda at: None
    flags: str = ""
    status: int = 1
    left: tuple[str, ...] = ()  # what the output folder holds afterwards, beside what it held
    script: str | None = None  # None: either will do
    told: str = ""  # what stands before the error


# Makers.


def write(name: str, content: bytes | str) -> Callable[[Place], object]:
    """Write a file below the case's root."""
    content = content.encode() if isinstance(content, str) else content
    return lambda at: at.root.joinpath(name).write_bytes(content)


def photo(name: str, content: bytes | str) -> Callable[[Place], object]:
    """Put a file among the photos."""
    return write(f"photos/{name}", content)


def picture(name: str, image: Image.Image, **options) -> Callable[[Place], object]:
    """Put a picture among the photos."""
    return lambda at: image.save(at.photos / name, **options)


def encoded(kind: str, width: int = 64, height: int = 64) -> bytes:
    """Return the bytes of a picture."""
    file = io.BytesIO()
    draw_picture(width, height, 1).save(file, kind)
    return file.getvalue()


def link(name: str, target: str) -> Callable[[Place], object]:
    """Make a link below the case's root."""
    return lambda at: (at.root / name).symlink_to(at.fill(target))


def empty(name: str) -> Callable[[Place], object]:
    """Empty a folder below the case's root."""
    return lambda at: [shutil.rmtree(at.root / name), (at.root / name).mkdir()]


def remove(name: str) -> Callable[[Place], object]:
    """Remove a file or folder below the case's root."""
    return lambda at: (shutil.rmtree if (at.root / name).is_dir() else os.unlink)(at.root / name)


def lock(name: str, mode: int) -> Callable[[Place], object]:
    """Change what may be done with a file or folder below the case's root, or skip the case if nobody minds."""

    def make(at: Place) -> None:
        (at.root / name).chmod(mode)
        if os.access(at.root / name, os.R_OK | os.W_OK):
            pytest.skip("this user may read and write everything")

    return make


def both(*makers: Callable[[Place], object]) -> Callable[[Place], object]:
    """Do several things."""
    return lambda at: [make(at) for make in makers]


def config(filename: str, removed: tuple[str, ...] = (), **changes) -> Callable[[Place], object]:
    """Change entries of one of the model's JSON files."""

    def make(at: Place) -> None:
        path = at.model / filename
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in removed}))

    return make


def index(**changes) -> Callable[[Place], object]:
    """Change entries of the model's index."""
    return config("model_index.json", **changes)


def tensors(part: str, change: Callable[[dict], object]) -> Callable[[Place], object]:
    """Change the weights of a part of the model."""

    def make(at: Place) -> None:
        weights = load_file(at.model / WEIGHTS[part])
        change(weights)
        save_file(weights, at.model / WEIGHTS[part], {"format": "pt"})

    return make


def not_finite(part: str, value: float) -> Callable[[Place], object]:
    """Put one number that is none into a layer."""
    return tensors(part, lambda weights: weights[LAYER[part]].view(-1)[:1].fill_(value))


def pickled(part: str, content: Callable[[dict, Place], object]) -> Callable[[Place], object]:
    """Replace the weights of a part by a pickle."""

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


def code(name: str) -> Callable[[Place], object]:
    """Put a Python file into the model that leaves a trace where it is executed."""
    return lambda at: (at.model / name).write_text(EVIL.format(str(at.executed)))


def checkpoint(state: object, name: str = "checkpoint-1", folder: str = "out") -> Callable[[Place], object]:
    """Write a checkpoint that holds nothing but its state."""

    def make(at: Place) -> None:
        (at.root / folder / name).mkdir(parents=True)
        text = state if isinstance(state, str) else json.dumps(state)
        (at.root / folder / name / "trainer_state.json").write_text(text)

    return make


# The tables.


def unreadable(name: str, reason: str, count: int = 2) -> str:
    """Return what is said of one photo that cannot be read."""
    return (
        f"1 of {count} images in --instance_data_dir {{photos}} cannot be read:\n  {{photos}}/{name}: {reason}\n"
        "Mend or remove them, or go on without them by --skip_bad_images."
    )


def not_loaded(part: str, reason: str, advice: str = "Download the model again, or use another.") -> str:
    """Return what is said of a part of the model that cannot be loaded."""
    return f"The {part} of {{model}} cannot be loaded: {reason} {advice}"


def lacking(part: str, layers: str) -> str:
    """Return what is said of weights that are not complete."""
    return f"The {part} of {{model}} lacks weights of {layers}. Download the model again, or use another."


def no_readable(name: str, reason: str) -> str:
    """Return what is said of a model without one of its configs."""
    return f"The model {{model}} is a folder without a readable {name}: {reason}"


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
        "--output_dir in --instance_data_dir {photos}: all pictures below it count as photos."
    ),
    f"{PRIOR} --class_data_dir {{photos}}": (
        "--class_data_dir in --instance_data_dir {photos}: all pictures below it count as photos.\n"
        "  - --instance_data_dir in --class_data_dir: all pictures below it count as class images."
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
UNFIT = {  # by flags, what is said of them once the model is known
    "--resolution 100": "--resolution or --validation_resolution 100: the model needs multiples of 8.",
    "--train_variance": "--train_variance: this U-Net predicts no variance.",
    "--tokenizer_max_length 78": "--tokenizer_max_length 78: the text encoder takes 77.",
    "--num_eval_images 1 --validation_prompt x": "--num_eval_images is for DeepFloyd IF's stage II.",
}
DAMAGED = "it is cut off or damaged («.+»)"
NO_FORMAT = "it is damaged, or in no format that is read here (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF, HEIC)"
PHOTOS = {
    "truncated.jpg": Case(DAMAGED, photo("truncated.jpg", encoded("JPEG")[:700])),
    "truncated.png": Case(DAMAGED, photo("truncated.png", encoded("PNG")[:-500])),
    "truncated.webp": Case(DAMAGED, photo("truncated.webp", encoded("WEBP")[:-100])),
    "empty.png": Case("the file is empty", photo("empty.png", "")),
    "drawing.png": Case(NO_FORMAT, photo("drawing.png", "<svg xmlns='http://www.w3.org/2000/svg'/>")),
    "page.jpg": Case(NO_FORMAT, photo("page.jpg", "<!DOCTYPE html><title>404</title>")),
    "script.jpg": Case(NO_FORMAT, photo("script.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    "phone.heic": Case(NO_FORMAT, photo("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))),
    "pointer.png": Case(NO_FORMAT, photo("pointer.png", "version https://git-lfs.github.com/spec/v1\n")),
    "deep.tiff": Case(
        "its pixels are of mode F, without a fixed range; save it with 8 bits per colour",
        picture("deep.tiff", Image.new("F", (64, 64))),
    ),
    "long.png": Case(
        "it is 30000 x 1 pixels, more than 100 times as long as wide",
        picture("long.png", Image.new("RGB", (30_000, 1))),
    ),
    "bomb.png": Case(
        "Image size (400000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack",
        picture("bomb.png", Image.new("1", (20_000, 20_000))),
    ),
    "gone.png": Case("No such file or directory", link("photos/gone.png", "{root}/nowhere.png")),
    "loop.png": Case("Too many levels of symbolic links", link("photos/loop.png", "{photos}/loop.png")),
    "pipe.png": Case("it is no file", lambda at: os.mkfifo(at.photos / "pipe.png")),
    "device.png": Case("it is no file", link("photos/device.png", "/dev/zero")),
    "locked.png": Case("Permission denied", both(photo("locked.png", encoded("PNG")), lock("photos/locked.png", 0))),
    "two\nlines.png": Case("the file is empty", photo("two\nlines.png", "")),
}
NO_IMAGES = f"--instance_data_dir {{photos}} holds no images (looked for {SUFFIXES}). "
FOLDERS = {
    "an empty folder": Case(NO_IMAGES + "It is empty.", empty("photos")),
    "captions alone": Case(
        NO_IMAGES + "Found: a.caption, a.txt.",
        both(empty("photos"), photo("a.txt", "a dog"), photo("a.caption", "a dog")),
    ),
    "an SVG alone": Case(NO_IMAGES + "Found: dog.svg.", both(empty("photos"), photo("dog.svg", "<svg/>"))),
    "a folder that is named like a picture": Case(
        NO_IMAGES + "It is empty.", both(empty("photos"), lambda at: (at.photos / "x.png").mkdir())
    ),
    "10,000 captions": Case(
        NO_IMAGES + f"Found: {', '.join(f'{number:04d}.txt' for number in range(10))} and 9990 more.",
        both(empty("photos"), lambda at: [(at.photos / f"{number:04d}.txt").touch() for number in range(10_000)]),
    ),
    "a link to itself in place of the folder": Case(
        "the flags do not fit:\n  - --instance_data_dir {photos} cannot be used: Too many levels of symbolic "
        "links. Use another.",
        both(remove("photos"), link("photos", "{photos}")),
        status=2,
    ),
    "all photos bad, and none to go on with": Case(
        "1 of 1 images in --instance_data_dir {photos} cannot be read:\n  {photos}/good.png: the file is empty\n"
        "Mend or remove them.",
        photo("good.png", ""),
        "--skip_bad_images",
    ),
    "a folder that may not be read": Case(
        "The image folder {photos}/locked cannot be listed: Permission denied. Name a folder that you may read.",
        both(lambda at: (at.photos / "locked").mkdir(), lock("photos/locked", 0)),
    ),
    "an output folder that may not be written": Case(
        "--output_dir {root}/locked/out cannot be used: Permission denied. Use another folder.",
        both(lambda at: (at.root / "locked").mkdir(), lock("locked", 0o500)),
        "--output_dir {root}/locked/out",
    ),
    "an output folder where nobody can make one": Case(
        "--output_dir /proc/out cannot be used: No such file or directory. Use another folder.",
        flags="--output_dir /proc/out",
    ),
    "a link to nowhere as output folder": Case(
        "the flags do not fit:\n  - --output_dir {root}/link cannot be used: it is a link to nowhere. Use another.",
        link("link", "{root}/nowhere"),
        "--output_dir {root}/link",
        status=2,
    ),
    "a name with a zero byte": Case(
        "the flags do not fit:\n  - --class_data_dir a\0b cannot be used: embedded null byte. Use another.",
        write("args.json", '{"class_data_dir": "a\\u0000b"}'),
        f"{PRIOR} --config {{root}}/args.json",
        status=2,
    ),
    "class images of another prompt": Case(
        "The images in {root}/class were drawn from 'a cat', not 'a dog'. Use another folder.",
        both(lambda at: (at.root / "class").mkdir(), write("class/.prompt", "a cat")),
        f"{PRIOR} --class_data_dir {{root}}/class",
    ),
    "a note of bytes beside the class images": Case(
        "{root}/class/.prompt cannot be read: «.+invalid start byte». Use another folder.",
        both(lambda at: (at.root / "class").mkdir(), write("class/.prompt", b"\xff\xfe")),
        f"{PRIOR} --class_data_dir {{root}}/class",
    ),
}
SUPPORTED = "Supported: Stable Diffusion 1.x/2.x, DeepFloyd IF stage I, DeepFloyd IF stage II."
NOT_THIS = "--pretrained_model_name_or_path {model} is "
LOADED_LATE = ("args.json",)  # weights are read once the output folder is there
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1822064\n"


TOKENIZER_OF_CODE = both(
    config("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"),
    code("tokenizer/evil.py"),
)
NO_WORDS = (
    "The tokenizer of {model} knows no words: it lacks its files (merges.txt, tokenizer.json, "
    "vocab.json). Download the "
    "model again."
)
NO_WEIGHTS = "The {0} of {{model}} has no weights: {{model}}/{0} holds neither .safetensors nor .bin files."
CUT_OFF = "Error while deserializing header: incomplete metadata, file not fully covered."
PICKLE = (
    "WARNING: The {} of {{model}} is read from a pickle, by weights_only=True: numbers, no code. "
    "Safetensors are safer.\n"
)
ENCODING = "INFO: [RANK 0] Encoding 1 of 1 prompts; the others are in «.+».\n"


def cut_off(part: str) -> Callable[[Place], object]:
    """Cut off the end of a part's weights."""
    return lambda at: os.truncate(at.model / WEIGHTS[part], (at.model / WEIGHTS[part]).stat().st_size - 999)


def more_words(at: Place) -> None:
    """Write a tokenizer that knows one word more than the model's."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["wombat"])
    tokenizer.save_pretrained(at.root / "words")


def evil(part: str) -> Case:
    """Return the case of a part whose pickle runs code."""
    what = "its pickle holds more than weights, perhaps code, so it is not read (Unsupported global: «.+»)."
    message = not_loaded(part, what, "Use a model with safetensors.")
    return Case(message, pickled(part, lambda weights, at: Evil(at)), left=LOADED_LATE, told=PICKLE.format(part))


def rotten(part: str, value: float, layer: str, flags: str = "", told: str = "") -> Case:
    """Return the case of a part of which one layer holds a number that is none."""
    message = (
        f"The {part} of {{model}} holds numbers that are not finite in {layer}: it is damaged, was saved by a "
        f"run that "
        "diverged, or is too large for this precision. Use another model."
    )
    return Case(message, not_finite(part, value), flags, left=LOADED_LATE, told=told)


MODELS = {
    "a name that is neither here nor on the Hub": Case(
        "The model nobody/nothing is no folder here, and the Hub gave no such model with a readable model_index.json: "
        "«.+»",
        flags="--pretrained_model_name_or_path nobody/nothing",
    ),
    "a folder without a model": Case(
        no_readable("model_index.json", "[Errno 2] No such file or directory: '{model}/model_index.json'"),
        empty("model"),
    ),
    "a name that is too long": Case(
        f"The model {'long' * 70} is no folder here, and the Hub gave no such model with a readable "
        f"model_index.json: «.+»",
        flags=f"--pretrained_model_name_or_path {'long' * 70}",
    ),
    "a single file of weights": Case(
        "The model {model}/unet/diffusion_pytorch_model.safetensors is a single file. Turn it into a folder with a "
        "model_index.json by diffusers' script convert_original_stable_diffusion_to_diffusers.py.",
        flags="--pretrained_model_name_or_path {model}/unet/diffusion_pytorch_model.safetensors",
    ),
    "no config of the U-Net": Case(
        no_readable("unet/config.json", "[Errno 2] No such file or directory: '{model}/unet/config.json'"),
        remove("model/unet/config.json"),
    ),
    "a config that is cut off": Case(
        no_readable("vae/config.json", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        write("model/vae/config.json", "{"),
    ),
    "an index that is a list": Case(
        no_readable("model_index.json", "it holds a list, not an object"), write("model/model_index.json", "[]")
    ),
    "an index without an end": Case(
        no_readable("model_index.json", "«maximum recursion depth exceeded.*»"),
        write("model/model_index.json", "[" * 100_000),
    ),
    "an index of another pipeline": Case(
        NOT_THIS + f"a Stable Diffusion XL checkpoint: not supported. {SUPPORTED}",
        index(text_encoder_2=["transformers", "CLIPTextModelWithProjection"]),
    ),
    "an index whose pipeline is no name": Case(
        '{model}/model_index.json has "_class_name": ["evil", "Evil"]; it must be a name.',
        both(index(_class_name=["evil", "Evil"]), code("evil.py")),
    ),
    "an index with a component that is no pair": Case(
        '{model}/model_index.json has "text_encoder": "CLIPTextModel"; it must be a library and a class.',
        index(text_encoder="CLIPTextModel"),
    ),
    "an index with a component of numbers": Case(
        '{model}/model_index.json has "tokenizer": [1, 2]; it must be a library and a class.',
        index(tokenizer=[1, 2]),
    ),
    "a component outside of the folder": Case(
        "{model}/model_index.json has a component '../evil'; it must be the name of a folder of the model.",
        index(**{"../evil": ["diffusers", "UNet2DConditionModel"]}),
    ),
    "a component of a file of the model's own": Case(
        '{model}/model_index.json has "scheduler": ["evil", "Evil"]; only classes of diffusers and transformers are '
        "loaded, and no code that comes with a model.",
        both(index(scheduler=["evil", "Evil"]), code("scheduler/evil.py"), code("evil.py")),
    ),
    "a component of Python's own": Case(
        '{model}/model_index.json has "text_encoder": ["os", "system"]; only classes of diffusers and '
        "transformers are "
        "loaded, and no code that comes with a model.",
        index(text_encoder=["os", "system"]),
    ),
    "a text encoder of no class": Case(
        "model_index.json names transformers.NoSuchModel as its text_encoder; no installed package has it.",
        index(text_encoder=["transformers", "NoSuchModel"]),
    ),
    "a scheduler of no class": Case(
        "model_index.json names diffusers.NoSuchScheduler as its scheduler; no installed package has it.",
        index(scheduler=["diffusers", "NoSuchScheduler"]),
    ),
    "a class that is no model": Case(
        "model_index.json names transformers.logging as its text_encoder, which it is not.",
        index(text_encoder=["transformers", "logging"]),
    ),
    "a model in place of a tokenizer": Case(
        "model_index.json names transformers.CLIPTextModel as its tokenizer, which it is not.",
        index(tokenizer=["transformers", "CLIPTextModel"]),
    ),
    "a scheduler of noise that nobody knows": Case(
        "The model's scheduler/scheduler_config.json says no noise levels: NotImplementedError: zigzag is not "
        "implemented for «.+».",
        config("scheduler/scheduler_config.json", beta_schedule="zigzag"),
    ),
    "a scheduler of noise in words": Case(
        "The model's scheduler/scheduler_config.json says no noise levels: «.+».",
        config("scheduler/scheduler_config.json", beta_end="0.02"),
    ),
    "a scheduler's config of no class": Case(
        '{model}/scheduler/scheduler_config.json has "_class_name": "NoSuchScheduler"; it must be one of '
        "diffusers' schedulers.",
        config("scheduler/scheduler_config.json", _class_name="NoSuchScheduler"),
    ),
    "a scheduler of no steps": Case(
        '{model}/scheduler/scheduler_config.json has "num_train_timesteps": "1000"; it must be a whole number.',
        config("scheduler/scheduler_config.json", num_train_timesteps="1000"),
    ),
    "a scheduler that predicts nothing known": Case(
        NOT_THIS + f"a StableDiffusionPipeline that predicts 'sample': not supported. {SUPPORTED}",
        config("scheduler/scheduler_config.json", prediction_type="sample"),
    ),
    "a U-Net of channels in words": Case(
        '{model}/unet/config.json has "in_channels": "4"; it must be a whole number.',
        config("unet/config.json", in_channels="4"),
    ),
    "a U-Net without channels": Case(
        "{model}/unet/config.json has no in_channels. Download the model again, or use another.",
        config("unet/config.json", ("in_channels",)),
    ),
    "a U-Net without widths": Case(
        "{model}/unet/config.json has no block_out_channels. Download the model again, or use another.",
        config("unet/config.json", ("block_out_channels",)),
    ),
    "a VAE without widths": Case(
        "{model}/vae/config.json has no block_out_channels. Download the model again, or use another.",
        config("vae/config.json", ("block_out_channels",)),
    ),
    "a VAE of one width": Case(
        '{model}/vae/config.json has "block_out_channels": 8; it must be a list of whole numbers.',
        config("vae/config.json", block_out_channels=8),
    ),
    "a U-Net of a size in words": Case(
        '{model}/unet/config.json has "sample_size": "8"; it must be one whole number or two.',
        config("unet/config.json", sample_size="8"),
    ),
    "a U-Net of another class": Case(
        NOT_THIS
        + "a StableDiffusionPipeline with a UNet3DConditionModel, 4 input channels, class embedding None, and "
        f"VAE AutoencoderKL: not supported. {SUPPORTED}",
        config("unet/config.json", _class_name="UNet3DConditionModel"),
    ),
    "a U-Net of blocks that nobody knows": Case(
        not_loaded("unet", "EvilBlock does not exist."),
        config("unet/config.json", down_block_types=["EvilBlock"] * 2),
        left=LOADED_LATE,
    ),
    "a text encoder of length in words": Case(
        '{model}/text_encoder/config.json has "max_position_embeddings": "77"; it must be a whole number.',
        config("text_encoder/config.json", max_position_embeddings="77"),
    ),
    "a text encoder of code": Case(
        "{model}/text_encoder/config.json has an auto_map, so it needs code that comes with the model: none "
        "is ever run.",
        both(
            config("text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"}, model_type="evil"),
            code("text_encoder/evil.py"),
        ),
    ),
    "a tokenizer of code": Case(
        "The tokenizer of {model} needs code that comes with the model (auto_map), and none is ever run.",
        TOKENIZER_OF_CODE,
        left=LOADED_LATE,
    ),
    "another tokenizer of code": Case(
        "The tokenizer of {model}/tokenizer cannot be loaded: it needs code that comes with the model, and "
        "none is ever "
        "run. Download the model again, or use another.",
        TOKENIZER_OF_CODE,
        "--tokenizer_name {model}/tokenizer",
        left=LOADED_LATE,
    ),
    "a tokenizer that is not there": Case(NO_WORDS, remove("model/tokenizer"), left=LOADED_LATE),
    "a tokenizer without its words": Case(NO_WORDS, remove("model/tokenizer/tokenizer.json"), left=LOADED_LATE),
    "a tokenizer that is cut off": Case(
        not_loaded("tokenizer", "Unterminated string starting at: line «.+»."),
        lambda at: os.truncate(at.model / "tokenizer/tokenizer.json", 900),
        left=LOADED_LATE,
    ),
    "a tokenizer that does not say how long prompts are": Case(
        "The tokenizer of {model} does not say how many tokens a prompt may have: give --tokenizer_max_length.",
        remove("model/tokenizer/tokenizer_config.json"),
        left=LOADED_LATE,
    ),
    "another tokenizer that is not there": Case(
        "The tokenizer of {root}/none cannot be loaded: «.+» There is no such folder here; for a model of "
        "the Hub, check "
        "its name, its files and --variant.",
        flags="--tokenizer_name {root}/none",
        left=LOADED_LATE,
    ),
    "another tokenizer of more words than the text encoder": Case(
        "The tokenizer of {root}/words has 618 words, the text encoder 617. Use another.",
        more_words,
        "--tokenizer_name {root}/words --instance_prompt 'a wombat'",
        left=LOADED_LATE,
    ),
    "a text encoder of other sizes than its config says": Case(
        "The text_encoder of {model} has weights of other shapes than its config says: encoder.layers.0.mlp.fc1.bias "
        "(64,), not (7,) and 5 more.",
        config("text_encoder/config.json", intermediate_size=7),
        left=LOADED_LATE,
    ),
    "no weights of the U-Net": Case(NO_WEIGHTS.format("unet"), remove(f"model/{WEIGHTS['unet']}"), left=LOADED_LATE),
    "no weights of the text encoder": Case(
        NO_WEIGHTS.format("text_encoder"), remove(f"model/{WEIGHTS['text_encoder']}"), left=LOADED_LATE
    ),
    "weights of a variant that is not named": Case(
        "The unet of {model} has no weights: {model}/unet holds diffusion_pytorch_model.fp16.safetensors: "
        "see --variant.",
        lambda at: (at.model / WEIGHTS["unet"]).rename(at.model / "unet/diffusion_pytorch_model.fp16.safetensors"),
        left=LOADED_LATE,
    ),
    "weights of a variant that is not there": Case(
        "The text_encoder of {model} has no weights of variant fp16: {model}/text_encoder holds "
        "model.safetensors: see "
        "--variant.",
        flags="--variant fp16 --pre_compute_text_embeddings",
        left=LOADED_LATE,
        told=ENCODING,
    ),
    "weights of the U-Net that are cut off": Case(not_loaded("unet", CUT_OFF), cut_off("unet"), left=LOADED_LATE),
    "weights of the VAE that are cut off": Case(not_loaded("vae", CUT_OFF), cut_off("vae"), left=LOADED_LATE),
    "weights of the text encoder that are cut off": Case(
        not_loaded("text_encoder", CUT_OFF), cut_off("text_encoder"), left=LOADED_LATE
    ),
    "weights of no bytes": Case(
        not_loaded("unet", "Error while deserializing header: header too small."),
        write(f"model/{WEIGHTS['unet']}", ""),
        left=LOADED_LATE,
    ),
    "weights that are a pointer of git": Case(
        not_loaded("unet", "«.+git lfs pull.+»"), write(f"model/{WEIGHTS['unet']}", LFS), left=LOADED_LATE
    ),
    "weights of another shape": Case(
        not_loaded("unet", "Cannot load because conv_in.bias expected shape torch.Size([24]), but got «.+»"),
        tensors("unet", lambda weights: weights.update({"conv_in.bias": torch.zeros(3)})),
        left=LOADED_LATE,
    ),
    "a text encoder's weights of another shape": Case(
        "The text_encoder of {model} has weights of other shapes than its config says: "
        "final_layer_norm.bias (3,), not (32,).",
        tensors("text_encoder", lambda weights: weights.update({LAYER["text_encoder"]: torch.zeros(3)})),
        left=LOADED_LATE,
    ),
    "weights that lack a layer": Case(
        lacking("unet", "conv_in.bias"), tensors("unet", lambda weights: weights.pop("conv_in.bias")), left=LOADED_LATE
    ),
    "a VAE's weights that lack a layer": Case(
        lacking("vae", LAYER["vae"]), tensors("vae", lambda weights: weights.pop(LAYER["vae"])), left=LOADED_LATE
    ),
    "a text encoder's weights that lack a layer": Case(
        lacking("text_encoder", LAYER["text_encoder"]),
        tensors("text_encoder", lambda weights: weights.pop(LAYER["text_encoder"])),
        left=LOADED_LATE,
    ),
    "a U-Net of NaN": rotten("unet", float("nan"), LAYER["unet"]),
    "a VAE of infinity": rotten("vae", float("inf"), LAYER["vae"]),
    "a text encoder of NaN": rotten("text_encoder", float("nan"), LAYER["text_encoder"]),
    "a text encoder of NaN that is encoded first": rotten(
        "text_encoder", float("nan"), LAYER["text_encoder"], "--pre_compute_text_embeddings", ENCODING
    ),
    "a pickled U-Net that runs code": evil("unet"),
    "a pickled VAE that runs code": evil("vae"),
    "a pickled text encoder that runs code": evil("text_encoder"),
    "a pickle that holds no weights": Case(
        not_loaded("unet", "AttributeError: 'list' object has no attribute 'keys'.", "Use a model with safetensors."),
        pickled("unet", lambda weights, at: [1, 2]),
        left=LOADED_LATE,
        told=PICKLE.format("unet"),
    ),
    "a pickle of words": Case(
        lacking("text_encoder", "embeddings.position_embedding.weight and 35 more"),
        pickled("text_encoder", lambda weights, at: {"a": "b"}),
        left=LOADED_LATE,
        told=PICKLE.format("text_encoder"),
    ),
    "a pipeline of NaN that is to draw class images": Case(
        "The model of {model}, unet, holds numbers that are not finite in conv_in.bias: it is damaged, was saved by a "
        "run that diverged, or is too large for this precision. Use another model.",
        not_finite("unet", float("nan")),
        f"{PRIOR} --class_data_dir {{out}}/class",
        left=("args.json", "class", "class/.prompt"),
        told="INFO: [RANK 0] Drawing 1 class images of 'a dog'.\n",
    ),
}
PROMPTS = {
    "a prompt of spaces": Case(
        "the flags do not fit:\n  - --instance_prompt is required.",
        flags="--instance_prompt ' '",
        status=2,
    ),
    "a prompt of bytes that are no text": Case(
        "the flags do not fit:\n  - --instance_prompt 'a \\udcff dog' is not written in UTF-8.",
        flags="--instance_prompt 'a \udcff dog'",
        status=2,
    ),
}
HUB = {
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
}
LOSSES = {
    "a loss that is no number": Case(
        "Training has diverged«.+»",
        flags="--noise_offset 1e38 --checkpointing_steps 1",
        left=("args.json", "metrics.jsonl"),
    ),
}
NONE_COMPLETE = "Complete checkpoints in {out}: none."
LATEST = "--resume_from_checkpoint latest"
FIRST = "--resume_from_checkpoint checkpoint-1"
CHECKPOINTS = {
    "a checkpoint that is not there": Case(
        f"The checkpoint checkpoint-7 does not exist. {NONE_COMPLETE}", flags="--resume_from_checkpoint checkpoint-7"
    ),
    "a file in place of a checkpoint": Case(
        f"The checkpoint checkpoint-7 is no folder. {NONE_COMPLETE}",
        both(lambda at: at.out.mkdir(), write("out/checkpoint-7", "")),
        "--resume_from_checkpoint checkpoint-7",
    ),
    "a link to nowhere in place of a checkpoint": Case(
        f"The checkpoint checkpoint-7 does not exist. {NONE_COMPLETE}",
        both(lambda at: at.out.mkdir(), link("out/checkpoint-7", "{root}/nowhere")),
        "--resume_from_checkpoint checkpoint-7",
    ),
    "a link to itself in place of a checkpoint": Case(
        f"The checkpoint checkpoint-7 does not exist. {NONE_COMPLETE}",
        both(lambda at: at.out.mkdir(), link("out/checkpoint-7", "{out}/checkpoint-7")),
        "--resume_from_checkpoint checkpoint-7",
    ),
    "a checkpoint of too long a name": Case(
        f"The checkpoint {'long' * 70} does not exist. {NONE_COMPLETE}",
        flags=f"--resume_from_checkpoint {'long' * 70}",
    ),
    "a state without an end": Case(
        f"The checkpoint checkpoint-1 is incomplete: its trainer_state.json is no valid JSON. {NONE_COMPLETE}",
        checkpoint("[" * 100_000),
        FIRST,
    ),
    "a state that is not there": Case(
        f"The checkpoint checkpoint-1 is incomplete: it has no readable trainer_state.json. {NONE_COMPLETE}",
        both(checkpoint({}), remove("out/checkpoint-1/trainer_state.json")),
        FIRST,
    ),
    "a state that is a list": Case(
        f"The checkpoint checkpoint-1 is incomplete: its trainer_state.json is no JSON object. {NONE_COMPLETE}",
        checkpoint([]),
        FIRST,
    ),
    "a state that is cut off": Case(
        f"The checkpoint checkpoint-1 is incomplete: its trainer_state.json is no valid JSON. {NONE_COMPLETE}",
        checkpoint('{"step": 1'),
        FIRST,
    ),
    "a state whose files are a list": Case(
        f"The checkpoint checkpoint-1 is damaged: its trainer_state.json has no usable files. {NONE_COMPLETE}",
        checkpoint({"step": 1, "fits": {}, "files": ["optimizer.pt"]}),
        FIRST,
    ),
    "a state that names a file that is gone": Case(
        f"The checkpoint checkpoint-1 is damaged: it lacks optimizer.pt. {NONE_COMPLETE}",
        checkpoint({"step": 1, "fits": {}, "files": {"optimizer.pt": 9}}),
        FIRST,
    ),
    "a state without a step": Case(
        f"The checkpoint checkpoint-1 is damaged: its trainer_state.json has no usable step. {NONE_COMPLETE}",
        checkpoint({"fits": {}, "files": {}}),
        FIRST,
    ),
    "a state of a step in words": Case(
        f"The checkpoint checkpoint-1 is damaged: its trainer_state.json has no usable step. {NONE_COMPLETE}",
        checkpoint({"step": "1", "fits": {}, "files": {}}),
        FIRST,
    ),
    "a state that does not say what fits": Case(
        f"The checkpoint checkpoint-1 is damaged: its trainer_state.json has no usable fits. {NONE_COMPLETE}",
        checkpoint({"step": 1, "files": {}}),
        FIRST,
    ),
}
SMALLER = "WARNING: [RANK 0] 1 of 2 photos are smaller than 64 px: enlarged.\n"


def good(name: str, *makers: Callable[[Place], object]) -> Case:
    """Return the case of a good photo of which there is nothing to say."""
    return Case("", both(photo(name, encoded("PNG")), *makers))


def pickled_well(part: str) -> Case:
    """Return the case of good weights in a pickle."""
    return Case(PICKLE.format(part), pickled(part, lambda weights, at: weights))


LONG = "a photo of sks dog " + " ".join(f"number {number}" for number in range(40))
TOO_LONG = (  # the first word is seen in part
    f"WARNING: The prompt '{LONG}' is longer than 77 tokens; "
    f"the model will not see '{LONG[LONG.index('number 11') :]}'.\n"
)
FINE = {
    "spaces and quotes in a name": good("a \"photo\" of 'my' dog.png"),
    "a name in other letters": good("собака 犬 🐕 é.png"),
    "a name of two lines": good("two\nlines.png"),
    "a name that is no UTF-8": Case("", lambda at: (at.photos / os.fsdecode(b"\xff.png")).write_bytes(encoded("PNG"))),
    "a name like a flag": good("--resolution=0.png"),
    "a suffix of another format": good("really-a-png.jpg"),
    "capital letters in a suffix": good("DOG.PNG"),
    "an animation": Case(
        "",
        picture(
            "dog.gif", draw_picture(64, 64, 1), save_all=True, append_images=[draw_picture(64, 64, n) for n in (2, 3)]
        ),
    ),
    "16 bits": Case(
        "",
        picture("deep.png", Image.fromarray(np.asarray(draw_picture(64, 64, 1).convert("L")).astype(np.uint16) * 257)),
    ),
    "CMYK": Case("", picture("print.jpg", draw_picture(64, 64, 1).convert("CMYK"))),
    "a real HEIC": Case("", lambda at: write_heic(at.photos / "phone.heic")),
    "a transparent picture": Case(
        "INFO: 1 images in {photos} are transparent in parts: put on white.\n",
        picture("cut-out.png", Image.new("RGBA", (64, 64))),
    ),
    "one pixel": Case(SMALLER, picture("dot.png", Image.new("RGB", (1, 1)))),
    "a panorama": Case(SMALLER, picture("wide.png", Image.new("RGB", (1900, 20)))),
    "a very large picture": Case("", picture("large.png", Image.new("1", (9_500, 9_500)))),
    "a bad photo passed over": Case(
        "INFO: 1 of 2 images in --instance_data_dir {photos} cannot be read:\n"
        "  {photos}/empty.png: the file is empty\n",
        photo("empty.png", ""),
        "--skip_bad_images",
    ),
    "a folder that links to itself": Case(
        "INFO: Not read as images in {photos}: again.\n", link("photos/again", "{photos}")
    ),
    "10,000 captions": Case(
        f"INFO: Not read as images in {{photos}}: {', '.join(f'{n:04d}.txt' for n in range(10))} and 9990 more.\n",
        lambda at: [(at.photos / f"{number:04d}.txt").touch() for number in range(10_000)],
    ),
    "a pickled U-Net": pickled_well("unet"),
    "a pickled VAE": pickled_well("vae"),
    "a pickled text encoder": pickled_well("text_encoder"),
    "a prompt that is too long": Case(TOO_LONG, flags=f"--instance_prompt '{LONG}'"),
    "a class prompt that is too long": Case(
        f"{TOO_LONG}INFO: [RANK 0] Drawing 1 class images of '{LONG}'.\n",
        flags=f"--with_prior_preservation --num_class_images 1 --class_prompt '{LONG}'",
    ),
    "metadata that are damaged": Case(
        "", picture("exif.jpg", draw_picture(64, 64, 1), exif=b"Exif\0\0II*\0\x08\0\0\0\xff")
    ),
    "a link to nowhere beside the text encoder": Case(
        ENCODING,
        link("model/text_encoder/notes", "{root}/nowhere"),
        "--pre_compute_text_embeddings",
    ),
    "a scheduler's config without a prediction": Case(
        "", config("scheduler/scheduler_config.json", ("prediction_type",))
    ),
    "a cache that is a file": Case(
        "INFO: [RANK 0] Encoding 1 of 1 prompts; the others are in {model}/model_index.json.\n"
        "WARNING: Embeddings cannot be cached in {model}/model_index.json: [Errno 17] File exists: "
        "'{model}/model_index.json'. The run goes on without.\n",
        flags="--pre_compute_text_embeddings --cache_dir {model}/model_index.json",
    ),
    "a class image that is none": Case(
        "WARNING: Class image {out}/class_images/broken.png does not count: the file is empty\n"
        "INFO: [RANK 0] Drawing 1 class images of 'a dog'.\n",
        both(lambda at: (at.out / "class_images").mkdir(parents=True), write("out/class_images/broken.png", "")),
        PRIOR,
    ),
    "a code file that nothing names": Case("", code("evil.py")),
    "a latest checkpoint where there is none": Case(
        "WARNING: {out} holds no complete checkpoint: starting at step 0.\n", flags=LATEST
    ),
    "a latest checkpoint that is a file": Case(
        "WARNING: Passed over {out}/checkpoint-7: it is no folder.\n"
        "WARNING: {out} holds no complete checkpoint: starting at step 0.\n",
        both(lambda at: at.out.mkdir(), write("out/checkpoint-7", "")),
        LATEST,
    ),
}


def write_heic(path: Path) -> None:
    """Write a photo as a phone does."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(draw_picture(64, 64, 1)).save(path)


def refusals() -> dict[str, Case]:
    """Return all cases that must be refused, by name."""
    head, unfit = "the flags do not fit:\n  - ", "the flags do not fit {model} (Stable Diffusion 1.x/2.x):\n"
    table = {flags: Case(head + words, flags=flags, status=2) for flags, words in FLAGS.items()}
    for flags, (script, words) in OF_ONE_SCRIPT.items():
        table[flags] = Case(head + words, flags=flags, status=2, script=script)
    table |= {flags: Case(words, flags=flags, status=2) for flags, words in PARSER.items()}
    for content, words in CONFIGS.items():
        words, flags = f"--config {{root}}/args.json {words}", "--config {root}/args.json"
        table[f"--config {content}"] = Case(words, write("args.json", content), flags, status=2)
    table |= {flags: Case(unfit + words, flags=flags) for flags, words in UNFIT.items()}
    for name, case in PHOTOS.items():
        table[f"a photo {name}"] = dataclasses.replace(case, message=unreadable(name, case.message))
    return table | FOLDERS | MODELS | PROMPTS | HUB | LOSSES | CHECKPOINTS


REFUSALS = refusals()


# Running the cases.


@pytest.fixture
def place(tiny, tmp_path) -> Place:
    """Copy the tiny model, and draw one good photo."""
    at = Place(tmp_path)
    shutil.copytree(tiny, at.model)
    at.photos.mkdir()
    (at.photos / "good.png").write_bytes(encoded("PNG"))
    return at


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
    """Return what was printed beside the progress bar."""
    return re.sub(r"(\n(steps|class images): .*)+\n( +\n)?", "", printed)


def cases(table: dict[str, Case]) -> list:
    """Return the cases as parameters, the scripts taking turns."""
    scripts = list(SCRIPTS)
    return [
        pytest.param(case, case.script or scripts[number % 2], id=name[:80])
        for number, (name, case) in enumerate(table.items())
    ]


@pytest.mark.parametrize(("case", "script"), cases(REFUSALS))
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
    pickled("unet", lambda weights, at: weights)(place)
    cache = trainer.home / "hub" / "models--nobody--pickled"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(place.model, cache / "snapshots" / ("0" * 40))
    case = Case("", flags="--pretrained_model_name_or_path nobody/pickled")
    run = run_case(trainer, place, case, "lora")
    assert run.code == 0 and run.stderr.count(PICKLE.format("unet").format(model="nobody/pickled")) == 1, run.stderr
