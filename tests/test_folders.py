"""Folders of pictures, of results and of checkpoints, as the scripts use them."""

import contextlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_concept
from tests.runs import wait_until
from utils.core.errors import UserError
from utils.data import class_images, list_images
from utils.data.list_images import IMAGE_SUFFIXES, inspect_folder
from utils.run import atomic_folders
from utils.run.atomic_folders import atomic_result, remove_leftovers
from utils.run.checkpoints import step_of, write_state
from utils.run.resume_checks import check_resume_keys

ENDED = getattr(os, "WEXITED", 0) | getattr(os, "WNOHANG", 0) | getattr(os, "WNOWAIT", 0)  # but still to be asked


@pytest.fixture
def photos(tmp_path):
    """Make an empty folder of photos."""
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def save(path, mode="RGB", size=(6, 4), colour=0):
    """Save a plain picture."""
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new(mode, size, colour).save(path)
    return path


def tree(folder) -> dict[str, str]:
    """Return every file below a folder with its text."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------- photo folders


def test_a_clean_folder_gives_sizes_and_no_notes(photos):
    """Pictures in subfolders count, in a fixed order, with their upright sizes."""
    save(photos / "b.png", size=(6, 4))
    save(photos / "sub" / "a.jpg", size=(30, 20))
    inspection = inspect_folder(photos, "--instance_data_dir", skip_bad=False)
    assert inspection.sizes == {photos / "b.png": (6, 4), photos / "sub" / "a.jpg": (30, 20)}
    assert list(inspection.sizes) == [photos / "b.png", photos / "sub" / "a.jpg"]
    assert inspection.notes == () and inspection.unreadable == {}


def test_what_is_no_picture_is_listed_once(photos):
    """Hidden files, captions and others are named in one note."""
    save(photos / "a.png")
    for name in (".DS_Store", "a.txt", "sub/notes.md"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).touch()
    notes = inspect_folder(photos, "--instance_data_dir", skip_bad=False).notes
    assert notes == (f"Not read as images in {photos}: .DS_Store, a.txt, sub/notes.md.",)


def test_a_long_list_is_cut(photos):
    """Ten names are given, and how many more there are."""
    save(photos / "a.png")
    for number in range(13):
        (photos / f"{number:02d}.txt").touch()
    (note,) = inspect_folder(photos, "--instance_data_dir", skip_bad=False).notes
    assert note.startswith(f"Not read as images in {photos}: 00.txt, ") and note.endswith("09.txt and 3 more.")


@pytest.mark.parametrize(("names", "found"), [((), "It is empty."), (("a.txt", ".b.png"), "Found: .b.png, a.txt.")])
def test_a_folder_without_pictures_is_an_error(photos, names, found):
    """The message says what was looked for and what was there."""
    for name in names:
        (photos / name).touch()
    with pytest.raises(UserError) as error:
        inspect_folder(photos, "--instance_data_dir", skip_bad=True)
    suffixes = " ".join(IMAGE_SUFFIXES)
    assert str(error.value) == f"--instance_data_dir {photos} holds no images (looked for {suffixes}). {found}"


def make_bad(photos):
    """Put an empty, a cut and a mislabelled picture beside a good one."""
    save(photos / "good.png")
    (photos / "empty.jpg").touch()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "cut.png")
    (photos / "cut.png").write_bytes((photos / "cut.png").read_bytes()[:2000])
    (photos / "text.webp").write_text("no picture")


def test_all_unreadable_pictures_are_named_in_one_error(photos):
    """Each has its line with the reason, and the way on is named."""
    make_bad(photos)
    with pytest.raises(UserError) as error:
        inspect_folder(photos, "--instance_data_dir", skip_bad=False)
    head, *lines, advice = str(error.value).split("\n")
    assert head == f"3 of 4 images in --instance_data_dir {photos} cannot be read:"
    assert [line.split(": ")[0] for line in lines] == [
        f"  {photos / name}" for name in ("cut.png", "empty.jpg", "text.webp")
    ]
    assert all(len(line.split(": ")[1]) > 10 for line in lines)
    assert advice == "Mend or remove them, or go on without them by --skip_bad_images."


def test_unreadable_pictures_can_be_skipped(photos):
    """Then they become a note, and the others are used."""
    make_bad(photos)
    inspection = inspect_folder(photos, "--instance_data_dir", skip_bad=True)
    assert list(inspection.sizes) == [photos / "good.png"] and len(inspection.unreadable) == 3
    (note,) = inspection.notes
    assert note.startswith("3 of 4 images in ") and note.count("\n") == 3


def test_nothing_is_left_when_all_are_unreadable(photos):
    """Skipping all of them is no way on, so it is an error, and one that does not advise what was just done."""
    (photos / "empty.jpg").touch()
    with pytest.raises(UserError) as error:
        inspect_folder(photos, "--instance_data_dir", skip_bad=True)
    assert str(error.value).startswith(f"1 of 1 images in --instance_data_dir {photos} cannot be read:")
    assert "go on without them by --skip_bad_images" not in str(error.value)


def test_transparent_pictures_are_counted(photos):
    """A note says how many are put on white; an opaque alpha channel is no transparency."""
    save(photos / "a.png", "RGBA", colour=(255, 0, 0, 128))
    save(photos / "b.png", "RGBA", colour=(255, 0, 0, 255))
    save(photos / "c.png", "LA", colour=(7, 0))
    notes = inspect_folder(photos, "--instance_data_dir", skip_bad=False).notes
    assert notes == (f"2 images in {photos} are transparent in parts: put on white.",)


# ----------------------------------------------------------------------------------------------------- result folders


def write_result(folder, text, *names):
    """Write files of a result."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_a_result_replaces_its_own_names_and_leaves_the_rest(tmp_path):
    """Old parts go whole, with files that the new ones lack; other files of the run stay."""
    write_result(tmp_path, "old", "index.json", "unet/a", "unet/only-old", "args.json", "samples/1.png", "vae")
    with atomic_result(tmp_path, last="index.json") as folder:
        write_result(folder, "new", "index.json", "unet/a", "vae/weights", "fresh/b")
        assert tree(tmp_path / "unet") == {"a": "old", "only-old": "old"}, "nothing is touched before the end"
    new = dict.fromkeys(("index.json", "unet/a", "vae/weights", "fresh/b"), "new")
    assert tree(tmp_path) == new | {"args.json": "old", "samples/1.png": "old"}


def test_a_result_makes_its_folder(tmp_path):
    """The output folder need not exist."""
    with atomic_result(tmp_path / "a" / "b", last="index.json") as folder:
        write_result(folder, "new", "index.json")
    assert tree(tmp_path) == {"a/b/index.json": "new"}


def test_an_error_while_writing_leaves_the_old_result(tmp_path):
    """A full disk in the middle of a save changes nothing, and no hidden folder stays."""
    write_result(tmp_path, "old", "index.json", "unet/a")
    with (
        pytest.raises(UserError, match=r"the disk is full\..* GB are free there"),
        atomic_result(tmp_path, last="index.json") as folder,
    ):
        write_result(folder, "new", "index.json", "unet/a")
        raise OSError("the disk is full")
    assert tree(tmp_path) == {"index.json": "old", "unet/a": "old"}
    assert sorted(os.listdir(tmp_path)) == ["index.json", "unet"]


def test_a_half_replaced_result_is_never_loadable(tmp_path, monkeypatch):
    """Whichever rename is the last that happens, the index is there only with all new parts, or all old ones."""
    rename = atomic_folders.Path.rename
    seen = []

    def stop_at(path, target):
        """Fail at the rename whose turn it is."""
        if len(renamed) == limit:
            raise OSError("killed")
        renamed.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(atomic_folders.Path, "rename", stop_at)
    for limit in range(4):
        output, renamed = tmp_path / str(limit), []
        write_result(output, "old", "index.json", "unet/a", "vae/a")
        killed = pytest.raises(UserError, match="killed") if limit < 3 else contextlib.nullcontext()
        with killed, atomic_result(output, last="index.json") as folder:
            write_result(folder, "new", "index.json", "unet/a", "vae/a")
        seen.append(tree(output))
    assert all("index.json" not in files for files in seen[:3])
    assert seen[3] == dict.fromkeys(("index.json", "unet/a", "vae/a"), "new")


def test_what_a_dead_save_left_is_removed_at_the_next_start(tmp_path):
    """The hidden folder of a run that was killed goes; the names of the result stay."""
    write_result(tmp_path, "x", ".saving-result-0123abcd/unet/a", "result/a", "index.json")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"result/a": "x", "index.json": "x"}


def test_files_of_a_result_have_the_usual_permissions(tmp_path):
    """Also those that were written for their owner alone."""
    mask = os.umask(0o022)
    try:
        with atomic_result(tmp_path, last="index.json") as folder:
            write_result(folder, "new", "index.json", "unet/a")
            (folder / "unet" / "a").chmod(0o600)
    finally:
        os.umask(mask)
    assert (tmp_path / "unet" / "a").stat().st_mode & 0o777 == 0o644


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_fits_what_it_equals(tmp_path):
    """Equal entries, and entries that only the checkpoint has, are no difference."""
    check_resume_keys(tmp_path, {"seed": 1, "rank": 4, "old": "x"}, {"seed": 1, "rank": 4})


def test_a_checkpoint_from_before_a_flag_fits_its_default(tmp_path):
    """It was made as the default is; any other value is a difference."""
    check_resume_keys(tmp_path, {"seed": 1}, {"seed": 1, "repeats": 1, "prior_target": "images"})
    with pytest.raises(UserError, match="\n  repeats: 1 there, 2 here\n"):
        check_resume_keys(tmp_path, {"seed": 1}, {"seed": 1, "repeats": 2, "prior_target": "images"})


def test_every_difference_to_a_checkpoint_is_named(tmp_path):
    """Each line has both values; what the checkpoint lacks counts as None."""
    with pytest.raises(UserError) as error:
        check_resume_keys(
            tmp_path / "checkpoint-5", {"seed": 1, "rank": 4, "same": 0}, {"seed": 2, "same": 0, "alpha": 8}
        )
    assert str(error.value).split("\n") == [
        f"{tmp_path / 'checkpoint-5'} cannot be resumed: this command differs from the run that wrote it in",
        "  seed: 1 there, 2 here",
        "  alpha: None there, 8 here",
        "Use the same values, or start a new run in another --output_dir.",
    ]


@pytest.mark.parametrize(("step", "aside"), [(10, [20, 100]), (20, [100]), (100, [])])
def test_checkpoints_that_lie_ahead_are_set_aside(tmp_path, caplog, step, aside):
    """Complete ones of later steps, which `latest` would take for this run's; older and other ones stay."""
    kept = ("checkpoint-3", "checkpoint-7-backup", "checkpoint-500")
    for name in ("checkpoint-100", "checkpoint-20", *kept):
        (tmp_path / name).mkdir()
        if name != "checkpoint-500":
            write_state(tmp_path / name, step_of(tmp_path / name) or 0, {})
    with caplog.at_level(logging.WARNING):
        atomic_folders.open_folder(tmp_path, {}, step, None)
    assert [message.split()[0] for message in caplog.messages] == [f"checkpoint-{number}" for number in aside]
    assert sorted(int(path.name.split("-")[2]) for path in tmp_path.glob("passed-over-*")) == aside
    assert all((tmp_path / name).exists() for name in kept)
    assert all((tmp_path / f"checkpoint-{number}").exists() != (number in aside) for number in (20, 100))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_of_two_that_come_at_once_one_gets_the_folder(tmp_path):
    """Whichever comes first, and however their writing of args.json falls in between."""
    for number in range(20):
        start, go = os.pipe()
        end, enough = os.pipe()
        children = []
        for name in "ab":
            if (child := os.fork()) == 0:
                os.read(start, 1)
                status = 2
                with contextlib.suppress(BaseException):
                    try:
                        atomic_folders.open_folder(tmp_path / str(number), {"seed": name}, 0, None)
                        os.read(end, 1)
                        status = 0
                    except UserError as error:
                        status = 1 if "in use by another run" in str(error) else 3
                os._exit(status)
            children.append(child)
        os.write(go, b"go")
        wait_until(lambda ids=children: any(os.waitid(os.P_PID, child, ENDED) for child in ids), "a refusal")
        os.write(enough, b"end")
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(statuses) == [0, 1]
        assert json.loads((tmp_path / str(number) / "args.json").read_text()) == {"seed": "ab"[statuses.index(0)]}
        for descriptor in (start, go, end, enough):
            os.close(descriptor)


def test_photos_of_the_minimum_size_are_kept():
    """A pixel less is too small."""
    sizes = {Path("just.png"): (64, 100), Path("less.png"): (63, 100)}
    assert list(list_images.leave_out_small(sizes, 64, "pixel")) == [Path("just.png")]
    assert list_images.leave_out_small(sizes, None, "pixel") == sizes


def test_missing_class_images_are_drawn_in_the_batches_that_they_fall_in():
    """Whatever is there already: their neighbors decide their last bits."""
    concept = make_concept(class_data_dir="class", num_class_images=5)
    missing = {Path("class", f"{number:05d}.png"): concept for number in (4, 1)}
    found = class_images.list_batches(missing, 2)
    assert found == [(concept, range(0, 2)), (concept, range(4, 5))]
