"""Work that must not end with, or hold up, a single request: tasks in a context of their own, and threads for what takes long."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def apart(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that several requests wait for, or that goes on after the one that began it.

    Ray Serve knows by a context variable which request a call to another replica is made for, and cancels the call when that request's
    client leaves. A task has the context it is started in, so work that others wait for too is started in an empty one.
    """
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())


class Threads:
    """Threads for one kind of work, which then waits for no other kind. One thread: calls are made one after the other."""

    def __init__(self, name: str, count: int) -> None:
        self.pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """What the call gives. When this is cancelled, a call that has begun goes on to its end, and one that has not is not made."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, call, *arguments)
