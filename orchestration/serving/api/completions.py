"""`/v1/completions`: text that the model goes on with. A hidden prompt stands around it all the same; `echo` gives back the client's own
text alone."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from actors.serving.protocol import Drawing
from orchestration.data.dialogues import Dialogue, Message
from orchestration.serving.api import bodies
from orchestration.serving.api.bodies import Head, completion_logprobs, new_id, usage
from orchestration.serving.api.chat import check_counts, check_logprobs, check_texts, room_for_reply
from orchestration.serving.api.forms import CompletionForm, refuse_unsupported
from orchestration.serving.api.streaming import DONE, event
from orchestration.serving.errors import ApiError, refused, unsupported
from orchestration.serving.keys import Owner
from orchestration.serving.moderation.verdict import Verdict
from orchestration.serving.replies import Piece
from orchestration.serving.service import ServedModel, Service
from orchestration.serving.writing import Job, interleaved, jobs, judged_input, together

DEFAULT_TOKENS = 16
"""OpenAI's own default."""


@dataclass
class Text:
    """One completion as it is put together."""

    index: int
    prompt: str
    """What `echo` gives back."""
    tokens: int
    """Of the prompt, without what is hidden."""
    text: str = ""
    finish: str | None = None
    written: int = 0
    offset: int = 0

    def take(self, piece: Piece, refusal: str) -> str:
        self.finish, self.written = piece.finish, piece.written
        new = refusal if piece.finish == "content_filter" and not self.text and not piece.text else piece.text
        self.text += new
        return new


@dataclass
class AskedText:
    """A request that was checked."""

    form: CompletionForm
    model: ServedModel
    wanted: list[Job]
    texts: list[Text]
    verdict: Verdict
    id: str = field(default_factory=lambda: new_id("cmpl"))

    @property
    def prompt_tokens(self) -> int:
        return sum(text.tokens for text in self.texts[:: self.form.n or 1])

    def usage(self) -> dict[str, int]:
        return usage(self.prompt_tokens, sum(text.written for text in self.texts))

    def choice(self, text: Text, shown: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": text.index, "text": shown, "logprobs": logprobs, "finish_reason": finish}

    def told(self, text: Text, piece: Piece) -> Any:
        """Log-probs of a piece, if they were asked for."""
        if self.form.logprobs is None or not piece.tokens:
            return None
        found = completion_logprobs(piece.tokens, self.model.token_text, text.offset)
        text.offset += sum(len(self.model.token_text(token.id)) for token in piece.tokens)
        return found


async def ask(service: Service, owner: Owner, form: CompletionForm) -> AskedText:
    """Check a request and make its prompts.

    Raises:
        ApiError: it cannot be served.
    """
    begun = service.clock()
    refuse_unsupported(form)
    model = service.model(form.model)
    if form.echo and form.logprobs is not None:
        raise unsupported("echo", "together with logprobs: log-probs of the prompt are not told")
    if form.logprobs and model.hidden:
        raise unsupported("logprobs", "above 0: what this model did not say is not told")
    given = _given(form)
    count = form.n or 1
    check_counts(service, len(given), count * len(given))
    longest = room_for_reply(service, model, form.max_tokens or DEFAULT_TOKENS)
    check_logprobs(service, longest * count * len(given), form.logprobs)
    for prompt in given:
        if not isinstance(prompt, str) and len(prompt) > model.context - longest:
            raise _too_long(model.context - longest, len(prompt))
    size = sum(map(len, given))
    await service.aside(size, check_texts, service, [prompt for prompt in given if isinstance(prompt, str)], "prompt")
    prompts = await service.aside(size, _prompts, given, model)
    wanted: list[Job] = []
    texts: list[Text] = []
    drawing = Drawing(
        longest, 1.0 if form.temperature is None else form.temperature, form.top_p or 1.0, logprobs=form.logprobs
    )  # fmt: skip
    said = [text for text, _ in prompts]
    service.log("completions", owner, said)
    secret = await service.aside(size, model.hidden.secret.known, said)
    for text, ids in prompts:
        whole = _around(ids, model)
        if not whole or len(whole) > model.context - longest:
            raise _too_long(model.context - longest - (len(whole) - len(ids)), len(ids))
        job = Job(model, owner, whole, drawing, tuple(form.stops()), secret, begun)
        for one in jobs(job, count, form.seed):
            wanted.append(one)
            texts.append(Text(len(texts), text, len(ids)))
    return AskedText(form, model, wanted, texts, await judged_input(service, owner, model, said))


def _too_long(room: int, tokens: int) -> ApiError:
    return ApiError(
        400, f"A prompt of this model has 1 to {max(0, room)} tokens beside this reply; this one has {tokens}.", param="prompt",
        code="context_length_exceeded",
    )  # fmt: skip


def _given(form: CompletionForm) -> list[str] | list[list[int]]:
    given: Any = form.prompt
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _prompts(given: Any, model: ServedModel) -> list[tuple[str, list[int]]]:
    """Each prompt as text and tokens. Special tokens are no text, and are refused as ids: nobody may fake a turn."""
    if isinstance(given[0], str):
        return list(zip(given, model.chat.texts(given), strict=True))
    special, known = set(model.chat.tokenizer.all_special_ids), len(model.chat.tokenizer)
    for ids in given:
        if (wrong := next((i for i in ids if not 0 <= i < known or i in special), None)) is not None:
            raise refused(f"prompt: {wrong} is not a token that a text of this model may have", "prompt")
    return [(model.chat.decode(ids), list(ids)) for ids in given]


def _around(ids: list[int], model: ServedModel) -> list[int]:
    """The prompt with what is hidden: the instructions before it as a system turn, those after it as text."""
    if not model.hidden:
        return ids
    before = model.chat.encode(Dialogue("", (Message("system", model.hidden.before),)))[0] if model.hidden.before else []
    return [*before, *ids, *(model.chat.text(model.hidden.after) if model.hidden.after else [])]


def _refused(service: Service, asked: AskedText) -> bool:
    if asked.verdict.action != "block":
        return False
    for text in asked.texts:
        text.text, text.finish = service.settings.refusal, "content_filter"
    return True


async def complete(service: Service, asked: AskedText) -> dict[str, Any]:
    """The answer in one body."""
    told: list[Any] = [None for _ in asked.texts]
    if not _refused(service, asked):
        for text, reply in zip(asked.texts, await together(service, asked.wanted), strict=True):
            blocked = reply.last.verdict.action == "block"
            whole = dataclasses.replace(
                reply.last, text=reply.text, tokens=[] if blocked else [token for piece in reply.pieces for token in piece.tokens]
            )
            text.take(whole, service.settings.refusal)
            told[text.index] = await service.aside(bodies.told(whole.tokens), asked.told, text, whole)
    head = Head(asked.id, "text_completion", asked.model.name)
    choices = [
        asked.choice(text, (text.prompt if asked.form.echo else "") + text.text, told[text.index], text.finish) for text in asked.texts
    ]
    return head.body(choices, usage=asked.usage())


async def stream(service: Service, asked: AskedText) -> AsyncIterator[bytes]:
    """The answer as events."""
    head = Head(asked.id, "text_completion", asked.model.name)
    further = {"usage": None} if asked.form.stream_options and asked.form.stream_options.include_usage else {}
    if _refused(service, asked):
        for text in asked.texts:
            yield event(head.body([asked.choice(text, text.text, None, text.finish)], **further))
    else:
        echoed: set[int] = set()
        pieces = interleaved(service, asked.wanted)
        try:
            async for index, piece in pieces:
                text = asked.texts[index]
                shown = text.take(piece, service.settings.refusal)
                if asked.form.echo and index not in echoed:
                    shown = text.prompt + shown
                echoed.add(index)
                yield event(head.body([asked.choice(text, shown, asked.told(text, piece), text.finish)], **further))
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # a generator
    if further:
        yield event(head.body([], usage=asked.usage()))
    yield DONE
