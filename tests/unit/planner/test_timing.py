"""The time model: better than a constant, and its constants are those that the published times give."""

from __future__ import annotations

import pytest

from orchestration.planner.timing import ARITHMETIC, LAYER, Work
from tests.benchmarks import planning


def test_it_beats_a_constant_times_parameters_per_gpu_on_rows_it_has_not_seen() -> None:
    found = planning.left_out()
    assert len(found) == 11
    ours = planning.mean_error([(p.ours, p.row.hours) for p in found])
    theirs = planning.mean_error([(p.theirs, p.row.hours) for p in found])
    assert ours < 0.9 * theirs


def test_its_constants_are_fitted_to_all_published_rows() -> None:
    slowness, layer = planning.fitted(planning.rows())
    assert pytest.approx(1 / slowness, rel=0.05) == ARITHMETIC
    assert pytest.approx(layer, rel=0.05) == LAYER


def test_work_adds_up() -> None:
    one, two = Work(1, 2, 3, 4, 5), Work(10, 20, 30, 40, 50)
    assert (one + two.times(2)).parts() == (21, 42, 63, 84, 105)
