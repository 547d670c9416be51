from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.calibration import BINS, Pairs, calibration_error, describe, pairs
from actors.algorithms.preference import ranking_loss
from tests.fakes import quickly


@quickly
@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(2, 5), min_size=1, max_size=4))
def test_pairs_are_those_a_loop_over_each_prompt_finds(seed: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    scores = torch.randn(count, generator=generator)
    rank = torch.randint(0, 3, (count,), generator=generator).float()
    length = torch.randint(1, 9, (count,), generator=generator)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    wanted = []
    for a, b in combinations(range(count), 2):
        if group[a] != group[b] or rank[a] == rank[b]:
            continue
        better, worse = (a, b) if rank[a] < rank[b] else (b, a)
        difference = float(scores[better] - scores[worse])
        wanted.append((round(1 / (1 + math.exp(-abs(difference))), 5), float(difference > 0), float(length[better] - length[worse])))
    found = pairs(scores, group, rank, length)
    rows = zip(found.probability.tolist(), found.right.tolist(), found.longer_by.tolist(), strict=True)
    for one, other in zip(
        sorted((round(p, 4), *rest) for p, *rest in rows), sorted((round(p, 4), *rest) for p, *rest in wanted), strict=True
    ):
        assert one == pytest.approx(other, abs=2e-4)


def test_scores_that_say_what_happens_are_calibrated_and_boasting_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = 0.5 + 0.5 * torch.rand(200_000, generator=generator)
    happens = (torch.rand(len(probability), generator=generator) < probability).float()
    assert calibration_error(probability, happens, low=0.5) < 0.01
    assert calibration_error(torch.full_like(probability, 0.99), happens, low=0.5) == pytest.approx(0.24, abs=0.01)


def test_the_error_is_the_weighted_gap_of_the_bins() -> None:
    probability, outcome = torch.tensor([0.05, 0.05, 0.95]), torch.tensor([0.0, 1.0, 1.0])
    assert BINS == 10
    assert calibration_error(probability, outcome) == pytest.approx((2 * 0.45 + 0.05) / 3)
    assert math.isnan(calibration_error(torch.zeros(0), torch.zeros(0)))


def error_of(probabilities: list[float], outcomes: list[float], edges: list[float]) -> float:
    """The expected calibration error, by a loop over the bins' edges."""
    total = 0.0
    for low, high in pairwise(edges):
        last = high == edges[-1]
        inside = [(p, y) for p, y in zip(probabilities, outcomes, strict=True) if low <= p and (p < high or last)]
        if inside:
            mean, share = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            total += len(inside) / len(probabilities) * abs(mean - share)
    return total


@pytest.mark.parametrize("low", [0.0, 0.5])
def test_each_probability_falls_into_its_own_bin(low: float) -> None:
    """Neighbouring bins err in opposite directions: a probability in the wrong one would cancel another's error."""
    edges = [low + (1 - low) * place / BINS for place in range(BINS + 1)]
    width = edges[1] - edges[0]
    probabilities = [edge + width * part for edge in edges[:-1] for part in (0.05, 0.95)] + [1.0]
    outcomes = [float(number // 2 % 2) for number in range(2 * BINS)] + [1.0]
    wanted = error_of(probabilities, outcomes, edges)
    assert calibration_error(torch.tensor(probabilities), torch.tensor(outcomes), low) == pytest.approx(wanted, abs=1e-6)
    if low == 0.0:
        assert calibration_error(torch.tensor(probabilities), torch.tensor(outcomes)) == pytest.approx(wanted, abs=1e-6)


def test_probabilities_out_of_the_range_count_in_the_nearest_bin() -> None:
    probability, outcome = torch.tensor([0.2, 0.52, 0.9]), torch.tensor([1.0, 0.0, 1.0])
    assert calibration_error(probability, outcome, low=0.5) == pytest.approx((abs(0.8 - 0.52) + 0.1) / 3, abs=1e-6)
    assert calibration_error(probability[:1], outcome[:1]) == pytest.approx(0.8)


def test_of_equal_scores_one_half_is_right_and_nobody_is_sure() -> None:
    found = pairs(torch.tensor([1.0, 1.0, 2.0, 1.0]), torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 1.0] * 2), torch.ones(4))
    assert found.right.tolist() == [0.5, 1.0]
    assert found.probability[0] == 0.5
    figures = describe(found)
    assert figures["share_unsure"] == 0.5
    assert figures["accuracy_unsure"] == 0.5


def test_the_error_of_pairs_is_counted_from_one_half() -> None:
    found = Pairs(torch.tensor([0.52, 0.57, 0.97]), torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3))
    assert describe(found)["calibration_error"] == pytest.approx((0.48 + 0.57 + 0.03) / 3, abs=1e-6)


def test_a_confidence_range_holds_its_low_end_and_not_its_high_end() -> None:
    figures = describe(Pairs(torch.tensor([0.5, 0.6, 0.8, 1.0], dtype=torch.float64), torch.ones(4), torch.zeros(4)))
    assert [figures[f"share_{name}"] for name in ("unsure", "leaning", "sure")] == [0.25, 0.25, 0.5]


def test_one_token_longer_is_longer_and_not_the_same_length() -> None:
    figures = describe(Pairs(torch.full((2,), 0.7), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])))
    assert figures["accuracy_longer_preferred"] == 1.0
    assert figures["accuracy_same_length"] == 0.0


def test_accuracy_by_confidence_and_by_length() -> None:
    # one prompt each: (score of the preferred, of the other), (their lengths)
    scores = torch.tensor([0.1, 0.0, 0.0, 1.0, 5.0, 0.0])
    length = torch.tensor([3, 2, 1, 4, 2, 2])
    found = describe(pairs(scores, torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0.0, 1.0] * 3), length))
    assert found["accuracy_unsure"] == 1.0
    assert found["accuracy_leaning"] == 0.0
    assert found["accuracy_sure"] == 1.0
    assert found["share_sure"] == pytest.approx(1 / 3)
    assert found["accuracy_longer_preferred"] == 1.0
    assert found["accuracy_shorter_preferred"] == 0.0
    assert found["accuracy_same_length"] == 1.0


def test_nothing_is_invented_for_empty_sets() -> None:
    tied = pairs(torch.tensor([1.0, 2.0]), torch.zeros(2), torch.zeros(2), torch.ones(2))
    assert describe(tied) == {}
    assert "accuracy_longer_preferred" not in describe(
        pairs(torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor([0.0, 1.0]), torch.ones(2))
    )


def test_a_margin_asks_for_a_difference_that_grows_with_the_distance_of_ranks() -> None:
    group, rank = torch.zeros(2, dtype=torch.long), torch.tensor([0.0, 2.0])
    met = ranking_loss(torch.tensor([1.0, 0.0]), group, rank, 1.0, margin=0.5)
    assert float(met) == pytest.approx(math.log(2))
    apart = ranking_loss(torch.tensor([1.0, 0.0]), group, rank, 1.0)
    assert float(apart) == pytest.approx(math.log(1 + math.exp(-1)))
