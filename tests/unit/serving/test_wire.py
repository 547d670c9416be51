"""The wire between engines and an ingress, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import msgpack
import pytest

from actors.serving.protocol import Delta, merged
from orchestration.serving.engine import Mailbox
from orchestration.serving.errors import ApiError
from orchestration.serving.wire import MOST_BYTES, Address, Desk, Line, Lines

HOST = "127.0.0.1"


def expected(desk: Desk, name: str) -> Mailbox:
    box = Mailbox(lambda: desk.forget(name))
    desk.expect(name, box)
    return box


async def all_of(box: Mailbox) -> Delta:
    found: list[Delta] = []
    while not found or not found[-1].finish:
        if delta := await box.take():
            found.append(delta)
    return merged(found)


def both(scenario: Callable[[Desk, Lines], Awaitable[None]], interval: float = 0.0) -> None:
    """A desk and an engine's lines in one event loop, closed at the end."""

    async def run() -> None:
        desk, lines = Desk(HOST), Lines(interval)
        try:
            await scenario(desk, lines)
        finally:
            lines.close()
            desk.close()

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("interval", [0.0, 0.005])
def test_replies_side_by_side_arrive_whole(interval: float) -> None:
    async def scenario(desk: Desk, lines: Lines) -> None:
        names = [f"r{number}" for number in range(5)]
        boxes = [expected(desk, name) for name in names]
        line = await lines.to(await desk.address())
        sinks = [line.reply(name) for name in names]
        for step in range(50):
            for number, sink in enumerate(sinks):
                more = Delta(names[number], [step, number], [-0.5, -1.5], [[(step, -0.5)], [(number, -1.5)]])
                sink.put(more if step < 49 else Delta(names[number], [7], [-2.0], [[(7, -2.0)]], "stop"))
            await asyncio.sleep(0)
        for number, box in enumerate(boxes):
            found = await all_of(box)
            assert found.tokens == [one for step in range(49) for one in (step, number)] + [7]
            assert found.logprobs == [-0.5, -1.5] * 49 + [-2.0]
            assert found.likeliest[:2] == [[(0, -0.5)], [(number, -1.5)]] and found.finish == "stop"
        for sink in sinks:
            await sink.ended

    both(scenario, interval)


def test_first_and_last_tokens_do_not_wait_for_the_interval() -> None:
    async def scenario(desk: Desk, lines: Lines) -> None:
        box, other = expected(desk, "a"), expected(desk, "b")
        line = await lines.to(await desk.address())
        line.last = line.loop.time()  # as if all had just been sent
        sink = line.reply("a")
        line.reply("b")
        sink.put(Delta("a", [1]))
        assert await box.take() == Delta("a", [1])
        sink.put(Delta("a", [2]))
        line.put(Delta("b", [5]))
        assert await other.take() == Delta("b", [5])
        assert await box.take(0.05) is None
        sink.put(Delta("a", [3], finish="length"))
        assert await box.take() == Delta("a", [2, 3], finish="length")

    both(scenario, 1000.0)


def test_who_does_not_know_the_secret_is_hung_up_on() -> None:
    async def scenario(desk: Desk, lines: Lines) -> None:
        box = expected(desk, "a")
        right = await desk.address()
        line = await lines.to(Address(right.host, right.port, b"x" * len(right.secret)))
        sink = line.reply("a")
        sink.put(Delta("a", [1], finish="stop"))
        while not line.lost:
            await asyncio.sleep(0.001)
        assert not box.deltas and not box.ended

    both(scenario)


def test_the_secret_is_not_in_what_is_printed() -> None:
    assert repr(Address(HOST, 1, b"secret")) == f"Address(host='{HOST}', port=1)"


def test_a_lost_connection_ends_both_sides() -> None:
    async def scenario(desk: Desk, lines: Lines) -> None:
        box = expected(desk, "a")
        address = await desk.address()
        line = await lines.to(address)
        sink = line.reply("a")
        sink.put(Delta("a", [1]))
        assert (await box.take()) == Delta("a", [1])
        line.transport.abort()
        with pytest.raises(ApiError) as caught:
            await box.take()
        assert caught.value.code == "engine_lost"
        with pytest.raises(ApiError):
            await sink.ended
        line.forget("a")
        assert (await lines.to(address)) is not line  # a later reply has a line of its own

    both(scenario)


def test_a_reply_is_not_begun_on_a_line_that_was_lost() -> None:
    """Between the opening of a line and its first use it may be lost: the reply would never end."""

    async def scenario(desk: Desk, lines: Lines) -> None:
        line = await lines.to(await desk.address())
        line.transport.abort()
        while not line.lost:
            await asyncio.sleep(0.001)
        with pytest.raises(ApiError) as caught:
            line.reply("a")
        assert caught.value.code == "engine_lost" and not line.replies

    both(scenario)


def test_what_is_missing_is_noticed() -> None:
    async def scenario(desk: Desk, lines: Lines) -> None:
        box = expected(desk, "a")
        line = await lines.to(await desk.address())
        sink = line.reply("a")
        sink.put(Delta("a", [1]))
        assert await box.take() == Delta("a", [1])
        sink.sent += 1  # as if one frame had been lost
        sink.put(Delta("a", [2], finish="stop"))
        with pytest.raises(ApiError) as caught:
            await box.take()
        assert caught.value.code == "engine_lost"

    both(scenario)


def test_who_has_left_gets_nothing_and_the_others_do() -> None:
    async def scenario(desk: Desk, lines: Lines) -> None:
        gone, there = expected(desk, "gone"), expected(desk, "there")
        line = await lines.to(await desk.address())
        left, kept = line.reply("gone"), line.reply("there")
        left.put(Delta("gone", [1]))
        await gone.take()
        gone.close()
        left.put(Delta("gone", [2]))
        line.forget("gone")
        kept.put(Delta("there", [3], finish="stop"))
        assert (await all_of(there)).tokens == [3]
        assert not gone.deltas and desk.boxes.keys() == {"there"}

    both(scenario)


@pytest.mark.parametrize(
    "frame", [(MOST_BYTES + 1).to_bytes(4, "big"), (3).to_bytes(4, "big") + b"\xc1\xc1\xc1"], ids=["too large", "no msgpack"]
)
def test_a_frame_that_is_none_ends_the_connection(frame: bytes) -> None:
    async def scenario(desk: Desk, lines: Lines) -> None:
        line = await lines.to(await desk.address())
        line.transport.write(frame)
        while not line.lost:
            await asyncio.sleep(0.001)
        assert line.lost

    both(scenario)


def test_an_ingress_that_cannot_be_reached() -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind((HOST, 0))
        port = taken.getsockname()[1]

        async def scenario(desk: Desk, lines: Lines) -> None:
            with pytest.raises(ApiError) as caught:
                await lines.to(Address(HOST, port, b"x" * 32))
            assert caught.value.code == "engine_lost"

        both(scenario)


def test_an_ingress_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestration.serving.wire.MOST_BYTES", 1000)

    async def scenario(desk: Desk, lines: Lines) -> None:
        server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), HOST, 0, limit=1)
        line: Line = await lines.to(Address(HOST, server.sockets[0].getsockname()[1], b"x" * 32))
        sink = line.reply("a")
        while not line.lost:
            sink.put(Delta("a", list(range(100_000))))
            await asyncio.sleep(0.001)
        with pytest.raises(ApiError):
            await sink.ended
        server.close()

    both(scenario)


def test_a_frame_is_as_it_is_described() -> None:
    """Engine and ingress of two versions would not understand each other: a change of the form is a change of this test."""
    sent: list[bytes] = []

    class Transport:
        def write(self, data: bytes) -> None:
            sent.append(data)

        def get_write_buffer_size(self) -> int:
            return 0

    async def scenario() -> None:
        line = Line(b"s" * 32, 0.0)
        line.connection_made(Transport())
        line.reply("a").put(Delta("a", [1, 2], [-0.5, -1.0], [[], []], "stop"))
        await asyncio.sleep(0.01)

    asyncio.run(scenario())
    hello, frame = sent
    assert hello == b"s" * 32
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert msgpack.unpackb(frame[4:]) == [["a", 0, [1, 2], [-0.5, -1.0], [[], []], "stop"]]
