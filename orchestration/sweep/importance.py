"""How much each setting matters for the judge's score: permutation importance of a random forest (Breiman 2001, 10) over the trials.

A forest foretells the last score from a trial's values; a setting's importance is how much worse it does, in the share of the variance it
explains, when that setting's values are shuffled between trials, and all are scaled to add up to 1. With few trials this is rough: it is
measured on the trials that the forest was grown on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestration.sweep.records import Trial
from orchestration.sweep.space import Dimension, Space
from orchestration.sweep.trial import Task

METHOD = "permutation importance of a random forest"
FEWEST = 6
"""Trials that ran to their end, below which nothing is said."""
TREES, SHUFFLES = 100, 20


def position(dimension: Dimension, value: Any) -> float:
    """Where a value stands within its dimension, 0 to 1 for those it can have; a choice by its place in the list."""
    if dimension.kind == "choice":
        return dimension.of.index(value) / (len(dimension.of) - 1) if value in dimension.of else math.nan
    low, high = dimension.of[:2]
    if dimension.kind in ("loguniform", "logint"):
        return math.log(value / low) / math.log(high / low) if value > 0 else math.nan
    return (value - low) / (high - low)


def importances(space: Space, found: Sequence[Trial], task: Task) -> dict[str, float]:
    """Setting -> share; empty with too few trials that ran to their end."""
    whole = [which for which in found if which.status == "finished" and which.points() and which.points()[-1].step == task.config.ppo.steps]
    if len(whole) < FEWEST:
        return {}
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    rows = np.array([[_feature(dimension, which) for dimension in space.dimensions] for which in whole])
    scores = np.array([which.points()[-1].score for which in whole])
    forest = RandomForestRegressor(TREES, random_state=0, min_samples_leaf=1, max_features=1.0).fit(rows, scores)
    drops = permutation_importance(forest, rows, scores, n_repeats=SHUFFLES, random_state=0).importances_mean.clip(0)
    total = float(drops.sum()) or 1.0
    return {dimension.key: float(drop) / total for dimension, drop in zip(space.dimensions, drops, strict=True)}


def _feature(dimension: Dimension, which: Trial) -> float:
    """-1 where the dimension is not in force, or the value outside it."""
    if dimension.key not in which.values:
        return -1.0
    found = position(dimension, which.values[dimension.key])
    return -1.0 if math.isnan(found) else found
