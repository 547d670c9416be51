from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.gae import gae, last_index, shape_rewards
from tests import references
from tests.fakes import floats, mask_with_gaps, quickly

SHAPES = {"seed": st.integers(0, 10**6), "rows": st.integers(1, 4), "width": st.integers(1, 10)}


@quickly
@given(**SHAPES, gamma=st.floats(0.5, 1), lam=st.floats(0, 1))
def test_advantages_are_the_textbooks_over_the_actions_alone(seed: int, rows: int, width: int, gamma: float, lam: float) -> None:
    rewards, values, mask = floats(seed, rows, width), floats(seed + 1, rows, width), mask_with_gaps(seed, rows, width)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()
    for b in range(rows):
        actions = mask[b].nonzero()[:, 0]
        wanted = references.gae(rewards[b, actions].tolist(), values[b, actions].tolist(), gamma, lam)
        assert advantages[b, actions].tolist() == pytest.approx(wanted)
        assert returns[b, actions].tolist() == pytest.approx([a + float(v) for a, v in zip(wanted, values[b, actions], strict=True)])


@quickly
@given(**SHAPES)
def test_with_lambda_1_and_gamma_1_returns_are_the_rewards_to_go_whatever_the_values(seed: int, rows: int, width: int) -> None:
    rewards, values, mask = floats(seed, rows, width), floats(seed + 1, rows, width), mask_with_gaps(seed, rows, width)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    counted = torch.where(mask, rewards, 0.0)
    to_go = counted.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0))


@quickly
@given(**SHAPES, extra=st.integers(1, 5))
def test_padding_and_the_numbers_under_it_change_nothing(seed: int, rows: int, width: int, extra: int) -> None:
    rewards, values, mask = floats(seed, rows, width), floats(seed + 1, rows, width), mask_with_gaps(seed, rows, width)
    noise = 100 * floats(seed + 2, rows, extra)
    padded = [torch.cat([x, noise], dim=1) for x in (rewards, values)]
    wide = torch.cat([mask, torch.zeros(rows, extra, dtype=torch.bool)], dim=1)
    for found, wanted in zip(gae(*padded, wide, 0.99, 0.9), gae(rewards, values, mask, 0.99, 0.9), strict=True):
        assert torch.equal(found[:, :width], wanted)


def test_the_worked_case_of_a_gap_of_twenty_tokens() -> None:
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[0, [0, 1, 22, 23]] = True
    rewards = torch.zeros(1, 24, dtype=torch.float64)
    rewards[0, 23] = 1.0
    advantages, _ = gae(rewards, torch.full((1, 24), 0.5, dtype=torch.float64), mask, gamma=1.0, lam=0.95)
    first = float(advantages[0, 0])
    assert first == pytest.approx(0.4287, abs=5e-5)
    # the two known mistakes, made here on purpose: lambda decays through the gap, and on top of it the gap's values are 0
    through = references.gae(rewards[0].tolist(), [0.5] * 24, 1.0, 0.95)[0]
    of_nothing = references.gae(rewards[0].tolist(), [0.5 * acts for acts in mask[0].tolist()], 1.0, 0.95)[0]
    assert through == pytest.approx(0.1537, abs=5e-5)
    assert of_nothing == pytest.approx(-0.1510, abs=5e-5)
    assert advantages[0, [1, 22, 23]].tolist() == pytest.approx([0.45125, 0.475, 0.5])


@quickly
@given(**SHAPES, beta=st.floats(0, 1), clip=st.floats(0.1, 3), penalty=st.floats(0, 2))
def test_rewards_are_the_kl_penalty_everywhere_and_the_score_at_the_last_reply_token(
    seed: int, rows: int, width: int, beta: float, clip: float, penalty: float
) -> None:
    scores, kl, mask = 3 * floats(seed, rows), floats(seed + 1, rows, width), mask_with_gaps(seed, rows, width)
    finished = floats(seed + 2, rows) > 0
    rewards = shape_rewards(scores, kl, mask, beta, clip, finished, penalty)
    for b in range(rows):
        given_ = (float(scores[b]), kl[b].tolist(), mask[b].tolist(), beta, clip, bool(finished[b]), penalty)
        assert rewards[b].tolist() == pytest.approx(references.shaped_rewards(*given_), abs=1e-12)


def test_the_missing_end_penalty_comes_on_top_of_the_clipped_score() -> None:
    rewards = shape_rewards(
        torch.tensor([9.0, 9.0]), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.1, 5.0, torch.tensor([True, False]), 1.0
    )
    assert rewards[:, 2].tolist() == [5.0, 4.0]


def test_rewards_do_not_write_into_the_kl_they_are_made_from() -> None:
    kl = torch.ones(1, 3)
    shape_rewards(torch.tensor([1.0]), kl, torch.ones(1, 3, dtype=torch.bool), 0.5, 5.0, torch.tensor([True]), 0.0)
    assert torch.equal(kl, torch.ones(1, 3))


def test_last_index_is_the_last_true_entry_and_minus_1_without_any() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert last_index(mask).tolist() == [2, 3, -1, 0]


def test_gradients_agree_with_finite_differences() -> None:
    mask = mask_with_gaps(3, 2, 5)
    given_ = (floats(1, 2, 5).requires_grad_(), floats(2, 2, 5).requires_grad_())
    assert torch.autograd.gradcheck(lambda r, v: gae(r, v, mask, 0.9, 0.8), given_)
