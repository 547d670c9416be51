from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.ppo import policy_loss, value_loss
from tests.fakes import floats, mask_with_gaps, quickly

SHAPES = {"seed": st.integers(0, 10**6), "rows": st.integers(1, 4), "width": st.integers(1, 9)}
CLIP = 0.2


def tensors(seed: int, rows: int, width: int, count: int) -> list[torch.Tensor]:
    return [floats(seed + i, rows, width) for i in range(count)]


@quickly
@given(**SHAPES)
def test_the_policy_loss_equals_equation_7_token_by_token(seed: int, rows: int, width: int) -> None:
    noise, old, advantages = tensors(seed, rows, width, 3)
    mask, logprobs = mask_with_gaps(seed, rows, width), old + 0.3 * noise
    total = clipped = kl = 0.0
    for b in range(rows):
        for t in range(width):
            if not mask[b, t]:
                continue
            ratio, a = math.exp(float(logprobs[b, t] - old[b, t])), float(advantages[b, t])
            held = min(max(ratio, 1 - CLIP), 1 + CLIP)
            total -= min(ratio * a, held * a)
            clipped += held * a < ratio * a
            kl += ratio - 1 - math.log(ratio)
    found = policy_loss(logprobs, old, advantages, mask, CLIP, 7.0)
    assert float(found.loss) == pytest.approx(total / 7)
    assert float(found.clipped) == pytest.approx(clipped / 7)
    assert float(found.kl) == pytest.approx(kl / 7)


@quickly
@given(**SHAPES)
def test_the_value_loss_equals_its_formula_token_by_token(seed: int, rows: int, width: int) -> None:
    values, old, returns = tensors(seed, rows, width, 3)
    mask = mask_with_gaps(seed, rows, width)
    total = 0.0
    for b in range(rows):
        for t in range(width):
            if mask[b, t]:
                v, before, target = float(values[b, t]), float(old[b, t]), float(returns[b, t])
                near = min(max(v, before - CLIP), before + CLIP)
                total += 0.5 * max((v - target) ** 2, (near - target) ** 2)
    assert float(value_loss(values, old, returns, mask, CLIP, 5.0)) == pytest.approx(total / 5)


@quickly
@given(**SHAPES, cut=st.integers(0, 4))
def test_pieces_with_the_shared_denominator_add_up_to_the_whole(seed: int, rows: int, width: int, cut: int) -> None:
    a, b, c = tensors(seed, rows, width, 3)
    mask = mask_with_gaps(seed, rows, width)
    tokens = float(mask.sum())
    whole = policy_loss(a, b, c, mask, CLIP, tokens)
    parts = [policy_loss(a[s], b[s], c[s], mask[s], CLIP, tokens) for s in (slice(0, cut), slice(cut, None))]
    for name in ("loss", "clipped", "kl"):
        assert float(sum(getattr(part, name) for part in parts)) == pytest.approx(float(getattr(whole, name)))
    values = [value_loss(a[s], b[s], c[s], mask[s], CLIP, tokens) for s in (slice(0, cut), slice(cut, None))]
    assert float(sum(values)) == pytest.approx(float(value_loss(a, b, c, mask, CLIP, tokens)))


@quickly
@given(**SHAPES)
def test_before_the_first_update_nothing_is_clipped_kl_is_0_and_the_gradient_is_minus_the_advantages(
    seed: int, rows: int, width: int
) -> None:
    old, advantages = tensors(seed, rows, width, 2)
    mask = mask_with_gaps(seed, rows, width)
    logprobs = old.clone().requires_grad_()
    found = policy_loss(logprobs, old, advantages, mask, CLIP, 3.0)
    found.loss.backward()
    assert float(found.clipped) == 0.0
    assert float(found.kl) == 0.0
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages / 3, 0.0))


@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_both_losses_agree_with_finite_differences(seed: int) -> None:
    noise, old, advantages, returns = tensors(seed, 3, 4, 4)
    mask = mask_with_gaps(seed, 3, 4)
    logprobs, values = (old + 0.3 * noise).requires_grad_(), (old + noise).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, mask, CLIP, 5.0).loss, logprobs)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, mask, CLIP, 5.0), values)


@pytest.mark.parametrize(("move", "advantage", "flat"), [(0.5, 1.0, True), (-0.5, -1.0, True), (0.5, -1.0, False), (-0.5, 1.0, False)])
def test_the_objective_is_flat_only_where_the_ratio_has_moved_far_in_the_advantages_direction(
    move: float, advantage: float, flat: bool
) -> None:
    logprobs = torch.tensor([[move]], requires_grad=True)
    found = policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool), CLIP, 1.0)
    found.loss.backward()
    assert (float(logprobs.grad) == 0.0) == flat
    assert float(found.clipped) == float(flat)


def test_outside_the_mask_neither_infinities_nor_nan_reach_loss_or_gradient() -> None:
    mask = torch.tensor([[True, False, False]])
    logprobs = torch.tensor([[-1.0, -math.inf, 800.0]], requires_grad=True)
    found = policy_loss(logprobs, torch.tensor([[-1.1, -2.0, -800.0]]), torch.tensor([[1.0, math.nan, 1.0]]), mask, CLIP, 1.0)
    found.loss.backward()
    assert math.isfinite(float(found.loss))
    assert math.isfinite(float(found.kl))
    assert logprobs.grad[0, 0] != 0
    assert logprobs.grad[0, 1:].tolist() == [0.0, 0.0]


def test_the_described_figures_carry_no_gradient() -> None:
    found = policy_loss(
        torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), CLIP, 2.0
    )
    assert found.loss.requires_grad
    assert not found.clipped.requires_grad
    assert not found.kl.requires_grad
