"""A base model's files: configs and the classes that they name, weights and whether they can be what they should be.

None of a model's own code is ever run: classes are those of diffusers and transformers, pickles are read as numbers.
"""

import dataclasses
import functools
import importlib
import json
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import transformers
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import nn

from utils.devices import is_out_of_memory
from utils.errors import InputError
from utils.flag_checks import problems_that_hold
from utils.geometry import Size

logger = logging.getLogger(__name__)

PARTS = {  # that runs read, and what their classes must be
    **dict.fromkeys(("unet", "vae", "text_encoder"), nn.Module),
    "tokenizer": transformers.PreTrainedTokenizerBase,
    **dict.fromkeys(("scheduler", "image_noising_scheduler"), diffusers.SchedulerMixin),
}

WEIGHT_SUFFIXES = (".safetensors", ".bin")

# What a value of a config must be, in words, and whether it is.
_WHOLE = "a whole number", lambda value: type(value) is int
_WHOLES = "a list of whole numbers", lambda value: isinstance(value, list) and value and all(map(_WHOLE[1], value))
_SIZE = "one whole number or two", lambda value: _WHOLE[1](value) or (_WHOLES[1](value) and len(value) == 2)
_NAME = "a name", lambda value: isinstance(value, str) and value
_SCHEDULER_NAME = (
    "one of diffusers' schedulers",
    lambda value: str(value).endswith("Scheduler") and value in dir(diffusers),
)
_SCHEDULER = {"_class_name": _SCHEDULER_NAME, "num_train_timesteps": _WHOLE, "prediction_type": _NAME}
_TYPES = {
    "unet": {
        **{"_class_name": _NAME, "in_channels": _WHOLE, "out_channels": _WHOLE, "block_out_channels": _WHOLES},
        **{"sample_size": _SIZE, "class_embed_type": _NAME},
    },
    "vae": {"_class_name": _NAME, "block_out_channels": _WHOLES},
    "text_encoder": {"max_position_embeddings": _WHOLE},
    "scheduler": _SCHEDULER,
    "image_noising_scheduler": _SCHEDULER,
}
_NEEDED = {  # by class; without them diffusers would assume the sizes of Stable Diffusion 1
    "UNet2DConditionModel": ("in_channels", "block_out_channels"),
    "AutoencoderKL": ("block_out_channels",),
}


def read_config(model: str, filename: str, revision: str | None = None, token: str | None = None) -> dict:
    """Read one JSON file of a model, of a folder's or a Hub repository's.

    Raises:
        InputError: There is no such model or file, or it is no JSON.
    """
    is_folder = os.path.isdir(model)  # which takes any text; Path.is_dir raises for one that is too long
    if os.path.isfile(model):
        raise InputError(
            f"The model {model} is a single file. Turn it into a folder with a model_index.json by diffusers' script "
            "convert_original_stable_diffusion_to_diffusers.py."
        )
    try:
        path = Path(model, filename)
        if not is_folder:
            path = Path(huggingface_hub.hf_hub_download(model, filename, revision=revision, token=token))
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content
    except (OSError, ValueError, RecursionError, HTTPError) as error:
        what = "is a folder without" if is_folder else "is no folder here, and the Hub gave no such model with"
        at = f" at revision {revision}" if revision else ""
        # A careless answer repeats the token; `from None`, because trackers print the whole chain of errors.
        secret = None if is_folder else token or huggingface_hub.get_token()
        reason = str(error).replace(secret, "<token>") if secret else error
        raise InputError(f"The model {model}{at} {what} a readable {filename}: {reason}") from None


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
        InputError: There is no such model or no config that its index promises, or one names code of the model's own,
            lacks a value or has one of the wrong type.
    """
    index = read_config(model, "model_index.json", revision, token)
    _check_index(model, index)
    parts = {field.name: {} for field in dataclasses.fields(Configs) if field.name != "index"}
    for part in parts:
        if index.get(part, [None])[0]:
            filename = "scheduler_config.json" if part.endswith("scheduler") else "config.json"
            parts[part] = read_config(model, f"{part}/{filename}", revision, token)
            _check_config(f"{model}/{part}/{filename}", parts[part], _TYPES[part])
    return Configs(index, **parts)


def _check_index(model: str, index: dict) -> None:
    """Raise InputError if a model's index is none, or names what does not come with diffusers or transformers."""
    path = f"{model}/model_index.json"
    _check_config(path, index, {"_class_name": _NAME})
    for name, value in index.items():
        is_pair = isinstance(value, list) and len(value) == 2
        if value is None or (is_pair and value[0] is None):
            continue
        is_component = is_pair and all(isinstance(text, str) for text in value)
        if name in PARTS and not is_component:
            raise InputError(f'{path} has "{name}": {json.dumps(value)}; it must be a library and a class.')
        if is_component and not name.isidentifier():
            raise InputError(f"{path} has a component {name!r}; it must be the name of a folder of the model.")
        if is_component and not _comes_installed(value[0]):
            raise InputError(
                f'{path} has "{name}": {json.dumps(value)}; only classes of diffusers and transformers are loaded, '
                "and no code that comes with a model."
            )


def _comes_installed(library: str) -> bool:
    """Say whether a library is one of the two, or the folder of one of diffusers' pipelines."""
    pipelines = Path(diffusers.__file__).parent / "pipelines"
    folders = [pipelines / library, pipelines / "deprecated" / library] if library.isidentifier() else []
    return library in ("diffusers", "transformers") or any(folder.is_dir() for folder in folders)


def _check_config(path: str, config: dict, types: dict) -> None:
    """Raise InputError if a config names code of the model's own, lacks a value or has one of the wrong type."""
    if "auto_map" in config:
        raise InputError(f"{path} has an auto_map, so it needs code that comes with the model: none is ever run.")
    for key, (words, fits) in types.items():
        if config.get(key) is not None and not fits(config[key]):
            raise InputError(f'{path} has "{key}": {json.dumps(config[key])}; it must be {words}.')
    lacking = [key for key in _NEEDED.get(config.get("_class_name"), ()) if config.get(key) is None]
    if lacking:
        raise InputError(f"{path} has no {' and no '.join(lacking)}. Download the model again, or use another.")


def why_unsupported(configs: Configs, is_known: bool, prediction_types: tuple[str, ...]) -> str | None:
    """Return what a checkpoint is if a script cannot train it, else None.

    Args:
        is_known: Whether the script knows a kind of such channels, VAE and class embedding.
        prediction_types: That it can train of this kind.

    Raises:
        InputError: It could be trained but for a class that no installed package has, or a scheduler that cannot be.
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
    for part in PARTS if not reasons else ():
        if index.get(part, [None])[0]:
            component_class(index, part)  # the result is put together from it, hours later
            if part.endswith("scheduler"):
                _check_noise(part, getattr(configs, part))
    return reasons[0] if reasons else None


def _check_noise(part: str, config: dict) -> None:
    """Raise InputError if a scheduler's config says no noise levels."""
    try:
        diffusers.DDPMScheduler.from_config(config)
    except Exception as error:  # whatever a wrong type or name ends in
        raise InputError(f"The model's {part}/scheduler_config.json says no noise levels: {_reason(error)}") from error


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
        InputError: The installed packages have no such class, or it is one of something else.
    """
    library, name = index[component]
    for module in (library, f"diffusers.pipelines.{library}", f"diffusers.pipelines.deprecated.{library}"):
        try:
            found = getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
        if isinstance(found, type) and issubclass(found, PARTS.get(component, object)):
            return found
        raise InputError(f"model_index.json names {library}.{name} as its {component}, which it is not.")
    raise InputError(f"model_index.json names {library}.{name} as its {component}; no installed package has it.")


# Loading.


def load(kind: type, model: str, part: str | None, **options) -> Any:
    """Load a part of a model, or with part None the whole of it.

    Args:
        kind: The class that loads it.
        options: Of its `from_pretrained`.

    Raises:
        InputError: Files are missing or broken, need code of the model's own, or hold no usable weights.
    """
    name = f"The {part or ('tokenizer' if kind is transformers.AutoTokenizer else 'model')} of {model}"
    folder, files = {"subfolder": part} if part else {}, Path(model, part or "")
    is_network = isinstance(kind, type) and issubclass(kind, nn.Module)
    if is_network and files.is_dir():
        options |= _local_options(name, files, options.get("variant"))
    if is_network:
        options["output_loading_info"] = True
    if is_network and issubclass(kind, transformers.PreTrainedModel):
        options["ignore_mismatched_sizes"] = True  # they are in the loading info, and refused
    if kind is transformers.AutoTokenizer:
        options["trust_remote_code"] = False  # unset, it would ask
    try:
        loaded = kind.from_pretrained(model, **folder, **options)
    except ImportError:
        raise
    except Exception as error:  # broken files raise nearly every type
        if is_out_of_memory(error):
            raise
        raise InputError(f"{name} cannot be loaded: {_reason(error)} {_advice(files, options)}") from error
    if is_network:
        loaded, info = loaded
        _check_completeness(name, info)
    if is_network and not files.is_dir():
        cached = huggingface_hub.try_to_load_from_cache(model, f"{part}/config.json", revision=options.get("revision"))
        if isinstance(cached, str) and _are_pickles(_weight_files(Path(cached).parent, options.get("variant"))):
            _warn_of_pickles(name)
    for part_name, network in _networks(loaded):
        _check_numbers(f"{name}, {part_name}," if part_name else name, network)
    if isinstance(loaded, transformers.PreTrainedTokenizerBase):
        _check_tokenizer(name, loaded)
    return loaded


def _local_options(name: str, folder: Path, variant: str | None) -> dict:
    """Return how the weights in a folder are to be read; raise InputError if there are none of the variant."""
    fitting = _weight_files(folder, variant)
    if not fitting:
        others = ", ".join(path.name for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES)
        held = f"{others}: see --variant" if others else f"neither {' nor '.join(WEIGHT_SUFFIXES)} files"
        raise InputError(f"{name} has no weights{f' of variant {variant}' * bool(variant)}: {folder} holds {held}.")
    if not _are_pickles(fitting):
        return {}
    _warn_of_pickles(name)
    return {"use_safetensors": False}


def _weight_files(folder: Path, variant: str | None) -> list[str]:
    """Return the names of a folder's files of weights that are of a variant, or with None of none."""
    names = [path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
    return [name for name in names if (f".{variant}" in name if variant else name.count(".") == 1)]


def _are_pickles(names: list[str]) -> bool:
    """Say whether files of weights are pickles alone: safetensors beside them are read instead."""
    return bool(names) and all(name.endswith(".bin") for name in names)


@functools.cache
def _warn_of_pickles(name: str) -> None:
    """Say once what is read from pickles."""
    logger.warning("%s is read from a pickle, by weights_only=True: numbers, no code. Safetensors are safer.", name)


def _reason(error: Exception) -> str:
    """Say why something cannot be loaded, in one line."""
    chain = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    if "git-lfs" not in str(error):
        # diffusers says of every other broken file of weights that it cannot be loaded, and not why.
        error = next((one for one in chain if isinstance(one, (SafetensorError, pickle.UnpicklingError))), error)
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, pickle.UnpicklingError):
        what = text.partition("WeightsUnpickler error: ")[2].partition(". ")[0] or "it is damaged"
        return f"its pickle holds more than weights, perhaps code, so it is not read ({what})."
    if "trust_remote_code" in text:
        return "it needs code that comes with the model, and none is ever run."
    says_what = isinstance(error, (OSError, ValueError, SafetensorError))
    return f"{text}." if says_what else f"{type(error).__name__}: {text}."


def _advice(folder: Path, options: dict) -> str:
    """Say what to do about a part that cannot be loaded."""
    if options.get("use_safetensors") is False:
        return "Use a model with safetensors."
    if not os.path.isdir(folder):
        return "There is no such folder here; for a model of the Hub, check its name, its files and --variant."
    return "Download the model again, or use another."


def _check_completeness(name: str, info: dict) -> None:
    """Raise InputError if weights lack layers of the network, which would be random, or have them in other shapes."""
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{name} lacks weights of {_first(missing)}. Download the model again, or use another.")
    if mismatched := [f"{key} {tuple(found)}, not {tuple(own)}" for key, found, own in info["mismatched_keys"]]:
        raise InputError(f"{name} has weights of other shapes than its config says: {_first(sorted(mismatched))}.")


def _networks(loaded: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield a loaded network, with no name, or those of a loaded pipeline with the names of their parts."""
    parts = loaded.components if isinstance(loaded, diffusers.DiffusionPipeline) else {"": loaded}
    yield from ((name, part) for name, part in parts.items() if isinstance(part, nn.Module))


def _check_numbers(name: str, network: nn.Module) -> None:
    """Raise InputError if a network's weights are not all finite: nothing could be learned or drawn with them."""
    named = [(layer, weights.detach()) for layer, weights in network.named_parameters() if weights.is_floating_point()]
    # The sum takes one pass and no memory, and is finite only if all are; it may overflow where all are.
    if bad := [layer for layer, weights in named if not weights.sum().isfinite() and not weights.isfinite().all()]:
        why = "it is damaged, was saved by a run that diverged, or is too large for this precision"
        raise InputError(f"{name} holds numbers that are not finite in {_first(bad)}: {why}. Use another model.")


def _check_tokenizer(name: str, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Raise InputError if a tokenizer needs code of the model's own, or knows no words."""
    if "auto_map" in tokenizer.init_kwargs:
        raise InputError(f"{name} needs code that comes with the model (auto_map), and none is ever run.")
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        files = ", ".join(sorted(tokenizer.vocab_files_names.values()))
        raise InputError(f"{name} knows no words: it lacks its files ({files}). Download the model again.")


def _first(names: list[str]) -> str:
    """Return the first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


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
