"""The engine that sampled and the trainer that learns are two policies: three log-probs of a token, and what is done about the first gap.

    behaviour   of the engine that sampled the token: its kernels, its precision, its version of the weights
    old         of the trainer before this step's updates; PPO's ratio starts from it
    current     of the trainer now; the only one with a gradient

E[sampled by behaviour] of w A exp(current - old) with w = exp(old - behaviour) is what PPO would see of its own samples. Truncated, as
IMPALA truncates it (Espeholt et al. 1802.01561, section 4.1: rho = min(rho_bar, pi / mu)), its variance is bounded. For engines of LLM
training: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025), truncated importance sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.algorithms.masking import Reduce, alone, masked_mean


def importance_weights(old: Tensor, behaviour: Tensor, mask: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """(weights min(exp(old - behaviour), cap), bool where the cap cut them), [B, T] each; outside the mask and without a cap 1, false."""
    if cap is None:
        return torch.ones_like(old), torch.zeros_like(mask)
    ratio = torch.where(mask, old - behaviour, torch.zeros_like(old)).exp()
    truncated = mask & (ratio > cap)
    return torch.where(truncated, torch.full_like(ratio, cap), ratio), truncated


def engine_gap(old: Tensor, behaviour: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """Mean of |old - behaviour| over the tokens of all ranks, nats; 0 for an engine that computes as the trainer does."""
    return masked_mean((old - behaviour).abs(), mask, reduce)
