"""What a batch of samples looks like, over all ranks: scores, KL, length, repetition, and how far the engines are from the trainer.

Pure torch; ranks meet only through the `Reduce` that is passed in. What needs every sample at once (how many replies are alike) is
gathered by summing: each rank fills its own places of one array, and the sum is the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.algorithms.kl import k1
from actors.algorithms.masking import Reduce, alone, masked_mean, moments
from actors.batch import Rollouts

MULTIPLIER = 6364136223846793005
"""Knuth's, of MMIX: an odd number whose powers spread tokens over 64 bits."""


@dataclass(frozen=True)
class Ranks:
    """Where this share of the samples stands among the others."""

    reduce: Reduce = alone
    rank: int = 0
    count: int = 1

    def gathered(self, x: Tensor) -> Tensor:
        """[N_i] on each rank -> [sum of N_i] on all, rank by rank."""
        sizes = torch.zeros(self.count, dtype=torch.long)
        sizes[self.rank] = len(x)
        sizes = self.reduce(sizes)
        whole = torch.zeros(int(sizes.sum()), dtype=x.dtype)
        start = int(sizes[: self.rank].sum())
        whole[start : start + len(x)] = x
        return self.reduce(whole)

    def largest(self, x: Tensor) -> float:
        """The greatest entry over all ranks."""
        return float(self.gathered(x.max().reshape(1)).max())


def sample_figures(rollouts: Rollouts, scores: Tensor, logprobs: Tensor, reference: Tensor, ranks: Ranks) -> dict[str, float]:
    """Figures of one batch, the same on every rank.

    Args:
        scores: [B].
        logprobs: [B, T] under the policy that learns.
        reference: [B, T] under the reference.
    """
    mask, reduce = rollouts.mask, ranks.reduce
    every = torch.ones(len(rollouts), dtype=torch.bool)
    difference = torch.where(mask, k1(logprobs, reference), torch.zeros(()))
    gap = torch.where(mask, (logprobs - rollouts.behaviour).abs(), torch.zeros(()))
    mean, variance = moments(scores, every, reduce)
    return {
        "score": float(mean),
        "score_std": float(variance.sqrt()),
        "kl": float(masked_mean(difference.sum(dim=1), every, reduce)),
        "kl_per_token": float(masked_mean(difference, mask, reduce)),
        "reference_gap": float(masked_mean(difference.abs(), mask, reduce)),
        "reply_tokens": float(masked_mean(mask.sum(dim=1).float(), every, reduce)),
        "finished_share": float(masked_mean(rollouts.finished.float(), every, reduce)),
        "engine_gap_mean": float(masked_mean(gap, mask, reduce)),
        "engine_gap_max": ranks.largest(gap),
        "weight_version_min": -ranks.largest(-rollouts.version),
        "weight_version_max": ranks.largest(rollouts.version),
        "tokens": float(reduce(rollouts.lengths.sum().float())),
    } | repetition(rollouts.tokens, mask, ranks)


def repetition(tokens: Tensor, mask: Tensor, ranks: Ranks) -> dict[str, float]:
    """How much the replies repeat themselves and each other.

    `distinct_n`: different n-grams over all n-grams of all replies (Li et al. 1510.03055, section 5.2); it falls with the size of the
    batch, so it is to be compared within a run. `duplicate_share`: replies that another reply of the batch equals, all but one of each.

    Args:
        tokens: [B, T].
        mask: [B, T] bool, the reply's tokens, contiguous in each row.
    """
    replies = ranks.gathered(reply_keys(tokens, mask))
    found = {"duplicate_share": 1 - len(replies.unique()) / len(replies)}
    for n in (1, 2, 3):
        grams = ranks.gathered(gram_keys(tokens, mask, n))
        found[f"distinct_{n}"] = len(grams.unique()) / len(grams) if len(grams) else 1.0
    return found


def gram_keys(tokens: Tensor, mask: Tensor, n: int) -> Tensor:
    """A 64-bit key for each n-gram inside a reply, [number of n-grams]; equal n-grams have equal keys."""
    width = tokens.shape[1] - n + 1
    if width < 1:
        return torch.zeros(0, dtype=torch.long)
    keys, inside = torch.zeros(len(tokens), width, dtype=torch.long), torch.ones(len(tokens), width, dtype=torch.bool)
    for i in range(n):
        keys = keys * MULTIPLIER + tokens[:, i : i + width] + 1  # wraps around, as a hash may
        inside &= mask[:, i : i + width]
    return keys[inside]


def reply_keys(tokens: Tensor, mask: Tensor) -> Tensor:
    """[B]: a 64-bit key of each reply; equal replies have equal keys, whatever their prompts."""
    keys = torch.zeros(len(tokens), dtype=torch.long)
    for column in range(tokens.shape[1]):
        keys = torch.where(mask[:, column], keys * MULTIPLIER + tokens[:, column] + 1, keys)
    return keys
