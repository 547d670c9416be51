"""Moderation as the service uses it: many streams ask at once, and a moderator is asked once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from orchestration.serving.errors import unmoderated
from orchestration.serving.moderation.moderators import Limits, ModerationError, Moderator, decide
from orchestration.serving.moderation.verdict import Verdict

Scores = dict[str, float]
ALLOWED = Verdict({}, "allow", ())
ORDER = ("allow", "warn", "block")
WINDOW = 4000
"""Characters of the end of a text that is still being written that are judged together."""
AT_ONCE = 64
"""Texts that a moderator is asked about at once."""


@dataclass
class Judge:
    """Scores by a moderator, actions by thresholds."""

    name: str
    categories: tuple[str, ...]
    ask: Callable[[list[str]], Awaitable[list[Scores]]]
    thresholds: Limits
    on: bool = True

    def __post_init__(self) -> None:
        self.waiting: list[tuple[str, asyncio.Future[Scores]]] = []
        self.asking: asyncio.Task[None] | None = None

    async def scores(self, texts: Sequence[str]) -> list[Scores]:
        """Scores of each text. Texts of several callers that come while the moderator is at work are its next batch.

        Raises:
            ApiError: 503, the moderator gave none.
        """
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in texts]
        self.waiting += zip(texts, futures, strict=True)
        if self.asking is None:
            self.asking = loop.create_task(self._work())
        try:
            return list(await asyncio.gather(*futures))
        except ModerationError:
            raise unmoderated() from None

    async def _work(self) -> None:
        try:
            while self.waiting:
                batch, self.waiting = self.waiting[:AT_ONCE], self.waiting[AT_ONCE:]
                try:
                    found = await self.ask([text for text, _ in batch])
                except Exception as cause:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(cause)
                    continue
                for (_, future), scores in zip(batch, found, strict=True):
                    if not future.done():  # whoever asked may have left
                        future.set_result(scores)
        finally:
            self.asking = None

    async def verdict(self, texts: Sequence[str]) -> Verdict:
        """The gravest verdict on any of the texts."""
        texts = [text for text in texts if text.strip()]
        if not self.on or not texts:
            return ALLOWED
        found = [decide(scores, self.thresholds) for scores in await self.scores(texts)]
        return max(found, key=lambda verdict: (ORDER.index(verdict.action), max(verdict.scores.values(), default=0.0)))


def in_process(moderator: Moderator, thresholds: Limits) -> Judge:
    """A moderator in a thread of this process."""

    async def ask(texts: list[str]) -> list[Scores]:
        return await asyncio.to_thread(moderator.scores, texts)

    return Judge(moderator.name, tuple(moderator.categories), ask, thresholds)


def nobody() -> Judge:
    """No moderation: everything is allowed."""

    async def ask(texts: list[str]) -> list[Scores]:
        return [{} for _ in texts]

    return Judge("off", (), ask, {}, on=False)
