from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.ppo import PolicyLoss, policy_loss, value_loss
from tests import references
from tests.fakes import floats, mask_with_gaps, quickly

SHAPES = {"seed": st.integers(0, 10**6), "rows": st.integers(1, 4), "width": st.integers(1, 9)}
CLIP = 0.2


def tensors(seed: int, rows: int, width: int, count: int) -> list[torch.Tensor]:
    return [floats(seed + i, rows, width) for i in range(count)]


@quickly
@given(**SHAPES, dual_clip=st.sampled_from([None, 1.3, 2.0]), weighted=st.booleans())
def test_the_policy_loss_equals_its_equations_token_by_token(
    seed: int, rows: int, width: int, dual_clip: float | None, weighted: bool
) -> None:
    noise, old, advantages, scale = tensors(seed, rows, width, 4)
    mask, logprobs = mask_with_gaps(seed, rows, width), old + 0.5 * noise
    weights = scale.abs() if weighted else None
    total = clipped = dual_clipped = kl = 0.0
    for place in references.positions_of(mask):
        now, before, a = (float(x[place]) for x in (logprobs, old, advantages))
        total += references.policy_token(now, before, a, CLIP, dual_clip, float(weights[place]) if weighted else 1.0)
        ratio = math.exp(now - before)
        clipped += references.clamp(ratio, 1 - CLIP, 1 + CLIP) * a < ratio * a
        dual_clipped += dual_clip is not None and a < 0 and ratio > dual_clip
        kl += references.k3(before, now)
    found = policy_loss(logprobs, old, advantages, mask, CLIP, 7.0, dual_clip, weights)
    assert float(found.loss) == pytest.approx(total / 7)
    assert float(found.clipped) == pytest.approx(clipped / 7)
    assert float(found.dual_clipped) == pytest.approx(dual_clipped / 7)
    assert float(found.kl) == pytest.approx(kl / 7)


ONE = torch.ones(1, 1, dtype=torch.bool)


def single(ratio: float, advantage: float, **more: Any) -> tuple[PolicyLoss, float]:
    """Loss of one token with that ratio, and its gradient by the log-prob."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, a = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[advantage]], dtype=torch.float64)
    found = policy_loss(logprobs, zero, a, ONE, CLIP, 1.0, **more)
    found.loss.backward()
    return found, float(logprobs.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "cut"),
    [
        (5.0, -2.0, 6.0, 0.0, True),  # 3 x 2, and flat
        (5.0, 2.0, -2.4, 0.0, False),  # positive advantages know the usual clip alone
        (2.0, -2.0, 4.0, 4.0, False),  # below the dual clip the ratio counts as it is
        (3.0, 0.0, 0.0, 0.0, False),  # no advantage, nothing to cut
        (0.5, -2.0, 1.6, 0.0, False),
    ],
)
def test_the_dual_clip_cuts_far_ratios_of_negative_advantages_alone(
    ratio: float, advantage: float, loss: float, gradient: float, cut: bool
) -> None:
    found, slope = single(ratio, advantage, dual_clip=3.0)
    assert float(found.loss) == pytest.approx(loss)
    assert slope == pytest.approx(gradient)
    assert float(found.dual_clipped) == float(cut)


def test_without_a_dual_clip_a_far_ratio_of_a_negative_advantage_costs_as_much_as_it_is_far() -> None:
    found, slope = single(50.0, -2.0)
    assert float(found.loss) == pytest.approx(100.0)
    assert slope == pytest.approx(100.0)
    assert float(found.dual_clipped) == 0.0


def test_weights_scale_a_tokens_loss_and_gradient_and_leave_the_described_figures() -> None:
    plain, slope = single(1.1, 3.0)
    found, scaled = single(1.1, 3.0, weights=torch.tensor([[0.25]]))
    assert float(found.loss) == pytest.approx(0.25 * float(plain.loss))
    assert scaled == pytest.approx(0.25 * slope)
    assert (float(found.clipped), float(found.kl)) == (float(plain.clipped), float(plain.kl))


@pytest.mark.parametrize(("ratio", "advantage"), [(1 + CLIP, 1.0), (1 - CLIP, -1.0), (1.0, 1.0)])
def test_at_the_clips_edge_nothing_is_cut_off(ratio: float, advantage: float) -> None:
    old = torch.zeros(1, 1, dtype=torch.float64)
    logprobs = torch.tensor([[ratio]], dtype=torch.float64).log()
    edge = abs(float(logprobs.exp()) - 1)  # what is left of the ratio after log and exp
    found = policy_loss(logprobs, old, torch.tensor([[advantage]], dtype=torch.float64), ONE, edge, 1.0)
    assert float(found.clipped) == 0.0
    assert float(found.loss) == pytest.approx(-ratio * advantage)


def test_an_empty_mask_costs_nothing() -> None:
    nothing, x = torch.zeros(2, 3, dtype=torch.bool), floats(0, 2, 3)
    found = policy_loss(x, 2 * x, x, nothing, CLIP, 1.0, 2.0, x)
    assert [float(v) for v in (found.loss, found.clipped, found.dual_clipped, found.kl)] == [0.0] * 4
    assert float(value_loss(x, 2 * x, 3 * x, nothing, CLIP, 1.0)) == 0.0


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        (0.1, 1.0, 0.405, -0.9),  # within the clip: the plain square
        (0.5, 1.0, 0.32, 0.0),  # moved further towards the target than the clip lets count: flat
        (0.5, 0.0, 0.125, 0.5),  # moved far from the target: the plain square is the larger one
        (0.2, 1.0, 0.32, -0.8),  # at the edge
    ],
)
def test_the_value_loss_is_flat_where_the_value_has_moved_far_towards_its_target(
    value: float, target: float, loss: float, gradient: float
) -> None:
    v = torch.tensor([[value]], requires_grad=True)
    found = value_loss(v, torch.zeros(1, 1), torch.tensor([[target]]), ONE, CLIP, 1.0)
    found.backward()
    assert float(found) == pytest.approx(loss)
    assert float(v.grad) == pytest.approx(gradient)


@quickly
@given(**SHAPES)
def test_the_value_loss_equals_its_formula_token_by_token(seed: int, rows: int, width: int) -> None:
    values, old, returns = tensors(seed, rows, width, 3)
    mask = mask_with_gaps(seed, rows, width)
    total = sum(references.value_token(*(float(x[p]) for x in (values, old, returns)), CLIP) for p in references.positions_of(mask))
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
    weights = floats(seed + 8, 3, 4).abs()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, mask, CLIP, 5.0).loss, logprobs)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, mask, CLIP, 5.0, 1.3, weights).loss, logprobs)
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
    assert not found.dual_clipped.requires_grad
    assert not found.kl.requires_grad


def test_a_ratio_at_the_dual_clip_is_not_cut() -> None:
    ratio = float(torch.tensor(math.log(2.0), dtype=torch.float64).exp())
    found, slope = single(2.0, -1.0, dual_clip=ratio)
    assert float(found.dual_clipped) == 0.0
    assert slope == pytest.approx(2.0)
