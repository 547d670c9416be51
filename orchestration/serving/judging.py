"""Moderation as the service uses it: many streams ask at once, and a moderator is asked once for all of them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from orchestration.serving.apart import Threads, apart
from orchestration.serving.errors import unmoderated
from orchestration.serving.moderation.moderators import Limits, ModerationError, Moderator, decide
from orchestration.serving.moderation.verdict import Verdict

logger = logging.getLogger("chatray.serving")
Scores = dict[str, float]
Waiting = tuple[str, asyncio.Future[Scores]]
ALLOWED = Verdict({}, "allow", ())
ORDER = ("allow", "warn", "block")
WINDOW = 4000
"""Characters of the end of a text that is still being written that are judged together."""
AT_ONCE = 64
"""Texts that a moderator is asked about at once."""
CHARACTERS_AT_ONCE = 100_000
"""Once a batch has as many, no further text joins it: a batch takes seconds at most."""
JUDGE_SECONDS = 120.0
"""Serve holds calls to a replica that was killed until its successor is there. Long enough for that, and for a moderator that is being
swapped: with 15 s requests were refused."""


@dataclass
class Judge:
    """Scores by a moderator, actions by thresholds."""

    name: str
    categories: tuple[str, ...]
    ask: Callable[[list[str]], Awaitable[list[Scores]]]
    thresholds: Limits
    on: bool = True
    seconds: float = JUDGE_SECONDS
    """How long a text waits for its scores, and the moderator is given for a batch."""

    def __post_init__(self) -> None:
        self.waiting: deque[Waiting] = deque()
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
            self.asking = apart(self._work())
        try:
            async with asyncio.timeout(self.seconds):
                return list(await asyncio.gather(*futures))
        except (ModerationError, TimeoutError):
            raise unmoderated() from None

    async def _work(self) -> None:
        """Ask about batch after batch. However one ends, those who wait for it hear of it, and the next one is asked about."""
        batch: list[Waiting] = []
        try:
            while batch := self._batch():
                try:
                    async with asyncio.timeout(self.seconds):
                        found = await self.ask([text for text, _ in batch])
                    if len(found) != len(batch):
                        raise ModerationError(f"{len(found)} scores for {len(batch)} texts")
                except (Exception, asyncio.CancelledError) as cause:
                    _fail(batch, cause)
                    if _cancelled():  # this task, and not just the call that it waits for
                        raise
                    continue
                for (_, future), scores in zip(batch, found, strict=True):
                    if not future.done():  # whoever asked may have left
                        future.set_result(scores)
        finally:
            self.asking = None
            left, self.waiting = [*batch, *self.waiting], deque()
            _fail(left, asyncio.CancelledError())

    def _batch(self) -> list[Waiting]:
        """The next texts to ask about, of those that somebody still waits for."""
        found: list[Waiting] = []
        characters = 0
        while self.waiting and len(found) < AT_ONCE and characters < CHARACTERS_AT_ONCE:
            text, future = self.waiting.popleft()
            if not future.done():
                found.append((text, future))
                characters += len(text)
        return found

    async def verdict(self, texts: Sequence[str]) -> Verdict:
        """The gravest verdict on any of the texts."""
        texts = [text for text in texts if text.strip()]
        if not self.on or not texts:
            return ALLOWED
        found = [decide(scores, self.thresholds) for scores in await self.scores(texts)]
        return max(found, key=lambda verdict: (ORDER.index(verdict.action), max(verdict.scores.values(), default=0.0)))


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _fail(batch: Iterable[Waiting], cause: BaseException) -> None:
    """Nobody may wait for scores that will not come, whatever the cause is."""
    waiting = [future for _, future in batch if not future.done()]
    if waiting and not isinstance(cause, ModerationError):
        logger.error("%d texts were not judged", len(waiting), exc_info=cause)
    for future in waiting:
        future.set_exception(ModerationError(type(cause).__name__))


def in_process(moderator: Moderator, thresholds: Limits) -> Judge:
    """A moderator in a thread of this process."""
    thread = Threads("moderation", 1)

    async def ask(texts: list[str]) -> list[Scores]:
        return await thread.run(moderator.scores, texts)

    return Judge(moderator.name, tuple(moderator.categories), ask, thresholds)


def nobody() -> Judge:
    """No moderation: everything is allowed."""

    async def ask(texts: list[str]) -> list[Scores]:
        return [{} for _ in texts]

    return Judge("off", (), ask, {}, on=False)
