"""What the chat service asks of an engine: requests that come and go while others are written, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Drawing:
    """How a reply is drawn."""

    max_tokens: int
    """Longest reply, its end token included."""
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this share are drawn from."""
    seed: int = 0
    """A reply is a function of model, prompt and seed, up to rounding, whatever else is in the batch."""
    logprobs: int | None = None
    """So many of the likeliest tokens are told beside each one written; None: not even that one's own log-prob."""


@dataclass(frozen=True)
class Request:
    """One reply that is wanted."""

    id: str
    prompt: Sequence[int]
    drawing: Drawing
    tokenizer: str = ""
    """Which tokenizer the ids are of; an engine that has been given another model by then refuses them. "": not checked."""


@dataclass(frozen=True)
class Delta:
    """What was written of a reply since the last one."""

    id: str
    tokens: list[int] = field(default_factory=list)
    """The end token is among them."""
    logprobs: list[float] = field(default_factory=list)
    """Of each token, nats at temperature 1; empty if not asked for."""
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    """For each token the likeliest at its place, with their log-probs."""
    finish: Finish | None = None
    """`stop`: the last token is the end token."""


class StepEngine(Protocol):
    """A model that writes several replies side by side. Called by one thread."""

    exclusive: bool
    """No second engine can be there while this one is (it takes a device's memory)."""

    def add(self, request: Request) -> None: ...

    def abort(self, name: str) -> None:
        """Stop writing; nothing more comes of that reply. Unknown names are no error."""

    def busy(self) -> bool: ...

    def step(self) -> list[Delta]:
        """Write a token of each reply there is room for."""

    def close(self) -> None:
        """Give back what it holds."""


def merged(deltas: Sequence[Delta]) -> Delta:
    """Successive deltas of one reply as one."""
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        deltas[0].id,
        [token for delta in deltas for token in delta.tokens],
        [logprob for delta in deltas for logprob in delta.logprobs],
        [some for delta in deltas for some in delta.likeliest],
        deltas[-1].finish,
    )
