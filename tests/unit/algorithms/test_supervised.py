from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.supervised import language_loss
from tests.fakes import floats, mask_with_gaps, quickly


@quickly
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), width=st.integers(1, 9), cut=st.integers(0, 5))
def test_the_loss_is_minus_the_sum_over_the_mask_and_pieces_add_up(seed: int, rows: int, width: int, cut: int) -> None:
    logprobs, mask = -floats(seed, rows, width).abs(), mask_with_gaps(seed, rows, width)
    wanted = -sum(float(logprobs[b, t]) for b in range(rows) for t in range(width) if mask[b, t]) / 6
    assert float(language_loss(logprobs, mask, 6.0)) == pytest.approx(wanted)
    parts = [language_loss(logprobs[s], mask[s], 6.0) for s in (slice(0, cut), slice(cut, None))]
    assert float(sum(parts)) == pytest.approx(wanted)


def test_over_its_own_tokens_the_loss_of_a_uniform_model_is_the_log_of_the_vocabulary() -> None:
    mask = mask_with_gaps(1, 4, 6)
    assert float(language_loss(torch.full((4, 6), -math.log(50)), mask, float(mask.sum()))) == pytest.approx(math.log(50))


def test_masked_out_tokens_get_no_gradient_and_the_gradient_agrees_with_finite_differences() -> None:
    logprobs, mask = floats(2, 3, 4).requires_grad_(), mask_with_gaps(2, 3, 4)
    assert torch.autograd.gradcheck(lambda x: language_loss(x, mask, 5.0), logprobs)
    language_loss(logprobs, mask, 5.0).backward()
    assert torch.equal(logprobs.grad != 0, mask)
