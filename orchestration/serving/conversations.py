"""Conversations that the service keeps, for clients that name one instead of sending the whole history.

A turn is kept together with its reply, once that is there: a request that fails leaves nothing. Turns that were blocked are kept and
shown, and not told to the model again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestration.data.dialogues import Message
from orchestration.serving.errors import missing, refused
from orchestration.serving.judging import ALLOWED
from orchestration.serving.keys import Owner
from orchestration.serving.moderation.verdict import Verdict
from orchestration.serving.service import ServedModel, Service

if TYPE_CHECKING:
    from orchestration.serving.api.forms import ChatForm


@dataclass
class Kept:
    """A conversation of the store, during one request."""

    service: Service
    owner: Owner
    id: str
    turns: tuple[Message, ...]
    """Earlier ones, as the model may be told."""
    own: tuple[Message, ...] = ()
    """The request's."""
    verdict: Verdict = ALLOWED
    """On the request's."""
    cut: str | None = None
    """The message from which on the request and its reply take the place of what was there."""

    @classmethod
    async def of(cls, service: Service, owner: Owner, form: ChatForm) -> Kept:
        """The conversation that a request names.

        Raises:
            ApiError: there is none of this owner, it has no such message, or it is full.
        """
        assert form.conversation is not None
        name, cut = (form.conversation, None) if isinstance(form.conversation, str) else (form.conversation.id, form.conversation.before)
        if (form.n or 1) > 1:
            raise refused("n: a kept conversation goes on with one reply", "n")
        found = await service.stored(service.store.messages, owner.id, name)
        if cut is not None:
            places = [number for number, message in enumerate(found) if message.id == cut]
            if not places:
                raise missing("message in this conversation")
            found = found[: places[0]]
        if len(found) + len(form.messages) >= service.settings.limits.messages:
            raise refused("conversation: it has as many messages as this server keeps; begin another", "conversation")
        if sum(len(message.content) for message in found) > service.settings.limits.characters:
            raise refused("conversation: it has as many characters as this server keeps; begin another", "conversation")
        told = tuple(Message(m.role, m.content) for m in found if not (m.extra or {}).get("untold"))
        return cls(service, owner, name, told, cut=cut)

    def before(self, own: tuple[Message, ...]) -> tuple[Message, ...]:
        """Earlier turns and the request's; a system message of the request takes the place of an earlier one."""
        turns = self.turns
        if own and own[0].role == "system":
            rest = turns[1:] if turns and turns[0].role == "system" else turns
            return (own[0], *rest, *own[1:])
        return (*turns, *own)

    async def answered(self, text: str, finish: str | None, verdict: Verdict, model: ServedModel) -> str:
        """Note the request's turns and the reply, all of them or none; gives the reply's id."""
        return await self.service.whatever_comes(self._answered(text, finish, verdict, model))

    async def _answered(self, text: str, finish: str | None, verdict: Verdict, model: ServedModel) -> str:
        if self.cut is not None:
            await self.service.stored(self.service.store.replace_from, self.owner.id, self.id, self.cut)
        add = self.service.store.add_message
        asked: dict[str, Any] = {"moderation": self.verdict.action, "categories": list(self.verdict.categories)}
        if self.verdict.action == "block":
            asked["untold"] = True
        for message in self.own:
            await self.service.stored(add, self.owner.id, self.id, message.role, holdable(message.content), extra=asked)
        extra: dict[str, Any] = {
            "finish": finish, "moderation": verdict.action, "categories": list(verdict.categories), "version": model.version,
            "prompt_version": model.hidden.version,
        }  # fmt: skip
        if finish == "content_filter":
            extra["untold"] = True
        found = await self.service.stored(add, self.owner.id, self.id, "assistant", holdable(text), model=model.name, extra=extra)
        return str(found.id)


def holdable(text: str) -> str:
    """Text without NUL, which databases do not hold."""
    return text.replace("\0", "�")
