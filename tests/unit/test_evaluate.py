from __future__ import annotations

import numpy as np
import pytest

from orchestration.stages.evaluate import bootstrap_interval, wins


def test_a_win_counts_1_a_tie_one_half_a_loss_0() -> None:
    assert wins(np.array([2.0, 1.0, 0.0, -1.0]), np.array([1.0, 1.0, 1.0, -2.0])).tolist() == [1.0, 0.5, 0.0, 1.0]


def test_a_model_against_itself_wins_half_and_wins_of_both_sides_add_up_to_1() -> None:
    ours, theirs = np.random.default_rng(0).integers(0, 3, (2, 50)).astype(float)
    assert (wins(ours, ours) == 0.5).all()
    assert (wins(ours, theirs) + wins(theirs, ours) == 1.0).all()


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_interval_is_about_two_standard_errors_around_the_mean(share: float) -> None:
    values = (np.arange(400) < 400 * share).astype(float)
    low, high = bootstrap_interval(values, 4000, seed=1)
    error = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert (low, high) == (pytest.approx(share - error, abs=0.006), pytest.approx(share + error, abs=0.006))


def test_the_interval_is_a_function_of_the_seed_and_empty_without_spread() -> None:
    values = np.random.default_rng(3).random(60)
    assert bootstrap_interval(values, 100, 5) == bootstrap_interval(values, 100, 5)
    assert bootstrap_interval(values, 100, 5) != bootstrap_interval(values, 100, 6)
    assert bootstrap_interval(np.full(10, 0.5), 50, 0) == (0.5, 0.5)


def test_fewer_prompts_give_a_wider_interval() -> None:
    values = np.random.default_rng(4).integers(0, 2, 400).astype(float)

    def width(part: np.ndarray) -> float:
        low, high = bootstrap_interval(part, 1000, 0)
        return high - low

    assert width(values[:40]) > 2 * width(values)
