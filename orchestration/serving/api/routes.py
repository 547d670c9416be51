"""The endpoints of OpenAI's API, and those for conversations. What each does is in the modules beside this one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import Field

from orchestration.serving.api import chat, completions
from orchestration.serving.api.bodies import answer, new_id
from orchestration.serving.api.forms import ChatForm, CompletionForm, Form, ModerationForm, Text
from orchestration.serving.api.sharing import After, Asking, Identifier, PageSize, Serving, router
from orchestration.serving.api.streaming import begun, while_there
from orchestration.serving.errors import refused, unsupported
from orchestration.serving.judging import decide
from orchestration.serving.service import ServedModel

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or with `stream` its events", "content": {"application/json": {}, "text/event-stream": {}}},
}
v1 = router()
plain = APIRouter()


@v1.post("/chat/completions", responses=STREAMED)
async def chat_completions(form: ChatForm, request: Request, service: Serving, owner: Asking) -> Any:
    with contextlib.ExitStack() as work:
        work.enter_context(service.admitted())
        asked = await chat.ask(service, owner, form)
        if form.stream:
            return await while_there(request, begun(counted(chat.stream(service, asked), work.pop_all())))
        return await answer(await while_there(request, chat.complete(service, asked)))


@v1.post("/completions", responses=STREAMED)
async def text_completions(form: CompletionForm, request: Request, service: Serving, owner: Asking) -> Any:
    with contextlib.ExitStack() as work:
        work.enter_context(service.admitted())
        asked = await completions.ask(service, owner, form)
        if form.stream:
            return await while_there(request, begun(counted(completions.stream(service, asked), work.pop_all())))
        return await answer(await while_there(request, completions.complete(service, asked)))


async def counted(events: AsyncIterator[bytes], work: contextlib.ExitStack) -> AsyncIterator[bytes]:
    """A stream is at work until its last event."""
    with work:
        try:
            async for one in events:
                yield one
        finally:
            await events.aclose()  # type: ignore[attr-defined]  # a generator


@v1.get("/models")
async def models(service: Serving) -> dict[str, Any]:
    return {"object": "list", "data": [model_body(model) for model in service.models.values()]}


@v1.get("/models/{model:path}")
async def model(model: Identifier, service: Serving) -> dict[str, Any]:
    return model_body(service.model(model))


def model_body(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "chatray", "max_model_len": model.context}


@v1.post("/moderations")
async def moderations(form: ModerationForm, service: Serving) -> Any:
    if not service.judge.on:
        raise refused("This server moderates nothing (serving.moderation).", "model", "moderation_off")
    given = [form.input] if isinstance(form.input, str) else form.input
    texts = []
    for part in given:
        if not isinstance(part, str) and not part.is_text:
            raise unsupported("input", f"parts of type {part.type!r:.40} are not supported by this server; only text is")
        texts.append(part if isinstance(part, str) else part.text)
    await service.aside(sum(map(len, texts)), chat.check_texts, service, texts, "input")
    results = []
    for scores in await service.judge.scores(texts):
        verdict = decide(scores, service.judge.thresholds)
        categories = {name: name in verdict.categories for name in scores}
        results.append({
            "flagged": bool(verdict.categories), "categories": categories, "category_scores": scores,
            "category_applied_input_types": {name: ["text"] for name in scores}, "action": verdict.action,
        })  # fmt: skip
    return await answer({"id": new_id("modr"), "model": service.judge.name, "results": results})


class NewConversation(Form):
    title: Annotated[Text, Field(max_length=200)] = ""
    consent: bool = False


@v1.post("/conversations")
async def new_conversation(form: NewConversation, service: Serving, owner: Asking) -> dict[str, Any]:
    return conversation_body(await service.stored(service.store.new_conversation, owner.id, title=form.title, consent=form.consent))


@v1.get("/conversations")
async def conversations(service: Serving, owner: Asking, limit: PageSize = 50, after: After = None) -> Any:
    found = await service.stored(service.store.conversations, owner.id, limit, after)
    return await answer({"object": "list", "data": [conversation_body(one) for one in found]})


@v1.get("/conversations/{id}")
async def conversation(id: Identifier, service: Serving, owner: Asking) -> Any:
    found = await service.stored(service.store.conversation, owner.id, id)
    kept = await service.stored(service.store.messages, owner.id, id)
    return await answer(conversation_body(found) | {"messages": [message_body(message) for message in kept]})


class ConversationChange(Form):
    title: Annotated[Text, Field(max_length=200)] | None = None
    consent: bool | None = None


@v1.post("/conversations/{id}")
async def change_conversation(id: Identifier, form: ConversationChange, service: Serving, owner: Asking) -> dict[str, Any]:
    """Another title; consent given, or taken back: then what was exported of it is withdrawn."""
    update = service.store.update_conversation
    return conversation_body(await service.stored(update, owner.id, id, title=form.title, consent=form.consent))


@v1.delete("/conversations/{id}")
async def delete_conversation(id: Identifier, service: Serving, owner: Asking) -> dict[str, Any]:
    await service.stored(service.store.delete_conversation, owner.id, id)
    return {"id": id, "object": "conversation.deleted", "deleted": True}


def conversation_body(found: Any) -> dict[str, Any]:
    return {
        "id": str(found.id), "object": "conversation", "title": found.title, "consent": bool(found.consent),
        "created_at": int(found.created),
    }  # fmt: skip


def message_body(message: Any) -> dict[str, Any]:
    """What its owner may know of a message: not the prompt's version, nor anything else of `extra` that is not named here."""
    extra = message.extra or {}
    told = {name: extra[name] for name in ("finish", "moderation", "categories") if name in extra}
    return {
        "id": str(message.id), "role": message.role, "content": message.content, "model": message.model,
        "created_at": int(message.created), **told,
    }  # fmt: skip


@plain.get("/health", responses={503: {"description": "The engines do not answer"}})
async def health(service: Serving) -> Response:
    """Whether requests can be served; for load balancers, without a key."""
    well = await service.live() if service.live else True
    return JSONResponse({"status": "ok" if well else "unavailable"}, 200 if well else 503)


@plain.get("/metrics", response_class=PlainTextResponse, responses={404: {"description": "Published elsewhere"}})
async def metrics(service: Serving) -> Response:
    text = service.metrics.text()
    return PlainTextResponse(text) if text is not None else PlainTextResponse("published by Ray\n", 404)
