"""KL between policy and reference: estimators, and what keeps it in hand.

Estimators after Schulman, "Approximating KL Divergence" (2020), for KL(pi || ref) from samples of pi, per token:
k1 = log pi - log ref (unbiased, may be negative), k2 = k1^2 / 2 (biased, low variance), k3 = e^-k1 - 1 + k1 (unbiased, >= 0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """[B, T] -> [B, T]."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """[B, T] -> [B, T]."""
    return (logprobs - reference) ** 2 / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """[B, T] -> [B, T]."""
    difference = reference - logprobs
    return torch.expm1(difference) - difference


@dataclass(frozen=True)
class KLController:
    """Beta, the weight of the KL penalty. `fixed` keeps it; `adaptive` follows Ziegler et al. (1909.08593, section 2.2):

    beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), with KL per reply in nats and n replies seen.
    """

    beta: float
    adaptive: bool
    target: float
    horizon: float

    def updated(self, kl: float, replies: int) -> KLController:
        """The controller after `replies` replies whose mean KL was `kl`."""
        if not self.adaptive:
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, beta=self.beta * (1 + error * replies / self.horizon))
