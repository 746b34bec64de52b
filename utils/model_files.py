"""A base model's files before its weights are loaded: configs and the classes that they name."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from utils.errors import InputError
from utils.flag_checks import problems_that_hold
from utils.geometry import Size


def read_config(model: str, filename: str, revision: str | None = None, token: str | None = None) -> dict:
    """Read one JSON file of a model, of a folder's or a Hub repository's.

    Raises:
        InputError: There is no such model or file, or it is no JSON.
    """
    is_folder = Path(model).is_dir()
    try:
        path = Path(model, filename)
        if not is_folder:
            path = Path(huggingface_hub.hf_hub_download(model, filename, revision=revision, token=token))
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content
    except (OSError, ValueError, HfHubHTTPError) as error:
        what = "is a folder without" if is_folder else "is no folder here, and the Hub gave no such model with"
        at = f" at revision {revision}" if revision else ""
        raise InputError(f"The model {model}{at} {what} a readable {filename}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Configs:
    """The configs of a model's parts, empty for a part that it does not have."""

    index: dict  # model_index.json: the library and class of each component
    unet: dict
    vae: dict
    text_encoder: dict
    scheduler: dict
    image_noising_scheduler: dict


def read_configs(model: str, revision: str | None = None, token: str | None = None) -> Configs:
    """Read what a model's own files say of it.

    Raises:
        InputError: There is no such model, or a config that its index promises.
    """
    index = read_config(model, "model_index.json", revision, token)
    parts = {field.name: {} for field in dataclasses.fields(Configs) if field.name != "index"}
    for part in parts:
        if index.get(part, [None])[0]:
            filename = "scheduler_config.json" if part.endswith("scheduler") else "config.json"
            parts[part] = read_config(model, f"{part}/{filename}", revision, token)
    return Configs(index, **parts)


def why_unsupported(configs: Configs, is_known: bool, prediction_types: tuple[str, ...]) -> str | None:
    """Return what a checkpoint is if a script cannot train it, else None.

    Args:
        is_known: Whether the script knows a kind of such channels, VAE and class embedding.
        prediction_types: That it can train of this kind.
    """
    unet, vae, index = configs.unet, configs.vae, configs.index
    channels, name = unet.get("in_channels"), index.get("_class_name", "pipeline")
    pipeline = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    is_xl = "text_encoder_2" in index or unet.get("addition_embed_type") == "text_time"
    lacking = ["text encoder (add the base model's, if this is a result of --skip_save_text_encoder)"]
    lacking = lacking * (not configs.text_encoder) + ["tokenizer"] * (not index.get("tokenizer", [None])[0])
    embedding, prediction_type = unet.get("class_embed_type"), configs.scheduler.get("prediction_type", "epsilon")
    other = f"{pipeline} with a {unet.get('_class_name')}, {channels} input channels, class embedding {embedding}, and"
    reasons = problems_that_hold(
        (not unet, f"{pipeline} without a U-Net"),
        (is_xl, "a Stable Diffusion XL checkpoint"),
        (channels == 9, "an inpainting checkpoint (9 input channels)"),
        (lacking, f"{pipeline} without a {' and a '.join(lacking)}"),
        (not is_known or unet.get("_class_name") != "UNet2DConditionModel", f"{other} VAE {vae.get('_class_name')}"),
        (unet.get("num_class_embeds") is not None, f"{pipeline} whose U-Net takes numbered classes"),
        (not configs.scheduler, f"{pipeline} without a scheduler"),
        (channels == 6 and not configs.image_noising_scheduler, f"{pipeline} without an image_noising_scheduler"),
        (prediction_type not in prediction_types, f"{pipeline} that predicts {prediction_type!r}"),
    )
    return reasons[0] if reasons else None


def find_stage_one_problems(model: str | None, token: str | None, stage_two: Configs, sizes: list[Size]) -> list[str]:
    """Return a sentence for each reason why a model cannot draw what IF's stage II enlarges; none if either is absent.

    Args:
        model: Of --stage_one_model_name_or_path.
        stage_two: The configs of a model, perhaps of stage II.
        sizes: In pixels, that stage I is to draw besides its own.

    Raises:
        InputError: There is no such model.
    """
    if not model or stage_two.unet.get("in_channels") != 6:
        return []
    configs, flag = read_configs(model, None, token), f"--stage_one_model_name_or_path {model}"
    unet = configs.unet
    if unet.get("in_channels") != 3 or configs.vae:
        return [f"{flag} is {configs.index.get('_class_name', 'no pipeline')}, and no stage I of DeepFloyd IF."]
    widths = [one.get("encoder_hid_dim") or one.get("cross_attention_dim") for one in (unet, stage_two.unet)]
    factor = 2 ** (len(unet["block_out_channels"]) - 1)
    uneven = ", ".join(str(size) for size in sizes if any(edge % factor for edge in size))
    return problems_that_hold(
        (widths[0] != widths[1], f"{flag} reads embeddings of width {widths[0]}, this model of width {widths[1]}."),
        (uneven, f"{flag} draws multiples of {factor} px; a quarter of the previews' size is {uneven}."),
    )


def component_class(index: dict, component: str) -> type:
    """Return the class that model_index.json names for a component.

    Args:
        index: The content of model_index.json.

    Raises:
        InputError: The installed packages have no such class.
    """
    library, name = index[component]
    for module in (library, f"diffusers.pipelines.{library}", f"diffusers.pipelines.deprecated.{library}"):
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise InputError(f"model_index.json names {library}.{name} as its {component}; no installed package has it.")


def load(kind: type, model: str, part: str | None, **options) -> Any:
    """Load a part of a model, or with part None the whole of it.

    Args:
        kind: The class that loads it.
        options: Of its `from_pretrained`.

    Raises:
        InputError: Files are missing or broken.
    """
    folder = {"subfolder": part} if part else {}
    try:
        return kind.from_pretrained(model, **folder, **options)
    except (OSError, ValueError, HfHubHTTPError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        advice = "Weight files may have a variant's name, such as fp16: then give it by --variant"
        raise InputError(f"The {part or 'model'} of {model} cannot be loaded: {reason} {advice}.") from error


def write_scheduler_config(folder: Path, config: dict) -> None:
    """Write the base model's scheduler config, as it was read, into a result.

    A scheduler's own `save_pretrained` would write defaults out. Then another sampler that is made from the config
    takes them over, which it does not from the base model, and draws other pictures.
    """
    (folder / "scheduler").mkdir(exist_ok=True)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def public_name(model: str) -> str:
    """Return a model's Hub id, or the last part of its folder's path."""
    return Path(model).resolve().name if Path(model).is_dir() else model
