"""The thread around an engine: many callers, new weights in between, and what happens when it breaks."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

import pytest

from actors.serving.protocol import Delta, Drawing, Request, merged
from orchestration.serving.engine import EngineLoop, Mailbox
from orchestration.serving.errors import ApiError


@dataclass
class Counting:
    """An engine whose every token is its own number; `gate` lets it step."""

    number: int
    exclusive: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    left: dict[str, int] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    closed: bool = False
    breaks: bool = False

    def add(self, request: Request) -> None:
        self.left[request.id] = request.drawing.max_tokens

    def abort(self, name: str) -> None:
        self.left.pop(name, None)
        self.aborted.append(name)

    def busy(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Delta]:
        self.gate.wait(10)
        if self.breaks:
            raise RuntimeError("out of memory")
        found = []
        for name in list(self.left):
            self.left[name] -= 1
            last = self.left[name] == 0
            found.append(Delta(name, [self.number], finish="length" if last else None))
            if last:
                del self.left[name]
        return found

    def close(self) -> None:
        self.closed = True


def opened(engine: Counting, waiting: int = 4, interval: float = 0.0) -> EngineLoop:
    return EngineLoop(lambda: engine, waiting, interval, sequences=4)


def request(name: str, tokens: int = 5) -> Request:
    return Request(name, [1], Drawing(tokens))


async def each(writing: Mailbox) -> list[Delta]:
    found: list[Delta] = []
    while not found or not found[-1].finish:
        if delta := await writing.take():
            found.append(delta)
    return found


async def all_of(writing: Mailbox) -> Delta:
    return merged(await each(writing))


def test_many_replies_side_by_side() -> None:
    engine = Counting(7)
    engine.gate.set()
    loop = opened(engine)

    async def several() -> list[Delta]:
        return await asyncio.gather(*(all_of(loop.submit(request(str(n), n + 1))) for n in range(8)))

    found = asyncio.run(several())
    assert [delta.tokens for delta in found] == [[7] * (n + 1) for n in range(8)]
    assert not loop.sinks and not loop.owners
    loop.close()


def test_a_full_queue_refuses() -> None:
    engine = Counting(7)
    loop = opened(engine, waiting=1)

    async def more() -> int:
        tasks = [asyncio.ensure_future(all_of(loop.submit(request(str(n))))) for n in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await all_of(loop.submit(request("late")))
        engine.gate.set()
        await asyncio.gather(*tasks)
        return caught.value.status

    assert asyncio.run(more()) == 503
    loop.close()


def test_who_leaves_is_not_written_for() -> None:
    engine = Counting(7)
    engine.gate.set()
    loop = opened(engine)

    async def leaving() -> None:
        stream = loop.submit(request("a", 10**9))
        await stream.take()
        stream.close()
        while "a" not in engine.aborted:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(leaving(), 10))
    assert engine.left == {}
    loop.close()


@pytest.mark.parametrize("exclusive", [False, True])
def test_new_weights_while_requests_are_under_way(exclusive: bool) -> None:
    old, new = Counting(1, exclusive), Counting(2, exclusive)
    loop = opened(old)

    async def swapped() -> tuple[Delta, Delta]:
        before = asyncio.ensure_future(all_of(loop.submit(request("before", 50))))
        while "before" not in old.left:
            await asyncio.sleep(0.001)
        swap = asyncio.ensure_future(loop.swap(lambda: new))
        if not exclusive:
            await swap
        await asyncio.sleep(0.01)
        after = asyncio.ensure_future(all_of(loop.submit(request("after", 3))))
        await asyncio.sleep(0.01)
        old.gate.set()
        new.gate.set()
        await swap
        return await before, await after

    before, after = asyncio.run(asyncio.wait_for(swapped(), 20))
    assert before.tokens == [1] * 50
    assert after.tokens == [2] * 3
    loop.close()
    assert old.closed and new.closed


def test_weights_that_cannot_be_loaded_change_nothing() -> None:
    engine = Counting(1)
    engine.gate.set()
    loop = opened(engine)

    def broken() -> Counting:
        raise OSError("no such file")

    async def tried() -> Delta:
        with pytest.raises(OSError, match="no such file"):
            await loop.swap(broken)
        return await all_of(loop.submit(request("a")))

    assert asyncio.run(tried()).tokens == [1] * 5
    loop.check()
    loop.close()


def test_an_engine_that_breaks_ends_its_replies_and_is_not_well() -> None:
    engine = Counting(1)
    loop = opened(engine)

    async def breaking() -> Delta:
        task = asyncio.ensure_future(all_of(loop.submit(request("a"))))
        while "a" not in engine.left:
            await asyncio.sleep(0.001)
        engine.breaks = True
        engine.gate.set()
        found = await task
        with pytest.raises(ApiError) as caught:
            await all_of(loop.submit(request("b")))
        assert caught.value.code == "engine_lost"
        return found

    assert asyncio.run(breaking()).finish == "error"
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.check()
    loop.close()


def test_tokens_are_handed_over_together() -> None:
    engine = Counting(3)
    engine.gate.set()
    loop = opened(engine, interval=1000.0)

    async def counted() -> list[int]:
        return [len(delta.tokens) for delta in await each(loop.submit(request("a", 200)))]

    counts = asyncio.run(counted())
    assert sum(counts) == 200
    # The first at once, the rest with the end, since the interval is longer than all of it; or all at once, where the engine was that fast.
    assert len(counts) <= 2
    loop.close()
