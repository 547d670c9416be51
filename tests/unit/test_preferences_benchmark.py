"""The benchmark's statistics; importing it runs nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.benchmarks.preferences import FOLDS, folds, interval


def test_the_interval_is_nadeau_and_bengios() -> None:
    mean, low, high = interval([0.01, 0.03, 0.02, 0.04, 0.0])
    reach = 2.7764451 * math.sqrt((1 / 5 + 1 / 4) * 0.00025)  # t of 4 degrees of freedom; the sample variance is 0.00025
    assert (mean, low, high) == pytest.approx((0.02, 0.02 - reach, 0.02 + reach), abs=1e-8)
    assert interval([0.1, 0.3], ratio=0.5)[2] == pytest.approx(0.2 + 12.7062047 * math.sqrt(1.0 * 0.02), abs=1e-6)
    assert interval([0.1] * 10) == pytest.approx((0.1, 0.1, 0.1))


def test_rows_of_a_group_are_in_one_fold_and_every_row_is_measured_once_in_each_repeat() -> None:
    groups = [f"context {n % 17}" for n in range(60)]
    found = list(folds(groups, 2))
    assert len(found) == 2 * FOLDS
    for learn, test in found:
        assert not {groups[i] for i in learn} & {groups[i] for i in test}
        assert sorted([*learn, *test]) == list(range(60))
    for repeat in (found[:FOLDS], found[FOLDS:]):
        assert sorted(np.concatenate([test for _, test in repeat]).tolist()) == list(range(60))
    first, second = ([set(test.tolist()) for _, test in part] for part in (found[:FOLDS], found[FOLDS:]))
    assert not any(test in second for test in first), "the repeats are shuffled apart"
