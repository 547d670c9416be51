"""Means and moments over the tokens that count."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks; the identity on one rank."""


def alone(x: Tensor) -> Tensor:
    """The `Reduce` of a single rank."""
    return x


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask`; scalar. What stands elsewhere (NaN too) has no effect."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum()


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """Mean over all unmasked entries of all ranks; 0 when there are none."""
    sums = reduce(torch.stack([masked_sum(x, mask), mask.sum().to(x.dtype)]))
    return sums[0] / sums[1].clamp(min=1)


def moments(x: Tensor, mask: Tensor, reduce: Reduce = alone) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all unmasked entries of all ranks."""
    mean = masked_mean(x, mask, reduce)
    return mean, masked_mean((x - mean) ** 2, mask, reduce)


def whiten(x: Tensor, mask: Tensor, reduce: Reduce = alone, epsilon: float = 1e-8) -> Tensor:
    """`x` with mean 0 and variance 1 over the unmasked entries of the whole batch on all ranks; 0 elsewhere.

    The variance is biased (divided by n), as in the reference reproductions of InstructGPT's PPO.
    """
    mean, variance = moments(x, mask, reduce)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + epsilon), torch.zeros_like(x))
