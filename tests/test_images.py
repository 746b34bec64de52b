"""Pictures made by hand, byte for byte where Pillow cannot write them, against the pixels they must give."""

import os
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFont

import train_dreambooth_lora
from tests.conftest import make_dataset, visit_of
from utils.core.atomic_files import save_png
from utils.core.errors import UserError
from utils.data import decode_images
from utils.data.decode_images import open_rgb
from utils.data.list_images import IMAGE_SUFFIXES, find_images, inspect_images
from utils.sampling.image_grid import _wrap, make_grid

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(
    0, 256, (5, 7, 3), dtype=np.uint8
)  # (height, width, RGB): 35 colours, so that a palette holds it
GREY = np.arange(256, dtype=np.uint8).reshape(8, 32)
DEEP_GREY = GREY.astype(int) * 257
NOISE = Image.fromarray(RNG.integers(0, 256, (96, 128, 3), dtype=np.uint8))


def pixels(path):
    """Open an image and return its pixels as integers."""
    image = open_rgb(path)
    assert image.mode == "RGB" and not image.info
    return np.asarray(image).astype(int)


def repeat(grey):
    """Write grey values three times, as RGB."""
    return np.repeat(np.asarray(grey)[..., None], 3, axis=-1)


def write_png(path, values, depth, color_type, transparency=None, exif=b""):
    """Write a PNG of any depth; color_type as in its header: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    height, width = values.shape[:2]
    rows = b""
    for row in values:
        bits = "".join(f"{value:0{depth}b}" for value in row.ravel())
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))]
    if transparency is not None:
        chunks.append((b"tRNS", struct.pack(f">{len(transparency)}H", *transparency)))
    chunks += [(b"eXIf", exif)] if exif else []
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_tiff(path, data, size, bits, photometric, samples=1, sample_format=1, extra=None):
    """Write an uncompressed little-endian TIFF; photometric: 0 white is zero, 1 black is zero, 2 RGB, 8 Lab."""
    tags = {256: size[0], 257: size[1], 258: [bits] * samples, 259: 1, 262: photometric, 273: 0, 277: samples}
    tags |= {278: size[1], 279: len(data)} | ({} if extra is None else {338: extra}) | {339: [sample_format] * samples}
    tail_at = 8 + 2 + 12 * len(tags) + 4
    lists = {tag: struct.pack(f"<{len(v)}H", *v) for tag, v in tags.items() if isinstance(v, list) and len(v) > 2}
    tail = b"".join(lists.values())
    tags[273] = tail_at + len(tail)
    entries, at = b"", tail_at
    for tag, value in tags.items():
        values = value if isinstance(value, list) else [value]
        packed = struct.pack(f"<{len(values)}H", *values).ljust(4, b"\0")
        if tag in lists:
            packed, at = struct.pack("<I", at), at + len(lists[tag])
        entries += struct.pack("<HHI", tag, 3, len(values)) + packed
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + tail + data)


def make_profile(space, tags, kind=b"mntr", connection=b"XYZ "):
    """Build a version 2 ICC profile from its tags."""
    tags = {b"wtpt": xyz(0.9642, 1.0, 0.8249)} | tags
    table, data, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", at + len(data), len(value))
        data += value
    header = struct.pack(">I4sI4s4s4s", at + len(data), b"lcms", 0x02100000, kind, space, connection)
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    return (header + xyz(0.9642, 1.0, 0.8249)[8:]).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def xyz(*values):
    """Build an ICC tag that holds a colour."""
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def curve(gamma=None, samples=()):
    """Build an ICC tag that holds a tone curve: a gamma, or its samples from 0 to 1."""
    if gamma is not None:
        return b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))
    return b"curv" + struct.pack(f">II{len(samples)}H", 0, len(samples), *(round(v * 65535) for v in samples))


def rgb_profile(primaries, tone):
    """Build an RGB profile from its primaries (columns, XYZ under D50) and one tone curve."""
    colors = {name: xyz(*column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True)}
    return make_profile(b"RGB ", colors | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone))


def cmyk_profile():
    """Build a CMYK profile whose every ink halves the lightness: L* = 100, 50, 25, 12.5, and 0 for all four."""
    corners = [bin(corner).count("1") for corner in range(16)]
    lightness = [0.0 if inks == 4 else 100 / 2**inks for inks in corners]
    grid = [value for light in lightness for value in (round(light / 100 * 0xFF00), 0x8000, 0x8000)]
    head = b"mft2" + struct.pack(">IBBBB9iHH", 0, 4, 3, 2, 0, *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536), 2, 2)
    lut = head + struct.pack(">8H", *(0, 65535) * 4) + struct.pack(">48H", *grid) + struct.pack(">6H", *(0, 65535) * 3)
    return make_profile(b"CMYK", {b"A2B0": lut}, kind=b"prtr", connection=b"Lab ")


def decode_srgb(values):
    """Turn sRGB in [0, 1] into linear light (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encode_srgb(light):
    """Turn linear light in [0, 1] into 8-bit sRGB (IEC 61966-2-1)."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


SRGB_PRIMARIES = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_PRIMARIES = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
ADOBE_RGB = rgb_profile(ADOBE_PRIMARIES, curve(gamma=563 / 256))
SRGB_BY_SAMPLES = rgb_profile(SRGB_PRIMARIES, curve(samples=decode_srgb(np.linspace(0, 1, 1024))))
SRGB_OF_PILLOW = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LINEAR_GREY = make_profile(b"GRAY", {b"kTRC": curve(gamma=1.0)})


# Listing


def test_listing_is_sorted_and_complete(tmp_path):
    images = [
        "B.JPG",
        "a-b.png",
        "a.png",
        "a/1.jpeg",
        "a/10.webp",
        "a/2.Bmp",
        "z.tiff",
        "z/y/x.avif",
        "zé.gif",
        "é.heic",
    ]
    others = ["a.txt", "a/1.caption", "a/2.csv", "a/a.json", "metadata.jsonl", "no_suffix", "photo.jpg.part", "x.mp4"]
    hidden = [".DS_Store", "._B.JPG", ".cache", "__MACOSX", "a/@eaDir"]
    inside_hidden = [".cache/x.jpg", "__MACOSX/a/x.jpg", "a/@eaDir/x.jpg"]
    for name in images + others + hidden[:2] + inside_hidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listing = find_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in listing.images] == images
    assert [path.relative_to(tmp_path).as_posix() for path in listing.skipped] == sorted(others + hidden)


def test_listing_counts_every_suffix_and_a_hidden_folder_that_is_named(tmp_path):
    folder = tmp_path / ".photos"
    folder.mkdir()
    for suffix in IMAGE_SUFFIXES:
        (folder / f"x{suffix.upper()}").touch()
    assert len(find_images(folder).images) == len(IMAGE_SUFFIXES) == 11


def test_listing_order_does_not_depend_on_how_accents_are_stored(tmp_path):
    for name in ("f.jpg", "e\u0301.jpg"):  # as one character, é sorts after f; as e and an accent, before it
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path).images] == ["f.jpg", "e\u0301.jpg"]


def test_listing_follows_links_and_ends_at_loops(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "photos"
    (outside / "deep").mkdir(parents=True)
    (folder / "sub").mkdir(parents=True)
    for path in (outside / "deep" / "o.png", folder / "sub" / "s.png", outside / "o.jpg"):
        path.touch()
    links = {"file.jpg": outside / "o.jpg", "gone.jpg": outside / "none.jpg", "self.jpg": folder / "self.jpg"}
    links |= {"z_again": folder / "sub", "up": tmp_path, "sub/loop": folder, "linked": outside}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    listing = find_images(folder)
    found = [path.relative_to(folder).as_posix() for path in listing.images]
    assert found == ["file.jpg", "gone.jpg", "linked/deep/o.png", "linked/o.jpg", "self.jpg", "sub/s.png"]
    assert [path.relative_to(folder).as_posix() for path in listing.skipped] == ["sub/loop", "up", "z_again"]


def test_listing_refuses_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for name, reason in (("none", "No such file"), ("file", "Not a directory")):
        with pytest.raises(UserError, match=f"{name} cannot be listed: {reason}"):
            find_images(tmp_path / name)


# Opening: formats and depths


def write_picture(path, kind):
    """Write PICTURE in one of the ways that must not change it."""
    image = Image.fromarray(PICTURE)
    if kind == "png16":
        write_png(path, PICTURE.astype(int) * 257, 16, 2)
    elif kind == "rgba16":
        write_png(path, np.dstack([PICTURE, np.full((5, 7), 255)]).astype(int) * 257, 16, 6)
    elif kind == "palette":
        palette = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7)).convert("P")
        palette.putpalette(PICTURE.tobytes())
        palette.save(path, "PNG")
    elif kind == "tiff16":
        write_tiff(path, (PICTURE.astype("<u2") * 257).tobytes(), (7, 5), 16, 2, samples=3)
    elif kind == "animation":
        image.save(path, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (7, 5), "red")])
    else:
        image.convert("RGBA" if kind == "rgba" else "RGB").save(path, **KINDS[kind])


KINDS = {
    **{"png": {"format": "PNG"}, "rgba": {"format": "PNG"}, "bmp": {"format": "BMP"}, "tiff": {"format": "TIFF"}},
    "webp": {"format": "WEBP", "lossless": True},
    "lzw": {"format": "TIFF", "compression": "tiff_lzw"},
    **dict.fromkeys(["png16", "rgba16", "palette", "tiff16", "animation"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_picture_gives_the_same_pixels_in_every_format(tmp_path, kind):
    path = tmp_path / "photo.jpg"  # the content decides, not the suffix
    write_picture(path, kind)
    np.testing.assert_array_equal(pixels(path), PICTURE)
    inspection = inspect_images([path])
    assert inspection.sizes == {path: (7, 5)} and not inspection.transparent and not inspection.unreadable


def test_first_frame_of_an_animated_gif(tmp_path):
    colors = [Image.new("RGB", (4, 3), color) for color in ("red", "blue", "lime")]
    colors[0].save(tmp_path / "x.gif", save_all=True, append_images=colors[1:])
    np.testing.assert_array_equal(pixels(tmp_path / "x.gif"), np.full((3, 4, 3), (255, 0, 0)))


def write_grey(path, kind):
    """Write GREY, or what has its upper bits, in one of the grey layouts."""
    size = (32, 8)
    if kind == "png16":
        write_png(path, DEEP_GREY, 16, 0)
    elif kind == "tiff16 white is zero":
        write_tiff(path, (65535 - DEEP_GREY).astype("<u2").tobytes(), size, 16, 0)
    elif kind == "tiff12":
        values = (GREY.astype(int) << 4).ravel()
        write_tiff(path, b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in values.reshape(-1, 2)), size, 12, 1)
    elif kind == "tiff32":
        write_tiff(path, DEEP_GREY.astype("<i4").tobytes(), size, 32, 1, sample_format=2)
    else:
        layouts = {"L": GREY, "I;16": DEEP_GREY.astype("<u2"), "I;16B": DEEP_GREY.astype(">u2")}
        Image.fromarray(layouts[kind]).save(path, "TIFF")


GREY_KINDS = ["L", "I;16", "I;16B", "png16", "tiff16 white is zero", "tiff12", "tiff32"]


@pytest.mark.parametrize("kind", GREY_KINDS)
def test_deep_grey_becomes_eight_bits(tmp_path, kind):
    write_grey(tmp_path / "x.tif", kind)
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif"), repeat(GREY))


def test_deep_grey_and_deep_colour_are_rounded_alike(tmp_path):
    values = RNG.integers(0, 65536, (8, 8))
    write_png(tmp_path / "grey.png", values, 16, 0)
    write_png(tmp_path / "rgb.png", repeat(values), 16, 2)
    np.testing.assert_array_equal(pixels(tmp_path / "grey.png"), repeat(values >> 8))
    np.testing.assert_array_equal(pixels(tmp_path / "grey.png"), pixels(tmp_path / "rgb.png"))


def test_two_levels(tmp_path):
    image = Image.fromarray(GREY > 99)
    assert image.mode == "1"
    for name in ("x.png", "x.tif", "x.bmp"):
        image.save(tmp_path / name)
        np.testing.assert_array_equal(pixels(tmp_path / name), repeat((GREY > 99) * 255))


def test_cmyk(tmp_path):
    inks = np.zeros((8, 24, 4), np.uint8)
    inks[:, :8, 1:3], inks[:, 8:16, 0], inks[:, 16:, 3] = 255, 255, 204
    expected = np.zeros((8, 24, 3), int)
    expected[:, :8], expected[:, 8:16], expected[:, 16:] = (255, 0, 0), (0, 255, 255), (51, 51, 51)
    for name, tolerance in (("x.tif", 0), ("x.jpg", 3)):  # a JPEG holds inverted inks, as Adobe writes them
        Image.fromarray(inks, "CMYK").save(tmp_path / name, quality=100)
        np.testing.assert_allclose(pixels(tmp_path / name), expected, atol=tolerance)


# Opening: transparency


def write_transparent(path, kind):
    """Write two pixels, black and half or fully transparent grey 100; say what they must become on white."""
    if kind == "RGBA":
        Image.fromarray(np.array([[[9, 8, 7, 255], [100, 0, 50, 0]]], np.uint8)).save(path, "PNG")
        return [[9, 8, 7], [255, 255, 255]]
    if kind == "RGBA half":
        Image.fromarray(np.array([[[0, 0, 0, 255], [100, 0, 50, 51]]], np.uint8)).save(path, "WEBP", lossless=True)
        return [[0, 0, 0], [224, 204, 214]]  # 255 + (v - 255) * 51 / 255
    if kind == "LA":
        Image.fromarray(np.array([[[7, 255], [100, 51]]], np.uint8)).save(path, "PNG")
        return [[7] * 3, [224] * 3]
    if kind == "LA16":
        write_png(path, np.array([[[7, 255], [100, 51]]]) * 257, 16, 4)
        return [[7] * 3, [224] * 3]
    if kind == "La":  # premultiplied: 20 = 100 * 51 / 255
        write_tiff(path, bytes([7, 255, 20, 51]), (2, 1), 8, 1, samples=2, extra=1)
        return [[7] * 3, [224] * 3]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([1, 2, 3, 100, 0, 50])
    options = {"P": {"transparency": 1}, "P half": {"transparency": bytes([255, 51])}, "gif": {"transparency": 1}}
    palette.save(path, "GIF" if kind == "gif" else "PNG", **options[kind])
    return [[1, 2, 3], [224, 204, 214] if kind == "P half" else [255] * 3]


@pytest.mark.parametrize("kind", ["RGBA", "RGBA half", "LA", "LA16", "La", "P", "P half", "gif"])
def test_transparency_becomes_white(tmp_path, kind):
    path = tmp_path / "x.png"
    expected = write_transparent(path, kind)
    np.testing.assert_array_equal(pixels(path)[0], expected)
    assert inspect_images([path]).transparent == (path,)


@pytest.mark.parametrize(
    ("depth", "color_type", "values", "key", "expected"),
    [
        (1, 0, [[0, 1]], [0], [255, 255]),
        (2, 0, [[0, 1, 2, 3]], [1], [0, 255, 170, 255]),
        (4, 0, [[0, 1, 2]], [2], [0, 17, 255]),
        (8, 0, [[0, 17, 34]], [17], [0, 255, 34]),
        (16, 0, [[0, 51400, 51401]], [51400], [0, 255, 200]),
        (8, 2, [[[1, 1, 1], [2, 2, 2]]], [2, 2, 2], [1, 255]),
        (16, 2, [[[257] * 3, [0xC811] * 3]], [0xC811] * 3, [1, 255]),
    ],
)
def test_transparent_colour_of_a_png_at_every_depth(tmp_path, depth, color_type, values, key, expected):
    path = tmp_path / "x.png"
    write_png(path, np.array(values), depth, color_type, key)
    np.testing.assert_array_equal(pixels(path)[0], repeat(expected))
    assert inspect_images([path]).transparent == (path,)


def test_opaque_alpha_is_not_called_transparent(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(PICTURE).convert("RGBA").save(path)
    assert inspect_images([path]).transparent == ()


# Opening: orientation and colour profiles

STORED = {  # EXIF orientation -> how the upright pixels are stored, from what the standard says of row 0 and column 0
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("suffix", "tolerance"), [("png", 0), ("webp", 0), ("tiff", 0), ("jpg", 4)])
def test_orientation(tmp_path, orientation, suffix, tolerance):
    path = tmp_path / f"x.{suffix}"
    upright = np.kron(PICTURE[:2, :3], np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(path, exif=exif, lossless=True, quality=100, subsampling=0)
    np.testing.assert_allclose(pixels(path), upright, atol=tolerance)
    assert inspect_images([path]).sizes == {path: (48, 32)}


def write_stored(path, picture, kind, exif):
    """Write a picture as it lies in a file that has EXIF data."""
    image, mode = Image.fromarray(picture), "L" if kind.startswith("grey") else "RGB"
    if kind.endswith("16"):
        values = np.asarray(image.convert(mode)).astype(int) * 257
        # Without the mark that begins it elsewhere.
        return write_png(path, values, 16, 0 if mode == "L" else 2, exif=exif.tobytes().removeprefix(b"Exif\0\0"))
    changed = {
        "palette": lambda: image.quantize(16, dither=0),
        "rgba": lambda: image.convert("RGBA"),
        "cmyk": lambda: Image.merge("CMYK", [*image.point(lambda v: 255 - v).split(), Image.new("L", image.size)]),
    }
    image = changed[kind]() if kind in changed else image.convert(mode)
    formats = {"cmyk": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "lossy": "WEBP"}
    options = {"quality": 100} if kind in ("cmyk", "jpeg", "lossy") else {"lossless": True}
    options |= {"subsampling": 0} if kind in ("cmyk", "jpeg") else {}
    return image.save(path, formats.get(kind, "PNG"), exif=exif, **options)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("is_grey", [False, True])
def test_a_picture_gives_one_tensor_in_every_format_and_turn(tmp_path, orientation, is_grey):
    """As a model is given it: equal, or within four levels of 255 where the format loses some."""
    upright = np.kron(PICTURE[:2, :3], np.ones((16, 16, 1), np.uint8))
    upright = np.repeat(upright[..., :1], 3, axis=-1) if is_grey else upright
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    kinds = [
        "png",
        "png16",
        "palette",
        "rgba",
        "webp",
        "cmyk",
        "jpeg",
        *["grey", "grey16", "lossy"] * is_grey,
    ]  # a lossy WebP halves colours
    for kind in kinds:
        write_stored(tmp_path / kind, stored, kind, exif)
    dataset = make_dataset(train_dreambooth_lora, [tmp_path / kind for kind in kinds], "48x32", crop_style="center")
    wanted = torch.from_numpy(upright).permute(2, 0, 1).float() / 127.5 - 1
    for number, kind in enumerate(kinds):
        found = visit_of(dataset, number, 0)["pixel_values"]
        assert found.shape == wanted.shape and found.dtype == torch.float32
        levels = (found - wanted).abs().max().item() * 127.5
        assert levels <= (4 if kind in ("cmyk", "jpeg", "lossy") else 0), kind


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0junk", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_ignored(tmp_path, exif):
    Image.fromarray(PICTURE).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), PICTURE)


@pytest.mark.parametrize("profile", [SRGB_OF_PILLOW, SRGB_BY_SAMPLES, b"junk", ADOBE_RGB[:200], LINEAR_GREY, b""])
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_srgb_broken_and_unfitting_profiles_change_no_pixel(tmp_path, profile, suffix):
    levels = np.arange(0, 256, 5)
    every = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(52, -1, 3).astype(np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(every).save(path, icc_profile=profile, lossless=True)
    np.testing.assert_array_equal(pixels(path), every)


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "RGBA", "P"])
def test_rgb_profile_is_applied(tmp_path, suffix):
    path = tmp_path / "x.png"
    image = Image.fromarray(PICTURE)
    if suffix == "P":
        write_picture(path, "palette")
        with Image.open(path) as image:
            image.load()
    image = image.convert("RGBA") if suffix == "RGBA" else image
    formats = {"webp": "WEBP", "tiff": "TIFF"}
    image.save(path, formats.get(suffix, "PNG"), icc_profile=ADOBE_RGB, lossless=True)
    to_srgb = np.linalg.inv(SRGB_PRIMARIES) @ ADOBE_PRIMARIES
    expected = encode_srgb((PICTURE / 255) ** (563 / 256) @ to_srgb.T)
    np.testing.assert_allclose(pixels(path), expected, atol=1)
    assert np.abs(expected - PICTURE).max() > 20


def test_profile_that_is_nearly_srgb_is_applied(tmp_path):
    Image.fromarray(GREY).convert("RGB").save(
        tmp_path / "x.png", icc_profile=rgb_profile(SRGB_PRIMARIES, curve(gamma=2.2))
    )
    expected = repeat(encode_srgb((GREY / 255) ** (563 / 256)))
    np.testing.assert_allclose(pixels(tmp_path / "x.png"), expected, atol=1.2)
    assert np.abs(expected - repeat(GREY)).max() < 9


def test_transparent_pixels_stay_white_under_a_profile(tmp_path):
    rgba = np.dstack([PICTURE, np.zeros((5, 7), np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "x.png", icc_profile=ADOBE_RGB)
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), 255)


@pytest.mark.parametrize("kind", ["L", "LA", "I;16"])
def test_grey_profile_is_applied(tmp_path, kind):
    image = Image.fromarray(DEEP_GREY.astype(np.uint16) if kind == "I;16" else GREY)
    (image.convert("LA") if kind == "LA" else image).save(tmp_path / "x.png", icc_profile=LINEAR_GREY)
    np.testing.assert_allclose(pixels(tmp_path / "x.png"), repeat(encode_srgb(GREY / 255)), atol=1)


def test_grey_image_with_a_colour_profile(tmp_path):
    linear_rgb = rgb_profile(SRGB_PRIMARIES, curve(gamma=1.0))
    Image.fromarray(GREY).save(tmp_path / "x.png", icc_profile=linear_rgb)
    np.testing.assert_allclose(pixels(tmp_path / "x.png"), repeat(encode_srgb(GREY / 255)), atol=1)


@pytest.mark.parametrize(("name", "tolerance"), [("x.tif", 1), ("x.jpg", 3)])
def test_cmyk_profile_is_applied_to_the_inks(tmp_path, name, tolerance):
    inks = np.zeros((8, 16, 4), np.uint8)
    inks[:, 8:, 0] = 255  # cyan, which this profile calls L* = 50: linear light 0.1842, sRGB 119
    Image.fromarray(inks, "CMYK").save(tmp_path / name, icc_profile=cmyk_profile(), quality=100)
    expected = repeat(np.repeat([[255, 119]], 8, axis=1).repeat(8, axis=0))
    np.testing.assert_allclose(pixels(tmp_path / name), expected, atol=tolerance)


# Refusals


def write_bad(path, kind):
    """Write a file that cannot be opened."""
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "postscript":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        write_png(path, np.zeros((1, 1), int), 8, 0)
        header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
        content = path.read_bytes()
        path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    elif kind == "float":
        Image.fromarray(GREY.astype(np.float32)).save(path, "TIFF")
    elif kind == "range":
        Image.fromarray(DEEP_GREY.astype(np.int32) - 5).save(path, "TIFF")
    elif kind == "lab":
        write_tiff(path, PICTURE.tobytes(), (7, 5), 8, 8, samples=3)
    elif kind == "heic":
        path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    elif kind == "film":
        path.write_bytes(b"\0\0\0\x18ftypisom\0\0\0\0isommp42")


BAD = {
    "missing": "No such file or directory",
    "folder": "Is a directory",
    "empty": "the file is empty",
    "text": "in no format that is read here",
    "film": "in no format that is read here",
    "postscript": "in no format that is read here",
    "bomb": "image: Image size (3600000000 pixels)",
    "float": "mode F, without a fixed range",
    "lab": "mode LAB, without a fixed range",
    "range": "from -5 to 65530, not from 0 to 65535",
    "heic": "needs `pip install pillow-heif`",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_with_the_reason(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    path = tmp_path / "bad.png"
    write_bad(path, kind)
    with pytest.raises(UserError) as caught:
        open_rgb(path)
    assert str(path) in str(caught.value) and BAD[kind] in str(caught.value)
    assert BAD[kind].removeprefix("image: ") in inspect_images([path]).unreadable[path]


ENCODINGS = {
    "jpg": {"format": "JPEG"},
    "progressive": {"format": "JPEG", "progressive": True},
    "lossless": {"format": "WEBP", "lossless": True},
    "lzw": {"format": "TIFF", "compression": "tiff_lzw"},
    **{name: {"format": name} for name in ("PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")},
}


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.98])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_files_that_are_cut_off(tmp_path, encoding, kept):
    path = tmp_path / "x.jpg"
    NOISE.save(path, **ENCODINGS[encoding])
    assert open_rgb(path).size == (128, 96)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match="damaged"):
        open_rgb(path)
    assert list(inspect_images([path]).unreadable) == [path]


def test_corrupt_png_data(tmp_path):
    path = tmp_path / "x.png"
    NOISE.save(path)
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        open_rgb(path)
    assert path in inspect_images([path]).unreadable


def test_inspection_goes_on_after_bad_files_and_keeps_the_order(tmp_path):
    paths = [tmp_path / name for name in ("b.jpg", "bad.jpg", "a.png", "c.png", "none.png")]
    Image.new("RGB", (30, 1)).save(paths[0])
    paths[1].write_bytes(b"bad")
    Image.new("RGBA", (3, 200)).save(paths[2])
    Image.new("L", (9, 9)).save(paths[3])
    inspection = inspect_images(iter(paths))
    assert list(inspection.sizes.items()) == [(paths[0], (30, 1)), (paths[2], (3, 200)), (paths[3], (9, 9))]
    assert list(inspection.unreadable) == [paths[1], paths[4]]
    assert inspection.transparent == (paths[2],)


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="needs a list of open files")
def test_no_file_stays_open(tmp_path):
    for number, kind in enumerate(KINDS):
        write_picture(tmp_path / f"{number}.png", kind)
    for kind in BAD:
        write_bad(tmp_path / f"{kind}.png", kind)
    open_before, kept = len(os.listdir("/dev/fd")), []
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for path in tmp_path.iterdir():
            kept.append(inspect_images([path]))
            try:
                kept.append(open_rgb(path))
            except UserError as error:
                kept.append(error)
    assert len(os.listdir("/dev/fd")) == open_before


@pytest.mark.parametrize("name", ["x.heic", "x.jpg"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_heic(tmp_path, name, orientation):
    pillow_heif = pytest.importorskip("pillow_heif")
    upright = np.kron(PICTURE[:4, :5], np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    pillow_heif.from_pillow(stored).save(tmp_path / name, quality=-1, exif=exif.tobytes())
    np.testing.assert_allclose(pixels(tmp_path / name), upright, atol=3)
    assert inspect_images([tmp_path / name]).sizes == {tmp_path / name: (80, 64)}


# Saving


def test_saved_png_keeps_its_pixels_and_takes_no_old_profile_along(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "old.png", icc_profile=ADOBE_RGB)
    once = open_rgb(tmp_path / "old.png")
    save_png(once, tmp_path / "new.png")
    np.testing.assert_array_equal(pixels(tmp_path / "new.png"), np.asarray(once))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.png", "old.png"]


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.png"
    save_png(Image.fromarray(PICTURE), path)
    with pytest.raises(OSError, match="CMYK"):
        save_png(Image.new("CMYK", (2, 2)), path)
    np.testing.assert_array_equal(pixels(path), PICTURE)
    assert list(tmp_path.iterdir()) == [path]


def test_save_is_complete_and_hidden_until_it_is_renamed(tmp_path, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, target: (seen.append(look(source, target)), replace(source, target))
    )
    save_png(Image.fromarray(PICTURE), tmp_path / "x.png")
    (same_folder, name, exists, content), permissions = seen[0], (tmp_path / "x.png").stat().st_mode
    assert same_folder and name.startswith(".") and not exists
    np.testing.assert_array_equal(content, PICTURE)
    (tmp_path / "plain").touch()
    assert permissions == (tmp_path / "plain").stat().st_mode  # as any new file, not private like a temporary one


def look(source, target):
    """Describe a file just before its rename."""
    return source.parent == target.parent, source.name, target.exists(), pixels(source)


# Grids


def test_grid_holds_every_image_unchanged_in_its_place():
    shades = [Image.new("RGB", (60, 40), (0, shade, 255)) for shade in (10, 20, 30, 40, 50)]
    grid = np.asarray(make_grid(shades, columns=2))
    boxes = [np.argwhere((grid == (0, shade, 255)).all(-1)) for shade in (10, 20, 30, 40, 50)]
    corners = [tuple(box.min(0)) for box in boxes]
    assert all(len(box) == 60 * 40 and tuple(box.max(0) - box.min(0)) == (39, 59) for box in boxes)
    (top, left), (second_top, _) = corners[0], corners[2]
    step = corners[1][1] - left
    assert corners == [(t, c) for t in (top, second_top, corners[4][0]) for c in (left, left + step)][:5]
    assert 60 < step <= 70 and 40 < second_top - top <= 60 and grid.shape[1] == left + 2 * step
    painted = sum(len(box) for box in boxes)
    assert (grid == 255).all(-1).sum() == grid.shape[0] * grid.shape[1] - painted


def test_grid_centres_smaller_images():
    grid = np.asarray(make_grid([Image.new("RGB", (100, 80), "red"), Image.new("RGB", (40, 20), "blue")], columns=1))
    red, blue = (np.argwhere((grid == color).all(-1)) for color in ((255, 0, 0), (0, 0, 255)))
    assert blue.min(0)[1] - red.min(0)[1] == 30 and red.max(0)[1] - blue.max(0)[1] == 30
    gap = red.min(0)[1]
    assert blue.min(0)[0] - red.max(0)[0] - 1 >= 30 + gap


def ink(grid, rows, columns):
    """Count the pixels of a part of a grid that are not white."""
    return int((np.asarray(grid)[rows, columns] != 255).any(-1).sum())


def test_texts_are_written_where_they_belong():
    images = [Image.new("RGB", (120, 50), "white")] * 4
    labels = ["one", "two", "three", "four"]
    everything = slice(None)
    plain = make_grid(images, 2)
    assert ink(plain, everything, everything) == 0
    labelled = make_grid(images, 2, labels)
    assert labelled.width == plain.width and labelled.height > plain.height + 2 * 12
    assert ink(labelled, slice(0, 50), everything) == 0 and ink(labelled, slice(50, 90), everything) > 50
    titled = make_grid(images, 2, title="A title")
    lower = titled.height - plain.height
    assert 12 < lower < 40 and ink(titled, slice(0, lower), everything) > 50
    assert ink(titled, slice(lower, None), everything) == 0
    rowed = make_grid(images, 2, row_labels=["step 0", "step 1"])
    shift = rowed.width - plain.width
    assert rowed.height == plain.height and 30 < shift <= 80
    assert ink(rowed, everything, slice(0, shift)) > 50 and ink(rowed, everything, slice(shift, None)) == 0


@pytest.mark.parametrize("label", ["word " * 100, "w" * 400, "日本語" * 100, "a\nb " * 200])
def test_long_labels_stay_in_their_cell_and_are_shortened(label):
    images = [Image.new("RGB", (120, 50), "white")] * 3
    three_lines = make_grid(images, 3, ["", "w" * 40, ""])
    grid = make_grid(images, 3, ["", label, ""])
    assert grid.size == three_lines.size
    assert grid.height == make_grid(images, 3, ["", "w", ""]).height + 2 * 16
    cell = (grid.width - 6) // 3
    assert ink(grid, slice(None), slice(6 + cell - 7, 6 + 2 * cell)) > 100
    assert ink(grid, slice(None), slice(0, cell)) == 0 and ink(grid, slice(None), slice(6 + 2 * cell, None)) == 0
    if " " not in label:
        longer = make_grid(images, 3, ["", label + "the end", ""])
        np.testing.assert_array_equal(np.asarray(longer), np.asarray(grid))


def test_a_row_is_as_high_as_its_own_labels():
    images = [Image.new("RGB", (120, 50), "white")] * 4
    short, long = (make_grid(images, 2, ["a", "b", label, "d"]) for label in ("c", "w" * 400))
    np.testing.assert_array_equal(np.asarray(short)[:80], np.asarray(long)[:80])
    assert long.height == short.height + 2 * 16


@pytest.mark.parametrize(
    ("text", "fits", "lines"),
    [
        ("one two three", "one two thr", "one two\nthree"),
        ("  one\n two ", "one two", "one two"),
        ("wwwwwww", "wwww", "wwww\nwww"),
        ("aa aa aa aa aa aa", "aa aaa", "aa aa\naa aa\naa aa"),
        ("aa aa aa aa", "aaa", "aa\naa\na…"),
        ("", "a", ""),
    ],
)
def test_wrapping(text, fits, lines):
    font = ImageFont.load_default(12)
    assert _wrap(text, font, font.getlength(fits)) == lines


@pytest.mark.parametrize(("text", "drawn"), [("naïve café", "naive cafe"), ("e\u0301", "e"), ("1–2", "1-2")])
def test_letters_that_the_font_lacks_are_drawn_plainly(text, drawn):
    image = [Image.new("RGB", (120, 20))]
    np.testing.assert_array_equal(np.asarray(make_grid(image, 1, [text])), np.asarray(make_grid(image, 1, [drawn])))


@pytest.mark.parametrize(
    ("count", "columns", "options", "message"),
    [
        (0, 1, {}, "0 images and 1 columns"),
        (1, 0, {}, "1 images and 0 columns"),
        (3, 2, {"labels": ["a"]}, "1 labels do not fit 3 images"),
        (3, 2, {"row_labels": ["a"]}, "1 row labels do not fit 2 rows"),
    ],
)
def test_grid_refuses_what_does_not_fit(count, columns, options, message):
    with pytest.raises(ValueError, match=message):
        make_grid([Image.new("RGB", (4, 4))] * count, columns, **options)


# ----------------------------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize("edges", [(2, 1), (3, 1), (4, 3), (1000, 37), (37, 100), (5, 5)])
def test_shrinking_stepwise_ends_at_the_size(tmp_path, edges):
    """However small, and whether there is anything to shrink; a plain picture stays plain."""
    Image.new("RGB", (edges[0], edges[0]), (10, 200, 90)).save(tmp_path / "plain.png")
    found = decode_images.open_scaled(tmp_path / "plain.png", (edges[1], edges[1]), Image.Resampling.LANCZOS, True)
    assert found.size == (edges[1], edges[1])
    assert set(found.get_flattened_data()) == {(10, 200, 90)}


def test_shrinking_stepwise_is_close_to_one_step_and_softer(tmp_path):
    """Of a picture with fine detail: a mean difference of few levels, and less contrast between neighbours."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    sizes = (tmp_path / "noise.png", (60, 60), Image.Resampling.LANCZOS)
    one, many = (np.asarray(decode_images.open_scaled(*sizes, stepwise), int) for stepwise in (False, True))
    assert 0 < np.abs(one - many).mean() < 10
    assert np.abs(np.diff(many, axis=0)).mean() < np.abs(np.diff(one, axis=0)).mean()


def test_pictures_are_remembered_up_to_their_bytes(monkeypatch):
    """Those that were used last; one that is larger than all of the memory, too, until the next one."""
    made = []

    @decode_images.ByteLimitedCache
    def draw(number: int, edge: int) -> Image.Image:
        """Draw a picture."""
        made.append(number)
        return Image.new("RGB", (edge, edge), (number, 0, 0))

    monkeypatch.setattr(decode_images.ByteLimitedCache, "BUDGET", 3 * 10 * 10 * 4)  # three of 10 px
    for number in (0, 1, 2, 0, 1, 2, 0, 3, 2, 0, 1):
        assert draw(number, 10).getpixel((0, 0)) == (number, 0, 0)
    assert made == [0, 1, 2, 3, 1], "1 was used longest ago when 3 came"
    assert draw(4, 100).size == (100, 100) and draw.size == 40_000 and len(draw.kept) == 1
    assert draw(0, 10).size == (10, 10) and draw.size == 400 and draw.__name__ == "draw"


def test_a_size_is_read_once_for_each_state_of_a_file(tmp_path):
    """Another picture under the same name has its own size; one that is gone is an error."""
    path = tmp_path / "photo.png"
    Image.new("RGB", (6, 4)).save(path)
    assert decode_images.upright_size(path) == (6, 4)
    Image.new("RGB", (40, 60)).save(path)
    assert decode_images.upright_size(path) == (40, 60)
    path.unlink()
    with pytest.raises(UserError, match="photo"):
        decode_images.upright_size(path)
