"""What a resumed run must have in common with the checkpoint that it goes on from, entry by entry."""

import shutil
from pathlib import Path

import pytest

import train_dreambooth
import train_dreambooth_lora
from tests.conftest import draw_picture, make_concept
from tests.inside import BF16, planned
from tests.runs import PRIOR_FLAGS
from utils.core.errors import UserError
from utils.data.geometry import Size
from utils.make_model import make_model
from utils.run import resume_checks

COMMON = set(
    "script seed processes precision resolution photos captions sizes concepts revision instance_prompt class_prompt "
    "repeats prior_target tokenizer_name train_text_encoder optimizer use_8bit_adam weight_dtype train_batch_size "
    "gradient_accumulation_steps train_variance".split()
) | {"fed by", "base model", "content of the base model", "class images", "content of the pictures"}
OWN = {"full": {"trained weights"}, "lora": {"rank", "alpha", "layers", "base precision"}}
PRIOR = f"{PRIOR_FLAGS} --class_data_dir {{class_images}}"
IF2 = "--pretrained_model_name_or_path {if2} --resolution 16"
DIFFERENCES = {  # by entry: the flags of a run and of another one, and the scripts
    "seed": ("", "--seed 52"),
    "precision": ("", BF16),
    "resolution": ("", "--resolution 32"),
    "base model": ("", "--pretrained_model_name_or_path {other}"),
    "content of the base model": ("", "--pretrained_model_name_or_path {changed}"),
    "photos": ("", "--instance_data_dir {fewer}"),
    "content of the pictures": ("", "--instance_data_dir {redrawn}"),
    "class images": (PRIOR, f"{PRIOR} --num_class_images 3"),
    "captions": ("", "--caption_strategy filename"),
    "sizes": ("", "--crop_aspect preserve"),
    "revision": ("", "--revision main"),
    "instance_prompt": ("", "--instance_prompt 'a dog'"),
    "class_prompt": (PRIOR, f"{PRIOR} --class_prompt 'a dog'"),
    "repeats": ("", "--repeats 2"),
    "prior_target": (PRIOR, f"{PRIOR} --prior_target base_prediction"),
    "tokenizer_name": ("", "--tokenizer_name {tiny}/tokenizer"),
    "train_text_encoder": ("", "--train_text_encoder"),
    "optimizer": ("", "--optimizer adafactor"),
    "use_8bit_adam": ("", "--use_8bit_adam"),
    "weight_dtype": (BF16, f"{BF16} --weight_dtype bf16"),
    "train_batch_size": ("", "--train_batch_size 1"),
    "gradient_accumulation_steps": ("", "--gradient_accumulation_steps 2"),
    "train_variance": (IF2, f"{IF2} --train_variance"),
    "fed by": (IF2, f"{IF2} --class_labels_conditioning timesteps"),
    "trained weights": ("", "--use_bitfit", "full"),
    "rank": ("", "--rank 2", "lora"),
    "alpha": ("", "--lora_alpha 8", "lora"),
    "layers": ("", "--lora_layers to_k", "lora"),
    "base precision": ("", "--base_model_precision int8", "lora"),
}
SCRIPTS = {"full": train_dreambooth, "lora": train_dreambooth_lora}


@pytest.fixture(scope="module")
def places(tiny, photos, class_images, tmp_path_factory) -> dict:
    """Make the folders that runs differ by."""
    folder = tmp_path_factory.mktemp("places")
    found = {"tiny": tiny, "class_images": class_images, "if2": make_model(folder / "if2", "tiny-if2")}
    for name in ("other", "changed/tiny"):
        found[name.partition("/")[0]] = shutil.copytree(tiny, folder / name)
    weights = next((folder / "changed" / "tiny" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    for name in ("fewer", "redrawn"):
        found[name] = shutil.copytree(photos, folder / name)
    (folder / "fewer" / "beach.png").unlink()
    draw_picture(80, 64, 9).save(folder / "redrawn" / "beach.png")
    return found


@pytest.mark.parametrize("entry", DIFFERENCES)
def test_a_resumed_run_has_this_in_common(monkeypatch, here, places, entry):
    """Runs that differ in it write down that they do, and the one does not go on with the checkpoint of the other."""
    *flags, only = DIFFERENCES[entry] if len(DIFFERENCES[entry]) == 3 else (*DIFFERENCES[entry], "")
    for name, script in SCRIPTS.items():
        if only not in ("", name):
            continue
        theirs, ours = (planned(monkeypatch, here, script, text.format(**places)).resume_keys for text in flags)
        assert theirs[entry] != ours[entry]
        with pytest.raises(UserError, match=rf"\n  {entry}: "):
            resume_checks.check_resume_keys(Path("checkpoint-1"), theirs, ours)


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_left_out_of_what_runs_have_in_common(monkeypatch, here, name):
    """Each entry is there, and each is compared; those of masks and settings may change and are said."""
    script = SCRIPTS[name]
    plan = planned(monkeypatch, here, script)
    may_change = {resume_checks.MASKS, resume_checks.SETTINGS}
    assert plan.resume_keys.keys() == COMMON | OWN[name] | may_change
    assert (
        plan.resume_keys["processes"] == 1 and planned(monkeypatch, here, script, "", 2).resume_keys["processes"] == 2
    )
    assert plan.resume_keys["script"] == script.METHOD
    for entry in plan.resume_keys.keys() - may_change:
        with pytest.raises(UserError, match=rf"\n  {entry}: "):
            resume_checks.check_resume_keys(
                Path("checkpoint-1"), plan.resume_keys | {entry: "another"}, plan.resume_keys
            )
    resume_checks.check_resume_keys(
        Path("checkpoint-1"), plan.resume_keys | {key: {} for key in may_change}, plan.resume_keys
    )


@pytest.mark.parametrize("entry", ["repeats", "prior_target", "optimizer", "weight_dtype", "trained weights"])
def test_checkpoints_from_before_a_flag_are_of_its_default(monkeypatch, here, entry):
    """They do not know of it; a run that sets it does not go on with them."""
    ours = planned(monkeypatch, here, train_dreambooth).resume_keys
    theirs = {key: value for key, value in ours.items() if key != entry}
    resume_checks.check_resume_keys(Path("checkpoint-1"), theirs, ours)
    with pytest.raises(UserError, match=rf"\n  {entry}: "):
        resume_checks.check_resume_keys(Path("checkpoint-1"), theirs, ours | {entry: "another"})


def test_concepts_of_a_list_are_compared(tmp_path):
    """By their prompts and repeats; a run whose one concept is given by flags has none to compare."""
    path, found = tmp_path / "photo.png", {}
    draw_picture(16, 16, 0).save(path)
    for number, prompt, repeats in ((0, "a dog", 1), (1, "a dog", 1), (1, "a cat", 1), (1, "a dog", 2)):
        concept = make_concept(number=number, instance_prompt=prompt, repeats=repeats)
        example = train_dreambooth.Example(path, (prompt,), concept, Size(16, 16))
        found[number, prompt, repeats] = resume_checks.resume_keys_of_pictures([example], "16")["concepts"]
    assert list(found.values()) == [None, [["a dog", None, 1]], [["a cat", None, 1]], [["a dog", None, 2]]]
