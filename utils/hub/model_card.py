"""The model card: README.md of a result, for people and for the Hub.

Its words are in `templates/model_card.md`, the code that it shows in `templates/snippet.md`. Both are Jinja templates
that anybody may edit; this module fills in the facts.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
import yaml
from huggingface_hub.errors import HTTPError

from utils.core import atomic_files
from utils.models import model_files

TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Snippet:
    """What the code of a card loads and samples.

    Attributes:
        result: Hub id or folder of the result.
        base_model: Of an adapter; None if the result is a whole pipeline.
        encoder_from: The model that lends its text encoder to a pipeline without one, else None.
        encoder_class: Of the text encoder, in transformers.
        revision, variant: Of the base model.
        max_length: Tokens a prompt, if it is not the tokenizer's own.
        is_masked: Whether the attention mask must be switched on.
        has_scheduler: Whether an adapter's own scheduler lies beside it.
        is_if: Whether it is DeepFloyd IF. Its T5 alone fills a card, so the parts are loaded one at a time.
        size: (width, height) in pixels, None for the model's own.
        small_size: That of the image that stage II enlarges; None for other models.
    """

    result: str
    prompt: str
    base_model: str | None = None
    encoder_from: str | None = None
    encoder_class: str = "CLIPTextModel"
    revision: str | None = None
    variant: str | None = None
    max_length: int | None = None
    is_masked: bool = False
    has_scheduler: bool = False
    is_if: bool = False
    size: tuple[int, int] | None = None
    small_size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
        title: The repository's id or the folder's name.
        base_model: Hub id or folder that was fine-tuned.
        prompts: Of each subject, as in training.
        grid: Path of the preview below the result, or None.
        settings: What a reader wants to know of the run, by name.
        snippet: Python code that samples an image with the result.
    """

    title: str
    base_model: str
    tags: list[str]
    prompts: tuple[str, ...]
    validation_prompt: str | None
    grid: str | None
    settings: dict[str, Any]
    snippet: str


def write_card(
    flags: dict[str, Any], plan: Any, tags: list[str], settings: dict[str, str], repository: str | None
) -> None:
    """Write README.md of a run's result, with the base model's licence, and with the grid if it is there.

    Args:
        flags: As given, by name.
        plan: The script's `Plan`.
        tags: Of the method.
        settings: The lines of the start-up screen, by name.
        repository: On the Hub; None: the result stays where it is.
    """
    family = "deepfloyd-if" if plan.base.is_if else "stable-diffusion"
    grid = f"samples/step-{max(plan.first_step, plan.steps):06d}/grid.png"
    prompts = {}  # of the first photo of each subject
    for example in plan.examples:
        if not example.is_prior:
            prompts.setdefault(example.concept, example.concept.instance_prompt or example.prompts[0])
    prompts = tuple(dict.fromkeys(prompts.values()))
    # The screen's own lines also tell defaults and the steps before a resume.
    plain = {"resolution": f"{plan.base.resolution} px", "steps": str(plan.steps)}
    describe = describe_adapter if "lora" in tags else describe_pipeline
    prompt = flags["validation_prompt"] or prompts[0]
    card = Card(
        title=repository or plan.output_dir.resolve().name,
        base_model=flags["pretrained_model_name_or_path"],
        tags=["text-to-image", "diffusers", "diffusers-training", "dreambooth", family, *tags],
        prompts=prompts,
        validation_prompt=flags["validation_prompt"],
        grid=grid if (plan.output_dir / grid).exists() else None,
        settings={name: plain.get(name, text) for name, text in settings.items()},
        snippet=render_snippet(describe(flags, plan.base, repository or str(plan.output_dir), prompt)),
    )
    text = render(card, find_license(card.base_model, flags["revision"], flags["hub_token"]))
    atomic_files.write_whole(plan.output_dir / "README.md", text)


def describe_pipeline(flags: dict[str, Any], base: Any, result: str, prompt: str) -> Snippet:
    """Return the facts for a full result; the base model lends the text encoder that it lacks."""
    has_encoder = not base.precomputes_text or Path(flags["output_dir"], "text_encoder").is_dir()
    is_lent = flags["skip_save_text_encoder"] or not has_encoder
    return Snippet(
        *(result, prompt),
        encoder_from=flags["pretrained_model_name_or_path"] if is_lent else None,
        encoder_class=base.index["text_encoder"][1],
        is_masked=bool(is_lent and flags["text_encoder_use_attention_mask"] and not base.is_if),
        **describe_base(flags, base),
    )


def describe_adapter(flags: dict[str, Any], base: Any, result: str, prompt: str) -> Snippet:
    """Return the facts for an adapter, which needs the base model and reads prompts as in training."""
    return Snippet(
        *(result, prompt),
        base_model=flags["pretrained_model_name_or_path"],
        max_length=None if base.is_if else flags["tokenizer_max_length"],
        is_masked=bool(flags["text_encoder_use_attention_mask"] and not base.is_if),
        has_scheduler=base.learns_variance and not flags["train_variance"],
        **describe_base(flags, base),
    )


def describe_base(flags: dict[str, Any], base: Any) -> dict[str, Any]:
    """Return the facts of the base model that both kinds of results share."""
    names = {name: flags[name] for name in ("revision", "variant")}
    return names | {"is_if": base.is_if, "size": base.resolution, "small_size": base.low_res_size}


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
    header = {"library_name": "diffusers", "tags": card.tags, "instance_prompt": card.prompts[0], **license}
    if not Path(card.base_model).is_dir():
        # The Hub refuses a base_model that is no Hub id.
        header["base_model"] = card.base_model
    sampled = card.validation_prompt or card.prompts[0]
    if card.grid:
        header["widget"] = [{"text": sampled, "output": {"url": card.grid}}]
    facts = {
        "title": card.title,
        "base": model_files.public_name(card.base_model),
        "prompts": [as_code(prompt) for prompt in card.prompts],
        "validation_prompt": as_code(sampled),
        "grid": card.grid,
        "snippet": card.snippet,
        "settings": {name: " ".join(str(text).split()).replace("|", "\\|") for name, text in card.settings.items()},
    }
    data = huggingface_hub.ModelCardData(**header)
    path = TEMPLATES / "model_card.md"
    return f"{huggingface_hub.ModelCard.from_template(data, template_path=str(path), **facts)}\n"


def render_snippet(snippet: Snippet) -> str:
    """Return Python code that samples an image with a result."""
    template = jinja2.Template((TEMPLATES / "snippet.md").read_text(encoding="utf-8"))
    given = {"revision": snippet.revision, "variant": snippet.variant}
    options = "".join(f", {name}={value!r}" for name, value in given.items() if value)
    facts = dataclasses.asdict(snippet) | {"size": snippet.size and tuple(snippet.size)}
    facts["small_size"] = snippet.small_size and tuple(snippet.small_size)
    return template.render(**facts, revision_and_variant=options, repr=repr)


def as_code(text: str) -> str:
    """Return a text as Markdown code within a line, whatever backticks or line breaks it has."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{' '.join(text.split())}{pad}{fence}" if "\n" in text else f"{fence}{pad}{text}{pad}{fence}"
