"""Server-sent events, and noticing that a client has left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Send

from orchestration.serving.errors import ApiError, failed

logger = logging.getLogger("chatray.serving")
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"


class EventStream(StreamingResponse):
    """A stream whose source is closed whatever ends it, so that generation stops for a client that left."""

    def __init__(self, events: AsyncIterator[bytes], source: AsyncIterator[bytes]) -> None:
        self.source = source
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await self.body_iterator.aclose()  # type: ignore[attr-defined, union-attr]  # a generator; one that was not begun closes nothing
                await self.source.aclose()  # type: ignore[attr-defined]


async def begun(events: AsyncIterator[bytes]) -> EventStream:
    """A stream whose first event is there, so that what goes wrong until then is answered with its own status.

    Raises:
        ApiError: it went wrong.
    """
    first = await anext(events)
    return EventStream(_going_on(first, events), events)


async def _going_on(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Later errors are events: the status has been sent."""
    try:
        yield first
        async for one in events:
            yield one
    except ApiError as error:
        yield event(error.body())
    except Exception:
        logger.exception("a stream failed")
        yield event(failed().body())
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # a generator


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client leaves.

    Raises:
        ClientLeft: it did.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        left.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(BaseException):
                await task


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
