"""What the app's endpoints share. Parts are replaced whole, so a request that has taken one goes on with it when another comes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from conf.serving import Serving
from orchestration.data.chat import Chat
from orchestration.serving.apart import Threads, apart
from orchestration.serving.engine import Engine
from orchestration.serving.errors import missing, no_such_model, out_of_time, overloaded, refused, too_many
from orchestration.serving.judging import Judge
from orchestration.serving.keys import Keys, Owner, Quotas
from orchestration.serving.metrics import Metrics
from orchestration.serving.prompts import HiddenPrompt
from orchestration.serving.store.records import NotFound, Refused, StoreBusy
from orchestration.serving.store.store import Store

logger = logging.getLogger("chatray.serving")
T = TypeVar("T")
SHORT = 4000
"""Characters, or things of a similar size, that are gone through on the event loop, which takes a few milliseconds; more in a thread."""


@dataclass(frozen=True)
class ServedModel:
    """A model as requests see it."""

    name: str
    chat: Chat
    context: int
    """Tokens of prompt and reply together, at most."""
    engine: Engine
    tools: bool = False
    """It was trained to write tool calls."""
    version: str = ""
    """Which checkpoint: a hash of its files' names, sizes and times."""
    tokenizer: str = ""
    """A hash of its tokenizer."""
    hidden: HiddenPrompt = field(default_factory=HiddenPrompt)
    created: int = field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def token_text(self) -> Callable[[int], str]:
        """The text of one token by itself, looked up once."""
        return functools.cache(self.chat.token_text)


@dataclass
class Service:
    """Models, moderation, store and limits of one ingress."""

    settings: Serving
    models: dict[str, ServedModel]
    judge: Judge
    store: Store
    keys: Keys
    metrics: Metrics
    clock: Callable[[], float] = time.monotonic
    live: Callable[[], Awaitable[bool]] | None = None
    """Whether the engines answer; None: nobody can say."""

    def __post_init__(self) -> None:
        self.quotas = Quotas(self.clock)
        self.ongoing = 0
        self.tasks: set[asyncio.Task[Any]] = set()
        self.threads = Threads("texts", 2)

    def model(self, name: str) -> ServedModel:
        """Raises:
        ApiError: 404.
        """
        if name not in self.models:
            raise no_such_model(name)
        return self.models[name]

    def log(self, path: str, owner: Owner, texts: Sequence[str]) -> None:
        """Note a client's texts, where that is wanted."""
        if self.settings.log_prompts:
            logger.info("%s of %s: %s", path, owner.name, json.dumps(list(texts), ensure_ascii=True))

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """One more request at work.

        Raises:
            ApiError: 429, there are too many.
        """
        if self.ongoing >= self.settings.limits.ongoing:
            raise too_many("This server has as many requests as it takes at once; try again later.", 1.0, code="too_many_requests")
        self.ongoing += 1
        self.metrics.set("chatray_ongoing", self.ongoing)
        try:
            yield
        finally:
            self.ongoing -= 1
            self.metrics.set("chatray_ongoing", self.ongoing)

    async def stored(self, call: Callable[..., T], *arguments: Any, **further: Any) -> T:
        """A call to the store, in a thread.

        Raises:
            ApiError: it has no such thing of this owner, will not hold it, is locked (503), or does not answer (504).
        """
        limit = self.settings.limits.seconds
        try:
            async with asyncio.timeout(limit):
                return await asyncio.to_thread(call, *arguments, **further)
        except NotFound as cause:
            raise missing(cause.what) from None
        except Refused as cause:
            raise refused(str(cause)) from None
        except StoreBusy:
            raise overloaded(retry_after=5.0) from None
        except TimeoutError:
            raise out_of_time(limit) from None

    async def aside(self, size: int, call: Callable[..., T], *arguments: Any) -> T:
        """What a call gives that goes through a client's texts: in a thread if they are long, so that nobody else waits for it.

        Args:
            size: of the texts, characters.

        Raises:
            ApiError: 504, it took too long.
        """
        if size <= SHORT:
            return call(*arguments)
        limit = self.settings.limits.seconds
        try:
            async with asyncio.timeout(limit):
                return await self.threads.run(call, *arguments)
        except TimeoutError:
            raise out_of_time(limit) from None

    async def whatever_comes(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of some work that is finished even if its request is cancelled meanwhile."""
        task = apart(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return await asyncio.shield(task)

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Work that goes on although the request it is of has ended."""
        task = apart(work)
        self.tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (cause := task.exception()) is not None:
            logger.error("work after a request failed", exc_info=cause)

    async def settle(self) -> None:
        """Wait for such work."""
        while self.tasks:
            await asyncio.wait(self.tasks)
