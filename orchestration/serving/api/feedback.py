"""`/v1/feedback`: what clients think of replies, and `/v1/data`: having everything forgotten.

What feedback is about is said in one of three ways: a reply of a kept conversation (`conversation`, `message`), a prompt and replies that
the client kept itself (`messages`, `answers`), or answers that earlier feedback has named (`of`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field

from orchestration.serving.api.bodies import answer
from orchestration.serving.api.chat import check_counts, check_texts, length_of, messages_of
from orchestration.serving.api.forms import Form, Messages, Name, Text, listed
from orchestration.serving.api.sharing import After, Asking, Identifier, PageSize, Serving, router
from orchestration.serving.conversations import holdable
from orchestration.serving.errors import missing, refused
from orchestration.serving.keys import Owner
from orchestration.serving.service import Service
from orchestration.serving.store.records import Feedback, digest_of

feedback: APIRouter = router()
TIE = "tie"


class FeedbackForm(Form):
    kind: Literal["thumbs", "comment", "choice", "edit"]
    value: Annotated[Text, Field(min_length=1)]
    """thumbs: `up` or `down`. comment, edit: a text. choice: `tie`, or the better answer: its identifier, or its place, from 0."""
    consent: bool = False
    """Whether the next round may train on it."""
    conversation: Name | None = None
    message: Name | None = None
    messages: Messages | None = None
    answers: Annotated[list[Text], listed(16), Field(default_factory=list)]
    """Beside `message`: further answers to the same prompt."""
    model: Name | None = None
    """Which served model wrote `answers`; needed beside `messages`."""
    of: Annotated[list[Name], listed(16, least=1)] | None = None


@dataclass(frozen=True)
class About:
    """Answers that are not in the store yet."""

    prompt: list[dict[str, str]]
    answers: list[str]
    model: str
    """The version that wrote them."""
    conversation: str | None = None


@feedback.post("/feedback")
async def give(form: FeedbackForm, service: Serving, owner: Asking) -> dict[str, Any]:
    ways = [form.of is not None, form.message is not None, form.messages is not None]
    if sum(ways) != 1:
        raise refused("feedback is about one of: 'of'; 'conversation' and 'message'; 'messages', 'answers' and 'model'", "messages")
    check_texts(service, [form.value], "value")
    check_texts(service, form.answers, "answers")
    if form.of is not None:
        return await _given(service, owner, form, form.of)
    about = await (_kept if form.message is not None else _told)(service, owner, form)
    _check(form, len(about.answers))
    known = [] if about.conversation is None else await service.stored(service.store.given, owner.id, about.conversation)
    return await _given(service, owner, form, await _recorded(service, owner, about, known))


async def _kept(service: Service, owner: Owner, form: FeedbackForm) -> About:
    """A reply of a conversation, and what it answers: every turn before it that the model was told."""
    if form.conversation is None:
        raise refused("message: needs 'conversation'", "conversation")
    found = await service.stored(service.store.messages, owner.id, form.conversation)
    place = next((number for number, message in enumerate(found) if message.id == form.message), None)
    if place is None:
        raise missing("message")
    reply = found[place]
    if reply.role != "assistant":
        raise refused("message: feedback is on what the assistant said", "message")
    told = [m for number, m in enumerate(found[:place]) if number == place - 1 or not (m.extra or {}).get("untold")]
    if not told:
        raise refused("message: it answers nothing", "message")
    prompt = [{"role": m.role, "content": m.content} for m in told]
    version = (reply.extra or {}).get("version")
    return About(prompt, [reply.content, *form.answers], f"{reply.model}@{version}" if version else reply.model or "", form.conversation)


async def _told(service: Service, owner: Owner, form: FeedbackForm) -> About:
    """A prompt and replies that the client sends."""
    assert form.messages is not None
    if not form.answers:
        raise refused("answers: at least one is needed beside 'messages'", "answers")
    if form.model is None:
        raise refused("model: needed beside 'messages'; the model that wrote 'answers'", "model")
    model = service.model(form.model)
    check_counts(service, len(form.messages), 1)
    size = length_of(form.messages)
    turns = await service.aside(size, messages_of, form.messages)
    await service.aside(size, check_texts, service, [*(turn.content for turn in turns), *form.answers])
    prompt = [{"role": turn.role, "content": holdable(turn.content)} for turn in turns]
    return About(prompt, form.answers, f"{model.name}@{model.version}")


def _check(form: FeedbackForm, answers: int) -> None:
    """Refuse what the store would refuse, before anything is written.

    Raises:
        ApiError: 400.
    """
    if form.kind == "choice" and answers < 2:
        raise refused("answers: a choice is between two or more", "answers")
    if form.kind != "choice" and answers > 1:
        raise refused(f"answers: {form.kind} is about one", "answers")
    if form.kind == "thumbs" and form.value not in ("up", "down"):
        raise refused("value: thumbs are 'up' or 'down'", "value")
    if form.kind == "choice" and form.value != TIE and _place(form.value, answers) is None:
        raise refused(f"value: 'tie', or the place of the better answer, 0 to {answers - 1}", "value")


def _place(value: str, answers: int) -> int | None:
    return int(value) if value.isascii() and value.isdigit() and len(value) < 3 and int(value) < answers else None


async def _recorded(service: Service, owner: Owner, about: About, known: list[tuple[str, str, str]]) -> list[str]:
    """Identifiers of the answers; those that the conversation has already are not recorded twice."""
    store = service.store
    have = {(digest, text): name for name, digest, text in known}
    texts = [holdable(text) for text in about.answers]
    names = [have.get((digest_of(about.prompt), text)) for text in texts]
    if new := [text for text, name in zip(texts, names, strict=True) if name is None]:
        made = iter(await service.stored(store.record_answer, owner.id, about.prompt, new, about.model, about.conversation))
        return [name or next(made) for name in names]
    return [name for name in names if name is not None]


async def _given(service: Service, owner: Owner, form: FeedbackForm, answers: list[str]) -> dict[str, Any]:
    value = holdable(form.value)
    if form.kind == "choice" and (place := _place(value, len(answers))) is not None:
        value = answers[place]
    return feedback_body(await service.stored(service.store.add_feedback, owner.id, form.kind, answers, value, form.consent))


@feedback.get("/feedback")
async def mine(service: Serving, owner: Asking, limit: PageSize = 50, after: After = None) -> Any:
    found = await service.stored(service.store.feedback, owner.id, limit=limit, after=after)
    return await answer({"object": "list", "data": [feedback_body(one) for one in found]})


@feedback.delete("/feedback/{id}")
async def delete_feedback(id: Identifier, service: Serving, owner: Asking) -> dict[str, Any]:
    await service.stored(service.store.delete_feedback, owner.id, id)
    return {"id": id, "object": "feedback.deleted", "deleted": True}


@feedback.delete("/data")
async def forget(service: Serving, owner: Asking) -> dict[str, Any]:
    """Delete whatever this key's owner said, was answered and thought; exported rows that came from it are withdrawn."""
    await service.stored(service.store.delete_owner, owner.id)
    return {"object": "data.deleted", "deleted": True}


def feedback_body(found: Feedback) -> dict[str, Any]:
    return {
        "id": found.id, "object": "feedback", "kind": found.kind, "value": found.value, "answers": list(found.answers),
        "consent": found.consent, "created_at": int(found.created),
    }  # fmt: skip
