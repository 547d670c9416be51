"""Mean and standard deviation of all scores so far, merged batch by batch and rank by rank (Chan, Golub and LeVeque 1979).

Order of what happens to a score, in all of PPO: normalise, then clip, then the penalty for a missing end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Of a set of numbers; of the empty set without arguments."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of the entries of a tensor, in float64."""
        x = x.double().reshape(-1)
        return cls(len(x), float(x.mean()), float(((x - x.mean()) ** 2).sum())) if len(x) else cls()

    def merged(self, other: Moments) -> Moments:
        """Of both sets together: no number is looked at twice, and none is kept."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return Moments(count, mean, self.squares + other.squares + apart**2 * self.count * other.count / count)

    def std(self) -> float:
        """Biased (divided by n), as everywhere in PPO; 0 of the empty set."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def normalised(scores: Tensor, so_far: Moments | None, epsilon: float = 1e-8) -> Tensor:
    """[B] scores in standard deviations from the mean of `so_far`; unchanged without it. Scores that are all equal become 0."""
    if so_far is None:
        return scores
    return ((scores.double() - so_far.mean) / max(so_far.std(), epsilon)).to(scores.dtype)
