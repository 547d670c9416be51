"""Reading a stream until somebody stops it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

T = TypeVar("T")


async def until(stream: AsyncIterator[T], stop: asyncio.Event) -> AsyncIterator[T]:
    """Items of the stream as long as `stop` is not set. The stream is closed in the end, whatever ends it."""
    stopped = asyncio.ensure_future(stop.wait())
    coming: asyncio.Future[T] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]  # an awaitable is enough
            await asyncio.wait({coming, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                return
            try:
                found = coming.result()
            except StopAsyncIteration:
                return
            yield found
    finally:
        stopped.cancel()
        if coming is not None:
            coming.cancel()
            with contextlib.suppress(BaseException):
                await coming
        await stream.aclose()  # type: ignore[attr-defined]  # a generator
