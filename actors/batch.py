"""What flows between the roles: batches of token sequences, padded on the right, and the rules to split and join them.

Alignment, used everywhere: a tensor of shape [B, T] describes the token at its own index. `logprobs[b, t]` is the log-probability of
`tokens[b, t]` given all before it; `values[b, t]` is the value of the state in which that token was chosen. Where `mask` is false the
numbers mean nothing and are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass
class Batch:
    """A struct of tensors whose first dimension is the sequence."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def select(self, index: Tensor | Sequence[int] | slice) -> Self:
        """The named rows, in the named order. Always a copy: a view would carry the whole batch along when it is sent somewhere."""
        rows = slice_or_tensor(index)
        return type(self)(**{f.name: getattr(self, f.name)[rows].clone() for f in fields(self)})

    def split(self, size: int) -> list[Self]:
        """Consecutive pieces of `size` rows; the last may be shorter."""
        return [self.select(slice(i, i + size)) for i in range(0, len(self), size)]

    def to(self, device: torch.device) -> Self:
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, padded with zeros on the right to the longest."""
        return cls(**{f.name: join_rows([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def trimmed(self) -> Self:
        """Without the columns that are padding in every row (needs a `lengths` field)."""
        longest = int(self.lengths.max())  # type: ignore[attr-defined]
        width = self.tokens.shape[1]  # type: ignore[attr-defined]
        cut = {f.name: getattr(self, f.name) for f in fields(self)}
        by_token = {name for name, value in cut.items() if value.dim() > 1 and value.shape[1] == width and name != "keys"}
        return type(self)(**{name: value[:, :longest].clone() if name in by_token else value for name, value in cut.items()})


def slice_or_tensor(index: Tensor | Sequence[int] | slice) -> Tensor | slice:
    """An index that torch takes, whatever sequence it came as (an empty one too)."""
    return index if isinstance(index, Tensor | slice) else torch.tensor(list(index), dtype=torch.long)


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension; [B_i, T_i] tensors are first padded with zeros to the longest T."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, longest - part.shape[1])) for part in parts])


def pad_rows(rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.long) -> tuple[Tensor, Tensor]:
    """Ragged rows as ([B, T] padded with zeros on the right, [B] lengths)."""
    lengths = torch.tensor([len(row) for row in rows])
    filled = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    tokens = torch.zeros(filled.shape, dtype=dtype)
    tokens[filled] = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return tokens, lengths


@dataclass
class Prompts(Batch):
    """Contexts that end where a reply begins."""

    tokens: Tensor
    """[B, T] long."""
    lengths: Tensor
    """[B] long."""
    keys: Tensor
    """[B, 2] long: (prompt, sample). With the seed and the step they fix a sample's randomness, wherever it is drawn."""

    def repeated(self, samples: int) -> Prompts:
        """Each row `samples` times, next to each other, their keys' samples counted from 0."""
        rows = self.select(torch.arange(len(self)).repeat_interleave(samples))
        rows.keys[:, 1] = torch.arange(len(rows)) % samples
        return rows


@dataclass
class Dialogues(Batch):
    """Whole dialogues to learn from."""

    tokens: Tensor
    """[B, T] long."""
    lengths: Tensor
    """[B] long."""
    mask: Tensor
    """[B, T] bool: tokens the assistant wrote, end of turn included."""


@dataclass
class Rollouts(Batch):
    """Prompts with sampled replies."""

    tokens: Tensor
    """[B, T] long: prompt, then reply."""
    lengths: Tensor
    """[B] long: of both together."""
    mask: Tensor
    """[B, T] bool: tokens the policy wrote."""
    behaviour: Tensor
    """[B, T] float: log-probs under the engine that sampled them."""
    finished: Tensor
    """[B] bool: the reply ended by itself."""
    keys: Tensor
    """[B, 2] long, as in `Prompts`."""
    version: Tensor
    """[B] long: version of the weights that sampled the reply."""


@dataclass
class Experience(Batch):
    """Rollouts with what PPO learns from."""

    tokens: Tensor
    lengths: Tensor
    mask: Tensor
    old_logprobs: Tensor
    """[B, T]: under the policy before the update."""
    old_values: Tensor
    """[B, T]: under the critic before the update; 0 without one."""
    advantages: Tensor
    """[B, T]."""
    returns: Tensor
    """[B, T]: targets of the critic; 0 without one."""
    behaviour: Tensor
    """[B, T]: log-probs under the engine that sampled, as in `Rollouts`."""


@dataclass
class Comparisons(Batch):
    """Answers that people ranked, or judged one by one."""

    tokens: Tensor
    """[N, T] long: context and answer."""
    lengths: Tensor
    """[N] long."""
    mask: Tensor
    """[N, T] bool: the answer's tokens."""
    group: Tensor
    """[N] long: the prompt an answer belongs to; only answers of one group are compared."""
    label: Tensor
    """[N] float: for rankings the rank (0 is best, equal is a tie); for judgements 1 (good) or 0 (bad)."""
