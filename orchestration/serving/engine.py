"""An engine for many callers at once: a thread steps it, and each reply comes as a stream of deltas.

    submit ─▶ inbox ─▶ thread: take in, step, give out ─▶ sink of each reply

New weights are swapped in without a pause: what is under way is finished by the old model, whoever comes later gets the new one. Where a
device has no room for two (vLLM), newcomers wait until the old model's replies are done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from actors.serving.protocol import Delta, Request, StepEngine, merged
from orchestration.serving.errors import engine_lost, overloaded

logger = logging.getLogger("chatray.serving")
STUCK_SECONDS = 120.0
"""A step takes milliseconds; one that takes so long will not end."""


class Writing(Protocol):
    """A reply under way."""

    async def take(self, wait: float | None = None) -> Delta | None:
        """What has been written since; None: nothing within `wait` seconds. The last delta says how the reply ended.

        Raises:
            ApiError: the engine stopped, or there was no room (503).
        """

    def close(self) -> None:
        """Stop the writing, if it has not ended."""


class Engine(Protocol):
    """What the service asks of whatever writes replies."""

    def submit(self, request: Request) -> Writing:
        """Have a reply written.

        Raises:
            ApiError: there is no room (503), or the engine stopped.
        """


class Sink(Protocol):
    """Where a reply's deltas go."""

    loop: asyncio.AbstractEventLoop

    def put(self, delta: Delta) -> None:
        """Called in that event loop."""


class Mailbox:
    """What has been written of a reply and not been fetched: deltas are handed over together, at most every `interval` seconds."""

    def __init__(self, stop: Callable[[], None], interval: float = 0.0) -> None:
        """Args:
        stop: called once nobody waits for this reply any more, whether it has ended or not.
        """
        self.loop, self.stop, self.interval = asyncio.get_running_loop(), stop, interval
        self.deltas: list[Delta] = []
        self.ended = False
        """The last delta has come."""
        self.error: Exception | None = None
        self.ready = asyncio.Event()
        self.due: asyncio.TimerHandle | None = None
        self.last = float("-inf")

    def put(self, delta: Delta) -> None:
        """Called in the event loop."""
        self.deltas.append(delta)
        self.ended = delta.finish is not None
        wait = self.last + self.interval - self.loop.time() if self.interval else 0.0
        if delta.finish or wait <= 0:
            self.ready.set()
        elif self.due is None:
            self.due = self.loop.call_later(wait, self.ready.set)

    def fail(self, error: Exception) -> None:
        """Nothing more will come; `take` raises this after what is there."""
        self.error = self.error or error
        self.ready.set()

    async def take(self, wait: float | None = None) -> Delta | None:
        """See `Writing`."""
        if not self.ready.is_set():
            alarm = None if wait is None else self.loop.call_later(wait, self.ready.set)
            try:
                await self.ready.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()
        if self.due is not None:
            self.due.cancel()
            self.due = None
        if self.deltas:
            self.last = self.loop.time()
            found, self.deltas = merged(self.deltas), []
            if self.error is None:
                self.ready.clear()
            return found
        if self.error is not None:
            raise self.error
        self.ready.clear()
        return None

    def close(self) -> None:
        """See `Writing`."""
        self.stop()


class EngineLoop:
    """The thread, and the replies under way."""

    def __init__(self, load: Callable[[], StepEngine], waiting: int, interval_ms: float, sequences: int) -> None:
        """Args:
        waiting: requests that may wait for one of the `sequences` places.
        """
        self.most, self.interval = waiting + sequences, interval_ms / 1000
        self.sinks: dict[str, Sink] = {}
        self.owners: dict[str, StepEngine] = {}
        """Which model writes each reply: several while a new one has been swapped in and the old one still writes."""
        self.engines: list[StepEngine] = [load()]
        """The last one gets new requests."""
        self.inbox: deque[Callable[[], None]] = deque()
        self.wake = threading.Condition()
        self.broken: str | None = None
        self.closing = False
        self.stepping: float | None = None
        """Since when the step under way has been."""
        self.held: list[Callable[[], None]] | None = None
        """Newcomers, while they have to wait for the old model's replies."""
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> Mailbox:
        """See `Engine`."""
        found = Mailbox(lambda: self.leave(request.id), self.interval)
        self.write(request, found)
        return found

    def write(self, request: Request, sink: Sink) -> None:
        """Have a reply written into a sink, until its end or until `leave`.

        Raises:
            ApiError: see `Engine.submit`.
        """
        if len(self.sinks) >= self.most:
            raise overloaded()
        self.sinks[request.id] = sink
        if self.broken or self.closing:  # asked afterwards: the thread says that it has ended to all that it finds here
            self.sinks.pop(request.id, None)
            raise engine_lost()
        if self.held is None:
            self._post(lambda: self._add(request))
        else:
            self.held.append(lambda: self._add(request))

    def leave(self, name: str) -> None:
        """Nobody waits for this reply any more: what is not written of it yet will not be."""
        if self.sinks.pop(name, None) is not None:
            self._post(lambda: self._abort(name))

    async def swap(self, load: Callable[[], StepEngine]) -> None:
        """Have later requests answered by another model. When it cannot be loaded everything stays as it was."""
        if not self.engines[-1].exclusive:
            fresh = await asyncio.to_thread(load)
            self._post(lambda: self.engines.append(fresh))
            return
        self.held = []  # no room for two: finish, give back, load
        closed = False
        try:
            while self.inbox or self.owners or any(engine.busy() for engine in self.engines):
                self.check()  # a thread that has ended finishes nothing
                await asyncio.sleep(0.01)
            closed = True
            await asyncio.to_thread(self.engines[-1].close)
            fresh = await asyncio.to_thread(load)
            self._post(lambda: self.engines.__setitem__(slice(None), [fresh]))
        except BaseException:  # a cancelled one leaves no model either
            if closed:
                self.broken, self.held = "the new model could not be loaded", []
                self._end()
            raise
        finally:
            held, self.held = self.held, None
            for add in held:
                self._post(add)

    def check(self) -> None:
        """Whether it works.

        Raises:
            RuntimeError: it does not, and never will again.
        """
        if self.broken or not self.thread.is_alive():
            raise RuntimeError(f"the engine stopped: {self.broken}")
        if self.stepping is not None and time.monotonic() - self.stepping > STUCK_SECONDS:
            raise RuntimeError(f"the engine has been at one step for more than {STUCK_SECONDS:g} seconds")

    def close(self) -> None:
        """End the thread; replies under way end with an error."""
        self.closing = True
        self._post(lambda: None)
        self.thread.join(timeout=30)
        for engine in self.engines:
            engine.close()

    def _post(self, do: Callable[[], None]) -> None:
        with self.wake:
            self.inbox.append(do)
            self.wake.notify()

    def _add(self, request: Request) -> None:
        if request.id not in self.sinks:  # whoever asked may have left by now
            return
        try:
            self.engines[-1].add(request)
        except Exception:  # it will not have this request; the others go on
            logger.exception("the engine refused a request")
            self._give([Delta(request.id, finish="error")])
        else:
            self.owners[request.id] = self.engines[-1]

    def _abort(self, name: str) -> None:
        if (engine := self.owners.pop(name, None)) is not None:
            engine.abort(name)

    def _run(self) -> None:
        try:
            while not self.closing:
                with self.wake:
                    while not self.inbox and not any(engine.busy() for engine in self.engines):
                        self.wake.wait()
                while self.inbox:
                    self.inbox.popleft()()
                self._step()
        except Exception as cause:  # whatever it was, the model's state is unknown now
            self.broken = f"{type(cause).__name__}: {cause}"
            logger.exception("the engine stopped")
        self._end()

    def _end(self) -> None:
        """Nothing more will be written of any reply."""
        self._give([Delta(name, finish="error") for name in [*self.sinks]])

    def _step(self) -> None:
        for engine in list(self.engines):
            if engine.busy():
                self.stepping = time.monotonic()
                found = engine.step()
                self.stepping = None
                for delta in found:
                    if delta.finish:
                        self.owners.pop(delta.id, None)
                self._give(found)
            elif engine is not self.engines[-1]:
                self.engines.remove(engine)
                engine.close()

    def _give(self, deltas: list[Delta]) -> None:
        """Hand them to the event loop, in one call."""
        for loop in {sink.loop for delta in deltas if (sink := self.sinks.get(delta.id))}:
            with contextlib.suppress(RuntimeError):  # it has ended, and with it whoever waited there
                loop.call_soon_threadsafe(self._deliver, loop, deltas)

    def _deliver(self, loop: asyncio.AbstractEventLoop, deltas: list[Delta]) -> None:
        for delta in deltas:
            sink = self.sinks.get(delta.id)
            if sink is None or sink.loop is not loop:
                continue
            if delta.finish:
                del self.sinks[delta.id]
            try:
                sink.put(delta)
            except Exception:  # of one reply; the others have theirs
                logger.exception("tokens were not handed over")
