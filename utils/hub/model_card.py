"""The model card: README.md of a result, for people and for the Hub."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import yaml
from huggingface_hub.errors import HTTPError

from utils.core import atomic_files
from utils.models import model_files


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
        title: The repository's id or the folder's name.
        base_model: Hub id or folder that was fine-tuned.
        grid: Path of the preview below the result, or None.
        settings: What a reader wants to know of the run, by name.
        snippet: Python code that draws a picture with the result.
    """

    title: str
    base_model: str
    tags: list[str]
    instance_prompt: str
    validation_prompt: str | None
    grid: str | None
    settings: dict[str, Any]
    snippet: str
    other_prompts: tuple[str, ...] = ()  # of further subjects


class Picture(NamedTuple):
    """What a snippet draws: sizes are width and height in pixels, None for the model's own."""

    size: tuple[int, int] | None = None
    small: tuple[int, int] | None = None  # of the picture that stage II enlarges; None: others draw from words alone
    is_if: bool = False


ANY_PICTURE = Picture()


def write_card(
    flags: dict[str, Any], plan: Any, tags: list[str], settings: dict[str, str], repository: str | None
) -> None:
    """Write README.md of a run's result, with the base model's licence, and with the grid if it is there.

    Args:
        flags: As given, by name.
        plan: The script's `Plan`.
        tags: Of the method.
        settings: What a reader wants to know of the run, by name.
        repository: On the Hub; None: the result stays where it is.
    """
    family = "deepfloyd-if" if plan.base.is_if else "stable-diffusion"
    grid = f"samples/step-{max(plan.first_step, plan.steps):06d}/grid.png"
    prompts = {}  # of the first photo of each subject
    for example in plan.examples:
        if not example.is_prior:
            prompts.setdefault(example.concept, example.concept.instance_prompt or example.prompts[0])
    prompt, *others = dict.fromkeys(prompts.values())
    describe = _adapter_snippet if "lora" in tags else _pipeline_snippet
    card = Card(
        title=repository or plan.output_dir.resolve().name,
        base_model=flags["pretrained_model_name_or_path"],
        tags=["text-to-image", "diffusers", "diffusers-training", "dreambooth", family, *tags],
        instance_prompt=prompt,
        other_prompts=tuple(others),
        validation_prompt=flags["validation_prompt"],
        grid=grid if (plan.output_dir / grid).exists() else None,
        settings=settings,
        snippet=describe(flags, plan.base, repository or str(plan.output_dir), prompt),
    )
    text = render(card, find_license(card.base_model, flags["revision"], flags["hub_token"]))
    atomic_files.write_whole(plan.output_dir / "README.md", text)


def _pipeline_snippet(flags: dict[str, Any], base: Any, name: str, prompt: str) -> str:
    """Return Python code that draws a picture with a full result; stage II's wants a small picture beside it."""
    prompt = flags["validation_prompt"] or prompt
    has_encoder = not base.precomputes_text or Path(flags["output_dir"], "text_encoder").is_dir()
    lacks_encoder = flags["skip_save_text_encoder"] or not has_encoder
    encoder_from = flags["pretrained_model_name_or_path"] if lacks_encoder else None
    is_masked = encoder_from and flags["text_encoder_use_attention_mask"] and not base.is_if
    places = (encoder_from, flags["revision"], flags["variant"], reading_lines(None, is_masked))
    picture = Picture(base.resolution, base.low_res_size, base.is_if)
    return pipeline_snippet(name, prompt, *places, base.index["text_encoder"][1], picture)


def _adapter_snippet(flags: dict[str, Any], base: Any, name: str, prompt: str) -> str:
    """Return Python code that draws a picture with an adapter; stage II's wants a small picture beside it."""
    prompt, max_length = flags["validation_prompt"] or prompt, flags["tokenizer_max_length"]
    reading = () if base.is_if else reading_lines(max_length, flags["text_encoder_use_attention_mask"])
    places = (flags["pretrained_model_name_or_path"], flags["revision"], flags["variant"], reading)
    has_scheduler = base.learns_variance and not flags["train_variance"]
    picture = Picture(base.resolution, base.low_res_size, base.is_if)
    return lora_snippet(name, prompt, *places, has_scheduler, picture)


def find_license(base_model: str, revision: str | None, token: str | None) -> dict[str, str]:
    """Return the licence entries of the base model's own card; none when it has no card or no licence."""
    path = Path(base_model, "README.md")
    try:
        if not Path(base_model).is_dir():
            path = Path(huggingface_hub.hf_hub_download(base_model, "README.md", revision=revision, token=token))
        data = huggingface_hub.ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError, HTTPError, yaml.YAMLError):
        return {}
    names = ("license", "license_name", "license_link")
    return {name: data.get(name) for name in names if data.get(name)}


def render(card: Card, license: dict[str, str]) -> str:
    """Return the card as Markdown with the Hub's YAML header.

    Args:
        license: The base model's licence entries, which bind what is derived from it.
    """
    header = {"library_name": "diffusers", "tags": card.tags, "instance_prompt": card.instance_prompt, **license}
    if not Path(card.base_model).is_dir():
        # The Hub refuses a base_model that is no Hub id.
        header["base_model"] = card.base_model
    if card.grid:
        header["widget"] = [{"text": card.validation_prompt or card.instance_prompt, "output": {"url": card.grid}}]
    preview = (
        f"\nDrawn from {as_code(card.validation_prompt or card.instance_prompt)}:\n\n![samples]({card.grid})\n"
        if card.grid
        else ""
    )
    base = model_files.public_name(card.base_model)
    words = ", ".join(map(as_code, (card.instance_prompt, *card.other_prompts)))
    subjects = f"one subject.\nName it in a prompt as in training: {words}"
    if card.other_prompts:
        subjects = f"{1 + len(card.other_prompts)} subjects.\nName them in prompts as in training: {words}"
    licence = license.get("license") or "unknown: see the base model"
    cells = {name: " ".join(str(value).split()).replace("|", "\\|") for name, value in card.settings.items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in cells.items())
    return f"""---
{huggingface_hub.repocard_data.CardData(**header).to_yaml()}
---

# {card.title}

Fine-tuned from {base} with [DreamBooth](https://arxiv.org/abs/2208.12242) on photos of {subjects}
{preview}
## Use

```python
{card.snippet}
```

## Settings

| | |
|---|---|
{rows}

Licence of the base model: {licence}
"""


def as_code(text: str) -> str:
    """Return a text as Markdown code within a line, whatever backticks or line breaks it has."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{' '.join(text.split())}{pad}{fence}" if "\n" in text else f"{fence}{pad}{text}{pad}{fence}"


def reading_lines(max_length: int | None, masked: bool) -> tuple[str, ...]:
    """Return code that lets a pipeline read prompts as training did, where that is not the base model's way."""
    lines = [f"pipeline.tokenizer.model_max_length = {max_length}"] if max_length else []
    return (*lines, *(["pipeline.text_encoder.config.use_attention_mask = True"] if masked else []))


def pipeline_snippet(
    result: str,
    prompt: str,
    base_model: str | None,
    revision: str | None = None,
    variant: str | None = None,
    reading: tuple[str, ...] = (),
    encoder_class: str = "CLIPTextModel",
    picture: Picture = ANY_PICTURE,
) -> str:
    """Return code that draws with a pipeline.

    Args:
        base_model: What lends its text encoder, None if the pipeline has one.
        reading: Of `reading_lines`.
        encoder_class: Of the text encoder, in transformers.
    """
    encoder = f"{base_model!r}, subfolder='text_encoder'{_options(revision, variant)}{', dtype=dtype' * picture.is_if}"
    lent = ", text_encoder=text_encoder" if base_model else ""
    return "\n".join(
        [
            "import torch",
            "from diffusers import DiffusionPipeline",
            *(["from transformers import " + encoder_class] if base_model else []),
            *_head(picture),
            *([f"text_encoder = {encoder_class}.from_pretrained({encoder})"] if base_model else []),
            *_loading(f"{result!r}{lent}", picture),
            *reading,
            _call(prompt, picture),
            'image.save("image.png")',
        ]
    )


def lora_snippet(
    result: str,
    prompt: str,
    base_model: str,
    revision: str | None,
    variant: str | None = None,
    reading: tuple[str, ...] = (),
    has_scheduler: bool = False,
    picture: Picture = ANY_PICTURE,
) -> str:
    """Return code that draws with a base model and an adapter.

    Args:
        reading: Of `reading_lines`.
        has_scheduler: Whether the adapter is drawn with another scheduler than the base model, which lies beside it.
    """
    scheduler = f"DDPMScheduler.from_pretrained({result!r}, subfolder='scheduler')"
    return "\n".join(
        [
            "import torch",
            "from diffusers import DiffusionPipeline" + (", DDPMScheduler" if has_scheduler else ""),
            *_head(picture),
            *_loading(f"{base_model!r}{_options(revision, variant)}", picture),
            f"pipeline.load_lora_weights({result!r})",
            *([f"pipeline.scheduler = {scheduler}"] if has_scheduler else []),
            *reading,
            _call(prompt, picture),
            'image.save("image.png")',
        ]
    )


def _head(picture: Picture) -> list[str]:
    """Return code for the last import, and for where and in which precision to draw."""
    image = ["from PIL import Image"] if picture.small else []
    device = ["", 'device = "cuda" if torch.cuda.is_available() else "cpu"']
    dtype = ['dtype = torch.bfloat16 if device == "cuda" else torch.float32'] if picture.is_if else []
    return image + device + dtype


def _loading(source: str, picture: Picture) -> list[str]:
    """Return code that loads a pipeline onto the device; IF's a network at a time, since T5 alone fills a card."""
    if not picture.is_if:
        return [f"pipeline = DiffusionPipeline.from_pretrained({source}).to(device)"]
    unchecked = "safety_checker=None, requires_safety_checker=False, dtype=dtype"
    return [
        f"pipeline = DiffusionPipeline.from_pretrained({source}, {unchecked})",
        'if device == "cuda":',
        "    pipeline.enable_model_cpu_offload()",
    ]


def _call(prompt: str, picture: Picture) -> str:
    """Return code that draws a picture; stage II enlarges one of the reader's own."""
    small, size = picture.small, picture.size
    image = f", image=Image.open('small.png').convert('RGB').resize({tuple(small)})" if small else ""
    image += f", width={size[0]}, height={size[1]}" if size else ""
    comment = "# small.png is what to enlarge, such as a picture of stage I\n" if small else ""
    return f"{comment}image = pipeline({prompt!r}{image}).images[0]"


def _options(revision: str | None, variant: str | None) -> str:
    """Return further arguments of `from_pretrained` as code."""
    given = {"revision": revision, "variant": variant}
    return "".join(f", {name}={value!r}" for name, value in given.items() if value)
