"""What the page asks of the service: the same functions, limits and errors as the API's endpoints, without a network between."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from pydantic import ValidationError

from orchestration.serving.api import chat
from orchestration.serving.api.forms import ChatForm
from orchestration.serving.errors import ApiError, refused
from orchestration.serving.keys import Owner
from orchestration.serving.page.rendering import rendered
from orchestration.serving.page.turns import STOPPED, Answer, Turn, prompt_of, turns_of
from orchestration.serving.service import Service
from orchestration.serving.store.records import Conversation, digest_of
from orchestration.serving.writing import interleaved, jobs

RENDERING = 8
"""A character of markdown takes as long as so many of other texts."""
LISTED = 30
"""Conversations in the list at a time: to draw one takes 2 ms, in which nobody else is served."""


def _recall(turns: list[Turn], given: dict[tuple[str, str], str], thumbs: dict[str, str]) -> None:
    """Note what the owner thought of the answers: by the digest of what each answers, and its text."""
    for turn in turns:
        if turn.answer:
            turn.answer.recorded = given.get((digest_of(prompt_of(turns, turn)), turn.answer.text))
            turn.answer.thumb = thumbs.get(turn.answer.recorded or "")


class Backend:
    """The service, for one owner."""

    def __init__(self, service: Service, owner: Callable[[], Owner | None]) -> None:
        self.service, self._owner = service, owner

    @property
    def owner(self) -> Owner:
        """Raises:
        ApiError: 401, the session is over.
        """
        if (owner := self._owner()) is None:
            raise ApiError(401, "This session is over.", kind="authentication_error")
        return owner

    @property
    def models(self) -> list[str]:
        return list(self.service.models)

    async def conversations(self, after: str | None = None) -> list[Conversation]:
        return await self.service.stored(self.service.store.conversations, self.owner.id, LISTED, after)

    async def rendered(self, turns: Sequence[Turn]) -> None:
        """Make the HTML of these turns' answers, so that it is there when they are drawn."""
        texts = [answer.text for turn in turns for answer in turn.answers]
        await self.service.aside(RENDERING * sum(map(len, texts)), lambda: [rendered(text) for text in texts])

    async def new_conversation(self, title: str, consent: bool) -> Conversation:
        return await self.service.stored(self.service.store.new_conversation, self.owner.id, title=title, consent=consent)

    async def conversation(self, name: str) -> tuple[Conversation, list[Turn]]:
        """A conversation and its turns, with what its owner thought of the answers."""
        store, owner = self.service.store, self.owner.id
        found = await self.service.stored(store.conversation, owner, name)
        turns = turns_of(await self.service.stored(store.messages, owner, name))
        given = {(digest, text): answer for answer, digest, text in await self.service.stored(store.given, owner, name)}
        if given:
            thoughts = await self.service.stored(store.feedback, owner, list(given.values()))
            thumbs = {thought.answers[0]: thought.value for thought in thoughts if thought.kind == "thumbs"}
            size = len(turns) * sum(len(turn.text) + len(turn.answer.text if turn.answer else "") for turn in turns)
            await self.service.aside(size, _recall, turns, given, thumbs)
        return found, turns

    async def delete_conversation(self, name: str) -> None:
        await self.service.stored(self.service.store.delete_conversation, self.owner.id, name)

    async def consent(self, name: str, given: bool) -> None:
        await self.service.stored(self.service.store.update_conversation, self.owner.id, name, consent=given)

    async def ask(self, conversation: str, text: str, model: str, before: str | None, count: int) -> chat.Asked:
        """A request that was admitted and checked.

        Args:
            before: the message that this one takes the place of, and all after it.
            count: 2: two answers to choose from.

        Raises:
            ApiError: it cannot be served.
        """
        owner = self.owner
        self.service.quotas.admit(owner)
        reference = {"id": conversation} | ({"before": before} if before else {})
        try:
            form = ChatForm.model_validate(
                {"model": model, "messages": [{"role": "user", "content": text}], "conversation": reference}
            )  # fmt: skip
        except ValidationError:
            raise refused("This text holds half of a character; type it again.") from None
        asked = await chat.ask(self.service, owner, form)
        if count > 1 and not asked.refuses:
            asked.wanted = jobs(asked.wanted[0], count, None)
        return asked

    async def write(self, asked: chat.Asked, answers: list[Answer]) -> AsyncIterator[Answer]:
        """Fill the answers, and give the one that has grown. Closing it stops the engine.

        Raises:
            ApiError: no room, the engine stopped, or time is over; what was written until then stays in the answers.
        """
        for answer in answers:
            answer.model, answer.version = asked.model.name, asked.model.version
            answer.read, answer.dropped = asked.window.tokens, asked.window.dropped
        with self.service.admitted():
            if asked.refuses:
                answers[0].text, answers[0].finish, answers[0].written = self.service.settings.refusal, "content_filter", 0
                yield answers[0]
                return
            stream = interleaved(self.service, asked.wanted)
            try:
                async for number, piece in stream:
                    answer = answers[number]
                    answer.text += piece.text
                    answer.finish, answer.written = piece.finish, piece.written
                    answer.judge(piece.verdict)
                    if answer.blocked and not answer.text:
                        answer.text = self.service.settings.refusal
                    yield answer
            finally:
                await stream.aclose()  # type: ignore[attr-defined]  # a generator

    async def keep(self, asked: chat.Asked, turn: Turn) -> None:
        """Note a turn and its first answer in the conversation, as far as it was written."""
        answer = turn.answer
        assert asked.kept is not None and answer is not None
        answer.finish = answer.finish or STOPPED
        verdict = dataclasses.replace(asked.verdict, action=answer.action, categories=answer.categories, scores={})
        answer.id = await asked.kept.answered(answer.text, answer.finish, verdict, asked.model)
        kept = await self.service.stored(self.service.store.messages, self.owner.id, asked.kept.id)
        turn.id = next((message.id for message in reversed(kept) if message.role == "user"), None)

    async def prefer(self, conversation: str, turn: Turn, answer: Answer) -> None:
        """Put the second of two answers into the conversation, in place of the first."""
        first = turn.answers[0]
        assert first.id is not None
        extra: dict[str, Any] = {
            "finish": answer.finish, "moderation": answer.action, "categories": list(answer.categories), "version": answer.version,
            "prompt_version": self.service.models[answer.model].hidden.version if answer.model in self.service.models else "",
        }  # fmt: skip
        message = await self.service.stored(
            self.service.store.replace_from, self.owner.id, conversation, first.id, answer.text, model=answer.model, extra=extra
        )
        answer.id = message.id if message else None

    async def record(self, conversation: str, turns: list[Turn], turn: Turn, *answers: Answer) -> list[str]:
        """Identifiers of answers for feedback; those that have none yet are recorded with the prompt they answer."""
        for answer in answers:
            if answer.recorded is None:
                version = f"{answer.model}@{answer.version}" if answer.version else answer.model
                [answer.recorded] = await self.service.stored(
                    self.service.store.record_answer, self.owner.id, prompt_of(turns, turn), answer.text, version, conversation
                )
        return [answer.recorded for answer in answers if answer.recorded]

    async def feedback(self, kind: str, answers: list[str], value: str, consent: bool) -> str:
        """The identifier of what was said."""
        found = await self.service.stored(self.service.store.add_feedback, self.owner.id, kind, answers, value, consent)
        return found.id

    async def take_back(self, kind: str, answer: str) -> None:
        """Delete what the owner said of an answer."""
        for thought in await self.service.stored(self.service.store.feedback, self.owner.id, [answer]):
            if thought.kind == kind:
                with contextlib.suppress(ApiError):
                    await self.service.stored(self.service.store.delete_feedback, self.owner.id, thought.id)
