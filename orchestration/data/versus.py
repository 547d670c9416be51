"""A reward model beside TF-IDF on the same held-out rows: both figures, their difference, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy.stats import rankdata

from orchestration.data.baselines import (
    difference_interval,
    pairs_right,
    text_of,
    tfidf_answer_scores,
    tfidf_judgement_scores,
    untied_pairs,
)
from orchestration.data.preferences import Comparison, Judgement

RESAMPLES = 1000


def on_rankings(scores: Sequence[float], train: Sequence[Comparison], test: Sequence[Comparison], seed: int) -> dict[str, float]:
    """Nothing where all answers are tied.

    Args:
        scores: ours, of all answers of `test`, one comparison after the other.
    """
    of_answer = [text_of(comparison.context) for comparison in test for _ in comparison.answers]
    contexts = [of_answer[better] for better, _ in untied_pairs(test)]
    if not contexts:
        return {}
    ours, theirs = pairs_right(np.array(scores), test), pairs_right(tfidf_answer_scores(train, test, seed), test)
    return _beside("pairwise_accuracy", float(theirs.mean()), lambda rows: float((ours - theirs)[rows].mean()), contexts, seed)


def on_judgements(scores: Sequence[float], train: Sequence[Judgement], test: Sequence[Judgement], seed: int) -> dict[str, float]:
    """Nothing where all rows were judged alike.

    Args:
        scores: ours, of the rows of `test`.
    """
    ours, theirs, good = np.array(scores), tfidf_judgement_scores(train, test), np.array([row.good for row in test])
    contexts = [text_of(row.context) for row in test]
    if good.all() or not good.any():
        return {}
    return _beside("auc", auc(theirs, good), lambda rows: auc(ours[rows], good[rows]) - auc(theirs[rows], good[rows]), contexts, seed)


def _beside(
    name: str, baseline: float, difference: Callable[[np.ndarray], float], contexts: Sequence[Hashable], seed: int
) -> dict[str, float]:
    low, high = difference_interval(difference, contexts, RESAMPLES, seed)
    whole = difference(np.arange(len(contexts)))
    return {f"baseline_{name}": baseline, f"{name}_difference": whole, f"{name}_difference_low": low, f"{name}_difference_high": high}


def auc(scores: np.ndarray, good: np.ndarray) -> float:
    """Probability that a good row scores above a bad one, ties one half (Mann-Whitney); NaN without both kinds."""
    positive, negative = int(good.sum()), int((~good).sum())
    if positive == 0 or negative == 0:
        return float("nan")
    return float((rankdata(scores)[good].sum() - positive * (positive + 1) / 2) / (positive * negative))
