"""Tokens on their way from engine replicas to an ingress: one connection between the two, and one message for all replies under way.

    engine replica: Lines ─▶ Line (one for each ingress) ─▶ frames ─▶ ingress replica: Desk ─▶ Mailbox of each reply

Ray Serve carries the request and says how it ended: routing, queues, scaling, cancelling and errors stay its own. The tokens in between
would be a streaming call of Serve, with a message, a pickle and two awakenings for each reply and each step; here that is paid once a step.

A frame is its length (4 bytes, big endian) and a msgpack list of `[id, place, tokens, logprobs, likeliest, finish]`, `place` being how many
frames this reply has had: what is lost, or written twice, is noticed. The first bytes on a connection are the ingress's secret, which it
gives with each request; whoever does not know it is hung up on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgpack

from actors.serving.protocol import Delta, merged
from orchestration.serving.apart import apart
from orchestration.serving.engine import Mailbox
from orchestration.serving.errors import engine_lost

T = TypeVar("T")
SECRET_BYTES = 32
HELLO_SECONDS = 10.0
CONNECT_SECONDS = 10.0
MOST_BYTES = 64 * 2**20
"""Of one frame, and of what an ingress has not read: one that far behind is given up."""


@dataclass(frozen=True)
class Address:
    """Where an ingress waits for tokens."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class Desk:
    """An ingress's end: takes frames and gives each delta to its mailbox. Used by one event loop."""

    def __init__(self, host: str) -> None:
        """Args:
        host: this machine's address as engine replicas reach it.
        """
        self.host, self.secret = host, secrets.token_bytes(SECRET_BYTES)
        self.boxes: dict[str, Mailbox] = {}
        self.places: dict[str, int] = {}
        self.opening: asyncio.Task[asyncio.Server] | None = None

    async def address(self) -> Address:
        """Where to send; opens the desk the first time.

        Raises:
            ApiError: it cannot be opened.
        """
        if self.opening is None or (self.opening.done() and _failed(self.opening)):
            self.opening = apart(asyncio.start_server(self._connected, self.host, 0))
        server = await _opened(self.opening)
        return Address(self.host, server.sockets[0].getsockname()[1], self.secret)

    def expect(self, name: str, box: Mailbox) -> None:
        """Deltas of this reply go into this box, until `forget`."""
        self.boxes[name], self.places[name] = box, 0

    def forget(self, name: str) -> None:
        self.boxes.pop(name, None)
        self.places.pop(name, None)

    def close(self) -> None:
        if self.opening is not None and self.opening.done() and not _failed(self.opening):
            self.opening.result().close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # the event loop ends; asyncio would log it
            await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard: set[str] = set()
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await reader.readexactly(SECRET_BYTES)
            while hmac.compare_digest(hello, self.secret):
                length = int.from_bytes(await reader.readexactly(4), "big")
                if length > MOST_BYTES:
                    break
                for one in msgpack.unpackb(await reader.readexactly(length)):
                    self._take(one, heard)
        except (asyncio.IncompleteReadError, TimeoutError, OSError, ValueError, TypeError):
            pass  # it went away, or does not speak as engines do
        finally:
            writer.close()
            for name in heard:
                if box := self.boxes.get(name):
                    box.fail(engine_lost())

    def _take(self, one: list, heard: set[str]) -> None:
        name, place, tokens, logprobs, likeliest, finish = one
        box = self.boxes.get(name)
        if box is None:  # its client left
            heard.discard(name)
            return
        if place != self.places[name]:
            box.fail(engine_lost())
            return
        self.places[name] += 1
        if finish:
            heard.discard(name)
        else:
            heard.add(name)
        box.put(Delta(name, tokens, logprobs, [[tuple(pair) for pair in some] for some in likeliest], finish))


class Outgoing:
    """A reply as the engine's end sees it: a sink of the engine's loop."""

    def __init__(self, line: Line, name: str) -> None:
        self.line, self.name, self.loop = line, name, line.loop
        self.sent = 0
        self.ended: asyncio.Future[None] = self.loop.create_future()
        """Done once its last delta is on its way; an error when that will never be."""

    def put(self, delta: Delta) -> None:
        """See `Sink`."""
        self.line.put(delta)


class Line(asyncio.Protocol):
    """An engine's end of a connection. What its replies have to say goes out together, at most every `interval` seconds;
    a reply's first tokens and its last do not wait."""

    def __init__(self, secret: bytes, interval: float) -> None:
        self.loop, self.secret, self.interval = asyncio.get_running_loop(), secret, interval
        self.transport: Any = None
        self.replies: dict[str, Outgoing] = {}
        self.waiting: dict[str, list[Delta]] = {}
        self.urgent: dict[str, None] = {}
        """Replies whose first or last tokens wait: these go out with the step that wrote them."""
        self.soon: asyncio.Handle | None = None
        self.due: asyncio.Handle | None = None
        self.last = float("-inf")
        self.lost = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport  # of uvloop, which does not derive its transports from asyncio's
        transport.write(self.secret)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        for timer in (self.soon, self.due):
            if timer is not None:
                timer.cancel()
        for reply in self.replies.values():
            if not reply.ended.done():
                reply.ended.set_exception(engine_lost())

    def reply(self, name: str) -> Outgoing:
        """A sink for a reply, until `forget`.

        Raises:
            ApiError: the connection was lost meanwhile; nobody would hear of it later.
        """
        if self.lost:
            raise engine_lost()
        self.replies[name] = found = Outgoing(self, name)
        return found

    def forget(self, name: str) -> None:
        reply = self.replies.pop(name)
        self.waiting.pop(name, None)
        if reply.ended.done() and not reply.ended.cancelled():
            reply.ended.exception()  # else asyncio complains that nobody has looked at it

    def put(self, delta: Delta) -> None:
        name = delta.id
        self.waiting.setdefault(name, []).append(delta)
        if self.lost:
            return
        if delta.finish or not self.replies[name].sent:  # somebody waits for just this
            self.urgent[name] = None
            if self.soon is None:  # after the other deltas of this step
                self.soon = self.loop.call_soon(self._send_urgent)
        elif self.due is None:
            self.due = self.loop.call_later(max(0.0, self.last + self.interval - self.loop.time()), self._send_all)

    def _send_urgent(self) -> None:
        self.soon = None
        self._send([*self.urgent])
        self.urgent.clear()

    def _send_all(self) -> None:
        self.due, self.last = None, self.loop.time()
        self._send([*self.waiting])

    def _send(self, names: list[str]) -> None:
        frame, ended = [], []
        for name in names:
            if deltas := self.waiting.pop(name, None):
                reply, one = self.replies[name], merged(deltas)
                frame.append((name, reply.sent, one.tokens, one.logprobs, one.likeliest, one.finish))
                reply.sent += 1
                if one.finish:
                    ended.append(reply.ended)
        if self.lost or not frame:
            return
        packed = msgpack.packb(frame)
        self.transport.write(len(packed).to_bytes(4, "big") + packed)
        for future in ended:
            if not future.done():
                future.set_result(None)
        if self.transport.get_write_buffer_size() > MOST_BYTES:
            self.transport.abort()


class Lines:
    """An engine's connections to ingresses."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.lines: dict[Address, asyncio.Task[Line]] = {}

    async def to(self, address: Address) -> Line:
        """A line to an ingress, opened if there is none.

        Raises:
            ApiError: it cannot be reached.
        """
        opening = self.lines.get(address)
        if opening is None or _lost(opening):
            for other, task in [*self.lines.items()]:  # ingresses come and go
                if _lost(task):
                    del self.lines[other]
            self.lines[address] = opening = apart(self._open(address))
        return await _opened(opening)

    async def _open(self, address: Address) -> Line:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, line = await asyncio.get_running_loop().create_connection(
                lambda: Line(address.secret, self.interval), address.host, address.port
            )
        return line

    def close(self) -> None:
        for task in self.lines.values():
            if task.done() and not _failed(task) and (transport := task.result().transport):
                with contextlib.suppress(RuntimeError):  # its event loop has ended
                    transport.close()


def _failed(task: asyncio.Task[Any]) -> bool:
    """Whether a task that is done gave nothing."""
    return task.cancelled() or task.exception() is not None


def _lost(opening: asyncio.Task[Line]) -> bool:
    return opening.done() and (_failed(opening) or opening.result().lost)


async def _opened(opening: asyncio.Task[T]) -> T:
    """What several requests wait for; it goes on whichever of them leaves.

    Raises:
        ApiError: it failed, was cancelled or takes too long.
    """
    await asyncio.wait({opening}, timeout=CONNECT_SECONDS)
    if not opening.done() or _failed(opening):
        raise engine_lost()
    return opening.result()
