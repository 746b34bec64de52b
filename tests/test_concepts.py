"""Lists of concepts: what they mean, and each mistake in them in a sentence."""

import json
from types import SimpleNamespace

import pytest

import train_dreambooth_lora
from utils.core.errors import UserError
from utils.data.concepts import (
    Concept,
    find_concept_problems,
    find_uneven,
    find_unused_keys,
    read_concepts,
)
from utils.data.geometry import Size
from utils.run.flag_conflicts import find_model_conflicts
from utils.run.folder_checks import find_folder_problems

DOG = {"instance_data_dir": "dog", "instance_prompt": "a photo of sks dog"}


@pytest.fixture
def flags_of(tmp_path):
    """Return a function that gives all flags of a run by name, with a list of concepts if there is one."""

    def make(*entries, **flags):
        parsed = vars(train_dreambooth_lora.make_parser().parse_args([])) | {"output_dir": "out"} | flags
        if entries:
            parsed["concepts_list"] = str(tmp_path / "list.json")
            (tmp_path / "list.json").write_text(json.dumps(list(entries)))
        return parsed

    return make


def test_without_a_list_the_flags_are_the_one_concept(flags_of):
    """Folder, prompt, crop and class folder are those of the flags."""
    flags = flags_of(**DOG, center_crop=True, with_prior_preservation=True, class_prompt="a dog", repeats=3)
    (one,) = read_concepts(flags)
    assert (one.instance_data_dir, one.instance_prompt) == ("dog", "a photo of sks dog")
    assert (one.crop_style, one.class_data_dir, one.repeats, one.number) == ("center", "out/class_images", 3, 0)
    assert read_concepts(flags_of(**DOG, class_data_dir="class"))[0].class_data_dir is None
    assert find_concept_problems(flags) == []


def test_a_list_goes_over_the_flags(flags_of):
    """What an object leaves out is the flag's; class images of one prompt share a folder named by it."""
    cat = {
        "instance_data_dir": "cat",
        "instance_prompt": "a zwx cat",
        "class_prompt": "a photo of: Cat!",
        "repeats": 2,
    }
    other = {"instance_data_dir": "dog2", "instance_prompt": "a dog", "class_data_dir": "own", "center_crop": True}
    shared = {"class_prompt": "a photo of dog", "num_class_images": 50, "with_prior_preservation": True}
    concepts = read_concepts(flags_of(DOG, cat, other, **shared, crop_style="shifted_center", random_flip=True))
    assert [one.number for one in concepts] == [1, 2, 3]
    assert [one.class_data_dir for one in concepts] == [
        "out/class_images/a_photo_of_dog",
        "out/class_images/a_photo_of_cat",
        "own",
    ]
    assert [one.repeats for one in concepts] == [1, 2, 1]
    assert [one.crop_style for one in concepts] == ["shifted_center", "shifted_center", "center"]
    assert {(one.num_class_images, one.random_flip) for one in concepts} == {(50, True)}


@pytest.mark.parametrize("spelling", ["is_regularisation_data", "is_regularization_data"])
def test_regularisation_data_is_told_by_the_class_prompt(flags_of, spelling):
    """In either spelling; the subject's prompt is none for it, and no class images are drawn for it."""
    entries = DOG, {"instance_data_dir": "dogs", "class_prompt": "a dog", spelling: True}
    flags = flags_of(*entries, instance_prompt="a photo of sks dog")
    subject, shown = read_concepts(flags)
    assert (subject.is_regularisation_data, shown.is_regularisation_data) == (False, True)
    assert (shown.instance_prompt, shown.class_data_dir, subject.class_data_dir) == ("a dog", None, None)
    assert find_concept_problems(flags) == []
    assert shown.loss_weight_of(is_prior=True) == 1.0
    weighed = shown._replace(loss_weight=0.5, prior_loss_weight=3.0)
    assert (weighed.loss_weight_of(is_prior=True), weighed.loss_weight_of(is_prior=False)) == (1.5, 0.5)


def test_umlauts_have_a_folder_of_their_own(flags_of):
    """Letters of any script stay; a prompt of punctuation alone has a folder as well."""
    entries = [DOG | {"class_prompt": prompt} for prompt in ("ein Kälbchen", "子犬", "?!")]
    concepts = read_concepts(flags_of(*entries, with_prior_preservation=True))
    folders = [one.class_data_dir.removeprefix("out/class_images/") for one in concepts]
    assert folders == ["ein_kälbchen", "子犬", "class"]


START = "--concepts_list, concept 1: "
WRONG = {
    "typo": ({"instance_dir": "dog"}, f"{START}'instance_dir' is no key; 'instance_data_dir' is."),
    "text": ({"instance_prompt": 3}, f"{START}instance_prompt is 3, not a text."),
    "number": ({"loss_weight": "2"}, f'{START}loss_weight is "2", not a number.'),
    "whole": ({"repeats": 1.5}, f"{START}repeats is 1.5, not a whole number."),
    "switch": ({"repeats": True}, f"{START}repeats is true, not a whole number."),
    "no switch": ({"random_flip": 1}, f"{START}random_flip is 1, not true or false."),
    "range": ({"repeats": 0}, f"{START}repeats 0 is out of range: it must be from 1 to 10,000."),
    "weight": ({"prior_loss_weight": -1}, f"{START}prior_loss_weight -1 is out of range: it must be 0 or more."),
    "choice": ({"crop_style": "middle"}, f"{START}crop_style 'middle' is none of random, center, shifted_center."),
    "crops": (
        {"center_crop": True, "crop_style": "random"},
        f"{START}center_crop excludes crop_style 'random'.",
    ),
    "spellings": (
        {"is_regularisation_data": True, "is_regularization_data": False},
        f"{START}is_regularisation_data has two values, one in each spelling.",
    ),
    "no folder": ({"instance_data_dir": None}, f"{START}instance_data_dir is required."),
    "no prompt": ({"instance_prompt": " "}, f"{START}instance_prompt is required."),
    "two sources": ({"dataset_name": "me/dogs"}, f"{START}dataset_name excludes instance_data_dir."),
    "column": ({"caption_column": "text"}, f"{START}caption_column needs dataset_name."),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_mistake_of_an_object_is_one_sentence(flags_of, case):
    """The sentence names the concept, the key and the value."""
    changes, sentence = WRONG[case]
    assert find_concept_problems(flags_of(DOG | changes)) == [sentence]


def test_a_wrong_size_is_explained(flags_of):
    """As for the flag."""
    (sentence,) = find_concept_problems(flags_of(DOG | {"resolution": "big"}))
    assert sentence.startswith(f"{START}resolution big is no size")
    assert find_concept_problems(flags_of(DOG | {"resolution": 64})) == []


def test_all_mistakes_are_told_together(flags_of):
    """Of all objects, whatever comes first."""
    problems = find_concept_problems(flags_of({"repeats": 0, "crop": 1}, {"instance_data_dir": 5}))
    assert len(problems) == 3 and all("concept" in problem for problem in problems)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "must hold a list of objects"),
        ("[]", "must hold a list of objects"),
        ('["dog"]', "must hold a list of objects"),
        ("[{]", "it is no valid JSON"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_no_list_is_refused(flags_of, tmp_path, content, words):
    """Whatever is in it, or if it is not there."""
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    flags = flags_of(concepts_list=str(path))
    (problem,) = find_concept_problems(flags)
    assert str(path) in problem and words in problem
    with pytest.raises(UserError, match="concepts_list"):
        read_concepts(flags)


def test_what_a_list_makes_needless_or_impossible(flags_of):
    """Flags that name one subject's folder, a list without a subject, class images without a class."""
    assert find_concept_problems(flags_of(DOG, instance_data_dir="dog", mask_data_dir="masks")) == [
        "--instance_data_dir excludes --concepts_list: each concept names its own.",
        "--mask_data_dir excludes --concepts_list: each concept names its own.",
    ]
    (problem,) = find_concept_problems(flags_of(DOG | {"is_regularisation_data": True}))
    assert problem.endswith("holds regularisation data only: there is no subject.")
    (problem,) = find_concept_problems(flags_of(DOG, with_prior_preservation=True))
    assert problem == f"{START}class_prompt is needed, such as 'a photo of dog'."


def test_every_key_of_a_concept_is_a_flag_or_documented(flags_of):
    """A key that neither flags nor README know would be found by nobody."""
    known = flags_of().keys() | {"loss_weight", "is_regularisation_data", "number"}
    assert set(Concept._fields) <= known


def test_an_object_can_undo_the_flag_of_center_crops(flags_of):
    """`false` is a value, too."""
    entries = [DOG, DOG | {"center_crop": False}, DOG | {"crop_style": "shifted_center"}]
    assert [one.crop_style for one in read_concepts(flags_of(*entries, center_crop=True))] == [
        "center",
        "random",
        "shifted_center",
    ]


def test_a_long_prompt_has_a_folder_that_a_disk_takes(flags_of):
    """Its name is cut, and still differs from that of a prompt with the same beginning."""
    entries = [DOG | {"class_prompt": f"{'a very long dog ' * 30}{number}"} for number in range(2)]
    entries.append(DOG | {"class_prompt": "犬" * 200})
    concepts = read_concepts(flags_of(*entries, with_prior_preservation=True))
    folders = [one.class_data_dir.rpartition("/")[2] for one in concepts]
    assert len(set(folders)) == 3 and all(len(name.encode()) <= 100 for name in folders)


def test_half_characters_are_no_text(flags_of):
    """JSON can write them, but nothing can read them."""
    (problem,) = find_concept_problems(flags_of(DOG | {"instance_prompt": "\ud800 dog"}))
    assert problem == f"{START}instance_prompt '\\ud800 dog' is not written in UTF-8."


def test_concepts_that_share_class_images_must_want_the_same_ones(flags_of, tmp_path):
    """The same prompt with another guidance gives other pictures."""
    entries = [DOG | {"class_prompt": "a dog", "class_guidance_scale": scale} for scale in (1, 3)]
    (tmp_path / "dog").mkdir()
    entries = [entry | {"instance_data_dir": str(tmp_path / "dog")} for entry in entries]
    flags = flags_of(*entries, with_prior_preservation=True, output_dir=str(tmp_path / "out"))
    (problem,) = find_folder_problems(flags)
    assert "cannot hold the class images of 'a dog (guidance 1)' and 'a dog (guidance 3)'" in problem
    assert find_folder_problems(flags_of(*[entries[0]] * 2, output_dir=str(tmp_path / "out"))) == []


def test_keys_without_effect_are_told(flags_of):
    """Class images without --with_prior_preservation, or of regularisation data; all is well with it."""
    entries = (
        DOG | {"class_prompt": "a dog"},
        {"instance_data_dir": "d", "class_prompt": "a dog", "class_data_dir": "c"},
    )
    entries[1]["is_regularisation_data"] = True
    assert find_unused_keys(flags_of(*entries)) == [
        f"{START}class_prompt has no effect: it needs --with_prior_preservation and a class_prompt.",
        "--concepts_list, concept 2: class_data_dir has no effect: regularisation data shows the class itself.",
    ]
    del entries[1]["class_data_dir"]
    assert find_unused_keys(flags_of(*entries, with_prior_preservation=True)) == []
    assert find_unused_keys(flags_of(**DOG, class_prompt="a dog", image_column="picture")) == [
        "--class_prompt has no effect without --with_prior_preservation.",
        "--image_column has no effect without --dataset_name.",
    ]


def test_why_a_prompt_is_required_is_told_where_there_are_captions(flags_of):
    """Captions that begin with it, and datasets whose captions nobody has asked for."""
    common = {"instance_data_dir": "dog", "caption_strategy": "textfile"}
    assert find_concept_problems(flags_of(**common, prepend_instance_prompt=True)) == [
        "--instance_prompt is required by --prepend_instance_prompt."
    ]
    assert find_concept_problems(flags_of({"dataset_name": "owner/dogs"})) == [
        f"{START}instance_prompt is required, or caption_column."
    ]
    assert find_concept_problems(flags_of(dataset_name="owner/dogs", caption_column="text")) == []


def test_a_target_of_class_images_that_a_list_does_not_have_is_told(flags_of):
    """Regularisation data are class images, too."""
    (note,) = find_unused_keys(flags_of(DOG, prior_target="base_prediction"))
    assert note.startswith("--prior_target base_prediction has no effect: there is neither --with_prior_preservation")
    pool = {"instance_data_dir": "d", "instance_prompt": "a dog", "is_regularization_data": True}
    assert find_unused_keys(flags_of(DOG, pool, prior_target="base_prediction")) == []
    given = {"prior_target": "base_prediction", "with_prior_preservation": True}
    assert find_unused_keys(flags_of(DOG | {"class_prompt": "a dog"}, **given)) == []


def test_sizes_and_steps_that_the_model_cannot_take_are_named(flags_of):
    """With the concept that they belong to; a step that leaves no bucket is one of them."""
    flags = flags_of(DOG | {"resolution": 60}, DOG | {"resolution": "64x65"}, DOG, resolution="64")
    assert find_uneven(flags, Size(64, 64), 8) == [
        f"{START}resolution 60: the model needs multiples of 8.",
        "--concepts_list, concept 2: resolution 64x65: the model needs multiples of 8.",
    ]
    preserve = {"crop_aspect": "preserve", "bucket_step": 12}
    assert find_uneven(flags_of(**DOG, **preserve), Size(64, 64), 8) == [
        "--bucket_step 12: the model needs multiples of 8."
    ]
    (problem,) = find_uneven(flags_of(**DOG, **preserve | {"bucket_step": 64}), Size(64, 64), 8)
    assert problem.startswith("--bucket_step 64 leaves no bucket beside the resolution 64")
    assert find_uneven(flags_of(**DOG, bucket_step=64), Size(64, 64), 8) == []


def test_lost_words_are_looked_for_in_every_concept(flags_of):
    """IF's pipelines delete words with digits."""
    base = SimpleNamespace(resolution=Size(64, 64), preview_sizes=[], size_multiple=8, low_res_size=None, tokens=77)
    vars(base).update(dict.fromkeys(("is_if", "precomputes_text", "uses_attention_mask", "learns_variance"), True))
    (problem,) = find_model_conflicts(flags_of(DOG, DOG | {"instance_prompt": "a p3rs0n dog"}), base, 77)
    assert "--concepts_list, concept 2: instance_prompt" in problem and "p3rs0n" in problem


def test_folders_may_be_shared_but_not_contain_each_other(flags_of, tmp_path):
    """The same photos may be two concepts; those below others, or masks among them, would be taken for others."""
    for name in ("dogs/small", "masks"):
        (tmp_path / name).mkdir(parents=True)
    dogs, small, masks = (str(tmp_path / name) for name in ("dogs", "dogs/small", "masks"))
    one, out = DOG | {"instance_data_dir": dogs}, {"output_dir": str(tmp_path / "out")}
    assert find_folder_problems(flags_of(one, one | {"mask_data_dir": masks}, **out)) == []
    (problem,) = find_folder_problems(flags_of(one, one | {"instance_data_dir": small}, **out))
    assert problem == (
        f"--concepts_list, concept 2: instance_data_dir in {START}instance_data_dir {dogs}: "
        "its images would be trained on as photos. Choose a folder outside."
    )
    (problem,) = find_folder_problems(flags_of(one | {"mask_data_dir": small}, **out))
    assert problem.startswith(f"{START}mask_data_dir in {START}instance_data_dir")
    (problem,) = find_folder_problems(flags_of(one | {"instance_data_dir": f"{dogs}/none"}, **out))
    assert problem == f"{START}instance_data_dir {dogs}/none does not exist."
