"""How replies are drawn, and the protocol of the engines that draw them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from actors.batch import Prompts, Rollouts


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn."""

    temperature: float
    """0: always the likeliest token."""
    max_new_tokens: int
    seed: int
    step: int


class RolloutEngine(Protocol):
    """What samples: transformers here, other engines behind the same two calls."""

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollouts: ...

    def load_weights(self, weights: dict[str, Tensor], version: int | None) -> None:
        """Replace some weights, named as in the policy's `LanguageModel`. With the last of them comes the version that replies are of from
        then on; None while more are to come."""

    def to(self, device: torch.device) -> None:
        """Move the weights."""


@runtime_checkable
class Queueing(Protocol):
    """An engine that samples replies of a later call while it still works on this one's."""

    def expect(self, prompts: Prompts, sampling: Sampling) -> None:
        """Begin with replies to these; `generate` is called for each of them before weights change."""


def assemble(prompts: Prompts, replies: Tensor, logprobs: Tensor, counts: Tensor, finished: Tensor, version: int) -> Rollouts:
    """Prompts and [B, N] replies as right-padded `Rollouts`."""
    lengths = prompts.lengths + counts
    width = int(lengths.max())
    columns = torch.arange(width)[None, :].expand(len(prompts), width)
    offset = columns - prompts.lengths[:, None]
    mask = (offset >= 0) & (columns < lengths[:, None])
    at = offset.clamp(0, replies.shape[1] - 1)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    shared = min(width, prompts.tokens.shape[1])
    inside = columns[:, :shared] < prompts.lengths[:, None]
    tokens[:, :shared] = torch.where(inside, prompts.tokens[:, :shared], 0)
    return Rollouts(
        tokens=torch.where(mask, replies.gather(1, at), tokens),
        lengths=lengths,
        mask=mask,
        behaviour=torch.where(mask, logprobs.gather(1, at), torch.zeros(())),
        finished=finished,
        keys=prompts.keys,
        version=torch.full((len(prompts),), version),
    )
