"""Losses of a reward model: rankings of K answers (InstructGPT 2203.02155, equation 1) and single judgements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def ranking_loss(scores: Tensor, group: Tensor, rank: Tensor, denominator: float, margin: float = 0.0) -> Tensor:
    """Sum over prompts of the mean of -log sigmoid(r_better - r_worse) over that prompt's untied pairs, over `denominator`.

    Args:
        scores, group, rank: [N]; pairs are formed inside a group, the lower rank is the better answer, equal ranks are dropped.
        denominator: prompts of the whole optimizer step on all ranks.
        margin: taken from r_better - r_worse for each step of rank between them (Llama 2, 2307.09288, 3.2.2).

    Returns:
        Scalar. All C(K, 2) pairs of a prompt weigh 1 together, so that K does not change a prompt's weight. Without a margin equal
        scores give ln 2.
    """
    better, pairs_of = comparable(group, rank)
    losses = -logsigmoid(scores[:, None] - scores[None, :] - margin * (rank[None, :] - rank[:, None]))
    weights = better.to(scores.dtype) / pairs_of.clamp(min=1)[:, None]
    return (losses * weights).sum() / denominator


def comparable(group: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """([N, N] bool: row i is preferred to column j, [N]: untied pairs in the row's group)."""
    same = group[:, None] == group[None, :]
    better = same & (rank[:, None] < rank[None, :])
    wins = better.sum(dim=1).to(rank.dtype)
    return better, same.to(rank.dtype) @ wins


@dataclass(frozen=True)
class UntiedPairs:
    """Pairs that people ordered, as a list: for many groups at once, where all answers against all would be too much."""

    better: Tensor
    """[P] long: place of the better answer."""
    worse: Tensor
    """[P] long."""
    steps: Tensor
    """[P]: by how much their ranks differ."""
    weight: Tensor
    """[P]: all pairs of a prompt weigh 1 together."""
    prompts: int
    """Prompts, those of which all answers are tied included."""


def untied_pairs(group: Tensor, rank: Tensor) -> UntiedPairs:
    """Args: group, rank: [N], as in `ranking_loss`."""
    members: dict[int, list[int]] = {}
    for place, name in enumerate(group.tolist()):
        members.setdefault(name, []).append(place)
    ranks = rank.tolist()
    rows: list[tuple[int, int, float, float]] = []
    for places in members.values():
        pairs = [(i, j, ranks[j] - ranks[i]) for i in places for j in places if ranks[i] < ranks[j]]
        rows += [(*pair, 1 / len(pairs)) for pair in pairs]
    found = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return UntiedPairs(found[:, 0].long(), found[:, 1].long(), found[:, 2].to(rank.dtype), found[:, 3].to(rank.dtype), len(members))


def pairs_loss(scores: Tensor, pairs: UntiedPairs, margin: float = 0.0) -> Tensor:
    """`ranking_loss` of [N] scores, with the number of prompts as the denominator."""
    losses = -logsigmoid(scores[pairs.better] - scores[pairs.worse] - margin * pairs.steps)
    return (losses * pairs.weight).sum() / max(pairs.prompts, 1)


def pairwise_correct(scores: Tensor, group: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """(untied pairs ordered as people did, untied pairs); equal scores count one half."""
    better, _ = comparable(group, rank)
    difference = scores[:, None] - scores[None, :]
    right = (difference > 0).to(scores.dtype) + 0.5 * (difference == 0).to(scores.dtype)
    return (right * better).sum(), better.sum()


def pointwise_loss(scores: Tensor, label: Tensor, positive_weight: float, denominator: float) -> Tensor:
    """Sum of binary cross-entropy of `scores` as logits over `denominator`, judgements of 1 weighted by `positive_weight`; all [N]."""
    weights = torch.where(label > 0.5, torch.full_like(scores, positive_weight), torch.ones_like(scores))
    return (weights * binary_cross_entropy_with_logits(scores, label, reduction="none")).sum() / denominator
