"""`/v1/chat/completions`."""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.serving.protocol import Drawing
from orchestration.data.dialogues import Message
from orchestration.serving import tools as calls
from orchestration.serving.api.bodies import Head, chat_logprobs, new_id, told, usage, verdict_body
from orchestration.serving.api.forms import MOST_LIKELIEST, ChatForm, ChatMessage, refuse_unsupported
from orchestration.serving.api.streaming import DONE, event
from orchestration.serving.conversations import Kept
from orchestration.serving.errors import refused, unsupported
from orchestration.serving.judging import ALLOWED
from orchestration.serving.keys import Owner
from orchestration.serving.moderation.verdict import Verdict
from orchestration.serving.replies import Piece
from orchestration.serving.service import ServedModel, Service
from orchestration.serving.window import Window, fitted
from orchestration.serving.writing import Job, interleaved, jobs, judged_input, together

CHUNK, WHOLE = "chat.completion.chunk", "chat.completion"
TURN = 20
"""Characters of a text that are gone through in the time that one more turn or part takes."""
UNFOLDING = 4
"""A text may be so many times longer in NFKD than `limits.characters`; Korean is two to three times, and one character can be eighteen."""
UNFOLDED_AT_ONCE = 4096


@dataclass
class Asked:
    """A request that was checked, and what its replies are made with."""

    form: ChatForm
    owner: Owner
    model: ServedModel
    window: Window
    wanted: list[Job]
    kept: Kept | None
    verdict: Verdict
    """On the client's texts."""
    names: frozenset[str] = frozenset()
    """Tools that a reply may call."""
    id: str = field(default_factory=lambda: new_id("chatcmpl"))

    @property
    def refuses(self) -> bool:
        return self.verdict.action == "block"

    def about(self, output: Verdict = ALLOWED, message_id: str | None = None) -> dict[str, Any]:
        """What the service says beyond OpenAI's form."""
        found: dict[str, Any] = {
            "prompt_tokens": self.window.tokens, "dropped_turns": self.window.dropped, "model_version": self.model.version,
            "moderation": {"input": verdict_body(self.verdict), "output": verdict_body(output)},
        }  # fmt: skip
        if self.kept:
            found |= {"conversation": self.kept.id, "message": message_id}
        return found


def messages_of(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The client's messages as turns; leading system messages are one.

    Raises:
        ApiError: something that is no text.
    """
    turns: list[Message] = []
    for number, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        text = _text(message, number)
        if role == "system" and turns and all(turn.role == "system" for turn in turns):
            turns[-1] = Message("system", f"{turns[-1].content}\n\n{text}")
            continue
        if text or not message.tool_calls:
            turns.append(Message(role, text))
        if role == "assistant" and message.tool_calls:
            turns += [Message(role, call) for call in calls.written([(c.function.name, c.function.arguments) for c in message.tool_calls])]
    return tuple(turns)


def _text(message: ChatMessage, number: int) -> str:
    if message.content is None or isinstance(message.content, str):
        if message.content is None and message.role != "assistant":
            raise refused(f"messages.{number}.content: needed", "messages")
        return message.content or ""
    other = next((part.type for part in message.content if not part.is_text), None)
    if other is not None:
        raise unsupported(f"messages.{number}.content", f"parts of type {other!r:.40} are not supported by this server; only text is")
    return "".join(part.text for part in message.content)


def length_of(messages: Sequence[ChatMessage]) -> int:
    """How much there is to go through, in characters: a message with its role, a part or a call are some themselves."""
    found = 0
    for message in messages:
        parts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content or ()]
        parts += [call.function.arguments for call in message.tool_calls or ()]
        found += sum(map(len, parts)) + TURN * (1 + len(parts))
    return found


def check_counts(service: Service, messages: int, choices: int) -> None:
    """Raises:
    ApiError: more than `serving.limits` allows.
    """
    limits = service.settings.limits
    if messages > limits.messages:
        raise refused(f"messages: {messages} are more than the {limits.messages} that this server takes", "messages")
    if choices > limits.choices:
        raise refused(f"n: {choices} replies are more than the {limits.choices} that this server gives", "n")


async def ask(service: Service, owner: Owner, form: ChatForm) -> Asked:
    """Check a request and make its prompt.

    Raises:
        ApiError: it cannot be served.
    """
    begun = service.clock()
    refuse_unsupported(form)
    model = service.model(form.model)
    names = _tools(form, model)
    check_counts(service, len(form.messages), form.n or 1)
    size = length_of(form.messages)
    own = await service.aside(size, messages_of, form.messages)
    await service.aside(size, check_texts, service, [message.content for message in own])
    if form.top_logprobs is not None and not form.logprobs:
        raise refused("top_logprobs: only allowed when 'logprobs' is true", "top_logprobs")
    if form.top_logprobs and model.hidden:
        raise unsupported("top_logprobs", "what this model did not say is not told; logprobs without it are")
    service.log("chat", owner, [message.content for message in own])
    kept = await Kept.of(service, owner, form) if form.conversation is not None else None
    longest = room_for_reply(service, model, form.max_completion_tokens or form.max_tokens)
    check_logprobs(service, longest * (form.n or 1), (form.top_logprobs or 0) if form.logprobs else None)
    whole, texts = kept.before(own) if kept else own, [message.content for message in own]
    size += sum(len(message.content) + TURN for message in whole)
    window = await service.aside(size, fitted, whole, model.chat, model.hidden, model.context - longest)
    secret = await service.aside(size, model.hidden.secret.known, texts)
    verdict = await judged_input(service, owner, model, [m.content for m in own if m.role != "assistant"])
    if kept:
        kept.own, kept.verdict = own, verdict
    drawing = Drawing(
        longest, 1.0 if form.temperature is None else form.temperature, form.top_p or 1.0,
        logprobs=(form.top_logprobs or 0) if form.logprobs else None,
    )  # fmt: skip
    job = Job(model, owner, window.ids, drawing, tuple(form.stops()), secret, begun)
    return Asked(form, owner, model, window, jobs(job, form.n or 1, form.seed), kept, verdict, names)


def _tools(form: ChatForm, model: ServedModel) -> frozenset[str]:
    chosen = form.tool_choice
    if not form.tools:
        if isinstance(chosen, dict) or chosen == "required":
            raise refused("tool_choice: needs 'tools'", "tool_choice")
        return frozenset()
    if isinstance(chosen, dict) or chosen not in (None, "auto", "none"):
        raise unsupported("tool_choice", "this server's models decide themselves whether to call; choose 'auto' or 'none'")
    if chosen == "none":
        return frozenset()
    if not model.tools:
        raise unsupported("tools", f"the model {model.name} was not trained to call tools")
    return frozenset(tool.function.name for tool in form.tools)


def check_texts(service: Service, texts: Sequence[str], what: str = "messages") -> None:
    """Raises:
    ApiError: they are longer than `serving.limits` allows.
    """
    limits = service.settings.limits
    characters = sum(map(len, texts))
    if characters > limits.characters:
        raise refused(f"{what}: {characters} characters are more than the {limits.characters} that this server takes", what)
    if unfolded(texts, UNFOLDING * limits.characters) > UNFOLDING * limits.characters:
        raise refused(f"{what}: made of characters that stand for many others; this server takes no so long text of them", what)


def unfolded(texts: Sequence[str], most: int) -> int:
    """Characters of the texts in Unicode's form NFKD, in which moderation and the hidden prompt's guard read them; stops above `most`."""
    found = 0
    for text in texts:
        for start in range(0, 0 if text.isascii() else len(text), UNFOLDED_AT_ONCE):
            found += len(unicodedata.normalize("NFKD", text[start : start + UNFOLDED_AT_ONCE]))
            if found > most:
                return found
    return found


def check_logprobs(service: Service, tokens: int, likeliest: int | None) -> None:
    """Raises:
    ApiError: more would have to be told than of the longest reply with 20 alternatives at each token.
    """
    most = service.settings.limits.new_tokens * (1 + MOST_LIKELIEST)
    if likeliest is not None and tokens * (1 + likeliest) > most:
        raise refused(
            f"logprobs: {1 + likeliest} of each of {tokens} tokens (of all choices) are more than the {most} that this server tells; lower "
            "max_tokens, n or the number of alternatives", "logprobs",
        )  # fmt: skip


def room_for_reply(service: Service, model: ServedModel, wanted: int | None) -> int:
    """Tokens that are kept free for the reply; without a wish at most half the context.

    Raises:
        ApiError: more than there can be.
    """
    limits = service.settings.limits
    if wanted is None:
        return max(1, min(limits.default_tokens, model.context // 2))
    if wanted > limits.new_tokens or wanted >= model.context:
        most = min(limits.new_tokens, model.context - 1)
        raise refused(f"max_tokens: {wanted} are more than the {most} that a reply of this model may have", "max_tokens")
    return wanted


@dataclass
class Choice:
    """One reply as it is put together, streamed or not."""

    asked: Asked
    index: int
    text: str = ""
    held: str = ""
    """Text that may turn out to be part of a tool call."""
    call: calls.Call | None = None
    finish: str | None = None
    verdict: Verdict = ALLOWED
    written: int = 0

    def take(self, piece: Piece, refusal: str) -> dict[str, Any]:
        """Go on with a piece; gives the delta to send, {} if there is none."""
        self.written, self.finish, self.verdict = piece.written, piece.finish, piece.verdict
        self.text += piece.text
        self.held += piece.text
        if piece.finish == "content_filter" and not self.text:
            self.text, self.held = refusal, ""
            return {"content": refusal}
        if self.asked.names and calls.may_become(self.text, self.asked.names):
            if not piece.finish:
                return {}
            self.call = calls.called(self.text, self.asked.names) if piece.finish == "stop" else None
            if self.call:
                self.finish, self.held = "tool_calls", ""
                return {"tool_calls": [{"index": 0, **self.tool_call()}]}
        delta, self.held = ({"content": self.held} if self.held else {}), ""
        return delta

    def tool_call(self) -> dict[str, Any]:
        assert self.call is not None
        return {
            "id": f"call_{self.asked.wanted[self.index].id[-24:]}", "type": "function",
            "function": {"name": self.call.name, "arguments": self.call.arguments},
        }  # fmt: skip

    def message(self) -> dict[str, Any]:
        if self.call:
            return {"role": "assistant", "content": None, "refusal": None, "tool_calls": [self.tool_call()]}
        return {"role": "assistant", "content": self.text, "refusal": None}

    async def keep(self) -> str | None:
        """Note the reply in its conversation, as far as it was released; gives its id there."""
        if self.asked.kept is None:
            return None
        return await self.asked.kept.answered(self.text, self.finish, self.verdict, self.asked.model)


def refusal(asked: Asked, text: str) -> list[Choice]:
    """What is answered when the client's own text was blocked: nothing is generated."""
    found = [Choice(asked, index) for index in range(len(asked.wanted))]
    for choice in found:
        choice.text, choice.finish = text, "content_filter"
    return found


async def complete(service: Service, asked: Asked) -> dict[str, Any]:
    """The answer in one body.

    Raises:
        ApiError: a reply could not be written.
    """
    head = Head(asked.id, WHOLE, asked.model.name)
    text = service.settings.refusal
    logprobs: list[Any] = [None for _ in asked.wanted]
    if asked.refuses:
        found = refusal(asked, text)
    else:
        found = []
        for index, reply in enumerate(await together(service, asked.wanted)):
            choice = Choice(asked, index)
            blocked = reply.last.verdict.action == "block"
            whole = Piece(reply.text, finish=reply.last.finish, verdict=reply.last.verdict, written=reply.last.written)
            choice.take(whole, text)
            found.append(choice)
            if asked.form.logprobs and not blocked:
                tokens = [token for piece in reply.pieces for token in piece.tokens]
                logprobs[index] = await service.aside(told(tokens), chat_logprobs, tokens, asked.model.token_text)
    message = await found[0].keep()  # a kept conversation has one choice
    choices = [
        {"index": choice.index, "message": choice.message(), "logprobs": logprobs[choice.index], "finish_reason": choice.finish}
        for choice in found
    ]
    worst = max((choice.verdict for choice in found), key=lambda v: ("allow", "warn", "block").index(v.action))
    return head.body(
        choices, usage=usage(asked.window.tokens, sum(choice.written for choice in found)), chatray=asked.about(worst, message)
    )  # fmt: skip


async def stream(service: Service, asked: Asked) -> AsyncIterator[bytes]:
    """The answer as events."""
    head = Head(asked.id, CHUNK, asked.model.name)
    choices = refusal(asked, service.settings.refusal) if asked.refuses else [Choice(asked, index) for index in range(len(asked.wanted))]
    opened: set[int] = set()
    pieces = None if asked.refuses else interleaved(service, asked.wanted)
    try:
        if pieces is None:
            for choice in choices:
                yield _chunk(asked, head, choice, {"role": "assistant", "content": choice.text}, None)
                yield _chunk(asked, head, choice, {}, None, await choice.keep())
        else:
            async for index, piece in pieces:
                choice = choices[index]
                delta = choice.take(piece, service.settings.refusal)
                if not delta and not piece.tokens and not choice.finish and index in opened:
                    continue
                opening = {} if index in opened else {"role": "assistant", "content": ""}
                opened.add(index)
                logprobs = chat_logprobs(piece.tokens, asked.model.token_text) if asked.form.logprobs and piece.tokens else None
                events = b""
                if delta or opening or logprobs:
                    events = _chunk(asked, head, choice, opening | delta, logprobs, ends=False)
                if choice.finish:
                    if asked.kept and events:  # the store is waited for; the text need not
                        yield events
                        events = b""
                    events += _chunk(asked, head, choice, {}, None, await choice.keep())
                if events:
                    yield events
        counts = b""
        if asked.form.stream_options and asked.form.stream_options.include_usage:
            counts = event(head.body([], usage=usage(asked.window.tokens, sum(choice.written for choice in choices))))
        yield counts + DONE
    finally:
        if pieces is not None:
            await pieces.aclose()  # type: ignore[attr-defined]  # a generator
        for choice in choices:
            if choice.finish is None and choice.text:  # the client left: what it has seen stays in its conversation
                choice.finish = "abandoned"
                service.later(choice.keep())


def _chunk(
    asked: Asked, head: Head, choice: Choice, delta: dict[str, Any], logprobs: Any, message: str | None = None, *, ends: bool = True
) -> bytes:
    finish = choice.finish if ends else None
    further: dict[str, Any] = {"chatray": asked.about(choice.verdict, message)} if finish else {}
    if asked.form.stream_options and asked.form.stream_options.include_usage:
        further["usage"] = None
    return event(
        head.body([{"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}], **further)
    )  # fmt: skip
