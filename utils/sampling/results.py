"""What a training run wrote, found and loaded: a result, any checkpoint-N of it, or a base model to compare with."""

import contextlib
import dataclasses
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import peft
import safetensors.torch
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError

from utils.core.errors import UserError
from utils.hub.publish import ADAPTER, PIPELINE
from utils.models import model_files
from utils.run import checkpoints

SAVED = "saved"
SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
LEARNED = ("learned", "learned_range")  # variances that only DDPM draws with
CHECKERS = ("safety_checker", "feature_extractor", "watermarker")  # none is loaded


@dataclasses.dataclass(frozen=True)
class Result:
    """A folder or Hub repository to draw from, and the flags of the run that wrote it."""

    name: str
    kind: str  # PIPELINE, ADAPTER or "unet", after the file or folder that it is recognised by
    settings: dict  # of args.json; empty if there is none


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a result's parts are loaded from: its own folder, its base model's, or both."""

    result: Result
    pipeline: dict  # for `from_pretrained`
    parts: dict[str, dict]  # the same for those parts that are elsewhere
    index: dict  # model_index.json of the pipeline


# ----------------------------------------------------------------------------------------------------------- finding


def locate(
    result: str,
    base_model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    reads_text: bool = True,
) -> Origin:
    """Find out from small files where a result's parts are.

    Args:
        base_model: What an adapter or a checkpoint was trained from; None: what args.json says.
        revision: Of the base model, or of `result` if that is a pipeline; None: what args.json says.
        variant: Of the same.
        reads_text: Whether a text encoder is needed, be it the base model's.

    Raises:
        UserError: There is nothing to draw from in `result`, or no base model.
    """
    found = recognise(result, revision)
    pipeline, parts = find_sources(found, base_model, {"revision": revision, "variant": variant}, reads_text)
    index = model_files.read_config(pipeline["pretrained_model_name_or_path"], PIPELINE, pipeline["revision"])
    return Origin(found, pipeline, parts, index)


def recognise(result: str, revision: str | None = None) -> Result:
    """Tell what a folder or Hub repository holds.

    Raises:
        UserError: It is nothing that this tool draws from.
    """
    if find_file(result, PIPELINE, revision):
        return Result(result, PIPELINE, read_settings([Path(result)]))
    kind = next((name for name in (ADAPTER, "unet/config.json") if find_file(result, name)), None)
    if kind is None:
        there = [path.name for path in checkpoints.list_checkpoints(Path(result))]
        hint = f" It has {', '.join(there)}: name one of them, as {Path(result, there[-1])}." if there else ""
        what = "holds" if Path(result).is_dir() else "is no folder, and as a Hub id it gave"
        raise UserError(f"{result} {what} neither {PIPELINE} nor {ADAPTER} nor a unet folder.{hint}")
    return Result(result, kind.partition("/")[0], read_settings([Path(result), Path(result).resolve().parent]))


def default_name(result: str) -> str:
    """Name what is made with a result after it; with a checkpoint, after its run as well."""
    folder = Path(result).resolve()
    if not folder.is_dir():
        return result.replace("/", "-")
    return folder.name if checkpoints.step_of(folder) is None else f"{folder.parent.name}-{folder.name}"


def find_file(model: str, filename: str, revision: str | None = None) -> Path | None:
    """Return the path of a folder's or a Hub repository's file, None if there is none."""
    if Path(model).exists():
        return Path(model, filename) if Path(model, filename).is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(model, filename, revision=revision))
    except (OSError, ValueError, HfHubHTTPError):
        return None


def read_settings(folders: list[Path]) -> dict:
    """Return the content of the first args.json in the folders, nothing if none has one."""
    path = next((folder / "args.json" for folder in folders if (folder / "args.json").is_file()), None)
    if path is None:
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def find_sources(
    found: Result, base_model: str | None, given: dict[str, str | None], reads_text: bool
) -> tuple[dict, dict[str, dict]]:
    """Return where the pipeline is loaded from, and those of its parts that are elsewhere, for `from_pretrained`.

    Args:
        given: `revision` and `variant`.
        reads_text: Whether a text encoder is needed.

    Raises:
        UserError: A base model is needed and unknown, or given and not needed.
    """
    own = {"pretrained_model_name_or_path": found.name}
    if found.kind != PIPELINE:
        trained = [name for name in ("unet", "text_encoder") if Path(found.name, name).is_dir()]
        return find_base(found, base_model, given), dict.fromkeys(trained if found.kind != ADAPTER else [], own)
    index = model_files.read_config(found.name, PIPELINE, given["revision"])
    if reads_text and index.get("text_encoder") == [None, None]:  # written with --skip_save_text_encoder
        return own | given, {"text_encoder": find_base(found, base_model, {})}
    if base_model:
        raise UserError(f"{found.name} is a whole pipeline: --base_model {base_model} would have no effect.")
    return own | given, {}


def find_base(found: Result, base_model: str | None, given: dict[str, str | None]) -> dict[str, str | None]:
    """Return the base model of a result as arguments of `from_pretrained`.

    Raises:
        UserError: Neither the caller nor args.json names it, or it is not there.
    """
    known = {"pretrained_model_name_or_path": str(base_model)} if base_model else found.settings
    source = {key: known.get(key) for key in ("pretrained_model_name_or_path", "revision", "variant")}
    source |= {key: value for key, value in given.items() if value is not None}
    name = source["pretrained_model_name_or_path"]
    if not name:
        raise UserError(f"{found.name} needs its base model, and no args.json names it. Give it by --base_model.")
    if not find_file(name, PIPELINE, source["revision"]):
        whose = "--base_model" if base_model else "its args.json: if it has moved, use --base_model"
        raise UserError(f"{found.name} needs its base model, and {name} has no {PIPELINE} (from {whose}).")
    return source


def place_of(origin: Origin, part: str) -> tuple[dict, dict]:
    """Return what `from_pretrained` loads a part with, and the model_index.json that names the part's class."""
    place = origin.parts.get(part, origin.pipeline)
    if "revision" not in place:  # a checkpoint, which has no such file
        return place, origin.index
    return place, model_files.read_config(place["pretrained_model_name_or_path"], PIPELINE, place["revision"])


def read_part_config(origin: Origin, part: str, filename: str = "config.json") -> dict:
    """Read the config of a part."""
    place, _ = place_of(origin, part)
    return model_files.read_config(place["pretrained_model_name_or_path"], f"{part}/{filename}", place.get("revision"))


# ----------------------------------------------------------------------------------------------------------- loading


def choose_device(device: str | None, dtype: torch.dtype) -> torch.device:
    """Return the device of that name, or the best there is.

    Raises:
        UserError: It cannot calculate in that precision.
    """
    chosen = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
    if dtype is torch.float16 and chosen.type == "cpu":
        raise UserError("--dtype fp16 needs a GPU: a CPU lacks fp16 arithmetic for some layers. Use bf16 or fp32.")
    return chosen


def load_pipeline(
    result: str | Path,
    base_model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    scheduler: str = SCHEDULERS[0],
    lora_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> diffusers.DiffusionPipeline:
    """Load a result, or a base model with what a result changes of it, ready to draw and without a safety checker.

    Args:
        result: Folder or Hub id of a pipeline or an adapter, or the folder of a checkpoint.
        base_model: What an adapter or a checkpoint was trained from; None: what args.json says.
        revision: Of the base model, or of `result` if that is a pipeline; None: what args.json says.
        variant: Of the same.
        scheduler: One of `SCHEDULERS` with the saved settings, or "saved" for the one that they are of.

    Raises:
        UserError: There is nothing to draw from in `result`, no base model, or the two do not fit together.
    """
    chosen = choose_device(device, dtype)
    return load(locate(str(result), base_model, revision, variant), scheduler, lora_scale, dtype, chosen)


def load(
    origin: Origin,
    scheduler: str,
    lora_scale: float,
    dtype: torch.dtype,
    device: torch.device,
    absent: tuple[str, ...] = (),
) -> diffusers.DiffusionPipeline:
    """Load what `locate` found, but the parts in `absent`.

    Raises:
        UserError: An adapter does not fit its base model, or a strength is given to what is no adapter.
    """
    check_strength(origin.result, lora_scale)
    parts = {name: load_part(origin, name, dtype) for name in origin.parts if name not in absent}
    parts |= dict.fromkeys((*absent, *(name for name in CHECKERS if name in origin.index)))
    if "safety_checker" in origin.index:
        parts["requires_safety_checker"] = False
    if "tokenizer" not in absent and origin.result.settings.get("tokenizer_name"):
        parts["tokenizer"] = load_tokenizer(origin)
    with hide_warnings():  # of parts that are left out on purpose
        pipeline = diffusers.DiffusionPipeline.from_pretrained(**origin.pipeline, **parts, dtype=dtype)
        if origin.result.kind == ADAPTER:
            load_adapter(pipeline, origin.result, lora_scale)
    set_scheduler(pipeline, origin.result, scheduler)
    # Otherwise prompts would not be read in the way that was trained.
    if pipeline.tokenizer and (length := origin.result.settings.get("tokenizer_max_length")):
        pipeline.tokenizer.model_max_length = length
    if pipeline.text_encoder and origin.result.settings.get("text_encoder_use_attention_mask"):
        pipeline.text_encoder.config.use_attention_mask = True
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@contextlib.contextmanager
def hide_warnings() -> Iterator[None]:
    """Make diffusers say nothing but errors."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


def load_part(origin: Origin, name: str, dtype: torch.dtype) -> Any:
    """Load one network of a pipeline."""
    place, index = place_of(origin, name)
    return model_files.component_class(index, name).from_pretrained(**place, subfolder=name, dtype=dtype).eval()


def load_tokenizer(origin: Origin) -> Any:
    """Load the tokenizer that a result was trained with."""
    if name := origin.result.settings.get("tokenizer_name"):
        return transformers.AutoTokenizer.from_pretrained(name)
    has_own = any(origin.index["tokenizer"])
    place, index = (origin.pipeline, origin.index) if has_own else place_of(origin, "text_encoder")
    return model_files.component_class(index, "tokenizer").from_pretrained(**place, subfolder="tokenizer")


def check_strength(found: Result, lora_scale: float) -> None:
    """Raise UserError if a strength is given to what is no adapter."""
    if found.kind != ADAPTER and lora_scale != 1:
        raise UserError(f"--lora_scale {lora_scale:g}: {found.name} is no adapter.")


def load_adapter(pipeline: diffusers.DiffusionPipeline, found: Result, scale: float) -> None:
    """Load an adapter, and make sure that all of it arrived: diffusers only warns of layers that it does not find.

    Raises:
        UserError: The base model lacks layers of the adapter, or has others in their place.
    """
    path = find_file(found.name, ADAPTER)
    misfit = f"{path} does not fit the base model {pipeline.config._name_or_path}"
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="result")
    except (RuntimeError, ValueError, KeyError) as error:
        # The whole of it has a line for each layer.
        raise UserError(f"{misfit}: {textwrap.shorten(str(error), 300, placeholder=' …')}") from error
    in_file = count_layers(safetensors.torch.load_file(path))
    arrived = Counter()
    for name in ("unet", "text_encoder"):
        network = getattr(pipeline, name)
        if "result" in getattr(network, "peft_config", {}):
            state = peft.get_peft_model_state_dict(network, adapter_name="result", save_embedding_layers=False)
            arrived += count_layers(f"{name}.{key}" for key in state)
    if lost := sorted(in_file - arrived):
        raise UserError(f"{misfit}: it lacks {len(lost)} of {len(in_file)} layers, the first being {lost[0]}.")
    if scale != 1:
        pipeline.set_adapters("result", scale)


def count_layers(keys: Iterable[str]) -> Counter:
    """Count the tensors of each layer that has an adapter, under the layers' names in the present transformers."""
    layers = (key.partition(".lora")[0] for key in keys if not key.endswith(".alpha"))
    return Counter(layer.replace("text_encoder.text_model.", "text_encoder.") for layer in layers)


def set_scheduler(pipeline: diffusers.DiffusionPipeline, found: Result, name: str) -> None:
    """Give the pipeline a sampler with the settings that were saved with the result, if any, else the base model's.

    A LoRA and a checkpoint of an IF model bring settings along, because training leaves the variance out.
    """
    path = find_file(found.name, "scheduler/scheduler_config.json") if found.kind != PIPELINE else None
    config = dict(json.loads(path.read_text(encoding="utf-8")) if path else pipeline.scheduler.config)
    kind = getattr(diffusers, name if name != SAVED else config["_class_name"], type(pipeline.scheduler))
    if config.get("variance_type") in LEARNED and kind is not diffusers.DDPMScheduler:
        # The pipelines drop the variance that the U-Net predicts only if the config says that it is not used.
        config["variance_type"] = "fixed_small"
    pipeline.scheduler = kind.from_config(config)
