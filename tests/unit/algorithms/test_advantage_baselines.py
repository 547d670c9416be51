from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.baselines import EPSILON, groups, grpo, on_tokens, reinforce, rloo
from tests import references
from tests.fakes import floats, mask_with_gaps, quickly

GROUPS = {"seed": st.integers(0, 10**6), "sizes": st.lists(st.integers(2, 5), min_size=1, max_size=4)}


def batch(seed: int, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rewards, prompts), replies to one prompt scattered over the batch."""
    prompts = torch.cat([torch.full((size,), 7 * number) for number, size in enumerate(sizes)])
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return floats(seed, len(prompts)), prompts[order]


@quickly
@given(**GROUPS)
def test_rloo_equals_a_loop_over_each_prompts_other_replies(seed: int, sizes: list[int]) -> None:
    rewards, prompts = batch(seed, sizes)
    assert rloo(rewards, prompts).tolist() == pytest.approx(references.by_prompt(rewards, prompts, references.rloo))


@quickly
@given(**GROUPS)
def test_grpo_equals_a_loop_over_each_prompts_replies(seed: int, sizes: list[int]) -> None:
    rewards, prompts = batch(seed, sizes)
    wanted = references.by_prompt(rewards, prompts, lambda group: references.grpo(group, EPSILON))
    assert grpo(rewards, prompts).tolist() == pytest.approx(wanted)


@quickly
@given(**GROUPS, shift=st.floats(-50, 50))
def test_no_baseline_lets_a_constant_through(seed: int, sizes: list[int], shift: float) -> None:
    rewards, prompts = batch(seed, sizes)
    for function in (lambda r: rloo(r, prompts), lambda r: grpo(r, prompts), reinforce):
        torch.testing.assert_close(function(rewards + shift), function(rewards), atol=1e-6, rtol=1e-6)


@quickly
@given(**GROUPS, shift=st.floats(-50, 50))
def test_rloo_and_grpo_let_no_constant_of_a_prompt_through_and_reinforce_does(seed: int, sizes: list[int], shift: float) -> None:
    rewards, prompts = batch(seed, sizes)
    moved = rewards + shift * prompts
    torch.testing.assert_close(rloo(moved, prompts), rloo(rewards, prompts), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grpo(moved, prompts), grpo(rewards, prompts), atol=1e-4, rtol=1e-4)
    if len(sizes) > 1 and abs(shift) > 1:
        assert not torch.allclose(reinforce(moved), reinforce(rewards))


def test_known_cases() -> None:
    rewards, prompts = torch.tensor([1.0, 2.0, 6.0, 0.0, 4.0]), torch.tensor([3, 3, 3, 8, 8])
    assert rloo(rewards, prompts).tolist() == [-3.0, -1.5, 4.5, -4.0, 4.0]
    assert grpo(rewards, prompts).tolist() == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, -(0.5**0.5), 0.5**0.5], abs=1e-5)
    assert reinforce(rewards).tolist() == pytest.approx([-1.6, -0.6, 3.4, -2.6, 1.4])


def test_rloo_is_group_mean_centring_times_n_over_n_minus_1() -> None:
    rewards, prompts = batch(1, [4])
    torch.testing.assert_close(rloo(rewards, prompts), (rewards - rewards.mean()) * 4 / 3)


def test_equal_rewards_have_no_advantage() -> None:
    rewards, prompts = torch.full((4,), 2.5), torch.tensor([0, 0, 1, 1])
    for found in (rloo(rewards, prompts), grpo(rewards, prompts), reinforce(rewards)):
        assert found.tolist() == [0.0] * 4


def test_the_standard_deviation_of_nearly_equal_rewards_is_held_up_by_epsilon() -> None:
    assert EPSILON == 1e-6
    found = grpo(torch.tensor([0.0, 2e-6], dtype=torch.float64), torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([-1 / (2**0.5 + 1), 1 / (2**0.5 + 1)])


@pytest.mark.parametrize("function", [rloo, grpo])
def test_a_reply_without_others_to_its_prompt_is_refused_by_name(function) -> None:
    with pytest.raises(ValueError, match=r"prompt 42 has a single reply on this rank.*ppo\.samples_per_prompt.*ppo\.advantage=reinforce"):
        function(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5, 42, 5]))


def test_groups_are_who_answers_the_same_prompt() -> None:
    same, size = groups(torch.zeros(4), torch.tensor([1, 2, 1, 2]))
    assert same.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert size.tolist() == [2, 2, 2, 2]


def test_reinforces_baseline_is_the_mean_over_all_ranks() -> None:
    mine, others = torch.tensor([1.0, 2.0]), torch.tensor([9.0])
    found = reinforce(mine, lambda sums: sums + torch.tensor([float(others.sum()), 1.0]))
    assert found.tolist() == [-3.0, -2.0]


def test_a_single_reply_in_the_whole_batch_has_no_advantage_under_reinforce() -> None:
    assert reinforce(torch.tensor([3.0])).tolist() == [0.0]


def test_a_replys_advantage_stands_at_each_of_its_tokens_and_nowhere_else() -> None:
    mask, advantages = mask_with_gaps(1, 3, 5), floats(2, 3)
    found = on_tokens(advantages, mask)
    assert found.dtype == advantages.dtype
    for b in range(3):
        assert found[b].tolist() == [float(advantages[b]) if mask[b, t] else 0.0 for t in range(5)]
