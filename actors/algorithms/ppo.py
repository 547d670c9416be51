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
    dual_clipped: Tensor
    """Share of tokens that the dual clip cut off (partial sum over `denominator`)."""
    kl: Tensor
    """k3 estimate of KL(old || current) (partial sum over `denominator`)."""


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    denominator: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """-mean w min(r A, clip(r, 1 - clip, 1 + clip) A), with r = exp(logprobs - old); all [B, T].

    Args:
        dual_clip: c > 1; where A < 0 the minimum is not let below c A, so that a ratio that has run away cannot blow up the loss
            (Ye et al. 1912.09729, equation 5).
        weights: w, [B, T], constants (importance.py); None: 1.
    """
    log_ratio = torch.where(mask, logprobs - old, torch.zeros_like(old))
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    losses = torch.maximum(unclipped, clipped)
    cut = torch.zeros_like(mask)
    if dual_clip is not None:
        most = -advantages * dual_clip
        cut = (advantages < 0) & (losses > most)
        losses = torch.where(cut, most, losses)
    if weights is not None:
        losses = weights * losses
    return PolicyLoss(
        loss=masked_sum(losses, mask) / denominator,
        clipped=masked_sum((clipped > unclipped).to(ratio.dtype), mask).detach() / denominator,
        dual_clipped=masked_sum(cut.to(ratio.dtype), mask).detach() / denominator,
        kl=masked_sum(k3(old, torch.where(mask, logprobs, old)), mask).detach() / denominator,
    )


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float, denominator: float) -> Tensor:
    """1/2 mean max((V - R)^2, (clip(V, V_old +- clip) - R)^2); all [B, T]; scalar."""
    near = torch.clamp(values, old - clip, old + clip)
    losses = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * masked_sum(losses, mask) / denominator
