"""The model card: a header that parses, the base model's licence, and words that break nothing."""

import ast
import builtins
import dataclasses
import re
from pathlib import Path

import huggingface_hub
import pytest
import yaml

import train_dreambooth
import train_dreambooth_lora
from utils.data.concepts import read_concepts
from utils.data.geometry import Size
from utils.hub import model_card
from utils.hub.model_card import Card, Snippet, find_license, render, render_snippet, write_card

ODD_PROMPTS = {
    "plain": "a photo of sks dog",
    "pipes": "a | b || c",
    "quotes": """a "sks" dog's 'photo'""",
    "colon": "dog: a # photo, [x] {y} & *z* - %",
    "newline": "a photo\nof sks dog",
    "paragraphs": "a photo\n\n# of\n\n---\n\n```\nsks dog",
    "backticks": "a `sks` dog ``x``",
    "backslashes": "a \\n dog \\",
    "no": "no",
    "number": "007",
    "letters": "ein Foto von sks Hündchen 狗 🐶",
    "markup": "<b>sks</b> <!-- dog",
}


SIZES = {"size": Size(256, 192), "small_size": Size(64, 48), "is_if": True}


def pipeline_snippet(result: str, prompt: str, encoder_from: str | None, **facts) -> str:
    """Return the code for a full result."""
    return render_snippet(Snippet(result, prompt, encoder_from=encoder_from, **facts))


def lora_snippet(result: str, prompt: str, base_model: str, revision: str | None, **facts) -> str:
    """Return the code for an adapter."""
    return render_snippet(Snippet(result, prompt, base_model, revision=revision, **facts))


@pytest.fixture(params=ODD_PROMPTS)
def prompt(request):
    """Run a test with each prompt."""
    return ODD_PROMPTS[request.param]


@pytest.fixture
def card():
    """Describe a result with previews."""
    return Card(
        title="somebody/dog",
        base_model="somebody/base",
        tags=["text-to-image", "dreambooth"],
        prompts=("a photo of sks dog",),
        validation_prompt="a sks dog in a bucket",
        grid="samples/step-000500/grid.png",
        settings={"steps": 500, "learning rate": "5e-06"},
        snippet="print(1)",
    )


def split(text: str) -> tuple[dict, str]:
    """Return a card's header, parsed, and its Markdown."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(match[1]), text[match.end() :]


def outside_code(markdown: str) -> str:
    """Return Markdown without its fenced code."""
    return re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)


def table_rows(markdown: str) -> list[list[str]]:
    """Return the cells of the settings' table, split at pipes that are not escaped."""
    table = markdown.partition("## Settings\n\n| | |\n|---|---|\n")[2].partition("\n\n")[0]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]


def code_spans(markdown: str) -> list[str]:
    """Return what CommonMark shows as code within the lines of a text."""
    found = re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", outside_code(markdown))
    return [content[1:-1] if content[0] == content[-1] == " " and content.strip() else content for _, content in found]


def strings_in(code: str) -> list[str]:
    """Return the string constants of Python code, which must compile."""
    return [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


# ------------------------------------------------------------------------------------------------------------- header


def test_the_header_says_what_the_hub_asks_for(card):
    """Library, tags, prompt, base model, licence and a widget with the grid."""
    header, _ = split(render(card, {"license": "openrail++"}))
    assert header == {
        "library_name": "diffusers",
        "license": "openrail++",
        "base_model": "somebody/base",
        "tags": ["text-to-image", "dreambooth"],
        "instance_prompt": "a photo of sks dog",
        "widget": [{"text": "a sks dog in a bucket", "output": {"url": "samples/step-000500/grid.png"}}],
    }


def test_a_local_base_model_is_left_out_of_the_header(card, tmp_path):
    """The Hub refuses a path as base_model, and nobody wants to publish where a folder lay."""
    folder = tmp_path / "my-base"
    folder.mkdir()
    text = render(dataclasses.replace(card, base_model=str(folder)), {})
    header, markdown = split(text)
    assert "base_model" not in header and "Fine-tuned from my-base with" in markdown and str(tmp_path) not in text
    assert "Fine-tuned from somebody/base with" in render(card, {})


def test_a_local_base_model_with_a_slash_at_its_end_keeps_its_name(card, tmp_path, monkeypatch):
    """`base/` and `.` are folders with names, too."""
    (tmp_path / "my-base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "Fine-tuned from my-base with" in render(dataclasses.replace(card, base_model="my-base/"), {})
    monkeypatch.chdir(tmp_path / "my-base")
    assert "Fine-tuned from my-base with" in render(dataclasses.replace(card, base_model="."), {})


def test_without_previews_there_is_no_picture(card):
    """Neither the header nor the text refers to a grid that was not drawn."""
    header, markdown = split(render(dataclasses.replace(card, grid=None), {}))
    assert "widget" not in header and "![" not in markdown
    assert "![samples](samples/step-000500/grid.png)" in split(render(card, {}))[1]


def test_the_hub_reads_the_header(card):
    """huggingface_hub's own parser finds the same entries."""
    data = huggingface_hub.ModelCard(render(card, {"license": "mit"})).data
    assert (data.base_model, data.license, data.tags) == ("somebody/base", "mit", card.tags)


# ------------------------------------------------------------------------------------------------------------ licence


@pytest.mark.parametrize(
    ("readme", "entries"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\n# Base", {"license": "creativeml-openrail-m"}),
        (
            "---\nlicense: other\nlicense_name: my-own\nlicense_link: LICENSE.md\n---\n",
            {"license": "other", "license_name": "my-own", "license_link": "LICENSE.md"},
        ),
        ("---\ntags: [x]\n---\n# Base", {}),
        ("# Base without header", {}),
        ("", {}),
        ("---\nlicense: [broken\n---\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_that_of_the_base_model(card, tmp_path, readme, entries):
    """It is copied from the base model's card; without one, none is made up."""
    if readme is not None:
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    license = find_license(str(tmp_path), None, None)
    assert license == entries
    header, markdown = split(render(card, license))
    assert {name: header[name] for name in header if name.startswith("license")} == entries
    assert markdown.endswith(f"Licence of the base model: {entries.get('license', 'unknown: see the base model')}\n")


def test_an_unreachable_base_model_has_no_licence(monkeypatch):
    """Offline, the card is written without."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_license("nobody/no-such-model", None, None) == {}


# --------------------------------------------------------------------------------------------------- words of any kind


def test_any_prompt_survives_the_header(card, prompt):
    """YAML gives both prompts back unchanged, as words."""
    header, _ = split(render(dataclasses.replace(card, prompts=(prompt,), validation_prompt=prompt), {}))
    assert header["instance_prompt"] == header["widget"][0]["text"] == prompt
    assert header["widget"][0]["output"] == {"url": card.grid} and header["tags"] == card.tags


def test_any_prompt_stays_within_its_place_in_the_text(card, prompt):
    """Headings stay those of the card, and a prompt of one line is shown as code, letter by letter."""
    plain = outside_code(split(render(card, {}))[1])
    markdown = split(render(dataclasses.replace(card, prompts=(prompt,), validation_prompt=prompt), {}))[1]
    headings = [line for line in outside_code(plain).splitlines() if line.startswith("#")]
    assert [line for line in outside_code(markdown).splitlines() if line.startswith("#")] == headings
    assert len(outside_code(markdown).splitlines()) == len(plain.splitlines())
    if "\n" not in prompt:
        assert code_spans(markdown).count(prompt) == 2


def test_any_value_stays_within_its_row(card, prompt):
    """The table has a row per setting and two cells per row."""
    settings = {"class_prompt": prompt, "steps": 500}
    rows = table_rows(split(render(dataclasses.replace(card, settings=settings), {}))[1])
    assert [len(row) for row in rows] == [2, 2]
    assert rows[0][0].strip() == "class_prompt" and rows[1] == [" steps ", " 500 "]


def test_any_prompt_survives_the_snippets(prompt):
    """The code compiles and passes the prompt on unchanged."""
    for code in (
        pipeline_snippet("some/dog", prompt, None),
        pipeline_snippet("some/dog", prompt, "some/base"),
        lora_snippet("some/dog", prompt, "some/base", None),
        lora_snippet("some/dog", prompt, "some/base", "v1"),
    ):
        assert strings_in(code).count(prompt) == 1
        assert not any(line.startswith("```") for line in code.splitlines())


# ----------------------------------------------------------------------------------------------------------- snippets


def test_the_snippets_name_what_they_load():
    """A pipeline comes from the result; an adapter goes on its base at the revision that was trained."""
    pipeline = strings_in(pipeline_snippet("some/dog", "a dog", None))
    assert "some/dog" in pipeline and "text_encoder" not in pipeline
    lent = strings_in(pipeline_snippet("some/dog", "a dog", "some/base"))
    assert {"some/dog", "some/base", "text_encoder"} <= set(lent)
    adapter = lora_snippet("some/dog", "a dog", "some/base", "v1")
    assert "from_pretrained('some/base', revision='v1')" in adapter and "load_lora_weights('some/dog')" in adapter
    assert "revision" not in lora_snippet("some/dog", "a dog", "some/base", None)


def test_the_snippets_draw_as_training_read_and_enlarged():
    """Prompts are read as in training, pictures enlarged from the size that it knew, and the scheduler is its own."""
    reading = (
        "pipeline.tokenizer.model_max_length = 20",
        "pipeline.text_encoder.config.use_attention_mask = True",
    )
    read = {"max_length": 20, "is_masked": True}
    pipeline = pipeline_snippet("some/dog", "a dog", "some/base", encoder_class="T5EncoderModel", **read, **SIZES)
    adapter = lora_snippet("some/dog", "a dog", "some/base", None, has_scheduler=True, **read, **SIZES)
    plain = lora_snippet("some/dog", "a dog", "some/base", None)
    assert not any(words in plain for words in ("max_length", "attention_mask", "width", "small.png", "dtype"))
    for code in (pipeline, adapter):
        lines = code.splitlines()
        drawn = next(number for number, line in enumerate(lines) if line.startswith("image = "))
        assert all(line in lines[:drawn] for line in reading)
        assert "image=Image.open('small.png').convert('RGB').resize((64, 48)), width=256, height=192" in lines[drawn]
        assert "safety_checker=None, requires_safety_checker=False, dtype=dtype)" in code
        assert "    pipeline.enable_model_cpu_offload()" in lines
    assert "T5EncoderModel.from_pretrained('some/base', subfolder='text_encoder', dtype=dtype)" in pipeline
    assert "pipeline.scheduler = DDPMScheduler.from_pretrained('some/dog', subfolder='scheduler')" in adapter
    assert "scheduler" not in lora_snippet("some/dog", "a dog", "some/base", None)


@pytest.mark.parametrize(
    "code",
    [
        pipeline_snippet("some/dog", "a dog", None),
        pipeline_snippet("some/dog", "a dog", "some/base"),
        pipeline_snippet("some/dog", "a dog", "some/base", encoder_class="T5EncoderModel", **SIZES),
        pipeline_snippet("some/dog", "a dog", None, max_length=20, is_masked=True, size=Size(64, 48)),
        lora_snippet("some/dog", "a dog", "some/base", "v1"),
        lora_snippet("some/dog", "a dog", "some/base", "v1", max_length=20, is_masked=True),
        lora_snippet("some/dog", "a dog", "some/base", None, has_scheduler=True, **SIZES),
    ],
)
def test_the_snippets_use_only_what_they_import(code):
    """Every name is defined before it is used, and every import exists."""
    known = set(dir(builtins))
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([statement], []), "snippet", "exec"), {})
            known |= {alias.asname or alias.name for alias in statement.names}
            continue
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        assert {node.id for node in names if isinstance(node.ctx, ast.Load)} <= known
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    assert "image.save(" in code


def test_the_snippet_stands_in_the_card_as_code(card):
    """What the card shows between its fences is the snippet."""
    code = lora_snippet("some/dog", "a dog", "some/base", None)
    markdown = split(render(dataclasses.replace(card, snippet=code), {}))[1]
    assert re.search(r"^```python\n(.*?)\n```$", markdown, re.DOTALL | re.MULTILINE)[1] == code


def test_the_templates_decide_the_words(card, tmp_path, monkeypatch):
    """Who edits them needs no Python; the header stays."""
    monkeypatch.setattr(model_card, "TEMPLATES", tmp_path)
    (tmp_path / "model_card.md").write_text("---\n{{ card_data }}\n---\nMein {{ title }}, {{ settings['steps'] }}.\n")
    (tmp_path / "snippet.md").write_text("load({{ repr(result) }})\n")
    header, markdown = split(render(card, {"license": "mit"}))
    assert markdown == "Mein somebody/dog, 500.\n" and header["license"] == "mit"
    assert render_snippet(Snippet("some/dog", "a dog")) == "load('some/dog')"


def recognised(script, **changes):
    """Return what a script makes of a Stable Diffusion model's configs, without any."""
    fields = {field.name: None for field in dataclasses.fields(script.ModelInfo)} | {
        "kind": script.ModelKind.STABLE_DIFFUSION,
        "index": {"text_encoder": ["transformers", "CLIPTextModel"]},
        "learns_variance": False,
        "resolution": Size(64, 64),
    }
    return script.ModelInfo(**fields | changes)


# ------------------------------------------------------------------------------------------------------ card of a run


def write_run(
    script, out: Path, *flags: str, repository: str | None = None, settings: dict | None = None, **changes
) -> tuple[dict, str, str]:
    """Write the card of a run of 500 steps; return its header, its Markdown and its snippet."""
    (out.parent / "photos").mkdir(exist_ok=True)
    needed = ["--pretrained_model_name_or_path", "some/base", "--instance_data_dir", str(out.parent / "photos")]
    args = script.parse_args([*needed, "--instance_prompt", "a photo of sks dog", "--output_dir", str(out), *flags])
    (concept,) = read_concepts(vars(args))
    photo = script.Example(Path("dog.jpg"), ("a dog on the beach", "a dog"), concept, Size(64, 64))
    plan = dict.fromkeys(field.name for field in dataclasses.fields(script.Plan))
    plan |= {"base": recognised(script), "examples": [photo], "first_step": 0, "steps": 500, "output_dir": out}
    out.mkdir(exist_ok=True)
    write_card(vars(args), script.Plan(**plan | changes), script.METHOD_TAGS, settings or {"steps": "500"}, repository)
    header, markdown = split((out / "README.md").read_text(encoding="utf-8"))
    return header, markdown, re.search(r"^```python\n(.*?)\n```$", markdown, re.DOTALL | re.MULTILINE)[1]


@pytest.fixture(params=[train_dreambooth, train_dreambooth_lora], ids=lambda module: module.__name__)
def script(request):
    """Run a test with each script."""
    return request.param


def test_a_card_shows_the_grid_only_if_it_was_drawn(script, tmp_path):
    """A written card has the base model's licence, and no picture that is not beside it."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (out / "samples" / "step-000500").mkdir(parents=True)
    flags = ["--pretrained_model_name_or_path", str(base), "--validation_prompt", "a dog"]
    for drawn in (False, True):
        header, markdown, _ = write_run(script, out, *flags)
        assert header["license"] == "mit" and ("widget" in header) == ("![samples]" in markdown) == drawn
        (out / "samples" / "step-000500" / "grid.png").touch()
    for steps in ({"steps": 400}, {"first_step": 600}):
        assert "![" not in write_run(script, out, *flags, **steps)[1]


def test_a_card_says_what_the_run_was(script, tmp_path):
    """Title, tags, base model, settings, and the instance prompt or, without one, the first photo's first caption."""
    header, markdown, snippet = write_run(script, tmp_path / "my-dog")
    lora, own = script is train_dreambooth_lora, ["--caption_strategy", "textfile", "--instance_prompt="]
    family = recognised(script, kind=script.ModelKind.IF_STAGE_1)
    tags = ["text-to-image", "diffusers", "diffusers-training", "dreambooth", "stable-diffusion", *["lora"] * lora]
    assert (header["tags"], header["base_model"]) == (tags, "some/base")
    assert header["instance_prompt"] == "a photo of sks dog" and table_rows(markdown) == [[" steps ", " 500 "]]
    assert "# my-dog\n" in markdown and str(tmp_path / "my-dog") in strings_in(snippet)
    header, markdown, snippet = write_run(script, tmp_path / "my-dog", *own, repository="me/dog", base=family)
    assert header["instance_prompt"] == "a dog on the beach" and "deepfloyd-if" in header["tags"]
    assert "# me/dog\n" in markdown and {"me/dog", "a dog on the beach"} <= set(strings_in(snippet))


def test_a_card_tells_no_news_of_the_run(script, tmp_path):
    """Whether a value was the default, and how many steps were done at the start, is for the screen."""
    said = {"steps": "500, 50 an epoch; 0 are done", "resolution": "64 px, the default for this model", "loss": "mse"}
    rows = table_rows(write_run(script, tmp_path / "out", settings=said)[1])
    assert rows == [[" steps ", " 500 "], [" resolution ", " 64 px "], [" loss ", " mse "]]


SAME_BASE = [
    (train_dreambooth, ["--skip_save_text_encoder"]),
    (train_dreambooth_lora, []),
]


@pytest.mark.parametrize(("script", "flags"), SAME_BASE)
def test_the_snippet_loads_the_base_model_as_the_run_did(script, flags, tmp_path):
    """What the base model lends comes from the same revision and from the files of the same variant."""
    assert "some/base" in strings_in(write_run(script, tmp_path / "out", *flags)[2])
    for flag, value in (("revision", "v1"), ("variant", "fp16")):
        code = write_run(script, tmp_path / "out", *flags, f"--{flag}", value)[2]
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        given = [ast.unparse(call) for call in calls if "'some/base'" in map(ast.unparse, call.args)]
        assert len(given) == 1 and f"{flag}={value!r}" in given[0]


def test_the_snippet_draws_the_validation_prompt_if_there_is_one(script, tmp_path):
    """Otherwise it draws the instance prompt."""
    for flags, prompt in (([], "a photo of sks dog"), (["--validation_prompt", "sks on Mars"], "sks on Mars")):
        code = write_run(script, tmp_path / "out", *flags)[2]
        assert prompt in strings_in(code) and "small.png" not in code and "scheduler" not in code


def test_a_card_names_every_subject(script, tmp_path):
    """By the prompt of its photos, each once; class images are none."""
    (tmp_path / "photos").mkdir()
    args = script.make_parser().parse_args(["--instance_data_dir", "photos", "--instance_prompt", "a sks dog"])
    (dog,) = read_concepts(vars(args))
    cat = dog._replace(instance_prompt=None, number=2)
    places = [(Path(str(number)), Size(64, 64)) for number in range(4)]
    photos = [
        script.Example(places[0][0], ("a sks dog",), dog, places[0][1]),
        script.Example(places[1][0], ("a zwx cat asleep", "a zwx cat"), cat, places[1][1]),
        script.Example(places[2][0], ("a sks dog",), dog, places[2][1]),
        script.Example(places[3][0], ("a dog",), dog, places[3][1], is_prior=True),
    ]
    header, markdown, _ = write_run(script, tmp_path / "out", examples=photos)
    assert header["instance_prompt"] == "a sks dog"
    assert "on photos of 2 subjects.\nName them in prompts as in training: `a sks dog`, `a zwx cat asleep`" in markdown
