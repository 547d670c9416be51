"""What a source of scores is given, and what it must give back."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from actors.batch import Rollouts

Messages = list[dict[str, str]]
"""A conversation: messages of `role` (system, user, assistant, tool) and `content`."""
LARGEST = float(torch.finfo(torch.float32).max)


class RewardError(RuntimeError):
    """A source gave no usable scores; says which, what it gave, and what to change."""


class Decoder(Protocol):
    """The policy's tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Encoder(Protocol):
    """A reward model's own tokenizer and chat template."""

    def encode(self, contexts: Sequence[Messages], replies: Sequence[str], finished: Sequence[bool]) -> list[tuple[list[int], int]]: ...


@dataclass(frozen=True)
class Texts:
    """What sources that read text need and token ids alone do not tell. The driver sends it to every rank."""

    contexts: list[Messages]
    """By the number that a rollout's key names."""
    policy: Decoder
    encoders: dict[str, Encoder]
    """By source: those models that do not score the policy's own tokens."""
    tokens: dict[str, str] = field(default_factory=dict, repr=False)
    """By source: bearer tokens. They come this way so that they stand in no configuration and no environment of a rank."""


class Rows:
    """The replies of one step on this rank, as tokens and as text."""

    def __init__(self, pieces: list[Rollouts], texts: Texts | None) -> None:
        self.pieces, self.known = pieces, texts

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    @property
    def texts(self) -> Texts:
        if self.known is None:
            raise RewardError("the reward role was not told the conversations (Reward.prepare), and a source reads text")
        return self.known

    @cached_property
    def replies(self) -> list[str]:
        """Decoded, without their end token."""
        rows = ((tokens, mask) for piece in self.pieces for tokens, mask in zip(piece.tokens, piece.mask, strict=True))
        return [self.texts.policy.decode(tokens[mask].tolist()) for tokens, mask in rows]

    @property
    def contexts(self) -> list[Messages]:
        """What each reply answers; a copy, so that no source can change what another reads."""
        numbers = (number for piece in self.pieces for number in piece.keys[:, 0].tolist())
        return [[dict(message) for message in self.texts.contexts[number]] for number in numbers]

    @property
    def finished(self) -> list[bool]:
        return [bool(done) for piece in self.pieces for done in piece.finished.tolist()]


class Source(Protocol):
    """One kind of source."""

    def score(self, rows: Rows) -> Tensor:
        """[N] float32, one for each row.

        Raises:
            RewardError: there is none for some row.
        """


def checked(values: Any, count: int, who: str) -> Tensor:
    """[count] float32 of what somebody else's code gave. Nothing but finite numbers passes: no null, no NaN, no text, no truth value.

    Raises:
        RewardError: naming `who` and the first value that is none.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise RewardError(f"{who} gave {_shown(values)} in place of a list of {count} numbers")
    if len(values) != count:
        raise RewardError(f"{who} gave {len(values)} rewards for {count} replies; one for each is needed, in their order")
    for number, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise RewardError(f"{who} gave {_shown(value)} for reply {number + 1} of {count}, which is no number")
        if not -LARGEST <= value <= LARGEST:  # type: ignore[operator]  # NaN too
            raise RewardError(f"{who} gave {_shown(value)} for reply {number + 1} of {count}, which is no finite number")
    return torch.tensor([float(value) for value in values])


def _shown(value: Any) -> str:
    return f"{str(value)[:80]!r} ({type(value).__name__})" if not isinstance(value, numbers.Real) else f"{value!r:.80}"
