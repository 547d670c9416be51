"""Ratios of times measured in pairs: the median, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """Median of the pairs' ratios."""

    median: float
    low: float
    high: float
    """95% percentile bootstrap; pairs are resampled whole."""
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"


def ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Ratio:
    """Ours over theirs. What disturbs both sides of a pair alike (a slower clock, a neighbour) cancels within it.

    Raises:
        ValueError: the sides differ in number, or there are none, or a time is not above 0.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} times and {len(theirs)}: pairs need as many of each, and at least one")
    if min(*ours, *theirs) <= 0:
        raise ValueError("a time that is not above 0")
    each = np.asarray(ours, dtype=float) / np.asarray(theirs, dtype=float)
    drawn = np.random.default_rng(seed).integers(0, len(each), (RESAMPLES, len(each)))
    low, high = np.percentile(np.median(each[drawn], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(each)), float(low), float(high), len(each))


def median(values: Sequence[float]) -> float:
    return float(np.median(values))
