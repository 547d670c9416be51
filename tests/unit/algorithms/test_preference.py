from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms.preference import comparable, pairs_loss, pairwise_correct, pointwise_loss, ranking_loss, untied_pairs
from tests.fakes import floats, quickly

GROUPS = {"seed": st.integers(0, 10**6), "sizes": st.lists(st.integers(1, 5), min_size=1, max_size=4)}


def ranked(seed: int, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores, group, rank) with ties, rows in a random order."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.cat([torch.full((size,), 10 * number) for number, size in enumerate(sizes)])
    rank = torch.cat([torch.randint(0, max(size - 1, 1), (size,), generator=generator) for size in sizes]).double()
    order = torch.randperm(len(group), generator=generator)
    return floats(seed, len(group)), group[order], rank[order]


def untied(group: torch.Tensor, rank: torch.Tensor) -> dict[int, list[tuple[int, int]]]:
    """(better, worse) pairs of each prompt."""
    found: dict[int, list[tuple[int, int]]] = {int(g): [] for g in group}
    for i, j in combinations(range(len(group)), 2):
        if group[i] == group[j] and rank[i] != rank[j]:
            found[int(group[i])].append((i, j) if rank[i] < rank[j] else (j, i))
    return found


@quickly
@given(**GROUPS)
def test_the_ranking_loss_is_the_mean_over_each_prompts_untied_pairs_summed_over_prompts(seed: int, sizes: list[int]) -> None:
    scores, group, rank = ranked(seed, sizes)
    wanted = 0.0
    for pairs in untied(group, rank).values():
        losses = [math.log1p(math.exp(float(scores[worse] - scores[better]))) for better, worse in pairs]
        wanted += sum(losses) / len(losses) if losses else 0.0
    assert float(ranking_loss(scores, group, rank, 3.0)) == pytest.approx(wanted / 3)


@quickly
@given(**GROUPS)
def test_accuracy_counts_each_untied_pair_once_and_equal_scores_one_half(seed: int, sizes: list[int]) -> None:
    scores, group, rank = ranked(seed, sizes)
    scores = scores.round()  # some scores are equal
    pairs = [pair for found in untied(group, rank).values() for pair in found]
    wanted = sum(0.5 if scores[a] == scores[b] else float(scores[a] > scores[b]) for a, b in pairs)
    right, total = pairwise_correct(scores, group, rank)
    assert (float(right), int(total)) == (wanted, len(pairs))


@pytest.mark.parametrize("answers", [2, 4, 9])
def test_equal_scores_cost_ln_2_whatever_k_is(answers: int) -> None:
    loss = ranking_loss(torch.full((answers,), 3.0), torch.zeros(answers, dtype=torch.long), torch.arange(float(answers)), 1.0)
    assert float(loss) == pytest.approx(math.log(2))


def test_each_pair_of_a_prompt_of_k_weighs_1_over_k_choose_2() -> None:
    scores = torch.zeros(4 + 2, dtype=torch.float64, requires_grad=True)
    group, rank = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0.0, 1, 2, 3, 0, 1]).double()
    ranking_loss(scores, group, rank, 2.0).backward()
    # at equal scores each pair's gradient is 1/2; the best of 4 is in 3 of 6 pairs, the best of 2 in 1 of 1; two prompts
    assert scores.grad.tolist() == pytest.approx([-0.125, -0.125 / 3, 0.125 / 3, 0.125, -0.25, 0.25])


def test_a_prompt_whose_answers_all_tie_has_no_loss_and_no_gradient() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = ranking_loss(scores, torch.zeros(3, dtype=torch.long), torch.ones(3), 1.0)
    loss.backward()
    assert float(loss) == 0.0
    assert scores.grad.tolist() == [0.0, 0.0, 0.0]


def test_answers_of_different_prompts_are_never_compared() -> None:
    better, pairs = comparable(torch.tensor([0, 1, 0, 1]), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert better.nonzero().tolist() == [[0, 2], [3, 1]]
    assert pairs.tolist() == [1, 1, 1, 1]


@quickly
@given(**GROUPS)
def test_prompts_split_over_ranks_with_the_shared_denominator_add_up_to_the_whole(seed: int, sizes: list[int]) -> None:
    scores, group, rank = ranked(seed, sizes)
    prompts = float(len(sizes))
    parts = [group == g for g in group.unique()]
    total = sum(ranking_loss(scores[p], group[p], rank[p], prompts) for p in parts)
    assert float(total) == pytest.approx(float(ranking_loss(scores, group, rank, prompts)))


@quickly
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), weight=st.floats(0.1, 5))
def test_the_pointwise_loss_is_weighted_cross_entropy(seed: int, count: int, weight: float) -> None:
    scores, label = 2 * floats(seed, count), (floats(seed + 1, count) > 0).double()
    wanted = 0.0
    for score, good in zip(scores.tolist(), label.tolist(), strict=True):
        chance = 1 / (1 + math.exp(-score))
        wanted -= weight * math.log(chance) if good else math.log(1 - chance)
    assert float(pointwise_loss(scores, label, weight, 4.0)) == pytest.approx(wanted / 4)
    halves = [pointwise_loss(scores[s], label[s], weight, 4.0) for s in (slice(0, count // 2), slice(count // 2, None))]
    assert float(sum(halves)) == pytest.approx(wanted / 4)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_both_losses_agree_with_finite_differences(seed: int) -> None:
    scores, group, rank = ranked(seed, [4, 3, 2])
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ranking_loss(x, group, rank, 3.0), scores)
    label = (rank > 0).double()
    assert torch.autograd.gradcheck(lambda x: pointwise_loss(x, label, 2.5, 9.0), scores)


def test_confident_and_wrong_scores_give_a_finite_loss() -> None:
    loss = ranking_loss(torch.tensor([-500.0, 500.0]), torch.zeros(2, dtype=torch.long), torch.tensor([0.0, 1.0]), 1.0)
    assert float(loss) == pytest.approx(1000.0)


@quickly
@given(margin=st.sampled_from([0.0, 0.3]), **GROUPS)
def test_a_list_of_pairs_gives_the_same_loss(margin: float, seed: int, sizes: list[int]) -> None:
    scores, group, rank = ranked(seed, sizes)
    pairs = untied_pairs(group, rank)
    assert sorted(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == sorted(
        pair for found in untied(group, rank).values() for pair in found
    )
    wanted = ranking_loss(scores, group, rank, float(len(sizes)), margin)
    torch.testing.assert_close(pairs_loss(scores, pairs, margin), wanted)


def test_a_list_of_pairs_asks_for_no_margin_unless_told() -> None:
    group, rank, scores = torch.zeros(3), torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0.3, -0.2, 0.9])
    torch.testing.assert_close(pairs_loss(scores, untied_pairs(group, rank)), ranking_loss(scores, group, rank, 1.0))


def test_pairs_keep_the_precision_of_the_ranks() -> None:
    rank = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    found = untied_pairs(torch.zeros(3), rank)
    assert found.weight.dtype == found.steps.dtype == torch.float64
    assert found.weight.tolist() == [1 / 3] * 3


def test_a_judgement_of_one_half_weighs_as_a_negative_one() -> None:
    half = pointwise_loss(torch.tensor([0.4]), torch.tensor([0.5]), 3.0, 1.0)
    torch.testing.assert_close(half, pointwise_loss(torch.tensor([0.4]), torch.tensor([0.5]), 1.0, 1.0))
