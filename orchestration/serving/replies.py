"""From an engine's tokens to text that may be shown: stop strings, hidden prompts, moderation.

    tokens ─▶ characters ─▶ before a stop string? ─▶ no recital of the hidden prompt? ─▶ end of a word ─▶ judged ─▶ released

Text is only ever held back, cut and released, never rewritten. What is held back because it may become a stop string or a recital is
released once it is neither; the rest of a word waits at most `flush_ms`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal

from actors.serving.protocol import Delta
from orchestration.serving.canaries import Guard, Secret
from orchestration.serving.detokenizing import Detokenizer
from orchestration.serving.engine import Writing
from orchestration.serving.errors import engine_lost, out_of_time
from orchestration.serving.judging import ALLOWED, WINDOW, Judge
from orchestration.serving.moderation.verdict import Verdict
from orchestration.serving.stopping import Stops

Ending = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Token:
    """One token of a reply, for a client that asked for log-probs."""

    id: int
    end: int
    """Where its text ends in the reply."""
    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """What is released of a reply at a time."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Ending | None = None
    verdict: Verdict = ALLOWED
    recited: bool = False
    """The reply was ended because it recited the hidden prompt."""
    written: int = 0
    """Tokens written so far, the end token included."""


class Draft:
    """A reply as far as it is written, and how much of it may be released."""

    def __init__(self, detokenizer: Detokenizer, stops: Stops, secret: Secret) -> None:
        self.detokenizer, self.stops, self.guard = detokenizer, stops, Guard(secret)
        self.text = ""
        self.cut: int | None = None
        """Where the reply ends before what was written ends."""
        self.ending: Ending | None = None
        self.written = 0
        self.tokens: list[Token] = []

    def push(self, delta: Delta) -> None:
        """Take in what was written.

        Raises:
            ApiError: the engine stopped.
        """
        if delta.finish == "error":
            raise engine_lost()
        self.written += len(delta.tokens)
        body = delta.tokens[:-1] if delta.finish == "stop" else delta.tokens
        if delta.logprobs:
            for token, logprob, likeliest in zip(body, delta.logprobs, delta.likeliest, strict=False):
                self._extend(self.detokenizer.push([token]))
                self.tokens.append(Token(token, len(self.text), logprob, likeliest))
        elif body:
            self._extend(self.detokenizer.push(body))
        if delta.finish:
            self._extend(self.detokenizer.finish())
            self.ending = self.ending or delta.finish

    def _extend(self, new: str) -> None:
        if not new or self.cut is not None:
            return
        before = len(self.text)
        self.text += new
        place = self.stops.find(self.text, len(new))
        if place is not None:
            self.cut, self.ending, new = place, "stop", new[: max(0, place - before)]
        self.guard.push(new)
        if self.guard.broken is not None:
            self.cut, self.ending = self.guard.broken, "content_filter"

    @property
    def over(self) -> bool:
        """Nothing more will be released than what is there."""
        return self.ending is not None

    def safe(self) -> int:
        """How many characters may be judged and released."""
        if self.cut is not None:
            return self.cut
        if self.over:
            return len(self.text)
        return min(self.stops.safe(self.text), self.guard.safe())


def word_end(text: str, start: int, stop: int) -> int:
    """Where the last whole word of text[start:stop] ends; `start` if none does."""
    for place in range(stop, start, -1):
        if text[place - 1].isspace():
            return place
    return start


class Release:
    """Gives out a draft in pieces that were judged."""

    def __init__(self, draft: Draft, judge: Judge, flush: float, clock: Callable[[], float]) -> None:
        self.draft, self.judge, self.flush, self.clock = draft, judge, flush, clock
        self.sent, self.told = 0, 0
        self.since: float | None = None
        """When the oldest text that waits for the rest of its word came."""
        self.held = 0.0
        """Longest that text has waited here, seconds: for the rest of its word and for its verdict."""
        self.verdict = ALLOWED

    def wait(self) -> float | None:
        """Seconds until text must go out though its word may go on; None: nothing waits."""
        return None if self.since is None else max(0.0, self.since + self.flush - self.clock())

    async def next(self) -> Piece | None:
        """What can be released now; None: nothing."""
        draft, over = self.draft, self.draft.over
        safe = draft.safe()
        until = safe
        if not over and self.judge.on:
            until = word_end(draft.text, self.sent, safe)
            if until == self.sent and self.since is not None and self.clock() >= self.since + self.flush:
                until = safe
        came = self.clock() if self.since is None else self.since
        self.since = None if until >= safe else (self.clock() if until > self.sent or self.since is None else self.since)
        if until <= self.sent and not over:
            return None
        if self.judge.on and until > self.sent:
            self.verdict = await self.judge.verdict([draft.text[max(0, until - WINDOW) : until]])
            if self.verdict.action == "block":
                return Piece(finish="content_filter", verdict=self.verdict, written=draft.written)
        if until > self.sent:
            self.held = max(self.held, self.clock() - came)
        text, self.sent = draft.text[self.sent : until], max(until, self.sent)
        return Piece(text, self._tokens(), draft.ending if over else None, self.verdict, self._recited(), draft.written)

    def _recited(self) -> bool:
        return self.draft.guard.broken is not None and self.draft.ending == "content_filter"

    def _tokens(self) -> list[Token]:
        """Tokens whose text is released by now, whole."""
        found = []
        while self.told < len(self.draft.tokens) and self.draft.tokens[self.told].end <= self.sent:
            found.append(self.draft.tokens[self.told])
            self.told += 1
        return found


async def pieces(writing: Writing, release: Release, until: float, limit: float) -> AsyncIterator[Piece]:
    """A reply in pieces; the last one has `finish`. Closing it stops the engine.

    Args:
        until: when, by the release's clock, it must be complete.
        limit: how long that is, for who asks why it is not.

    Raises:
        ApiError: the engine stopped, or time is over.
    """
    clock = release.clock
    try:
        while True:
            left, flush = max(until - clock(), 0.0), release.wait()
            delta = await writing.take(left if flush is None else min(left, flush))
            if delta is not None:
                release.draft.push(delta)
            elif flush is None or left <= flush:
                raise out_of_time(limit)
            if release.judge.on:
                try:
                    async with asyncio.timeout(max(until - clock(), 0.0)):
                        piece = await release.next()
                except TimeoutError:
                    raise out_of_time(limit) from None
            else:
                piece = await release.next()
            if piece is not None:
                yield piece
                if piece.finish:
                    return
    finally:
        writing.close()
