"""Measures with their standard errors."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A measure, and by how much it would vary if everything were drawn again from other seeds."""

    value: float
    error: float | None  # None: too few seeds to tell


def estimate(items: Sequence[Any], measure: Callable[[Sequence[Any]], float]) -> Estimate:
    """Return a measure of all items, and its standard error over seeds by the jackknife.

    Pictures of one seed share their noise, so seeds are left out as a whole, one at a time. With d_i the measure
    without the i-th of S seeds, the error is sqrt((S - 1) / S * sum((d_i - mean of d)^2)); for a mean over seeds it is
    the standard deviation divided by the root of S.

    Args:
        items: Each with a `seed`.
    """
    seeds = sorted({item.seed for item in items})
    if len(seeds) < 2:
        return Estimate(measure(items), None)
    without = [measure([item for item in items if item.seed != seed]) for seed in seeds]
    return Estimate(measure(items), math.sqrt((len(seeds) - 1) * float(np.var(without))))


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error)
