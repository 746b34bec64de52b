"""The masks that are drawn for photos: where they lie, what they cover, and what is left alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.conftest import ORIENTATION
from tests.runs import ROOT, environment, names
from utils import make_masks
from utils.core.errors import UserError
from utils.data import make_mask
from utils.models import segmentation
from utils.synthetic.small_tokenizers import build_tokenizer

DATA = ROOT.parent / "shared" / "data" / "dreambooth"
HARD = ("--padding", "0", "--feather", "0")
# What is surely the subject's, in fractions of the photo's width and height: face, chest, lid, belly.
REAL = {
    "cat/00.jpg": [(0.2, 0.4), (0.25, 0.6), (0.5, 0.65)],
    "dog/00.jpg": [(0.53, 0.45), (0.4, 0.85)],
    "teapot/04.jpg": [(0.42, 0.4), (0.45, 0.55)],
}


def draw_photo(size: tuple[int, int] = (400, 300), middle: tuple[float, float] = (0.5, 0.55)):
    """Return a photo of an orange egg on a meadow, and where the egg is, (H, W) bool."""
    width, height = size
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    is_egg = ((y / height - middle[1]) / 0.3) ** 2 + ((x / width - middle[0]) / 0.2) ** 2 < 1
    colours = np.where(is_egg[..., None], (220, 130, 40), (60, 110, 50)) + rng.normal(0, 12, (height, width, 1))
    return Image.fromarray(np.uint8(np.clip(colours + 20 * np.sin(x / 30)[..., None], 0, 255))), is_egg


def draw_plain() -> Image.Image:
    """Return a photo without any subject."""
    return Image.new("RGB", (90, 70), (90, 120, 150))


def overlap(mask: Path, is_subject: np.ndarray) -> float:
    """Return the intersection of a mask with the subject over their union."""
    found = np.asarray(Image.open(mask)) > 127
    return (found & is_subject).sum() / (found | is_subject).sum()


def refusal(*words) -> str:
    """Return the message of a command that is refused."""
    with pytest.raises(UserError) as error:
        make_masks.main([str(word) for word in words])
    return str(error.value)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Write two photos, one of them in a folder below."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    draw_photo()[0].save(tmp_path / "photos" / "egg.png")
    draw_photo((200, 260))[0].save(tmp_path / "photos" / "more" / "tall.jpg", quality=95)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Path:
    """Write a tiny random CLIPSeg model."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "clipseg", build_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": 0}
    config = CLIPSegConfig(
        text_config=sizes | ids,
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
        extract_layers=[0, 1],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    torch.manual_seed(0)
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ViTImageProcessorPil(size={"height": 48, "width": 48}, image_mean=mean, image_std=std).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("middle", [(0.5, 0.55), (0.3, 0.5)])
def test_a_known_subject_is_found(tmp_path, middle):
    """The mask is the subject, nearly to the pixel, in the middle of the photo or beside it."""
    photo, is_egg = draw_photo(middle=middle)
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "egg.png")
    assert make_masks.main([str(tmp_path / "photos"), str(tmp_path / "masks"), *HARD]) == 0
    assert overlap(tmp_path / "masks" / "egg.png", is_egg) > 0.95


def test_masks_lie_like_their_photos_and_a_second_run_keeps_them(photos, tmp_path, capsys):
    """Names, sizes and modes are right; --overwrite draws the same again, without it what is there stays."""
    masks = tmp_path / "masks"
    command = [sys.executable, "-m", "utils.make_masks", str(photos), str(masks)]
    variables = environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [f"Masks in {masks}: 2 written, 0 kept.", f"Sheet: {tmp_path / 'masks-sheet.png'}"],
    ), done.stderr
    assert (names(masks), names(masks / "more")) == (["egg.png", "more"], ["tall.png"])
    drawn = {path: path.read_bytes() for path in (masks / "egg.png", masks / "more" / "tall.png")}
    assert [(image.mode, image.size) for image in map(Image.open, drawn)] == [("L", (400, 300)), ("L", (200, 260))]
    assert len(np.unique(np.asarray(Image.open(masks / "egg.png")))) > 5  # soft, unless told
    assert Image.open(tmp_path / "masks-sheet.png").width > 2 * make_masks.CELL_EDGE
    Image.new("L", (400, 300), 9).save(masks / "egg.png")
    (masks / "more" / "tall.png").unlink()
    assert make_masks.main([*command[3:], "--sheet", str(tmp_path / "sheets" / "one.png")]) == 0
    assert f"{masks}: 1 written, 1 kept." in capsys.readouterr().out
    assert Image.open(masks / "egg.png").getextrema() == (9, 9) and (tmp_path / "sheets" / "one.png").exists()
    assert make_masks.main([*command[3:], "--overwrite"]) == 0
    assert f"{masks}: 2 written, 0 kept." in capsys.readouterr().out
    assert {path: path.read_bytes() for path in drawn} == drawn


def test_a_turned_photo_has_an_upright_mask(tmp_path):
    """EXIF data turns the photo before the mask is drawn."""
    photo, is_egg = draw_photo(middle=(0.4, 0.5))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees clockwise
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "egg.jpg", exif=exif, quality=95)
    assert make_masks.main([str(tmp_path / "photos"), str(tmp_path / "masks"), *HARD]) == 0
    assert Image.open(tmp_path / "masks" / "egg.png").size == (300, 400)
    assert (
        overlap(tmp_path / "masks" / "egg.png", np.rot90(is_egg, -1)) > 0.75
    )  # JPEG blurs the colours of the edge; mirrored, it is 0.3


def test_padding_grows_and_feather_softens():
    """Both are fractions of the shorter edge; without them a mask is black and white."""
    photo, is_egg = draw_photo()
    edges = {"hard": (0, 0), "padded": (0.1, 0), "soft": (0.1, 0.2)}
    drawn = {name: make_mask.draw_mask(photo, lambda _: is_egg, *both) for name, both in edges.items()}
    drawn = {name: np.asarray(mask).astype(int) for name, mask in drawn.items()}
    assert set(np.unique(drawn["hard"])) == set(np.unique(drawn["padded"])) == {0, 255}
    assert len(np.unique(drawn["soft"])) > 50
    top = {name: int((mask[:165, 200] > 0).sum()) for name, mask in drawn.items()}  # 165: the egg's middle
    assert top["hard"] == pytest.approx(90, abs=2)
    assert (top["padded"], top["soft"]) == pytest.approx((top["hard"] + 30, 165), abs=2)
    side = {name: int((mask[165] > 0).sum()) for name, mask in drawn.items()}
    assert (side["padded"], side["soft"]) == pytest.approx((side["hard"] + 60, side["hard"] + 180), abs=3)
    assert (drawn["hard"] <= drawn["padded"]).all() and (drawn["padded"] <= drawn["soft"]).all()


def test_the_edge_falls_off_as_told():
    """One white pixel, by hand: 255 up to the padding, a straight line over the feather, 0 beyond."""
    is_subject = np.arange(12)[None] == 0
    assert make_mask.soften(is_subject, 2, 0)[0].tolist() == [255] * 3 + [0] * 9
    assert make_mask.soften(is_subject, 2, 5)[0].tolist() == [255] * 3 + [204, 153, 102, 51] + [0] * 5


def test_specks_go_and_holes_are_filled():
    """Of what was found, the main part stays, whole."""
    found = np.zeros((100, 100), bool)
    found[30:70, 30:70] = True
    wanted = found.copy()
    found[45:55, 45:55] = False
    found[5:8, 5:8] = found[90, 10:90] = True
    cleaned = make_mask.clean(found)
    assert (cleaned & wanted).sum() / (cleaned | wanted).sum() > 0.98
    assert not make_mask.clean(np.zeros((40, 40), bool)).any()


def test_photos_without_a_subject_get_no_mask_and_are_listed(photos, tmp_path, capsys):
    """Nothing is made up; with --overwrite an earlier mask stays, and that is said."""
    draw_plain().save(photos / "sky.png")
    masks = tmp_path / "masks"
    assert make_masks.main([str(photos), str(masks)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["No subject was found in 1 of 3 photos, and no mask was written for:", "  sky.png"]
    assert not (masks / "sky.png").exists() and f"Masks in {masks}: 2 written, 0 kept." in lines
    draw_plain().convert("L").save(masks / "sky.png")
    assert make_masks.main([str(photos), str(masks), "--overwrite"]) == 0
    assert "  sky.png (its earlier mask stays)" in capsys.readouterr().out.splitlines()
    assert Image.open(masks / "sky.png").size == (90, 70)


def test_masks_that_are_probably_wrong_are_named(photos, tmp_path, capsys):
    """Of a subject often only a part is found, such as an ear: a mask of next to nothing, or of nearly all."""
    masks = tmp_path / "masks"
    assert make_masks.main([str(photos), str(masks)]) == 0
    assert "Look at these first" not in capsys.readouterr().out
    mask = Image.new("L", (400, 300))
    mask.paste(255, (0, 0, 100, 48))  # a 25th
    mask.save(masks / "egg.png")
    Image.new("L", (200, 260), 255).save(masks / "more" / "tall.png")
    assert make_masks.main([str(photos), str(masks)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Look at these first, whose masks cover less than 5% or more than 80%")
    assert lines[1:3] == ["  egg.png (4.0%)", "  more/tall.jpg (100.0%)"]


def test_a_mask_unlike_the_others_is_named(tmp_path, capsys):
    """Half or twice the median is the limit; of two masks nobody knows which one is wrong."""
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    masks.mkdir()
    for name, rows in (("a", 20), ("b", 20), ("c", 20), ("twice", 40), ("more", 41), ("half", 10), ("less", 9)):
        draw_plain().resize((10, 100)).save(photos / f"{name}.png")
        mask = Image.new("L", (10, 100))
        mask.paste(255, (0, 0, 10, rows))
        mask.save(masks / f"{name}.png")
    assert make_masks.main([str(photos), str(masks)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("80%, or less than half or more than twice as much as the median of 20.0%:")
    assert lines[:2] == ["  less.png (9.0%)", "  more.png (41.0%)"] and "Masks in" in lines[2]
    for name in ("b", "c", "twice", "half", "less"):
        (photos / f"{name}.png").unlink()
    assert make_masks.main([str(photos), str(masks)]) == 0
    assert "Look at these first" not in capsys.readouterr().out


STUB = """
from types import SimpleNamespace
from PIL import Image

def new_session(name):
    if name != "isnet-general-use":
        raise ValueError(f"No session class found for model '{name}'")
    return SimpleNamespace(name=name)

def remove(photo, session, only_mask):
    assert only_mask and session.name == "isnet-general-use"
    mask = Image.new("L", photo.size, 100)
    mask.paste(200, (0, 0, photo.width // 2, photo.height))
    return mask
"""


def test_rembg_finds_the_subject(photos, tmp_path, monkeypatch):
    """What is lighter than the middle in its answer is the mask; other names are refused with what to do."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "rembg.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "rembg", raising=False)
    assert make_masks.main([str(photos), str(tmp_path / "masks"), "--rembg", "isnet-general-use", *HARD]) == 0
    mask = np.asarray(Image.open(tmp_path / "masks" / "egg.png"))
    assert mask.shape == (300, 400) and (mask[:, :195] == 255).mean() > 0.99 and not mask[:, 205:].any()
    message = refusal(photos, tmp_path / "masks", "--rembg", "isnet")
    assert message.startswith("--rembg isnet cannot be opened: No session class found for model 'isnet'. Use a name")
    assert "download isnet.onnx elsewhere and set U2NET_HOME to its folder" in message
    monkeypatch.delitem(sys.modules, "rembg")


def test_rembg_is_asked_for_by_name(photos, tmp_path, monkeypatch):
    """Without the package there is one line that says what to install."""
    monkeypatch.setattr(segmentation, "is_installed", lambda name: False)
    with pytest.raises(ImportError, match=r'^--rembg needs .* pip install "rembg\[cpu\]"$'):
        make_masks.main([str(photos), str(tmp_path / "masks"), "--rembg", "isnet-general-use"])
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("size", [(3, 2), (2000, 21), (1, 60)])
def test_odd_sizes_are_no_obstacle(tmp_path, size):
    """A photo may be smaller or longer than what GrabCut likes."""
    (tmp_path / "photos").mkdir()
    Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "photos" / "odd.png")
    assert make_masks.main([str(tmp_path / "photos"), str(tmp_path / "masks")]) == 0
    assert all(Image.open(path).size == size for path in (tmp_path / "masks").glob("*.png"))


def test_what_cannot_be_is_refused_before_anything_is_written(photos, tmp_path):
    """Each message names the files; no mask and no sheet is there afterwards."""
    masks = tmp_path / "masks"
    before = names(tmp_path)
    assert f"OUT {photos} lies in IN" in refusal(photos, photos)
    assert "lies in IN" in refusal(photos, photos / "masks")
    assert f"IN {photos} lies in OUT {tmp_path}" in refusal(photos, tmp_path)
    assert "is a file" in refusal(photos, __file__)
    assert f"--sheet {photos / 'sheet.png'} lies in IN" in refusal(photos, masks, "--sheet", photos / "sheet.png")
    assert "would count as a mask" in refusal(photos, masks, "--sheet", masks / "sheet.png")
    assert f"--sheet {tmp_path} is a folder" in refusal(photos, masks, "--sheet", tmp_path)
    assert "cannot be listed: No such file or directory" in refusal(tmp_path / "none", masks)
    assert names(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(tmp_path / "empty", masks)
    draw_plain().save(photos / "egg.webp")
    draw_plain().save(photos / "more" / "tall.png")
    message = refusal(photos, masks)
    assert "  egg.png and egg.webp\n" in message and "  more/tall.jpg and more/tall.png\n" in message
    (photos / "egg.webp").write_bytes(b"no picture")
    (photos / "more" / "tall.png").write_bytes(b"")
    message = refusal(photos, masks)
    assert (
        "2 photos cannot be read" in message and "egg.webp: " in message and "tall.png: the file is empty" in message
    )
    assert not masks.exists() and not (tmp_path / "masks-sheet.png").exists()


def test_masks_in_other_formats_are_kept_but_not_overwritten(photos, tmp_path, capsys):
    """A photo has one mask, whatever its format; one that cannot be read is named."""
    masks = tmp_path / "masks"
    masks.mkdir()
    draw_photo()[0].save(masks / "egg.jpg")
    assert make_masks.main([str(photos), str(masks)]) == 0
    assert "1 written, 1 kept" in capsys.readouterr().out and not (masks / "egg.png").exists()
    assert f"  {masks / 'egg.jpg'}\nRemove them." in refusal(photos, masks, "--overwrite")
    draw_plain().save(masks / "egg.png")
    (masks / "bad.png").write_bytes(b"")
    message = refusal(photos, masks)
    assert "bad.png: the file is empty" in message and "egg.png: egg.jpg has the same name" in message


def test_the_sheet_shows_a_transparent_mask_as_training_reads_it(tmp_path):
    """Where it is opaque, the photo counts and is as it was; a cut-out of the subject is such a mask."""
    photo = Image.new("RGB", (80, 60), "orange")
    photo.save(tmp_path / "egg.png")
    cut_out = photo.convert("RGBA")
    cut_out.putalpha(0)
    cut_out.paste((0, 0, 0, 255), (0, 0, 40, 60))  # dark and opaque
    cut_out.save(tmp_path / "mask.png")
    job = make_masks.Job("egg.png", tmp_path / "egg.png", tmp_path / "mask.png", True)
    cell, label = make_masks.draw_cell(job, photo)
    assert cell.getpixel((10, 30)) == photo.getpixel((10, 30)) and label == "egg.png: 50%"
    assert cell.getpixel((70, 30)) == Image.blend(photo, Image.new("RGB", (80, 60), make_masks.TINT), 0.75).getpixel(
        (0, 0)
    )


def test_opencv_is_asked_for_by_name(photos, tmp_path):
    """Without the package there is one line that says what to install."""
    words = ["make_masks", str(photos), str(tmp_path / "masks")]
    code = f"import runpy, sys; sys.modules['cv2'] = None; sys.argv = {words}; "
    code += "runpy.run_module('utils.make_masks', run_name='__main__')"
    variables = environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: Masks are drawn with OpenCV")
    assert done.stderr.endswith("pip install opencv-python-headless\n") and not (tmp_path / "masks").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--padding -0.1", "--padding -0.1 is out of range: it must be in [0, 1)"),
        ("--feather 1", "--feather 1.0 is out of range"),
        ("--threshold nan", "--threshold nan is out of range"),
        ("--model x", "--model needs --prompt"),
        ("--prompt dog", "--prompt needs --model"),
        ("--rembg x --model y --prompt dog", "--rembg and --model are two ways to find the subject"),
    ],
)
def test_flags_are_checked(capsys, flags, message):
    """Ranges, and flags that need each other."""
    with pytest.raises(SystemExit, match="2"):
        make_masks.main(["photos", "masks", *flags.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("out", ["masks", "masks/", "../masks"])
def test_the_sheet_lies_beside_the_masks(out):
    """Its name is that of the folder, with -sheet.png."""
    assert make_masks.parse_args(["photos", out]).sheet == Path(f"{out.rstrip('/')}-sheet.png")
    here = Path.cwd()
    assert make_masks.parse_args(["photos", "."]).sheet == here.with_name(f"{here.name}-sheet.png")


def test_a_network_looks_for_what_the_prompt_says(segmenter, photos, tmp_path):
    """The mask is what the network is surer of than the threshold, at the photo's size; other words, another mask."""
    photo = Image.open(photos / "egg.png")
    loaded = segmentation.load_segmenter(str(segmenter), "a dog")
    pixels = segmentation.prepare_pixels(loaded, photo)
    wanted = ViTImageProcessorPil.from_pretrained(segmenter)(photo, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, wanted, atol=1e-5) and pixels.shape == (1, 3, 48, 48)
    with torch.no_grad():
        sure = loaded.network(**loaded.text, pixel_values=wanted).logits.sigmoid()[0]
    threshold = float(sure.quantile(0.6))
    found = segmentation.find_words(loaded, threshold, photo)
    assert np.array_equal(found, (sure > threshold).numpy()) and 0.3 < found.mean() < 0.5
    other = segmentation.load_segmenter(str(segmenter), "a teapot on the beach")
    assert not torch.equal(other.text["input_ids"], loaded.text["input_ids"])
    flags = ["--model", str(segmenter), "--prompt", "a dog", "--threshold", str(threshold), *HARD]
    assert make_masks.main([str(photos), str(tmp_path / "masks"), *flags]) == 0
    mask = Image.open(tmp_path / "masks" / "egg.png")
    assert (mask.mode, mask.size) == ("L", (400, 300))
    wanted = make_mask.draw_mask(photo, lambda _: found, 0, 0)
    assert np.array_equal(np.asarray(mask), np.asarray(wanted))


def test_other_models_are_refused(segmenter, tiny, photos, tmp_path):
    """A folder that is not there, another kind of model, and one that lacks its preprocessing: each has a message."""
    command = [photos, tmp_path / "masks", "--prompt", "dog", "--model"]
    assert f"--model {tmp_path / 'none'} is no folder" in refusal(*command, tmp_path / "none")
    assert "is a folder without a readable config.json" in refusal(*command, tiny)
    assert "is of type 'clip_text_model', not 'clipseg'" in refusal(*command, tiny / "text_encoder")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in segmenter.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(settings | {"size": {"shortest_edge": 48}}))
    assert "preprocessor_config.json lacks 'width'" in refusal(*command, copy)
    (copy / "preprocessor_config.json").write_text(json.dumps(settings | {"size": {"height": 48, "width": 56}}))
    assert "a size of 56x48, and CLIPSeg takes squares" in refusal(*command, copy)
    (copy / "preprocessor_config.json").unlink()
    assert "without a readable preprocessor_config.json" in refusal(*command, copy)
    assert not (tmp_path / "masks").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason="the photos of the DreamBooth paper are not here")
def test_real_subjects_are_covered(tmp_path):
    """What is surely the subject's is white, and the photo's upper corners are black."""
    for name in REAL:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).symlink_to(DATA / name)
    assert make_masks.main([str(tmp_path / "photos"), str(tmp_path / "masks")]) == 0
    for name, points in REAL.items():
        mask = Image.open((tmp_path / "masks" / name).with_suffix(".png"))
        white = [mask.getpixel((int(x * mask.width), int(y * mask.height))) for x, y in points]
        assert white == [255] * len(points), name
        assert mask.getpixel((0, 0)) == mask.getpixel((mask.width - 1, 0)) == 0, name
