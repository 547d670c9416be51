"""Rewards per token, and generalised advantage estimation (Schulman et al. 1506.02438) over the tokens the policy wrote."""

from __future__ import annotations

import torch
from torch import Tensor


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float, clip: float, finished: Tensor, penalty: float) -> Tensor:
    """Rewards per token: -beta KL at every reply token, and the clipped score at the last one (InstructGPT, equation 2).

    Args:
        scores: [B], one per reply; clipped to +-clip.
        kl: [B, T], log pi - log pi_ref.
        mask: [B, T] bool, reply tokens; every row has at least one.
        finished: [B] bool; `penalty` is taken from the score of replies that did not end by themselves.

    Returns:
        [B, T], 0 outside the mask.
    """
    rewards = torch.where(mask, -beta * kl, torch.zeros_like(kl))
    final = scores.clamp(-clip, clip) - penalty * (~finished).to(scores.dtype)
    rewards[torch.arange(len(scores)), last_index(mask)] += final
    return rewards


def last_index(mask: Tensor) -> Tensor:
    """[B]: index of the last true entry of each row; -1 for a row without any."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, [B, T] each, 0 outside the mask.

    delta_t = r_t + gamma V(next) - V_t and A_t = delta_t + gamma lam A(next), where `next` is the next *unmasked* token: a gap of tool or
    user tokens takes no time, so neither discount nor lambda decays over it. After the last token both are 0.
    Returns are A + V.
    """
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        acts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(acts, advantage, torch.zeros_like(advantage))
        next_value = torch.where(acts, values[:, t], next_value)
        next_advantage = torch.where(acts, advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, torch.zeros_like(values))
