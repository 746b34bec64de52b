"""Which pictures make a batch: passes without gaps or doubles, batches of one size, partners of the same concept."""

import collections
import math
import random
from types import SimpleNamespace

import pytest

from utils.data.batch_order import BatchOrder, split_batch
from utils.data.concepts import Concept
from utils.data.geometry import Size, choose_bucket, list_buckets

NOTHING = dict.fromkeys(Concept._fields)


def concept(number: int = 0, **values) -> Concept:
    """Return a concept that has only what an order goes by."""
    return Concept(**NOTHING | {"number": number, "repeats": 1, "is_regularisation_data": False} | values)


def examples_of(one: Concept, sizes: list[Size], is_prior: bool = False) -> list[SimpleNamespace]:
    """Return an example for each size."""
    return [SimpleNamespace(concept=one, size=size, is_prior=is_prior) for size in sizes]


def test_one_size_fills_every_batch_and_passes_run_on():
    """Each photo comes once before any comes again, whatever the batch; visits are counted."""
    order = BatchOrder(examples_of(concept(), [Size(8, 8)] * 5), batch=4, seed=3)
    visits = [pair.photo for number in range(10) for pair in order[number]]
    assert len(visits) == 40
    for turn in range(8):
        part = visits[5 * turn : 5 * turn + 5]
        assert sorted(visit.example for visit in part) == list(range(5))
        assert {visit.earlier_visits for visit in part} == {turn}
    assert order.epoch_length == 2 and len({tuple(visits[at : at + 5]) for at in range(0, 40, 5)}) > 1


@pytest.mark.parametrize("batch", [1, 4, 7, 64])
def test_a_thousand_sizes_each_once_a_pass(batch):
    """Of 1,000 shapes from 1:2 to 2:1 none is missing from a pass and none comes twice; batches have one size."""
    chance = random.Random(1)
    edges = [(round(900 * 2 ** chance.uniform(-0.5, 0.5)), 900) for _ in range(1000)]
    target = Size(512, 512)
    buckets = list_buckets(target, 64, "pixel_area")
    order = BatchOrder(examples_of(concept(), [choose_bucket(size, buckets, target) for size in edges]), batch, seed=1)
    assert order.epoch_length == order.pass_length == sum(math.ceil(n / batch) for n in order.counts.values())
    for turn in range(2):
        numbers = range(turn * order.epoch_length, (turn + 1) * order.epoch_length)
        batches = [order[number] for number in numbers]
        assert sorted(pair.photo.example for pairs in batches for pair in pairs) == list(range(1000))
        assert {pair.photo.earlier_visits for pairs in batches for pair in pairs} == {turn}
        assert all(len({pair.size for pair in pairs}) == 1 and len(pairs) <= batch for pairs in batches)
    short = collections.Counter(pairs[0].size for pairs in batches if len(pairs) < batch)
    assert set(short.values()) <= {1}, "of each size at most the last batch is smaller"


def test_sizes_come_in_a_shuffled_order_that_the_seed_decides():
    """Batches of one size do not come one after the other, and another seed gives another order."""
    examples = examples_of(concept(), [Size(8, 8)] * 40 + [Size(8, 16)] * 40)
    orders = [[BatchOrder(examples, 4, seed)[number] for number in range(20)] for seed in (1, 1, 2)]
    sizes = [pairs[0].size for pairs in orders[0]]
    assert sizes not in (sorted(sizes), sorted(sizes, reverse=True))
    assert orders[0] == orders[1] != orders[2]


def test_a_batch_depends_on_its_number_alone():
    """A batch that is asked for first is what it is after all others."""
    make = [concept(1, repeats=3), concept(2)]
    examples = examples_of(make[0], [Size(8, 8)] * 3 + [Size(8, 16)] * 4) + examples_of(make[1], [Size(8, 8)] * 5)
    whole = BatchOrder(examples, 4, 9)
    in_turn = [whole[number] for number in range(40)]
    for number in (39, 17, 0):
        assert BatchOrder(examples, 4, 9)[number] == in_turn[number]


@pytest.mark.parametrize("sizes", [[Size(8, 8)], [Size(8, 8), Size(8, 16)]])
def test_repeats_weigh_concepts(sizes):
    """A photo of a concept with 3 repeats comes three times a pass, each time as a visit of its own."""
    examples = examples_of(concept(1, repeats=3), sizes * 2) + examples_of(concept(2), sizes * 4)
    order = BatchOrder(examples, 1, 5)
    seen = collections.Counter()
    for number in range(2 * order.epoch_length):
        visit = order[number][0].photo
        assert visit.earlier_visits < 2 * (3 if visit.example < 2 * len(sizes) else 1)
        seen[visit] += 1
    assert set(seen.values()) == {1}
    counts = collections.Counter(visit.example for visit in seen)
    assert [counts[index] for index in range(len(examples))] == [6] * 2 * len(sizes) + [2] * 4 * len(sizes)


@pytest.mark.parametrize("sizes", [[Size(8, 8)], [Size(8, 8), Size(8, 16)]])
def test_class_images_stand_beside_photos_of_their_concept(sizes):
    """Partners are the concept's own and regularisation data, each once before any comes again, cut like the photo."""
    one, two, shared = concept(1), concept(2), concept(3, is_regularisation_data=True, repeats=2)
    examples = examples_of(one, sizes * 3) + examples_of(two, sizes * 2)
    first = len(examples)
    kinds = [(one, 4), (two, 3), (shared, 2)]
    examples += [example for kind, count in kinds for example in examples_of(kind, [None] * count, is_prior=True)]
    order = BatchOrder(examples, 2, 7)
    beside = {1: [], 2: []}
    for number in range(60):
        for pair in order[number]:
            kind = examples[pair.class_image.example].concept
            assert kind in (examples[pair.photo.example].concept, shared)
            assert pair.size == examples[pair.photo.example].size
            beside[examples[pair.photo.example].concept.number].append(pair.class_image)
    for number, own in ((1, range(first, first + 4)), (2, range(first + 4, first + 7))):
        expected = sorted([*own, *[first + 7, first + 8] * 2])  # both of the shared ones twice
        found = beside[number]
        for at in range(0, len(found) - len(expected), len(expected)):
            assert sorted(visit.example for visit in found[at : at + len(expected)]) == expected
        assert len(set(found)) == len(found), "every visit to a class image is a new one"


def test_an_epoch_has_shown_every_class_image():
    """It is as long as the passes that show all class images of the concept that has most of them."""
    examples = examples_of(concept(), [Size(8, 8)] * 5) + examples_of(concept(), [None] * 100, is_prior=True)
    assert BatchOrder(examples, 4, 0).epoch_length == 25
    assert BatchOrder(examples[:5], 4, 0).epoch_length == 2
    two = examples_of(concept(1), [Size(8, 8)] * 5) + examples_of(concept(2), [Size(8, 8)] * 5)
    order = BatchOrder(two + examples_of(concept(2), [None] * 12, is_prior=True), 2, 0)
    seen = {
        pair.class_image.example for number in range(order.epoch_length) for pair in order[number] if pair.class_image
    }
    assert seen == set(range(10, 22)) and order.epoch_length == 12


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_processes_share_a_batch_by_its_mean(count, processes):
    """Averaged over processes, the shares of all pictures are one mean; nobody is without a picture."""
    parts = [split_batch(count, rank, processes) for rank in range(processes)]
    assert all(len(places) for places, _ in parts)
    weights = [0.0] * count
    for places, share in parts:
        for place in places:
            weights[place] += share / processes
    assert weights == pytest.approx([1 / count] * count)
    assert max(len(places) for places, _ in parts) == math.ceil(count / processes)


@pytest.mark.parametrize("sizes", [[Size(8, 8)], [Size(8, 8), Size(8, 16)]])
def test_each_pass_has_an_order_of_its_own(sizes):
    """Photos, class images and batches of one size do not come in the order of the pass before."""
    photos = examples_of(concept(), sizes * 12)
    order = BatchOrder(photos + examples_of(concept(), [None] * 24, is_prior=True), 4, 3)
    passes = [[order[number] for number in range(at, at + 6)] for at in (0, 6, 12)]
    for part in ("photo", "class_image"):
        found = [[getattr(pair, part).example for pairs in batches for pair in pairs] for batches in passes]
        assert len({tuple(examples) for examples in found}) == 3
        assert len({tuple(sorted(examples)) for examples in found}) == 1
    if len(sizes) > 1:
        assert len({tuple(pairs[0].size for pairs in batches) for batches in passes}) > 1
