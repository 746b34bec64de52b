"""In which order pictures come, batch by batch: a function of a seed and of the batch's number alone."""

import functools
import math
from fractions import Fraction
from typing import Any, NamedTuple

from utils.core.seeds import derive_seed, shuffled
from utils.data.geometry import Size


class Visit(NamedTuple):
    """An example's index, and how often it was visited before."""

    example: int
    earlier_visits: int


class Pair(NamedTuple):
    """A photo, the class image beside it, if there is one, and the size in pixels that both are cut to."""

    photo: Visit
    class_image: Visit | None
    size: Size


class BatchOrder:
    """Endless passes over the photos, in each of which every photo comes as often as its concept is repeated.

    A batch holds photos of one size. If all have the same, batches are always full: one pass runs on into the next.
    If not, a pass is cut into batches of one size each, which come in a shuffled order, and what is left of a size
    makes a smaller batch: in a pass no photo is left out, and none comes more often than it should.

    Beside each photo stands a class image: the next one of its concept's own and of all regularisation data, in
    endless passes over those.
    """

    def __init__(self, examples: list[Any], batch: int, seed: int):
        """Take the script's `Example`s, how many photos make a batch, and a seed."""
        self._examples, self.batch, self._seed = examples, batch, seed
        photos = [index for index, example in enumerate(examples) if not example.is_prior]
        self._visits = [(index, turn) for index in photos for turn in range(examples[index].concept.repeats)]
        sizes = [examples[index].size for index, _ in self._visits]
        self.counts = {size: sizes.count(size) for size in dict.fromkeys(sizes)}  # visits in a pass, of each size
        concepts = [examples[index].concept for index, _ in self._visits]
        self._concept_counts = {concept: concepts.count(concept) for concept in dict.fromkeys(concepts)}
        self._partners = {concept: self._list_partners(concept) for concept in self._concept_counts}
        self._pass = functools.lru_cache(maxsize=4)(self._arrange)  # a batch may reach over two passes

    @property
    def has_partners(self) -> bool:
        """Whether class images stand beside the photos."""
        return any(self._partners.values())

    @property
    def pass_length(self) -> Fraction:
        """The batches of a pass over the photos; of one size it may end within a batch."""
        if len(self.counts) == 1:
            return Fraction(len(self._visits), self.batch)
        return Fraction(sum(math.ceil(count / self.batch) for count in self.counts.values()))

    @property
    def epoch_length(self) -> int:
        """The batches until every photo has come, and every class image as well."""
        passes = [Fraction(len(found), self._concept_counts[one]) for one, found in self._partners.items()]
        return math.ceil(self.pass_length * max([Fraction(1), *passes]))

    def __getitem__(self, number: int) -> list[Pair]:
        """Return a batch, counted from 0 over all passes."""
        if len(self.counts) == 1:
            places = range(number * self.batch, (number + 1) * self.batch)
            found = [divmod(place, len(self._visits)) for place in places]
            return [self._pair(turn, *self._pass(turn)[0][position]) for turn, position in found]
        turn, position = divmod(number, int(self.pass_length))
        return [self._pair(turn, *entry) for entry in self._pass(turn)[position]]

    def _list_partners(self, concept: Any) -> list[tuple[int, int, int]]:
        """Return what may stand beside a concept's photos: index, which of its repeats in a pass, and of how many."""
        found = []
        for index, example in enumerate(self._examples):
            shared = example.concept.is_regularisation_data
            if example.is_prior and (shared or example.concept == concept):
                repeats = example.concept.repeats if shared else 1
                found += [(index, turn, repeats) for turn in range(repeats)]
        return found

    def _arrange(self, turn: int) -> list[list[tuple[int, int, int]]]:
        """Return a pass as batches of (index, repeat, rank within the concept); of one size as a single long one."""
        places = shuffled(len(self._visits), derive_seed(self._seed, "order", "instance", turn))
        by_size = {size: [] for size in self.counts}
        for visit in [self._visits[place] for place in places]:
            by_size[self._examples[visit[0]].size].append(visit)
        batches = list(by_size.values())
        if len(batches) > 1:
            step = self.batch
            cut = [visits[at : at + step] for visits in batches for at in range(0, len(visits), step)]
            batches = [cut[place] for place in shuffled(len(cut), derive_seed(self._seed, "order", "batches", turn))]
        seen, ranked = dict.fromkeys(self._concept_counts, 0), []
        for batch in batches:
            ranked.append([])
            for index, repeat in batch:
                concept = self._examples[index].concept
                ranked[-1].append((index, repeat, seen[concept]))
                seen[concept] += 1
        return ranked

    def _pair(self, turn: int, index: int, repeat: int, rank: int) -> Pair:
        """Return an entry of a pass as visits, counted over all passes."""
        example = self._examples[index]
        photo = Visit(index, turn * example.concept.repeats + repeat)
        partners, beside = self._partners[example.concept], None
        if partners:
            number = turn * self._concept_counts[example.concept] + rank
            turn, position = divmod(number, len(partners))
            order = shuffled(len(partners), derive_seed(self._seed, "order", "class", turn))
            partner, repeat, repeats = partners[order[position]]
            beside = Visit(partner, turn * repeats + repeat)
        return Pair(photo, beside, example.size)


def split_batch(count: int, rank: int, processes: int) -> tuple[range, float]:
    """Return which places of a batch are a process's own, and the part of each in the mean of its losses.

    As processes average their gradients, each counts its own pictures `processes / count` times. Where there are
    fewer pictures than processes, those without one compute the first with weight 0, because all must join the
    all-reduce.
    """
    first, last = (count * place // processes for place in (rank, rank + 1))
    return (range(first, last), processes / count) if first < last else (range(1), 0.0)
