"""Language modelling on the tokens the assistant wrote."""

from __future__ import annotations

from torch import Tensor

from actors.algorithms.masking import masked_sum


def language_loss(logprobs: Tensor, mask: Tensor, denominator: float) -> Tensor:
    """-sum of log-probs over the mask, over `denominator`: the unmasked tokens of the whole optimizer step on all ranks. Nats."""
    return -masked_sum(logprobs, mask) / denominator
