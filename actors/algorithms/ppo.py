"""PPO's two clipped losses (Schulman et al. 1707.06347, equation 7; value clipping as in the reference implementations).

Both are sums over the reply tokens of this piece, divided by `denominator`: the reply tokens of the whole optimizer step on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.algorithms.kl import k3
from actors.algorithms.masking import masked_sum


@dataclass
class PolicyLoss:
    loss: Tensor
    """Scalar, to be minimised."""
    clipped: Tensor
    """Share of tokens whose ratio the clip cut off (partial sum over `denominator`)."""
    kl: Tensor
    """k3 estimate of KL(old || current) (partial sum over `denominator`)."""


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float, denominator: float) -> PolicyLoss:
    """-mean min(r A, clip(r, 1 - clip, 1 + clip) A), with r = exp(logprobs - old); all [B, T]."""
    log_ratio = torch.where(mask, logprobs - old, torch.zeros_like(old))
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return PolicyLoss(
        loss=masked_sum(torch.maximum(unclipped, clipped), mask) / denominator,
        clipped=masked_sum((clipped > unclipped).to(ratio.dtype), mask).detach() / denominator,
        kl=masked_sum(k3(old, torch.where(mask, logprobs, old)), mask).detach() / denominator,
    )


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float, denominator: float) -> Tensor:
    """1/2 mean max((V - R)^2, (clip(V, V_old +- clip) - R)^2); all [B, T]; scalar."""
    near = torch.clamp(values, old - clip, old + clip)
    losses = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * masked_sum(losses, mask) / denominator
