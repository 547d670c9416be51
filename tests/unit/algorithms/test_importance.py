from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.importance import engine_gap, importance_weights
from tests import references
from tests.fakes import floats, mask_with_gaps, quickly

SHAPES = {"seed": st.integers(0, 10**6), "rows": st.integers(1, 4), "width": st.integers(1, 9)}


@quickly
@given(**SHAPES, cap=st.sampled_from([None, 0.5, 1.0, 2.0]))
def test_weights_are_the_truncated_ratio_of_trainer_to_engine_token_by_token(seed: int, rows: int, width: int, cap: float | None) -> None:
    old, behaviour, mask = floats(seed, rows, width), floats(seed + 1, rows, width), mask_with_gaps(seed, rows, width)
    weights, truncated = importance_weights(old, behaviour, mask, cap)
    for b in range(rows):
        for t in range(width):
            wanted = references.importance(float(old[b, t]), float(behaviour[b, t]), cap) if mask[b, t] else 1.0
            assert float(weights[b, t]) == pytest.approx(wanted)
            assert bool(truncated[b, t]) == (bool(mask[b, t]) and cap is not None and math.exp(float(old[b, t] - behaviour[b, t])) > cap)


def test_equal_log_probs_weigh_1_exactly_and_a_ratio_at_the_cap_is_not_truncated() -> None:
    same = floats(0, 2, 3)
    weights, truncated = importance_weights(same, same, torch.ones(2, 3, dtype=torch.bool), 1.0)
    assert weights.tolist() == [[1.0] * 3] * 2
    assert not truncated.any()


def test_what_stands_outside_the_mask_weighs_1_whatever_it_is() -> None:
    mask = torch.tensor([[True, False, False]])
    weights, truncated = importance_weights(torch.tensor([[0.0, math.inf, math.nan]]), torch.zeros(1, 3), mask, 0.25)
    assert weights.tolist() == [[0.25, 1.0, 1.0]]
    assert truncated.tolist() == [[True, False, False]]


@quickly
@given(**SHAPES)
def test_the_gap_is_the_mean_distance_of_the_two_log_probs(seed: int, rows: int, width: int) -> None:
    old, behaviour, mask = floats(seed, rows, width), floats(seed + 1, rows, width), mask_with_gaps(seed, rows, width)
    places = references.positions_of(mask)
    wanted = math.fsum(abs(float(old[p] - behaviour[p])) for p in places) / len(places)
    assert float(engine_gap(old, behaviour, mask)) == pytest.approx(wanted)


def test_the_gap_is_over_the_tokens_of_all_ranks() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert float(engine_gap(torch.ones(1, 2), torch.zeros(1, 2), mask, lambda sums: sums + torch.tensor([4.0, 1.0]))) == 2.0
