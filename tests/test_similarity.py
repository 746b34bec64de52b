"""The paper's measures against hand computations, with CLIP, DINO and DINOv2 of random weights at a tiny size."""

import itertools
import json
import logging
import math
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from tests.conftest import draw_picture
from utils.core.errors import UserError
from utils.evaluation import encoders, similarity
from utils.evaluation.encoders import embed_pictures, embed_texts
from utils.evaluation.prompt_files import read_prompts
from utils.evaluation.similarity import estimate_diversity
from utils.evaluation.standard_errors import Estimate
from utils.synthetic.small_tokenizers import build_tokenizer

DATA_SET = Path(__file__).parents[2] / "shared" / "data" / "dreambooth" / "prompts_and_classes.txt"
EDGE = 32
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SHAPE | {"image_size": EDGE, "patch_size": 8}
COMMON = {"do_normalize": True, "do_resize": True}
CLIP_FILE = COMMON | {  # the keys and kinds of values that the published files have
    "feature_extractor_type": "CLIPFeatureExtractor",
    "do_center_crop": True,
    "crop_size": EDGE,
    "size": EDGE,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
VIT_FILE = COMMON | IMAGENET | {"feature_extractor_type": "ViTFeatureExtractor", "size": EDGE, "resample": 2}
DINOV2_FILE = (
    COMMON
    | IMAGENET
    | {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": EDGE, "width": EDGE},
        "do_rescale": True,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 40},
        "resample": 3,
    }
)
NAMES = ["clip", "vit", "dinov2"]
PROMPTS = ["a dog in the snow", "dog", "a red cat on the beach, at night"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Write a model of each kind."""
    return write_encoders(tmp_path_factory.mktemp("encoders"))


def write_encoders(home: Path) -> dict[str, Path]:
    """Write a model of each kind, whose weights are large enough that different pictures are not alike."""
    tokenizer = build_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": 77} | ids
    torch.manual_seed(0)
    models = {
        "clip": CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)),
        "vit": ViTModel(ViTConfig(**VISION), add_pooling_layer=False),
        "dinov2": Dinov2Model(Dinov2Config(**VISION)),
    }
    for (name, model), file in zip(models.items(), (CLIP_FILE, VIT_FILE, DINOV2_FILE), strict=True):
        for weights in model.parameters():
            if weights.ndim > 1:
                torch.nn.init.normal_(weights, std=0.5)
        model.save_pretrained(home / name)
        (home / name / "preprocessor_config.json").write_text(json.dumps(file))
    tokenizer.save_pretrained(home / "clip")
    return {name: home / name for name in NAMES}


@pytest.fixture(scope="module")
def loaded(folders) -> dict[str, encoders.Encoder]:
    """Load each model."""
    loaders = (encoders.load_clip, encoders.load_dino, encoders.load_dino)
    return {name: load(folders[name]) for name, load in zip(NAMES, loaders, strict=True)}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Draw pictures of all shapes, the first two wider and higher than they are high and wide."""
    sizes = [(83, 50), (41, 90), (64, 64), (32, 32), (20, 31), (70, 55), (48, 48), (90, 33), (36, 60)]
    return [draw_picture(*size, number) for number, size in enumerate(sizes)]


@pytest.fixture
def damaged(folders, tmp_path) -> dict[str, Path]:
    """Copy the models, to be damaged by a test."""
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}


def prepare(picture: Image.Image, name: str) -> torch.Tensor:
    """Resize, crop and normalise a picture by Pillow and numpy as a model's file says, (1, 3, H, W)."""
    width, height = picture.size
    if name == "vit":
        picture = picture.resize((EDGE, EDGE), Image.Resampling.BILINEAR)
    else:
        edge = EDGE if name == "clip" else 40
        size = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
        left, top = (size[0] - EDGE) // 2, (size[1] - EDGE) // 2
        resized = picture.resize(size, Image.Resampling.BICUBIC)
        picture = resized.crop((left, top, left + EDGE, top + EDGE))
    file = CLIP_FILE if name == "clip" else IMAGENET
    pixels = (np.asarray(picture) / 255 - file["image_mean"]) / file["image_std"]
    return torch.from_numpy(pixels).float().permute(2, 0, 1)[None]


def raw_picture(folder: Path, name: str, picture: Image.Image) -> torch.Tensor:
    """Embed a picture by the layers of a model, unnormalised, (D,)."""
    kind = {"clip": CLIPModel, "vit": ViTModel, "dinov2": Dinov2Model}[name]
    model = kind.from_pretrained(folder, **({"add_pooling_layer": False} if name == "vit" else {})).eval()
    with torch.no_grad():
        if name != "clip":
            return model(prepare(picture, name)).last_hidden_state[0, 0]
        hidden = model.vision_model(prepare(picture, name)).last_hidden_state[0, 0]
        return model.visual_projection.weight @ model.vision_model.post_layernorm(hidden)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the cosine of the angle between two vectors of any length."""
    one, other = one.double(), other.double()
    return (one @ other / math.sqrt(one @ one) / math.sqrt(other @ other)).item()


# Embeddings.


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_prepared_as_the_models_file_says(loaded, pictures, name):
    """Edges, filter, crop, mean and deviation are the file's, for wide and high pictures."""
    for picture in pictures[:2]:
        pixels = loaded[name].processor([picture], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, EDGE, EDGE) and pixels.dtype == torch.float32
        assert torch.allclose(pixels, prepare(picture, name), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_pictures_embedding_is_the_raw_models(loaded, folders, pictures, name):
    """CLIP's is the projected class token, DINO's the class token, both of length 1; pictures are told apart."""
    found = embed_pictures(loaded[name], pictures[:2])
    expected = torch.stack([raw_picture(folders[name], name, picture) for picture in pictures[:2]])
    assert found.dtype == torch.float32 and found.shape == (2, 12 if name == "clip" else 16)
    assert torch.allclose(found, expected / expected.norm(dim=-1, keepdim=True), atol=1e-5)
    assert cosine(*found) < 0.95 and expected.norm(dim=-1).min() > 1.1


def test_a_texts_embedding_is_the_raw_models(loaded, folders):
    """It is the projected end token, whatever else is in the batch."""
    model, tokenizer = CLIPModel.from_pretrained(folders["clip"]).eval(), build_tokenizer()
    found = embed_texts(loaded["clip"], PROMPTS)
    for prompt, row in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            expected = model.text_projection.weight @ model.text_model(ids).last_hidden_state[0, -1]
        assert torch.allclose(row, expected / expected.norm(), atol=1e-5) and expected.norm() > 1.1
    assert found.dtype == torch.float32 and cosine(found[0], found[1]) < 0.95


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_size_changes_nothing(loaded, pictures, name):
    """Pictures, and texts of unequal length, come out in their order."""
    whole = embed_pictures(loaded[name], pictures)
    for size in (1, 2, 4):
        assert torch.allclose(embed_pictures(loaded[name], pictures, size), whole, atol=1e-5)
        if name == "clip":
            assert torch.allclose(
                embed_texts(loaded[name], PROMPTS, size), embed_texts(loaded[name], PROMPTS), atol=1e-5
            )


def test_grey_pictures_are_embedded_too(loaded, pictures):
    """A picture of one channel counts as one whose three are equal."""
    grey = pictures[0].convert("L")
    found = embed_pictures(loaded["vit"], [grey, grey.convert("RGB")])
    assert torch.equal(found[0], found[1])


def test_long_prompts_are_cut_with_one_warning(loaded, caplog):
    """The model sees 77 tokens: start, 75 words, end."""
    cut = embed_texts(loaded["clip"], ["dog " * 75])
    assert not caplog.records and not torch.allclose(embed_texts(loaded["clip"], ["dog " * 74]), cut, atol=1e-4)
    found = embed_texts(loaded["clip"], ["cat", "dog " * 75 + "red", "dog " * 200], batch_size=1)
    assert torch.allclose(found[1:], cut, atol=1e-5) and len(caplog.records) == 1
    assert f"{loaded['clip'].name} reads only the first 77 tokens of 2 of 3 prompts, as of 'dog" in caplog.text
    assert caplog.text.rstrip().endswith("dog red'.")


# Loading.


def test_loading_is_quiet_and_gives_frozen_networks_in_float32(damaged, caplog):
    """Weights in half precision are calculated with in full, without training's randomness or gradients."""
    CLIPModel.from_pretrained(damaged["clip"]).half().save_pretrained(damaged["clip"])
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, "transformers"):
            found = [encoders.load_clip(damaged["clip"]), encoders.load_dino(damaged["vit"], "cpu")]
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    for encoder in found:
        assert {weights.dtype for weights in encoder.network.parameters()} == {torch.float32}
        assert not encoder.network.training and encoder.processor.backend == "pil"
        assert not any(weights.requires_grad for weights in encoder.network.parameters())


def test_a_model_of_another_kind_is_an_error(folders, tmp_path):
    """Transformers would load it, with random weights and a warning."""
    with pytest.raises(UserError, match=r"vit is a model of type vit, but clip is needed here. Name a CLIP, such as"):
        encoders.load_clip(folders["vit"])
    with pytest.raises(UserError, match=r"clip is a model of type clip, but vit or dinov2 is needed .* DINO, such"):
        encoders.load_dino(folders["clip"])
    with pytest.raises(UserError, match=r"no/such is no folder here, and the Hub gave no such model with a readable"):
        encoders.load_dino("no/such")
    with pytest.raises(UserError, match=r"is a folder without a readable config.json"):
        encoders.load_clip(tmp_path)


def test_a_lacking_weight_is_an_error(damaged):
    """It would be drawn at random."""
    path = damaged["vit"] / "model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["layernorm.weight"], state["embeddings.cls_token"]
    safetensors.torch.save_file(state, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"vit lacks weights of embeddings.cls_token and 1 more. Download"):
        encoders.load_dino(damaged["vit"])


def test_a_lacking_tokenizer_is_an_error(damaged):
    """Transformers makes one that knows no words."""
    for path in damaged["clip"].glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"The tokenizer of .*clip knows no words: it lacks its files"):
        encoders.load_clip(damaged["clip"])


def test_a_broken_or_lacking_file_is_an_error(damaged):
    """Weights that are cut off, and a picture's preparation that nobody describes."""
    (damaged["vit"] / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"The model of .*vit cannot be loaded: .*header"):
        encoders.load_dino(damaged["vit"])
    (damaged["dinov2"] / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"The model of .*dinov2 cannot be loaded: .*preprocessor_config.json"):
        encoders.load_dino(damaged["dinov2"])


# Measures.


def test_measures_are_means_of_cosines_and_vary_by_seed(loaded, folders, pictures):
    """Each number equals a loop over raw embeddings; the error is that of the seeds' means over prompts."""
    photos, drawn = pictures[6:], [(prompt, pictures[2 * i : 2 * i + 2]) for i, prompt in enumerate(PROMPTS)]
    found = similarity.measure(loaded["clip"], loaded["vit"], photos, drawn, batch_size=4)
    assert list(found) == ["CLIP-I", "CLIP-T", "DINO"]
    for name, kind in (("CLIP-I", "clip"), ("DINO", "vit"), ("CLIP-T", "clip")):
        raw = {id(picture): raw_picture(folders[kind], kind, picture) for picture in pictures}
        per_seed = []
        for seed in range(2):
            values = []
            for prompt, group in drawn:
                text = embed_texts(loaded["clip"], [prompt])[0]
                others = [text] if name == "CLIP-T" else [raw[id(photo)] for photo in photos]
                values += [statistics.mean(cosine(raw[id(group[seed])], other) for other in others)]
            per_seed.append(statistics.mean(values))
        assert found[name].value == pytest.approx(statistics.mean(per_seed), abs=1e-5)
        assert found[name].error == pytest.approx(statistics.stdev(per_seed) / math.sqrt(2), abs=1e-5)
        assert found[name].error > 1e-3


def test_class_pictures_are_compared_with_the_photos_and_with_each_other(loaded, folders, pictures):
    """PRES is a mean of cosines with photos, DIV-DINO is 1 - that of all pairs; neither by CLIP."""
    photos, of_class = pictures[:3], pictures[3:7]
    found = similarity.measure(loaded["clip"], loaded["dinov2"], photos, [("dog", photos)], of_class)
    raw = [raw_picture(folders["dinov2"], "dinov2", picture) for picture in pictures]
    each = [statistics.mean(cosine(one, photo) for photo in raw[:3]) for one in raw[3:7]]
    assert list(found) == ["CLIP-I", "CLIP-T", "DINO", "PRES", "DIV-DINO"]
    assert found["PRES"].value == pytest.approx(statistics.mean(each), abs=1e-5)
    assert found["PRES"].error == pytest.approx(statistics.stdev(each) / 2, abs=1e-5)
    pairs = statistics.mean(cosine(*pair) for pair in itertools.combinations(raw[3:7], 2))
    assert found["DIV-DINO"].value == pytest.approx(1 - pairs, abs=1e-5)


def test_the_photo_itself_is_as_like_as_can_be(loaded, pictures):
    """Copies of the only photo give 1, and no diversity; one seed gives no error."""
    photo = pictures[:1]
    drawn = [(prompt, photo) for prompt in PROMPTS]
    found = similarity.measure(loaded["clip"], loaded["vit"], photo, drawn, photo * 3)
    for name in ("CLIP-I", "DINO", "PRES"):
        assert found[name].value == pytest.approx(1, abs=1e-5)
    assert found["DIV-DINO"].value == pytest.approx(0, abs=1e-5) and abs(found["CLIP-T"].value) < 0.95
    assert [found[name].error for name in ("CLIP-I", "CLIP-T", "DINO")] == [None] * 3


def test_the_error_of_diversity_is_the_jackknifes():
    """Each picture is left out once and all pairs of the others are counted again."""
    vectors = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    without = [
        1 - statistics.mean(cosine(*pair) for pair in itertools.combinations([*vectors[:i], *vectors[i + 1 :]], 2))
        for i in range(5)
    ]
    squares = sum((value - statistics.mean(without)) ** 2 for value in without)
    found = estimate_diversity(vectors)
    assert found.error == pytest.approx(math.sqrt(4 / 5 * squares), abs=1e-6) and squares > 1e-3
    assert estimate_diversity(torch.eye(2)) == Estimate(1, None)


def test_what_cannot_be_measured_is_an_error(loaded, pictures):
    """Without photos, pictures or a picture of every seed there are no numbers."""
    clip, dino, one = loaded["clip"], loaded["vit"], pictures[:1]
    cases = [
        ([], [("a", one)], (), "There are no photos of the subject"),
        (one, [], (), "There are no drawn pictures to measure"),
        (one, [("a", [])], (), "There are no drawn pictures to measure"),
        (one, [("a", one), ("b", one * 2)], (), "The prompt 'b' has 2 pictures, 'a' has 1: .* Draw those"),
        (one, [("a", one)], one, "One class picture has no diversity"),
    ]
    for photos, drawn, of_class, message in cases:
        with pytest.raises(UserError, match=message):
            similarity.measure(clip, dino, photos, drawn, of_class)
    with pytest.raises(UserError, match=r"vit reads no text: prompts are compared with pictures by a CLIP"):
        similarity.measure(dino, clip, one, [("a", one)])


# Prompts.

HEAD = "Classes\n\nsubject_name,class\ncan,can\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n"
ENTRY = "'a {0} {1} at home'.format(unique_token, class_token)"


def test_the_data_sets_format_is_read(tmp_path):
    """Both lists, in their order, with one place for identifier and class; what is around them does not count."""
    second = '"a cat\'s {0} {1}".format(unique_token, class_token)'
    path = tmp_path / "prompts.txt"
    path.write_text(f"{HEAD}{ENTRY},\n{second}\n]\n\nLive Subject Prompts\n\nprompt_list = [\n\n  {ENTRY}\n]")
    assert read_prompts(path) == {"object": ["a {} at home", "a cat's {}"], "live subject": ["a {} at home"]}


def test_a_plain_list_is_read(tmp_path):
    """A prompt on each line, whatever editor wrote it."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa {} at home\r\n\r\n  ein {} im Café \r\n".encode())
    assert read_prompts(str(path)) == {"prompts": ["a {} at home", "ein {} im Café"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {}\n\na dog\n", r"line 3: 'a dog' needs one \{\} for the subject and no other braces"),
        ("a {} and a {}", r"line 1: 'a \{\} and a \{\}' needs one \{\}"),
        ("a {} {0}", r"line 1: 'a \{\} \{0\}' needs one \{\}"),
        (" \n\n", r"prompts.txt has no prompts: write one"),
        (f"{HEAD}]\n", r"prompts.txt has no prompts for object: write one"),
        (
            f"{HEAD}{ENTRY},\n'a {{1}} {{0}}'.format(unique_token, class_token)\n]",
            r"line 12: 'a \{1\} \{0\}' needs one",
        ),
        (f"{HEAD}{ENTRY},\na {{}}\n]", r"line 12: 'a \{\}' is not 'a \{0\} \{1\} .*\]. Download the file again"),
        (f"{HEAD}{ENTRY},\n", r"prompts.txt ends at line 11 within a list: \] is missing. Download"),
        (b"a {} in a caf\xe9", r"prompts.txt cannot be read as text in UTF-8: .*0xe9"),
        (None, r"The prompts .*prompts.txt cannot be read as text in UTF-8: .*No such file"),
    ],
)
def test_a_line_that_is_no_prompt_is_an_error(tmp_path, text, message):
    """The message names the line."""
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_prompts(path)


@pytest.mark.skipif(not DATA_SET.is_file(), reason="the paper's data set is not here")
def test_the_papers_own_prompts_are_read():
    """There are 25 for objects and 25 for live subjects, and the last five are the same."""
    found = read_prompts(DATA_SET)
    assert {name: len(set(prompts)) for name, prompts in found.items()} == {"object": 25, "live subject": 25}
    assert found["object"][0].format("dog") == "a dog in the jungle"
    assert found["object"][20:] == found["live subject"][20:] and found["object"][10] != found["live subject"][10]
