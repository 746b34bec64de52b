"""A base model's files: read its configs, tell what it is, find its classes, load its parts.

None of a model's own code is ever run: classes are those of diffusers and transformers, pickles are read as numbers.
"""

import dataclasses
import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HTTPError
from torch import nn

from utils.core.errors import UserError
from utils.data.cache import read_samples
from utils.data.geometry import Size
from utils.devices.device_memory import is_out_of_memory
from utils.flags.flag_checks import messages_if
from utils.models import model_checks
from utils.models.model_checks import PARTS, check_config, check_index, has_part


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
        UserError: There is no such model or no config that its index promises, or one names code of the model's own,
            lacks a value or has one of the wrong type.
    """
    index = read_config(model, "model_index.json", revision, token)
    check_index(f"{model}/model_index.json", index)
    parts = {field.name: {} for field in dataclasses.fields(Configs) if field.name != "index"}
    for part in parts:
        if has_part(index, part):
            filename = f"{part}/{'scheduler_config' if part.endswith('scheduler') else 'config'}.json"
            parts[part] = read_config(model, filename, revision, token)
            check_config(f"{model}/{filename}", part, parts[part])
    return Configs(index, **parts)


def read_config(model: str, filename: str, revision: str | None = None, token: str | None = None) -> dict:
    """Read one JSON file of a model, of a folder's or a Hub repository's.

    Raises:
        UserError: There is no such model or file, or it is no JSON.
    """
    if os.path.isfile(model):
        raise UserError(
            f"The model {model} is a single file. Turn it into a folder with a model_index.json by diffusers' script "
            "convert_original_stable_diffusion_to_diffusers.py."
        )
    is_folder = os.path.isdir(model)  # which takes any text; Path.is_dir raises for one that is too long
    try:
        path = Path(model, filename)
        if not is_folder:
            path = Path(huggingface_hub.hf_hub_download(model, filename, revision=revision, token=token))
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content
    except (OSError, ValueError, RecursionError, HTTPError) as error:
        what = "is a folder without" if is_folder else "is no folder here, and the Hub gave no such model with"
        at = f" at revision {revision}" if revision else ""
        # A careless answer repeats the token; `from None`, because trackers print the whole chain of errors.
        secret = None if is_folder else token or huggingface_hub.get_token()
        reason = str(error).replace(secret, "<token>") if secret else error
        raise UserError(f"The model {model}{at} {what} a readable {filename}: {reason}") from None


def check_supported(
    model: str, configs: Configs, is_known: bool, prediction_types: tuple[str, ...], supported: list[str]
) -> None:
    """Raise UserError if a script cannot train a checkpoint.

    Args:
        is_known: Whether the script knows a kind of such channels, VAE and class embedding.
        prediction_types: That it can train of this kind.
        supported: The kinds that it can train, in words.
    """
    if reason := _why_unsupported(configs, is_known, prediction_types):
        words = f"not supported. Supported: {', '.join(supported)}."
        raise UserError(f"--pretrained_model_name_or_path {model} is {reason}: {words}")
    _check_parts(configs)


def _why_unsupported(configs: Configs, is_known: bool, prediction_types: tuple[str, ...]) -> str | None:
    """Return what a checkpoint is if a script cannot train it, else None; arguments of `check_supported`."""
    unet, vae, index = configs.unet, configs.vae, configs.index
    channels, name = unet.get("in_channels"), index.get("_class_name") or "pipeline"
    pipeline = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    is_xl = "text_encoder_2" in index or unet.get("addition_embed_type") == "text_time"
    how = " (add the base model's, if this is a result of --skip_save_text_encoder)"
    lacking = messages_if(
        (not configs.text_encoder, f"text encoder{how}"),
        (not has_part(index, "tokenizer"), "tokenizer"),
    )
    embedding, prediction_type = unet.get("class_embed_type"), configs.scheduler.get("prediction_type", "epsilon")
    other = f"{pipeline} with a {unet.get('_class_name')}, {channels} input channels, class embedding {embedding}, and"
    reasons = messages_if(
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


def _check_parts(configs: Configs) -> None:
    """Raise UserError if a part is of no installed class, or a scheduler says no noise levels."""
    for part in PARTS:
        if has_part(configs.index, part):
            component_class(configs.index, part)  # the result is put together from it, hours later
            if part.endswith("scheduler"):
                _check_noise(part, getattr(configs, part))


def component_class(index: dict, component: str) -> type:
    """Return the class that model_index.json names for a component.

    Args:
        index: The content of model_index.json.

    Raises:
        UserError: The installed packages have no such class, or it is one of something else.
    """
    library, name = index[component]
    own = [f"diffusers.pipelines.{library}", f"diffusers.pipelines.deprecated.{library}"]
    for module in [library] if library in ("diffusers", "transformers") else own:  # never a module of the model's own
        try:
            found = getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
        if isinstance(found, type) and issubclass(found, PARTS.get(component, object)):
            return found
        raise UserError(f"model_index.json names {library}.{name} as its {component}, which it is not.")
    raise UserError(f"model_index.json names {library}.{name} as its {component}; no installed package has it.")


def _check_noise(part: str, config: dict) -> None:
    """Raise UserError if a scheduler's config says no noise levels."""
    try:
        diffusers.DDPMScheduler.from_config(config)
    except Exception as error:  # whatever a wrong type or name ends in
        reason = model_checks.explain(error)
        raise UserError(f"The model's {part}/scheduler_config.json says no noise levels: {reason}") from error


def find_stage_one_problems(model: str | None, token: str | None, stage_two: Configs, sizes: list[Size]) -> list[str]:
    """Return a sentence for each reason why a model cannot draw what IF's stage II enlarges; none if either is absent.

    Args:
        model: Of --stage_one_model_name_or_path.
        stage_two: The configs of a model, perhaps of stage II.
        sizes: In pixels, that stage I is to draw besides its own.

    Raises:
        UserError: There is no such model.
    """
    if not model or stage_two.unet.get("in_channels") != 6:
        return []
    configs, flag = read_configs(model, None, token), f"--stage_one_model_name_or_path {model}"
    unet = configs.unet
    if unet.get("in_channels") != 3 or configs.vae or "block_out_channels" not in unet:
        return [f"{flag} is {configs.index.get('_class_name', 'no pipeline')}, and no stage I of DeepFloyd IF."]
    widths = [one.get("encoder_hid_dim") or one.get("cross_attention_dim") for one in (unet, stage_two.unet)]
    factor = 2 ** (len(unet["block_out_channels"]) - 1)
    uneven = ", ".join(str(size) for size in sizes if any(edge % factor for edge in size))
    return messages_if(
        (widths[0] != widths[1], f"{flag} reads embeddings of width {widths[0]}, this model of width {widths[1]}."),
        (uneven, f"{flag} draws multiples of {factor} px; a quarter of the previews' size is {uneven}."),
    )


def load(kind: type, model: str, part: str | None, device: torch.device | None = None, **options) -> Any:
    """Load a part of a model, or with part None the whole of it.

    Args:
        kind: The class that loads it.
        device: Where a network is put; "meta" builds it from its config, without weights. None: where it was loaded.
        options: Of its `from_pretrained`.

    Raises:
        UserError: Files are missing or broken, need code of the model's own, or hold no usable weights.
    """
    name = f"The {part or ('tokenizer' if kind is transformers.AutoTokenizer else 'model')} of {model}"
    folder, is_network = Path(model, part or ""), issubclass(kind, nn.Module)
    options |= {"subfolder": part} if part else {}
    if device is not None and device.type == "meta":
        return _build(kind, model, options)
    options |= _options_of(kind)
    is_here = os.path.isdir(folder)
    if is_network and is_here:
        model_checks.check_presence(name, folder, options.get("variant"))
        if model_checks.are_pickles(name, folder, options.get("variant")):
            options["use_safetensors"] = False
    try:
        loaded = kind.from_pretrained(model, **options)
    except Exception as error:  # broken files raise nearly every type
        if isinstance(error, ImportError) or is_out_of_memory(error):
            raise
        why = f"{model_checks.explain(error)} {_advice(is_here, options)}"
        raise UserError(f"{name} cannot be loaded: {why}") from error
    if is_network:
        loaded, info = loaded
        model_checks.check_completeness(name, info)
        if not is_here:
            _warn_of_downloaded_pickles(name, model, options)
    model_checks.check_loaded(name, loaded)
    return loaded if device is None else loaded.to(device)


def _build(kind: type, model: str, options: dict) -> nn.Module:
    """Return a network as its config says, without weights."""
    places = {key: options[key] for key in ("subfolder", "revision", "token") if options.get(key)}
    with torch.device("meta"):
        if issubclass(kind, diffusers.ModelMixin):
            network = kind.from_config(kind.load_config(model, **places))
        else:
            network = kind(kind.config_class.from_pretrained(model, **places))
    return network.to(options.get("dtype") or torch.float32)


def _options_of(kind: type) -> dict:
    """Return the options that loading by a class needs for the checks, or for none of a model's code to be run."""
    if kind is transformers.AutoTokenizer:
        return {"trust_remote_code": False}  # unset, it would ask
    options = {"output_loading_info": True} if issubclass(kind, nn.Module) else {}
    if issubclass(kind, transformers.PreTrainedModel):
        options["ignore_mismatched_sizes"] = True  # they are in the loading info, and refused
    return options


def _advice(is_here: bool, options: dict) -> str:
    """Say what to do about a part that cannot be loaded."""
    if options.get("use_safetensors") is False:
        return "Use a model with safetensors."
    if not is_here:
        return "There is no such folder here; for a model of the Hub, check its name, its files and --variant."
    return "Download the model again, or use another."


def _warn_of_downloaded_pickles(name: str, model: str, options: dict) -> None:
    """Warn if a network of the Hub was read from pickles, which is seen once its files are here."""
    filename = f"{options.get('subfolder')}/config.json"
    config = huggingface_hub.try_to_load_from_cache(model, filename, revision=options.get("revision"))
    if isinstance(config, str):
        model_checks.are_pickles(name, Path(config).parent, options.get("variant"))


def resume_keys_of_model(model: str, revision: str | None, token: str | None) -> dict[str, str]:
    """Return what a checkpoint's run and the one that resumes it must have in common as to the base model."""
    return {"base model": public_name(model), "content of the base model": fingerprint(model, revision, token)}


def fingerprint(model: str, revision: str | None, token: str | None) -> str:
    """Return what tells a model's U-Net from another of the same name: samples of its weights, or the Hub's commit."""
    if not os.path.isdir(model):
        config = huggingface_hub.hf_hub_download(model, "unet/config.json", revision=revision, token=token)
        return Path(config).parents[1].name
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in Path(model, "unet").iterdir() if path.suffix in model_checks.WEIGHT_SUFFIXES):
        found.update(read_samples(path))
    return found.hexdigest()


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
