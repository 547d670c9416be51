from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.gae import shape_rewards
from actors.algorithms.running import Moments, normalised
from tests.fakes import floats, quickly


@quickly
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), shift=st.floats(-1e4, 1e4))
def test_merged_batch_by_batch_they_are_the_moments_of_all(seed: int, sizes: list[int], shift: float) -> None:
    x = floats(seed, sum(sizes)) + shift
    merged = Moments()
    for part in x.split(sizes):
        merged = merged.merged(Moments.of(part))
    assert merged.count == len(x)
    if len(x):
        assert merged.mean == pytest.approx(float(x.mean()), rel=1e-9, abs=1e-9)
        assert merged.std() == pytest.approx(float(x.std(unbiased=False)), rel=1e-6, abs=1e-9)


def test_ranks_may_be_merged_in_any_grouping() -> None:
    a, b, c = (Moments.of(floats(seed, 5) + seed) for seed in range(3))
    one, other = a.merged(b).merged(c), a.merged(b.merged(c))
    assert (one.count, one.mean, one.squares) == pytest.approx((other.count, other.mean, other.squares))


def test_a_large_mean_does_not_swallow_a_small_spread() -> None:
    merged = Moments()
    for batch in (torch.tensor([1e8, 1e8 + 1]), torch.tensor([1e8 + 2, 1e8 + 3], dtype=torch.float64)):
        merged = merged.merged(Moments.of(batch.double().round()))
    assert merged.std() == pytest.approx(1.118033988749895, abs=0.3)


def test_normalised_by_the_first_batch_scores_have_mean_0_and_deviation_1() -> None:
    scores = floats(0, 64) * 5 + 3
    found = normalised(scores, Moments.of(scores))
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.std(unbiased=False)) == pytest.approx(1)
    assert normalised(scores, None) is scores
    assert normalised(scores.float(), Moments.of(scores)).dtype == torch.float32


def test_equal_scores_become_zero_and_not_infinite() -> None:
    scores = torch.full((4,), 7.0)
    assert normalised(scores, Moments.of(scores)).tolist() == [0.0] * 4


def test_the_order_is_normalise_clip_penalty() -> None:
    scores, mask = torch.tensor([0.0, 0.0, 0.0, 100.0]), torch.ones(4, 1, dtype=torch.bool)
    finished = torch.tensor([True, True, False, False])
    rewards = shape_rewards(normalised(scores, Moments.of(scores)), torch.zeros(4, 1), mask, 0.0, 1.0, finished, 2.0)[:, 0]
    below = float(-25 / scores.std(unbiased=False))
    assert rewards.tolist() == pytest.approx([below, below, below - 2, 1.0 - 2])


def test_of_nothing_the_deviation_is_0_and_scores_that_are_all_but_equal_are_still_told_apart() -> None:
    assert Moments().std() == 0.0
    near = torch.tensor([1.0, 1.0 + 1e-6], dtype=torch.float64)
    torch.testing.assert_close(normalised(near, Moments.of(near)), torch.tensor([-1.0, 1.0], dtype=torch.float64), atol=1e-3, rtol=0)
