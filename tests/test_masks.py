"""Masks: found by name, cut like their photos, and what of the loss they let through."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

import train_dreambooth
import train_dreambooth_lora
from tests.conftest import ORIENTATION, draw_picture
from train_dreambooth import vlb_loss
from utils.core.errors import UserError
from utils.data import decode_images, list_images, masks
from utils.data.geometry import Crop, Size


@pytest.fixture(params=[train_dreambooth, train_dreambooth_lora], ids=lambda module: module.__name__)
def script(request):
    """Run a test with each script."""
    return request.param


@pytest.fixture
def folders(tmp_path):
    """Make a folder of three photos, one of them below it and turned by its EXIF data, and one of masks."""
    photos, light = tmp_path / "photos", tmp_path / "masks"
    (photos / "more").mkdir(parents=True)
    (light / "more").mkdir(parents=True)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    draw_picture(60, 40, 1).save(photos / "a.jpg")
    draw_picture(40, 60, 2).save(photos / "b.png")
    draw_picture(60, 40, 3).save(photos / "more" / "c.jpg", exif=exif)
    for name, size in (("a", (60, 40)), ("b", (20, 30)), ("more/c", (40, 60))):
        Image.new("L", size, 255).save(light / f"{name}.png")
    return photos, light


def find(photos, light):
    """Return the masks of a folder of photos by their names."""
    sizes = list_images.inspect_folder(photos, "--instance_data_dir", False).sizes
    found = masks.find_masks(photos, sizes, str(light), "--mask_data_dir")
    return {path.name: mask.relative_to(light).as_posix() for path, mask in found.items()}


def test_masks_are_found_by_path_and_stem(folders):
    """Of any format, of a smaller size, below subfolders, upright."""
    assert find(*folders) == {"a.jpg": "a.png", "b.png": "b.png", "c.jpg": "more/c.png"}
    assert masks.find_masks(folders[0], {}, None, "--mask_data_dir") == {}


def test_photos_without_mask_and_masks_without_photo_are_listed(folders, caplog):
    """They count wholly, and are of no use, in this order."""
    photos, light = folders
    (light / "b.png").rename(light / "d.png")
    with caplog.at_level(logging.WARNING):
        assert list(find(photos, light)) == ["a.jpg", "c.jpg"]
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 3 photos have no mask, so all their pixels count in the loss: {photos / 'b.png'}",
        f"1 masks in {light} belong to no photo: {light / 'd.png'}",
    ]


def test_masks_that_cannot_be_right_are_refused_together(folders):
    """Another shape, all but black, or two of one name."""
    photos, light = folders
    Image.new("L", (60, 60), 255).save(light / "a.png")
    spot = Image.new("L", (400, 600))
    spot.putpixel((20, 20), 255)
    spot.save(light / "b.png")
    Image.new("L", (40, 60), 255).save(light / "more" / "c.bmp")
    with pytest.raises(UserError) as error:
        find(photos, light)
    assert str(error.value).split("\n") == [
        f"The masks in --mask_data_dir {light} cannot be used:",
        f"{light / 'more' / 'c.bmp'}, {light / 'more' / 'c.png'} have the same name.",
        f"{light / 'a.png'} is 60x60, but {photos / 'a.jpg'} is 60x40: another shape.",
        f"{light / 'b.png'} is almost black (0.00% white), so almost no pixel of its photo would be trained.",
    ]


def test_a_mask_of_numbers_of_things_is_explained(folders):
    """Segmenters write 1 where the first thing is: that looks black, and a small thing is next to nothing."""
    photos, light = folders
    mask = Image.new("L", Image.open(photos / "a.jpg").size)
    mask.paste(1, (0, 0, 10, 10))
    mask.save(light / "a.png")
    with pytest.raises(UserError, match="Its lightest place is 1 of 255, which should be white"):
        find(photos, light)


def test_a_broken_mask_is_named_if_a_photo_has_it(folders):
    """One that belongs to no photo harms nothing."""
    photos, light = folders
    (light / "none.png").write_bytes(b"no picture")
    assert len(find(photos, light)) == 3
    (light / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read: it is damaged") as error:
        find(photos, light)
    assert "skip_bad_images" not in str(error.value)


def test_a_folder_of_other_masks_is_refused(folders, tmp_path):
    """None fits, so it is the wrong folder; or there is none at all."""
    (tmp_path / "other").mkdir()
    for _ in range(2):
        with pytest.raises(UserError, match="has no mask for any of the 3 photos"):
            find(folders[0], tmp_path / "other")
        Image.new("L", (8, 8), 255).save(tmp_path / "other" / "x.png")


def test_names_are_the_same_however_they_are_written(folders):
    """macOS writes "é" as two characters."""
    photos, light = folders
    (photos / "b.png").rename(photos / "caf\u00e9.png")
    (light / "b.png").rename(light / "cafe\u0301.png")
    assert len(find(photos, light)) == 3


def test_transparent_parts_of_a_mask_do_not_count(tmp_path):
    """A cut-out subject is its own mask; an opaque picture goes by its light."""
    cutout = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    cutout.paste((10, 20, 30, 255), (2, 2, 6, 6))
    cutout.save(tmp_path / "cutout.png")
    Image.new("RGBA", (8, 8), (255, 255, 255, 255)).save(tmp_path / "opaque.png")
    light = np.asarray(decode_images.open_light(tmp_path / "cutout.png"))
    assert light[2:6, 2:6].min() == 255 and light.sum() == 16 * 255
    assert np.asarray(decode_images.open_light(tmp_path / "opaque.png")).min() == 255


def test_a_mask_is_cut_and_mirrored_like_its_photo(tmp_path):
    """A photo that is its own mask gives the same numbers, whatever the crop; a place of a latent is a mean."""
    values = np.zeros((40, 60), np.uint8)
    values[10:30, 20:50] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(values).save(path)
    for box in ((0, 0, 32, 32), (20, 8, 52, 40)):
        for flip in (False, True):
            cut = Crop((60, 40), box, flip)
            scaled = decode_images.open_scaled(path, (60, 40), Image.Resampling.LANCZOS)
            photo = decode_images.crop(scaled, cut).convert("L")
            wanted = torch.from_numpy(np.array(photo)).float() / 255
            assert torch.equal(masks.weight_map(path, cut, Size(32, 32), 1)[0], wanted)
            found = masks.weight_map(path, cut, Size(32, 32), 8)
            assert found.shape == (1, 4, 4)
            means = wanted.reshape(4, 8, 4, 8).mean(dim=(1, 3))
            assert torch.allclose(found[0], means)
    assert torch.equal(masks.weight_map(None, cut, Size(32, 16), 8), torch.ones(1, 2, 4))


def test_a_white_mask_weighs_exactly_one(tmp_path):
    """However it is scaled, so that it changes no bit of a run."""
    path = tmp_path / "white.png"
    Image.new("L", (37, 53), 255).save(path)
    weights = masks.weight_map(path, Crop((111, 159), (5, 7, 69, 71), True), Size(64, 64), 8)
    assert torch.equal(weights, torch.ones(1, 8, 8))


def write_mask(path, size, *boxes):
    """Write a mask that is white in some boxes."""
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    mask.save(path)
    return path


def test_a_crop_that_misses_the_mask_is_moved_to_it(tmp_path):
    """To where most light is; one that holds a tenth of that stays."""
    path = write_mask(tmp_path / "corner.png", (100, 50), (90, 0, 100, 10))
    assert masks.move_crop_onto_mask(path, (100, 50), (0, 0, 50, 50)) == (50, 0, 100, 50)
    assert masks.move_crop_onto_mask(path, (100, 50), (41, 0, 91, 50)) == (41, 0, 91, 50), "a tenth of the light"
    assert masks.move_crop_onto_mask(path, (100, 50), (40, 0, 90, 50)) == (50, 0, 100, 50)
    assert masks.move_crop_onto_mask(None, (100, 50), (0, 0, 50, 50)) == (0, 0, 50, 50)
    left, top, right, bottom = masks.move_crop_onto_mask(path, (100, 50), (0, 30, 20, 50))
    assert (right - left, bottom - top) == (20, 20) and left >= 80 and top <= 0


def test_a_crop_with_less_than_a_tenth_of_the_light_is_moved(tmp_path):
    """Also if it holds some: the loss would be that of a few places at the rim."""
    path = write_mask(tmp_path / "wide.png", (100, 50), (80, 0, 100, 10))
    assert masks.move_crop_onto_mask(path, (100, 50), (31, 0, 81, 50)) == (50, 0, 100, 50), "a twentieth"
    assert masks.move_crop_onto_mask(path, (100, 50), (32, 0, 82, 50)) == (32, 0, 82, 50), "a tenth"


def test_a_crop_between_two_light_parts_is_moved_onto_one(tmp_path):
    """The middle of all that is light may be dark: there, nothing of the photo would count."""
    path = write_mask(tmp_path / "two.png", (192, 64), (0, 0, 40, 64), (150, 0, 192, 64))
    box = masks.move_crop_onto_mask(path, (192, 64), (64, 0, 128, 64))
    assert masks.open_mask(path, (192, 64)).crop(box).getextrema()[1] == 255
    assert np.asarray(masks.open_mask(path, (192, 64)).crop(box)).mean() > 100


@pytest.mark.parametrize("seed", range(20))
def test_no_crop_has_next_to_no_light(tmp_path, seed):
    """Wherever a mask is light, each crop of it holds a tenth of what it could, or what was asked for."""
    chance = np.random.default_rng(seed)
    width, height = (int(edge) for edge in chance.integers(40, 90, 2))
    left, top = int(chance.integers(0, width - 8)), int(chance.integers(0, height - 8))
    path = write_mask(tmp_path / "mask.png", (width, height), (left, top, left + 8, top + 8))
    for x in range(0, width - 32, 3):
        for y in range(0, height - 32, 3):
            box = masks.move_crop_onto_mask(path, (width, height), (x, y, x + 32, y + 32))
            assert np.asarray(masks.open_mask(path, (width, height)).crop(box)).sum() >= 0.1 * 64 * 255
            assert box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height


# What of the loss a mask lets through.

ALPHAS = torch.linspace(0.99, 0.01, 1000)
STEPS = torch.tensor([3, 500])


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_loss_over_a_mask_is_that_of_the_cut_out_part(script, snr_gamma):
    """A rectangle of a mask gives the very loss of a picture that is that rectangle."""
    prediction, wanted = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(2, 1, 16, 16)
    weights[..., 4:12, 2:9] = 1
    rest = (STEPS, ALPHAS, "epsilon", snr_gamma)
    whole = script.example_losses(prediction, wanted, weights, *rest)
    part = [tensor[..., 4:12, 2:9] for tensor in (prediction, wanted)]
    torch.testing.assert_close(whole, script.example_losses(*part, torch.ones(2, 1, 8, 7), *rest))


def test_grey_weighs(script):
    """Half as light counts half as much, of two halves a third of the whole."""
    errors = torch.tensor([1.0, 3.0]).repeat_interleave(8).reshape(1, 1, 4, 4)
    weights = torch.tensor([1.0, 0.5]).repeat_interleave(8).reshape(1, 1, 4, 4)
    losses = script.example_losses(errors.sqrt(), torch.zeros(1, 1, 4, 4), weights, STEPS[:1], ALPHAS, "epsilon", None)
    assert losses.item() == pytest.approx((1 * 1 + 3 * 0.5) / 1.5)


def test_nothing_outside_a_mask_has_a_gradient(script):
    """Neither of the error nor of the variance's bound; inside all places have one."""
    chance = torch.Generator().manual_seed(1)
    clean = torch.rand(2, 3, 8, 8, generator=chance) * 2 - 1
    noise, prediction, variance = torch.randn(3, 2, 3, 8, 8, generator=chance)
    prediction.requires_grad_(), variance.requires_grad_()
    noisy = ALPHAS[STEPS].sqrt()[:, None, None, None] * clean + (1 - ALPHAS[STEPS]).sqrt()[:, None, None, None] * noise
    weights = torch.zeros(2, 1, 8, 8)
    weights[0, :, 2:5, 1:7], weights[1, :, :, 3] = 1, 0.5
    losses = script.example_losses(prediction, noise, weights, STEPS, ALPHAS, "epsilon", None)
    terms = vlb_loss(prediction.detach(), variance, clean, noisy, STEPS, ALPHAS)
    bound = script.weighted_mean(terms, weights)
    (losses.sum() + bound.sum()).backward()
    for gradient in (prediction.grad, variance.grad):
        assert torch.equal(gradient != 0, (weights > 0).expand_as(gradient))
