"""The simulated labeller: ranks answers in the embedded world by the exact grade plus noise, as noisily as people do."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from orchestration.data.preferences import Comparison
from orchestration.data.world.gold import grade


@dataclass(frozen=True)
class SimulatedLabeler:
    """Sees each answer's gold score with Gaussian noise of deviation `noise`, and ranks by what it sees."""

    noise: float
    seed: int

    def rank(self, comparison: Comparison) -> list[int]:
        """Ranks of the answers, 0 the best, no ties; a function of the seed and the comparison alone."""
        rng = random.Random(f"label {self.seed} {comparison.context.id}")
        seen = [gold + rng.gauss(0, self.noise) for gold in golds(comparison)]
        order = sorted(range(len(seen)), key=lambda i: -seen[i])
        return [order.index(i) for i in range(len(seen))]


def golds(comparison: Comparison) -> list[float]:
    """Exact grades of a comparison's answers."""
    return [grade(comparison.context, *answer) for answer in zip(comparison.answers, comparison.finished, strict=True)]


def noise_for(agreement: float, comparisons: Sequence[Comparison]) -> float:
    """The noise at which two labellers agree on `agreement` of these comparisons' pairs.

    A pair whose golds differ by d is ranked right with p = Phi(d / (noise sqrt 2)), and two labellers agree with p^2 + (1 - p)^2.

    Raises:
        ValueError: the answers are so alike that no noise gives that agreement.
    """
    gaps = [abs(a - b) for comparison in comparisons for a, b in combinations(golds(comparison), 2)]
    low, high = 1e-4, 10.0
    if expected_agreement(gaps, low) < agreement:
        raise ValueError(
            f"labeler.agreement={agreement}: without any noise they would agree on only {expected_agreement(gaps, low):.3f} of the pairs, "
            "since many answers are equally good; lower it, or raise compare.temperature"
        )
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if expected_agreement(gaps, middle) > agreement else (low, middle)
    return low


def expected_agreement(gaps: Sequence[float], noise: float) -> float:
    """Mean chance that two labellers order a pair alike."""
    chances = [0.5 * (1 + math.erf(gap / (2 * noise))) for gap in gaps]
    return sum(p * p + (1 - p) ** 2 for p in chances) / len(chances)


def agreement(first: Sequence[Comparison], second: Sequence[Comparison]) -> float:
    """Share of pairs that two labellings of the same comparisons order alike."""
    same = pairs = 0
    for one, other in zip(first, second, strict=True):
        for i, j in combinations(range(len(one.answers)), 2):
            same += (one.ranks[i] < one.ranks[j]) == (other.ranks[i] < other.ranks[j])
            pairs += 1
    return same / pairs


def ceiling(comparisons: Sequence[Comparison]) -> float:
    """Pairwise accuracy of the exact grade against these labels, ties one half: what no model can beat by much."""
    right = pairs = 0.0
    for comparison in comparisons:
        gold = golds(comparison)
        for i, j in combinations(range(len(gold)), 2):
            pairs += 1
            difference = (gold[i] - gold[j]) * (comparison.ranks[j] - comparison.ranks[i])
            right += 0.5 if difference == 0 else float(difference > 0)
    return right / pairs
