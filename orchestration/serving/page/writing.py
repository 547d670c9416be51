"""An answer that is being written for a page, from the request to the conversation it is kept in."""

from __future__ import annotations

import asyncio
import time

from orchestration.serving.api.chat import Asked
from orchestration.serving.errors import ApiError
from orchestration.serving.page import notes
from orchestration.serving.page.backend import Backend
from orchestration.serving.page.flow import until
from orchestration.serving.page.turn_view import TurnView
from orchestration.serving.page.turns import Turn

PACE = 0.06
"""Seconds between two updates of a growing text in the browser, at least; more where drawing it takes longer."""
UNDER_WAY: dict[tuple[str, str], Writing] = {}
"""By owner and conversation, in this process: so that a page that is loaded again finds what the one before it was being told."""


class Writing:
    """One turn's answers."""

    def __init__(self, backend: Backend, turn: Turn, model: str, count: int, before: str | None) -> None:
        self.backend, self.turn, self.model, self.count, self.before = backend, turn, model, count, before
        self.stopping, self.done = asyncio.Event(), asyncio.Event()
        self.error: str | None = None
        """What went wrong after some text had come."""

    def stop(self) -> None:
        self.stopping.set()

    async def run(self, conversation: str, view: TurnView) -> None:
        """Write, show and keep. A turn without answers afterwards left nothing behind.

        Raises:
            ApiError: it failed before any text came.
        """
        place = self.backend.owner.id, conversation
        UNDER_WAY[place] = self
        turn = self.turn
        kept = False
        try:
            asked = await self.backend.ask(conversation, turn.text, self.model, self.before, self.count)
            turn.action, turn.categories = asked.verdict.action, asked.verdict.categories
            if asked.refuses:
                del turn.answers[1:]
                view.show(last=True, writing=True)
            try:
                await self._stream(asked, view)
            except ApiError as error:
                if not any(answer.text for answer in turn.answers):
                    raise
                self.error = notes.told(error)
            self._choose()
            if turn.answers:
                await self.backend.keep(asked, turn)
                kept = True
        finally:
            if not kept:
                turn.answers = []
            UNDER_WAY.pop(place, None)
            self.done.set()

    async def _stream(self, asked: Asked, view: TurnView) -> None:
        shown, took = 0.0, 0.0
        waiting: set[int] = set()
        async for answer in until(self.backend.write(asked, self.turn.answers), self.stopping):
            waiting.add(self.turn.answers.index(answer))
            now = time.monotonic()
            if now - shown < max(PACE, 4 * took):
                continue
            await self.backend.rendered([self.turn])
            for number in waiting:
                view.grow(self.turn.answers[number])
            waiting.clear()
            shown = time.monotonic()
            took = shown - now

    def _choose(self) -> None:
        """Two answers stay only if both came to an end and can be compared; otherwise the better end of the two does."""
        answers = [answer for answer in self.turn.answers if answer.text]
        whole = [answer for answer in answers if answer.finish in ("stop", "length")]
        if len(answers) > 1 and len(whole) < len(answers):
            answers = whole[:1] or answers[:1]
        if len(answers) > 1 and answers[0].text == answers[1].text:
            answers = answers[:1]
        self.turn.answers = answers


async def settled(owner: str, conversation: str) -> None:
    """Stop what a page that is gone still has written for this conversation, and wait until it is kept."""
    if (writing := UNDER_WAY.get((owner, conversation))) is not None:
        writing.stop()
        await writing.done.wait()
