from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.masking import masked_mean, masked_sum, moments, whiten
from tests.fakes import floats, mask_with_gaps, quickly

SHAPES = {"seed": st.integers(0, 10**6), "rows": st.integers(1, 5), "width": st.integers(1, 9)}


def listed(x: torch.Tensor, mask: torch.Tensor) -> list[float]:
    return [float(x[b, t]) for b in range(len(x)) for t in range(x.shape[1]) if mask[b, t]]


@quickly
@given(**SHAPES)
def test_sum_and_mean_equal_a_loop_over_the_tokens_that_count(seed: int, rows: int, width: int) -> None:
    x, mask = floats(seed, rows, width), mask_with_gaps(seed, rows, width)
    counted = listed(x, mask)
    assert float(masked_sum(x, mask)) == pytest.approx(math.fsum(counted))
    assert float(masked_mean(x, mask)) == pytest.approx(math.fsum(counted) / len(counted))


@quickly
@given(**SHAPES)
def test_moments_are_the_mean_and_the_biased_variance(seed: int, rows: int, width: int) -> None:
    x, mask = floats(seed, rows, width), mask_with_gaps(seed, rows, width)
    counted = listed(x, mask)
    mean = math.fsum(counted) / len(counted)
    found_mean, variance = moments(x, mask)
    assert float(found_mean) == pytest.approx(mean)
    assert float(variance) == pytest.approx(math.fsum((v - mean) ** 2 for v in counted) / len(counted), abs=1e-12)


@quickly
@given(**SHAPES)
def test_whitening_gives_mean_0_and_biased_variance_1_inside_the_mask_and_0_outside(seed: int, rows: int, width: int) -> None:
    x, mask = 3 + 5 * floats(seed, rows, width), mask_with_gaps(seed, rows, width, at_least=2)
    white = whiten(x, mask)
    assert (white[~mask] == 0).all()
    counted = listed(white, mask)
    if len(counted) > 1:
        assert math.fsum(counted) == pytest.approx(0, abs=1e-6)
        assert math.fsum(v * v for v in counted) / len(counted) == pytest.approx(1, abs=1e-5)


def test_what_stands_outside_the_mask_has_no_effect_even_nan() -> None:
    x, mask = floats(3, 4, 6), mask_with_gaps(3, 4, 6)
    spoilt = torch.where(mask, x, torch.full_like(x, math.nan))
    assert masked_sum(spoilt, mask) == masked_sum(x, mask)
    assert masked_mean(spoilt, mask) == masked_mean(x, mask)
    assert torch.equal(whiten(spoilt, mask), whiten(x, mask))


def test_gradients_of_a_masked_sum_are_not_nan_where_masked_out_entries_are() -> None:
    x = torch.tensor([[1.0, math.nan, 2.0]], requires_grad=True)
    masked_sum(x, torch.tensor([[True, False, True]])).backward()
    assert x.grad.tolist() == [[1.0, 0.0, 1.0]]


def test_an_empty_mask_gives_mean_0() -> None:
    assert float(masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))) == 0.0


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_two_ranks_of_unequal_size_whiten_like_one_over_the_whole_batch(cut: int) -> None:
    x, mask = floats(9, 6, 7), mask_with_gaps(9, 6, 7, share=0.4)
    parts = [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]

    def reduced(function):
        """What `function` gives on each rank when sums run over both (each rank's sums are collected in a first pass, stage by stage)."""
        known: list[torch.Tensor] = []
        for _ in range(2):  # moments reduce twice: first for the mean, then for the variance
            collected = []
            for part, its_mask in parts:
                asked = []

                def reduce(value: torch.Tensor, asked=asked) -> torch.Tensor:
                    asked.append(value)
                    return known[len(asked) - 1] if len(asked) <= len(known) else value

                function(part, its_mask, reduce)
                collected.append(asked[len(known)])
            known.append(sum(collected))
        replies = [iter(known), iter(known)]
        return [function(part, its_mask, lambda _, r=r: next(r)) for (part, its_mask), r in zip(parts, replies, strict=True)]

    torch.testing.assert_close(torch.cat(reduced(whiten)), whiten(x, mask))
    alone = torch.cat([whiten(part, its_mask) for part, its_mask in parts])
    assert not torch.allclose(alone, whiten(x, mask), atol=1e-2)


def test_a_single_token_whitens_to_0_and_equal_ones_too() -> None:
    one = torch.tensor([[False, True, False]])
    assert whiten(torch.tensor([[9.0, 5.0, 9.0]]), one).tolist() == [[0.0, 0.0, 0.0]]
    assert whiten(torch.full((1, 3), 4.0), torch.ones(1, 3, dtype=torch.bool)).tolist() == [[0.0, 0.0, 0.0]]


def test_epsilon_is_added_to_the_variance_before_the_root() -> None:
    found = whiten(torch.tensor([[-1e-4, 1e-4]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool))
    assert found.tolist() == [pytest.approx([-(0.5**0.5), 0.5**0.5])]
    wide = whiten(torch.tensor([[-1.0, 1.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool), epsilon=3.0)
    assert wide.tolist() == [[-0.5, 0.5]]


def test_gradients_agree_with_finite_differences() -> None:
    mask = mask_with_gaps(2, 2, 4, at_least=2)
    for function in (lambda x: masked_sum(x, mask), lambda x: masked_mean(x, mask), lambda x: whiten(x, mask)):
        assert torch.autograd.gradcheck(function, floats(1, 2, 4).requires_grad_())
