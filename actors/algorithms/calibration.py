"""How far a reward model's scores can be believed: calibration, accuracy by confidence and by which answer was longer.

A pair's probability is sigmoid(r_a - r_b), the Bradley-Terry model that the ranking loss fits. It is calibrated when of the pairs given
a probability p a share p is ordered as people did (Guo et al. 1706.04599).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.algorithms.preference import comparable

CONFIDENCES = {"unsure": (0.5, 0.6), "leaning": (0.6, 0.8), "sure": (0.8, 1.01)}
"""Ranges of the probability of the answer that the model prefers."""
BINS = 10


@dataclass(frozen=True)
class Pairs:
    """The untied pairs of a set of comparisons."""

    probability: Tensor
    """[P]: of the answer that the model prefers, from 0.5 to 1."""
    right: Tensor
    """[P]: 1 where people prefer it too, 0 where they do not, one half where the scores are equal."""
    longer_by: Tensor
    """[P]: tokens by which the answer that people prefer is longer than the other."""


def pairs(scores: Tensor, group: Tensor, rank: Tensor, length: Tensor) -> Pairs:
    """Args: scores, group, rank, length: [N]; `length` counts an answer's tokens."""
    better, _ = comparable(group, rank)
    preferred, other = better.nonzero(as_tuple=True)
    difference = scores[preferred] - scores[other]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return Pairs(torch.sigmoid(difference.abs()), right, (length[preferred] - length[other]).float())


def calibration_error(probability: Tensor, outcome: Tensor, low: float = 0.0) -> float:
    """Expected calibration error: |mean probability - share of outcomes| in equal bins from `low` to 1, weighted by their counts.

    Args: probability, outcome: [P]. NaN for none.
    """
    if len(probability) == 0:
        return float("nan")
    place = ((probability - low) / (1 - low) * BINS).long().clamp(0, BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.float64).index_add(0, place, (probability - outcome).double())
    return float(gap.abs().sum() / len(probability))


def describe(found: Pairs) -> dict[str, float]:
    """Figures of a set of pairs. A figure of an empty set is left out."""
    if len(found.right) == 0:
        return {}
    figures = {"calibration_error": calibration_error(found.probability, found.right, low=0.5)}
    for name, (low, high) in CONFIDENCES.items():
        inside = (found.probability >= low) & (found.probability < high)
        figures[f"share_{name}"] = float(inside.float().mean())
        figures |= _accuracy(f"accuracy_{name}", found.right[inside])
    figures |= _accuracy("accuracy_longer_preferred", found.right[found.longer_by > 0])
    figures |= _accuracy("accuracy_shorter_preferred", found.right[found.longer_by < 0])
    return figures | _accuracy("accuracy_same_length", found.right[found.longer_by == 0])


def _accuracy(name: str, right: Tensor) -> dict[str, float]:
    return {name: float(right.mean())} if len(right) else {}
