"""From a request to replies in pieces: the same way for all endpoints, streaming or not."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from actors.serving.protocol import Drawing, Request
from orchestration.serving.api.bodies import new_id
from orchestration.serving.canaries import Secret
from orchestration.serving.detokenizing import Detokenizer
from orchestration.serving.keys import Owner
from orchestration.serving.moderation.verdict import Verdict
from orchestration.serving.replies import Draft, Piece, Release, pieces
from orchestration.serving.service import ServedModel, Service
from orchestration.serving.stopping import Stops
from orchestration.serving.store.records import Audit

Side = Literal["input", "output"]
RECITAL = Verdict({}, "block", ("recital",))


@dataclass(frozen=True)
class Job:
    """One reply that is wanted, with all that decides about it."""

    model: ServedModel
    owner: Owner
    prompt: list[int]
    drawing: Drawing
    stops: tuple[str, ...]
    secret: Secret
    begun: float
    """When the request came, by the service's clock."""
    id: str = field(default_factory=lambda: new_id("reply"))


def jobs(job: Job, count: int, seed: int | None) -> list[Job]:
    """The same reply several times, each drawn with a seed of its own."""
    first = secrets.randbits(62) if seed is None else seed
    drawings = [replace(job.drawing, seed=_seed(first, number)) for number in range(count)]
    return [replace(job, drawing=drawing, id=new_id("reply")) for drawing in drawings]


def _seed(first: int, number: int) -> int:
    """Seeds of one request's choices: neither negative, nor those of another request with the next seed."""
    return (first % 2**63 + number * 0x9E3779B97F4A7C15) % 2**63


async def write(service: Service, job: Job) -> AsyncIterator[Piece]:
    """One reply in pieces; the last has `finish`. Closing it stops the engine.

    Raises:
        ApiError: no room, the engine stopped, or time is over.
    """
    model, metrics, clock = job.model, service.metrics, service.clock
    draft = Draft(Detokenizer(model.chat.tokenizer), Stops(job.stops), job.secret)
    release = Release(draft, service.judge, service.settings.flush_ms / 1000, clock)
    request = Request(job.id, job.prompt, job.drawing, model.tokenizer)
    limit = service.settings.limits.seconds
    stream = pieces(model.engine.submit(request), release, job.begun + limit, limit)
    first: float | None = None
    ended = False
    metrics.count("chatray_prompt_tokens", len(job.prompt), model=model.name)
    try:
        while not ended:
            piece = await anext(stream)
            if first is None:
                first = clock()
                metrics.observe("chatray_first_token_seconds", first - job.begun, model=model.name)
            ended = piece.finish is not None
            if ended:
                _note(service, job, piece)
            yield piece
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
        service.quotas.spend(job.owner, len(job.prompt) + draft.written)
        metrics.count("chatray_reply_tokens", draft.written, model=model.name)
        metrics.observe("chatray_reply_seconds", clock() - job.begun, model=model.name)
        if first is not None:
            metrics.observe("chatray_held_seconds", release.held, model=model.name)
        if first is not None and draft.written > 1:
            metrics.observe("chatray_token_seconds", (clock() - first) / (draft.written - 1), model=model.name)
        if not ended:
            metrics.count("chatray_abandoned", model=model.name)


def _note(service: Service, job: Job, last: Piece) -> None:
    """What is kept of a reply that was warned of or stopped."""
    if last.recited:
        service.metrics.count("chatray_recitals", model=job.model.name)
        service.later(audit(service, job, job.owner, job.model, "output", RECITAL, "hidden_prompt"))
    if last.verdict.action != "allow":
        service.metrics.count("chatray_moderation_hits", side="output", action=last.verdict.action)
        service.later(audit(service, job, job.owner, job.model, "output", last.verdict))


async def audit(service: Service, job: Job | None, owner: Owner, model: ServedModel, side: Side, verdict: Verdict, by: str = "") -> None:
    """An audit record: whose request, which model and which version of its prompt, what was decided and why; no text."""
    version = f"{model.name}@{model.version} prompt={model.hidden.version or 'none'}"
    await service.stored(
        service.store.audit,
        Audit(
            owner.id, side, verdict.action, verdict.categories, dict(verdict.scores), by or service.judge.name,
            request_id=job.id if job else None, model=version,
        ),
    )  # fmt: skip


async def judged_input(service: Service, owner: Owner, model: ServedModel, texts: Sequence[str]) -> Verdict:
    """The verdict on what a client sent, recorded where it is not `allow`."""
    begun = service.clock()
    verdict = await service.judge.verdict(texts)
    if service.judge.on:
        service.metrics.observe("chatray_moderation_seconds", service.clock() - begun, side="input")
    if verdict.action != "allow":
        service.metrics.count("chatray_moderation_hits", side="input", action=verdict.action)
        await audit(service, None, owner, model, "input", verdict)
    return verdict


@dataclass
class Reply:
    """A whole reply."""

    text: str = ""
    pieces: list[Piece] = field(default_factory=list)

    @property
    def last(self) -> Piece:
        return self.pieces[-1]


async def whole(service: Service, job: Job) -> Reply:
    """A reply once it is complete. What moderation blocked is not in it."""
    found = Reply()
    stream = write(service, job)
    try:
        async for piece in stream:
            found.pieces.append(piece)
            found.text += piece.text
    finally:
        await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
    if found.last.finish == "content_filter" and found.last.verdict.action == "block":
        found.text = ""
    return found


async def together(service: Service, wanted: Sequence[Job]) -> list[Reply]:
    """Several replies side by side; when one fails the others are stopped."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(whole(service, job)) for job in wanted]
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
    return [task.result() for task in tasks]


async def interleaved(service: Service, wanted: Sequence[Job]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of several replies as they come, each with the number of its reply."""
    if len(wanted) == 1:
        stream = write(service, wanted[0])
        try:
            async for piece in stream:
                yield 0, piece
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        return
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(maxsize=64)
    tasks = [asyncio.ensure_future(_into(queue, number, write(service, job))) for number, job in enumerate(wanted)]
    try:
        left = len(tasks)
        while left:
            number, found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield number, found
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


async def _into(queue: asyncio.Queue, number: int, stream: AsyncIterator[Piece]) -> None:
    try:
        async for piece in stream:
            await queue.put((number, piece))
        await queue.put((number, None))
    except Exception as cause:
        await queue.put((number, cause))
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
