"""Sizes and crops against hand values and, for every small picture, against what the words promise."""

import itertools
from fractions import Fraction

import pytest

from utils.data.geometry import (
    UNITS,
    Shrinking,
    Size,
    bucket_step,
    choose_bucket,
    cover,
    cut_off,
    find_shrinking_problems,
    find_size_problems,
    list_buckets,
    parse_list,
    scaled_size,
    shifted_center,
)

JUNK = [
    *("0", "0x64", "64x0", "-5", "-64x64", "64x-64", "", " ", "x", "64x", "x64", "64x64x64", "64 64", "64,64", "1.5"),
    *("64.0", "1e3", "64px", "big", "None", "٦٤", "²", "6_4", "+64", "64*64", "1234567", "9" * 5000, 0, -1, 64.0),
]


@pytest.mark.parametrize(
    ("text", "size", "written"),
    [
        ("512", (512, 512), "512"),
        (512, (512, 512), "512"),
        ("96x64", (96, 64), "96x64"),
        ("64x96", (64, 96), "64x96"),
        ("96X64", (96, 64), "96x64"),
        ("96×64", (96, 64), "96x64"),
        (" 96x64\n", (96, 64), "96x64"),
        ("64x64", (64, 64), "64"),
        ("0064", (64, 64), "64"),
        ("1", (1, 1), "1"),
    ],
)
def test_sizes_are_read_and_written(text, size, written):
    """Width comes first, a square has one number, and what is written is read again."""
    parsed = Size.parse(text)
    assert parsed == size and (parsed.width, parsed.height) == size and type(parsed) is Size
    assert str(parsed) == f"{parsed}" == written and Size.parse(written) == parsed


@pytest.mark.parametrize("text", JUNK)
def test_what_is_no_size_is_refused(text):
    """The sentence has the value and says what a size looks like."""
    with pytest.raises(
        ValueError, match=r"is no size: give .* such as 512, or WIDTHxHEIGHT, such as 96x64\.$"
    ) as error:
        Size.parse(text)
    assert str(error.value).startswith(str(text).strip() or "an empty text is")


def test_lists_of_sizes():
    """Commas separate; order and repetitions stay."""
    assert parse_list("64,96,64x96") == [(64, 64), (96, 96), (64, 96)]
    assert parse_list(" 64 , 64 ") == [(64, 64), (64, 64)] and parse_list(64) == [(64, 64)]
    for text in ("", "64,", ",64", "64,,96", "64;96", "64,0"):
        with pytest.raises(ValueError, match="is no size"):
            parse_list(text)


def test_problems_of_a_flag():
    """None and good values give none, others one sentence that starts with the flag and its value."""
    for text, many in ((None, False), (None, True), (64, False), ("96x64", False), ("64", True), ("64,96", True)):
        assert find_size_problems("--resolution", text, many) == []
    (single,) = find_size_problems("--resolution", "64,96")
    assert single.startswith("--resolution 64,96 is no size: give the edge of a square in pixels, such as 512")
    (listed,) = find_size_problems("--resolution", "64,0x5", many=True)
    assert listed.startswith("--resolution 64,0x5: 0x5 is no size: give ") and listed.endswith("between two sizes.")
    assert find_size_problems("--resolution", "")[0].startswith("--resolution an empty text is no size")


# Covering


@pytest.mark.parametrize(
    ("size", "target", "covered"),
    [
        ((80, 64), (64, 64), (80, 64)),
        ((100, 90), (64, 64), (71, 64)),
        ((90, 100), (64, 64), (64, 71)),
        ((30, 50), (16, 16), (16, 27)),
        ((50, 30), (16, 16), (27, 16)),
        ((32, 16), (64, 64), (128, 64)),
        ((4000, 3000), (512, 512), (683, 512)),
        ((4000, 3000), (96, 64), (96, 72)),
        ((4000, 3000), (64, 96), (128, 96)),
        ((64, 96), (64, 96), (64, 96)),
        ((1, 1000), (8, 8), (8, 8000)),
        ((1000, 1), (8, 8), (8000, 8)),
        ((6553601, 6553600), (64, 64), (64, 64)),
        ((3, 5), (2, 2), (2, 3)),
    ],
)
def test_covering_by_hand(size, target, covered):
    """One edge fits and the other is as long as the shape asks for, or a little longer than the target."""
    assert cover(size, Size(*target)) == covered


def test_covering_of_every_small_picture():
    """At no edge smaller than the target, exact at one, and within half a pixel of the same shape."""
    for width, height, wide, high in itertools.product(range(1, 20), range(1, 20), range(1, 9), range(1, 9)):
        covered = cover((width, height), Size(wide, high))
        scale = max(Fraction(wide, width), Fraction(high, height))
        assert covered[0] >= wide and covered[1] >= high and (covered[0] == wide or covered[1] == high)
        assert abs(covered[0] - width * scale) <= Fraction(1, 2) and abs(covered[1] - height * scale) <= Fraction(1, 2)


# Crops off the centre


@pytest.mark.parametrize(
    ("margins", "target", "shift", "place"),
    [
        ((20, 0), (64, 64), (0.0, 0.0), (10, 0)),
        ((21, 7), (64, 64), (0.0, 0.0), (10, 3)),
        ((100, 100), (64, 64), (1.0, -1.0), (56, 44)),
        ((100, 100), (64, 256), (1.0, 1.0), (56, 76)),
        ((100, 100), (256, 64), (-1.0, -1.0), (24, 44)),
        ((100, 100), (64, 64), (0.5, -0.25), (53, 48)),
        ((6, 6), (64, 64), (1.0, -1.0), (6, 0)),
        ((0, 0), (64, 64), (1.0, -1.0), (0, 0)),
        ((1, 1), (512, 512), (1.0, -1.0), (1, 0)),
    ],
)
def test_shifted_crops_by_hand(margins, target, shift, place):
    """From the centre by a tenth of the crop's edge at most, and never out of the picture."""
    assert shifted_center(*margins, Size(*target), shift) == place


def test_shifted_crops_stay_inside():
    """For all margins and shifts, within the picture and within a tenth of the edge; on average in the middle."""
    shifts = [step / 10 for step in range(-10, 11)]
    for margin_x, margin_y, edge in itertools.product(range(0, 31, 3), range(0, 31, 5), (8, 30, 64)):
        places = [shifted_center(margin_x, margin_y, Size(edge, edge * 2), (shift, -shift)) for shift in shifts]
        for left, top in places:
            assert 0 <= left <= margin_x and abs(left - margin_x // 2) <= edge / 10 + 0.5
            assert 0 <= top <= margin_y and abs(top - margin_y // 2) <= edge / 5 + 0.5
        assert places == sorted(places, key=lambda place: (place[0], -place[1]))


# ----------------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize(("edge", "step", "most"), [(512, 64, 0.05), (768, 64, 0.05), (512, 8, 0.015)])
@pytest.mark.parametrize("spread", ["ratios", "logarithms"])
def test_little_is_cut_off(edge, step, most, spread):
    """Of 1,000 shapes from 1:2 to 2:1, buckets within a tenth of the area cut off little on average."""
    target = Size(edge, edge)
    buckets = list_buckets(target, step, "pixel_area")
    shapes = [place / 999 for place in range(1000)]
    shapes = [0.5 + 1.5 * place if spread == "ratios" else 2 ** (2 * place - 1) for place in shapes]
    sizes = [(round(4000 * shape), 4000) for shape in shapes]
    assert sum(cut_off(size, choose_bucket(size, buckets, target)) for size in sizes) / 1000 <= most


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("target", "step"), [(Size(512, 512), 64), (Size(64, 64), 8), (Size(512, 640), 8), (Size(480, 480), 64)]
)
def test_buckets_keep_their_promises(target, step, unit):
    """Edges are multiples, areas within a tenth, shapes within 1:4; the resolution itself is among them, once."""
    buckets = list_buckets(target, step, unit)
    assert target in buckets and len(set(buckets)) == len(buckets)
    for bucket in buckets:
        if bucket == target:
            continue
        assert max(bucket) % step == 0 or max(bucket) == min(target)
        assert unit == "pixel" or min(bucket) % step == 0
        assert 1 / 4 <= bucket.width / bucket.height <= 4
        assert Size(bucket.height, bucket.width) in buckets
        if unit == "pixel_area":
            assert abs(bucket.width * bucket.height / (target.width * target.height) - 1) <= 0.1
        else:
            assert min(bucket) == min(target), "only the longer edge is a multiple"


def test_a_square_photo_has_the_resolution_as_its_bucket():
    """A photo of the resolution's own shape is cut to it, whatever else fits as well."""
    for edge, step in ((512, 64), (512, 8), (64, 8), (256, 32)):
        target = Size(edge, edge)
        assert choose_bucket((1000, 1000), list_buckets(target, step, "pixel_area"), target) == target


def test_of_two_buckets_that_cut_as_little_one_is_chosen_by_area_and_then_by_width():
    """Whatever their order: a photo's bucket must not depend on how they were listed."""
    target, near, far = Size(64, 64), Size(56, 72), Size(48, 80)
    doubled, halved = Size(112, 144), Size(28, 36)
    assert choose_bucket((560, 720), [doubled, near, halved, far], target) == near
    assert choose_bucket((560, 720), [halved, far, near, doubled], target) == near
    turned = [Size(32, 64), Size(64, 32)]  # each cuts off half of a square, to the last bit
    assert choose_bucket((64, 64), turned, target) == choose_bucket((64, 64), turned[::-1], target) == Size(32, 64)


def test_the_usual_step_follows_from_the_resolution():
    """64 px for Stable Diffusion, 8 for IF's stage I, 32 for its stage II; less for small models."""
    sizes = {(512, 8): 64, (768, 8): 64, (1024, 8): 64, (256, 8): 32, (64, 8): 8, (64, 4): 8, (24, 8): 8, (256, 4): 32}
    assert {key: bucket_step(Size(key[0], key[0]), key[1]) for key in sizes} == sizes


def test_only_pictures_above_the_maximum_keep_more_than_the_crop():
    """They are scaled to the wanted measure, and never to less than the crop needs."""
    target, by_edge, by_area = Size(64, 64), Shrinking(200, 100, "pixel"), Shrinking(200, 100, "pixel_area")
    assert scaled_size((200, 300), target, by_edge) == (64, 96)
    assert scaled_size((202, 303), target, by_edge) == (100, 150)
    assert scaled_size((100, 400), target, by_area) == (64, 256)
    assert scaled_size((100, 500), target, by_area) == (64, 320), "100 px of area would not cover 64 px"
    assert scaled_size((300, 300), target, by_area) == (100, 100)
    assert scaled_size((4000, 4000), target, Shrinking()) == (64, 64)
    for given in ((100, None), (None, 100), (100, 101)):
        assert len(find_shrinking_problems(*given)) == 1
    assert find_shrinking_problems(None, None) == find_shrinking_problems(100, 100) == []
