"""The subjects of a run, each with its photos, words and class images: from the flags, or from a list in a JSON file.

The file holds a list of objects with the names of flags as keys; a key that is left out has the flag's value.
"""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from utils.core.errors import UserError
from utils.data.captions import STRATEGIES
from utils.data.geometry import CROP_STYLES, Size, find_size_problems, find_step_problems
from utils.flags.flag_checks import find_out_of_range, find_unused, is_text, messages_if

FLAG = "--concepts_list"
SPELLINGS = {"is_regularization_data": "is_regularisation_data"}
CHOICES = {"caption_strategy": STRATEGIES, "crop_style": CROP_STYLES}
RANGES = {"repeats": "from 1 to 10,000", "num_class_images": "1 or more"}
RANGES |= dict.fromkeys(("loss_weight", "prior_loss_weight", "class_guidance_scale"), "0 or more")
LONGEST_NAME = 80  # bytes of a folder's name that is made of a prompt
OF_EACH = ("instance_data_dir", "dataset_name", "mask_data_dir")  # flags that a list leaves no work for


class Concept(NamedTuple):
    """One subject, or pictures of a class that stand beside the subjects; the names are those of the flags."""

    instance_data_dir: str | None
    dataset_name: str | None
    image_column: str
    caption_column: str | None
    instance_prompt: str | None
    caption_strategy: str
    prepend_instance_prompt: bool
    mask_data_dir: str | None
    class_data_dir: str | None  # of its own class images, there or to be drawn; None: it has none
    class_prompt: str | None
    num_class_images: int
    class_guidance_scale: float | None
    repeats: int
    prior_loss_weight: float
    resolution: str | None
    crop_style: str
    random_flip: bool
    loss_weight: float = 1.0
    is_regularisation_data: bool = False  # its photos show a class, and count as class images
    number: int = 0  # in the list, from 1; 0: there is no list

    def loss_weight_of(self, is_prior: bool) -> float:
        """Return the weight of an example's loss."""
        return self.loss_weight * (self.prior_loss_weight if is_prior else 1.0)

    def flag_name(self, key: str) -> str:
        """Return what a message calls one of its flags or keys."""
        return f"{FLAG}, concept {self.number}: {key}" if self.number else f"--{key}"


KINDS = {key: kind for key, kind in Concept.__annotations__.items() if key != "number"} | {"center_crop": bool}


def read_concepts(flags: dict[str, Any]) -> list[Concept]:
    """Return the concepts of a run: those of --concepts_list, or the one of the flags.

    Class images without a folder of their own lie in --class_data_dir or, if there is a list, in a folder in there
    that is named by their prompt, so that concepts of one class share them.

    Args:
        flags: All flags by name.

    Raises:
        UserError: The list cannot be read, or its objects have wrong keys or values; all are named.
    """
    usual = {key: flags[key] for key in Concept._fields if key in flags}
    usual["crop_style"] = "center" if flags["center_crop"] else flags["crop_style"] or "random"
    folder = Path(flags["class_data_dir"] or Path(flags["output_dir"], "class_images"))
    wants_class = flags["with_prior_preservation"]
    if not flags["concepts_list"]:
        return [Concept(**usual | {"class_data_dir": str(folder) if wants_class else None})]
    concepts = []
    for number, entry in enumerate(_read_list(flags["concepts_list"]), start=1):
        if "center_crop" in entry:
            entry.setdefault("crop_style", "center" if entry.pop("center_crop") else flags["crop_style"] or "random")
        if entry.get("is_regularisation_data"):
            # What the photos of a subject are told is no default for those of a class.
            entry = {"instance_prompt": entry.get("class_prompt", usual["class_prompt"])} | entry
        concept = Concept(**usual | entry | {"number": number})
        own = entry.get("class_data_dir") or folder / _folder_name(concept.class_prompt or "")
        has_own = wants_class and concept.class_prompt and not concept.is_regularisation_data
        concepts.append(concept._replace(class_data_dir=str(own) if has_own else None))
    return concepts


def find_concept_problems(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each mistake in the flags of the subjects, or in the list of them."""
    given = [f"--{name}" for name in OF_EACH if flags["concepts_list"] and flags[name]]
    problems = [f"{name} excludes {FLAG}: each concept names its own." for name in given]
    try:
        concepts = read_concepts(flags)
    except UserError as error:
        return [*problems, *str(error).split("\n")]
    pool = any(concept.is_regularisation_data for concept in concepts)
    if all(concept.is_regularisation_data for concept in concepts):
        problems.append(f"{FLAG} {flags['concepts_list']} holds regularisation data only: there is no subject.")
    needs_class = flags["with_prior_preservation"] and not pool
    return problems + [problem for concept in concepts for problem in _find_lacks(concept, needs_class)]


def find_uneven(flags: dict[str, Any], resolution: Size, factor: int) -> list[str]:
    """Return a sentence for each size of a concept, and for a --bucket_step, that does not fit the model.

    Args:
        resolution: Of the run.
        factor: What the model's edges must be multiples of.
    """
    own = {one.flag_name("resolution"): one.resolution for one in read_concepts(flags)}
    sizes = {key: Size.parse(size) for key, size in own.items() if size not in (None, flags["resolution"])}
    uneven = [f"{key} {size}" for key, size in sizes.items() if any(edge % factor for edge in size)]
    step = flags["bucket_step"] if flags["crop_aspect"] == "preserve" else None
    found = [f"{name}: the model needs multiples of {factor}." for name in uneven]
    return found + find_step_problems(resolution, step, factor, flags["resolution_type"])


def find_unused_keys(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each flag or key of the subjects that changes nothing in this run."""
    by_column = flags["caption_column"] or flags["concepts_list"]
    if flags["prepend_instance_prompt"] and flags["caption_strategy"] == STRATEGIES[0] and not by_column:
        return ["--prepend_instance_prompt has no effect with --caption_strategy instanceprompt.", *_find_idle(flags)]
    return _find_idle(flags)


def _find_idle(flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each flag or key of class images that changes nothing in this run."""
    if not flags["concepts_list"]:
        names = ("class_prompt", "class_data_dir", "class_guidance_scale", "prior_target base_prediction")
        needs = dict.fromkeys(names, "with_prior_preservation")
        needs |= {} if flags["image_column"] == "image" else {"image_column": "dataset_name"}
        return find_unused(flags, needs)
    given, concepts = _read_list(flags["concepts_list"]), read_concepts(flags)
    has_priors = any(concept.class_data_dir or concept.is_regularisation_data for concept in concepts)
    idle = flags["prior_target"] == "base_prediction" and not has_priors
    needs = "neither --with_prior_preservation nor regularisation data"
    notes = [f"--prior_target base_prediction has no effect: there is {needs}."] * idle
    for concept, entry in zip(concepts, given, strict=True):
        keys = [key for key in ("class_data_dir", "class_prompt") if entry.get(key) and not concept.class_data_dir]
        if concept.is_regularisation_data:
            keys = [key for key in keys if key == "class_data_dir"]
            why = "regularisation data shows the class itself"
        else:
            why = "it needs --with_prior_preservation and a class_prompt"
        notes += [f"{concept.flag_name(key)} has no effect: {why}." for key in keys]
    return notes


def _find_lacks(concept: Concept, needs_class: bool) -> list[str]:
    """Return a sentence for each thing that a concept lacks, or has too much of."""
    call, by_column = concept.flag_name, concept.dataset_name and concept.caption_column
    dash = "" if concept.number else "--"
    wants_prompt = concept.prepend_instance_prompt or (not by_column and concept.caption_strategy == "instanceprompt")
    lacks_prompt = wants_prompt and not (concept.instance_prompt or "").strip()
    instead = f" by {dash}prepend_instance_prompt" if concept.prepend_instance_prompt else ""
    if concept.dataset_name and not (by_column or instead):
        instead = f", or {dash}caption_column"
    lacks_class = needs_class and not (concept.class_prompt or "").strip()
    asking = "--with_prior_preservation needs --class_prompt" if not concept.number else call("class_prompt is needed")
    return messages_if(
        (not (concept.instance_data_dir or concept.dataset_name), f"{call('instance_data_dir')} is required."),
        (
            concept.instance_data_dir and concept.dataset_name,
            f"{call('dataset_name')} excludes {dash}instance_data_dir.",
        ),
        (concept.caption_column and not concept.dataset_name, f"{call('caption_column')} needs {dash}dataset_name."),
        (
            by_column and concept.caption_strategy == "filename",
            f"{call('caption_column')} excludes captions by filename.",
        ),
        (concept.mask_data_dir and concept.dataset_name, f"{call('mask_data_dir')} needs {dash}instance_data_dir."),
        (lacks_prompt, f"{call('instance_prompt')} is required{instead}."),
        (lacks_class, f"{asking}, such as 'a photo of dog'."),
    )


def _read_list(name: str) -> list[dict[str, Any]]:
    """Return the objects of a list of concepts, each with proper keys and values, None left out."""
    try:
        entries = json.loads(Path(name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"it is no valid JSON ({error})"
        raise UserError(f"{FLAG} {name} cannot be read: {reason}.") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        example = '[{"instance_data_dir": "dog", "instance_prompt": "a photo of sks dog"}, …]'
        raise UserError(f"{FLAG} {name} must hold a list of objects such as {example}.")
    wrong = [problem for number, entry in enumerate(entries, start=1) for problem in _find_wrong(number, entry)]
    if wrong:
        raise UserError("\n".join(wrong))
    return [{SPELLINGS.get(key, key): value for key, value in entry.items() if value is not None} for entry in entries]


def _find_wrong(number: int, entry: dict[str, Any]) -> list[str]:
    """Return a sentence for each key that is none, and each value that is not of its key's kind or range."""
    start, known = f"{FLAG}, concept {number}: ", [*KINDS, *SPELLINGS]
    problems = []
    for key in entry.keys() - set(known):
        near = difflib.get_close_matches(key, known, n=1)
        problems.append(
            f"{start}{key!r} is no key" + (f"; {near[0]!r} is." if near else f". Keys: {', '.join(KINDS)}.")
        )
    values = {SPELLINGS.get(key, key): value for key, value in entry.items() if key in known and value is not None}
    if any(entry.get(one) != entry.get(other, entry.get(one)) for one, other in SPELLINGS.items() if one in entry):
        problems.append(f"{start}is_regularisation_data has two values, one in each spelling.")
    for key, value in values.items():
        kind = KINDS[key]
        names = {bool: "true or false", int: "a whole number", float: "a number", float | None: "a number"}
        # Python takes true for a number.
        fits = isinstance(value, kind) or (kind in (float, float | None) and isinstance(value, int))
        fits = fits or (key == "resolution" and isinstance(value, int))
        if not fits or isinstance(value, bool) != (kind is bool):
            problems.append(f"{start}{key} is {json.dumps(value)}, not {names.get(kind, 'a text')}.")
        elif isinstance(value, str) and not is_text(value):
            problems.append(f"{start}{key} {value!r} is not written in UTF-8.")
        elif key in CHOICES and value not in CHOICES[key]:
            problems.append(f"{start}{key} {value!r} is none of {', '.join(CHOICES[key])}.")
        elif key in RANGES:
            problems += [start + found.removeprefix("--") for found in find_out_of_range(values, {key: RANGES[key]})]
        elif key == "resolution":
            problems += find_size_problems(start + key, value)
    if values.get("center_crop") and values.get("crop_style", "center") != "center":
        problems.append(f"{start}center_crop excludes crop_style {values['crop_style']!r}.")
    return sorted(problems)


def _folder_name(prompt: str) -> str:
    """Return the name of the folder for the class images of a prompt."""
    name = re.sub(r"\W+", "_", prompt.strip().lower()).strip("_") or "class"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    start = name.encode()[:LONGEST_NAME].decode(errors="ignore")
    return f"{start}_{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
