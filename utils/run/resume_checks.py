"""What a checkpoint's run and the one that resumes it must have in common; other changes hold from there on."""

import functools
import logging
import textwrap
from pathlib import Path
from typing import Any

from utils.core.errors import UserError
from utils.data import list_images
from utils.models.model_files import resume_keys_of_model

logger = logging.getLogger(__name__)

# What checkpoints were made with that do not know of a flag.
SINCE = {
    "repeats": 1,
    "prior_target": "images",
    "optimizer": "adamw",
    "weight_dtype": "fp32",
    "trained weights": "all",
}

# These may change, as the same flags may: what is new holds from there on, and is said.
MASKS, SETTINGS = "content of the masks", "settings of the concepts"
SET = ("mask_data_dir", "loss_weight", "prior_loss_weight", "crop_style", "random_flip")


def resume_keys_of_run(flags: dict[str, Any], names: tuple[str, ...], base: Any, examples: list) -> dict:
    """Return what both runs must have in common as to flags, model, pictures and captions.

    Args:
        names: The flags whose values must be the same.
        base: The script's `ModelInfo`.
        examples: The script's `Example`s.
    """
    fits = {"resolution": str(base.resolution), "fed by": base.conditioning}
    fits |= resume_keys_of_model(flags["pretrained_model_name_or_path"], flags["revision"], flags["hub_token"])
    return fits | {name: flags[name] for name in names} | resume_keys_of_pictures(examples, str(base.resolution))


def resume_keys_of_pictures(examples: list, resolution: str) -> dict:
    """Return what a checkpoint's run and the one that resumes it must have in common as to pictures and captions.

    Args:
        examples: The script's `Example`s.
        resolution: Of the run; the sizes of photos are told if they are not all that.
    """
    photos = [example for example in examples if not example.is_prior]
    subjects = list(dict.fromkeys(example.concept for example in examples))
    sizes = {str(example.size) for example in photos}
    has_captions = any(one.caption_strategy != "instanceprompt" or one.caption_column for one in subjects)
    return {
        "photos": [example.path.name for example in photos],
        "class images": len(examples) - len(photos),
        "captions": [list(example.prompts) for example in examples if not may_be_drawn(example)]
        if has_captions
        else None,
        "sizes": [str(example.size) for example in photos] if sizes != {resolution} else None,
        "concepts": [[one.instance_prompt, one.class_prompt, one.repeats] for one in subjects if one.number] or None,
        "content of the pictures": list_images.fingerprint((one.path, may_be_drawn(one)) for one in examples),
        MASKS: list_images.fingerprint((example.mask, False) for example in examples if example.mask),
        SETTINGS: {one.flag_name(key): getattr(one, key) for one in subjects if one.number for key in SET},
    }


def may_be_drawn(example: Any) -> bool:
    """Say whether an example is a class image; regularisation data are there before, as the photos of subjects are."""
    return example.is_prior and not example.concept.is_regularisation_data


def check_resume_keys(checkpoint: Path, theirs: dict, ours: dict) -> None:
    """Raise UserError naming each difference between a checkpoint's run and the one that wants to resume it."""
    there = {name: theirs.get(name, SINCE.get(name)) for name in ours}
    if MASKS in ours and theirs.get(MASKS, ours[MASKS]) != ours[MASKS]:
        logger.info("From here on, the masks are others than in %s.", checkpoint)
    for name, value in ours.get(SETTINGS, {}).items():
        if (before := theirs.get(SETTINGS, {}).get(name, value)) != value:
            logger.info("From here on, %s is %s; it was %s.", name, value, before)
    shorten = functools.partial(textwrap.shorten, width=300, placeholder=" …")
    lines = [
        f"  {name}: {shorten(str(there[name]))} there, {shorten(str(own))} here"
        for name, own in ours.items()
        # Older checkpoints do not say what is in the files.
        if str(there[name]) != str(own) and (name in theirs or not name.startswith("content of"))
        if name not in (MASKS, SETTINGS)
    ]
    if lines:
        head = f"{checkpoint} cannot be resumed: this command differs from the run that wrote it in"
        raise UserError("\n".join([head, *lines, "Use the same values, or start a new run in another --output_dir."]))
