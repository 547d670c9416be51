"""Nobody waits for ever because somebody else has left: work that requests share, and how it ends.

Ray Serve is played by `Serve`: it knows by a context variable which request a call is made for, and cancels the call with that request.
"""

from __future__ import annotations

import asyncio
import contextvars
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

import orchestration.serving
from actors.serving.protocol import Delta, Drawing, Request
from orchestration.serving import wire
from orchestration.serving.app import create_app
from orchestration.serving.deployments import Moderation
from orchestration.serving.engine import EngineLoop, Mailbox
from orchestration.serving.errors import ApiError
from orchestration.serving.judging import Judge, in_process
from orchestration.serving.moderation.moderators import ModerationError
from orchestration.serving.service import Service
from orchestration.serving.store.store import Store
from orchestration.serving.wire import Address, Desk, Line, Lines
from tests.serving_stand_ins import THRESHOLDS, ScriptedEngine, WordModerator, service, settings

REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="")
ASK: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


class Serve:
    """Calls to another replica."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, asyncio.Future[Any]]] = []

    async def call(self) -> Any:
        future = asyncio.get_running_loop().create_future()
        self.calls.append((REQUEST.get(), future))
        return await future

    async def called(self, times: int) -> None:
        while len(self.calls) < times:
            await asyncio.sleep(0)

    def request(self, name: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        context = contextvars.copy_context()
        context.run(REQUEST.set, name)
        return asyncio.get_running_loop().create_task(work, context=context)

    async def leave(self, name: str, task: asyncio.Task[Any]) -> None:
        """The client of a request goes: the request is cancelled, and so are the calls that were made for it."""
        task.cancel()
        for owner, future in self.calls:
            if owner == name:
                future.cancel()
        await asyncio.wait({task})


def run(scenario: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 20))


def judge_of(ask: Callable[[list[str]], Awaitable[Any]], seconds: float = 20.0) -> Judge:
    found = Judge("words", ("violence",), ask, THRESHOLDS)
    found.seconds = seconds
    return found


async def refused(task: Awaitable[Any]) -> tuple[int, str | None]:
    """The error that a waiter is answered."""
    with pytest.raises(ApiError) as caught:
        await asyncio.wait_for(task, 10)
    return caught.value.status, caught.value.code


UNJUDGED = (503, "moderation_unavailable")


# the first to wait leaves


def test_texts_are_judged_though_the_first_client_leaves() -> None:
    async def scenario() -> None:
        serve = Serve()
        judged: list[list[str]] = []

        async def ask(texts: list[str]) -> list[dict[str, float]]:
            judged.append(texts)
            return await serve.call()

        judge = judge_of(ask)
        first = serve.request("first", judge.scores(["a"]))
        await serve.called(1)
        second, third, fourth = (serve.request(name, judge.scores([name])) for name in ("b", "c", "d"))
        await asyncio.sleep(0)
        await serve.leave("first", first)
        await serve.leave("c", third)
        if not serve.calls[0][1].done():
            serve.calls[0][1].set_result([{"violence": 0.1}])
        await serve.called(2)
        serve.calls[1][1].set_result([{"violence": 0.2}, {"violence": 0.3}])
        assert await asyncio.wait_for(second, 10) == [{"violence": 0.2}]
        assert await asyncio.wait_for(fourth, 10) == [{"violence": 0.3}]
        assert judged == [["a"], ["b", "d"]], "who has left is not judged any more"

    run(scenario)


def test_who_waits_in_the_same_batch_gets_scores_though_the_other_leaves() -> None:
    async def scenario() -> None:
        serve = Serve()

        async def ask(texts: list[str]) -> list[dict[str, float]]:
            return await serve.call()

        judge = judge_of(ask)
        first, second = (serve.request(name, judge.scores([name])) for name in ("first", "second"))
        await serve.called(1)
        await serve.leave("first", first)
        serve.calls[0][1].set_result([{"violence": 0.1}, {"violence": 0.2}])
        assert await asyncio.wait_for(second, 10) == [{"violence": 0.2}]

    run(scenario)


def test_a_line_is_opened_though_the_first_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        serve, lines = Serve(), Lines(0.0)
        monkeypatch.setattr(Lines, "_open", lambda *_: serve.call())
        to = Address("127.0.0.1", 1, b"")
        first, second = (serve.request(name, lines.to(to)) for name in ("first", "second"))
        await serve.called(1)
        await serve.leave("first", first)
        line = Line(b"", 0.0)
        serve.calls[0][1].set_result(line)
        assert await asyncio.wait_for(second, 10) is line
        assert len(serve.calls) == 1

    run(scenario)


def test_a_desk_is_opened_though_the_first_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        serve, desk, open_one = Serve(), Desk("127.0.0.1"), asyncio.start_server
        opened = []

        async def slowly(*given: Any) -> Any:
            await serve.call()
            opened.append(await open_one(*given))
            return opened[-1]

        monkeypatch.setattr(wire.asyncio, "start_server", slowly)
        first, second = (serve.request(name, desk.address()) for name in ("first", "second"))
        await serve.called(1)
        await serve.leave("first", first)
        serve.calls[0][1].set_result(None)
        assert (await asyncio.wait_for(second, 10)).port > 0
        assert len(opened) == 1
        desk.close()

    run(scenario)


@pytest.mark.parametrize("how", ["whatever_comes", "later"])
def test_work_that_outlives_its_request_goes_on(how: str) -> None:
    async def scenario() -> None:
        serve, made = Serve(), service(ScriptedEngine(lambda _: ""), None)
        kept: list[str] = []

        async def keep() -> None:
            kept.append(await serve.call())

        async def asked() -> None:
            if how == "later":
                made.later(keep())
            else:
                await made.whatever_comes(keep())

        task = serve.request("first", asked())
        await serve.called(1)
        await serve.leave("first", task)
        assert not serve.calls[0][1].cancelled()
        serve.calls[0][1].set_result("kept")
        await made.settle()
        assert kept == ["kept"]

    run(scenario)


# what they wait for ends in another way


async def cancelled(texts: list[str]) -> Any:
    raise asyncio.CancelledError


async def broken(texts: list[str]) -> Any:
    raise RuntimeError("no such tensor")


async def exhausted(texts: list[str]) -> Any:
    raise ModerationError("no")


async def too_few(texts: list[str]) -> Any:
    return []


async def never(texts: list[str]) -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("ask", [cancelled, broken, exhausted, too_few, never])
def test_however_a_batch_ends_its_waiters_hear_of_it_and_the_next_one_is_judged(ask: Callable[[list[str]], Awaitable[Any]]) -> None:
    async def scenario() -> None:
        bad = True

        async def first_badly(texts: list[str]) -> Any:
            return await ask(texts) if bad else [{"violence": 0.1} for _ in texts]

        judge = judge_of(first_badly, 0.05 if ask is never else 20.0)
        waiters = [asyncio.create_task(judge.scores([text])) for text in "ab"]
        assert [await refused(waiter) for waiter in waiters] == [UNJUDGED] * 2
        bad, judge.seconds = False, 20.0
        assert await asyncio.wait_for(judge.scores(["c"]), 10) == [{"violence": 0.1}]

    run(scenario)


def test_when_judging_itself_is_cancelled_everybody_hears_of_it() -> None:
    async def scenario() -> None:
        judge = judge_of(never)
        judged = [asyncio.create_task(judge.scores([text])) for text in "ab"]
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(judge.scores(["c"]))
        await asyncio.sleep(0)
        assert judge.asking is not None
        judge.asking.cancel()
        assert [await refused(waiter) for waiter in (*judged, waiting)] == [UNJUDGED] * 3
        assert judge.asking is None

    run(scenario)


def test_a_text_waits_for_its_turn_only_so_long() -> None:
    async def scenario() -> None:
        asked, gate = asyncio.Event(), asyncio.Event()

        async def slow(texts: list[str]) -> Any:
            asked.set()
            await gate.wait()
            return [{} for _ in texts]

        judge = judge_of(slow)
        first = asyncio.create_task(judge.scores(["a"]))
        await asked.wait()
        judge.seconds = 0.05
        assert await refused(judge.scores(["b"])) == UNJUDGED
        gate.set()
        assert await first == [{}]

    run(scenario)


@pytest.mark.parametrize("ask", [cancelled, broken, too_few])
def test_a_request_that_could_not_be_judged_is_answered_in_openais_form(ask: Callable[[list[str]], Awaitable[Any]], tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    made = service(ScriptedEngine(lambda _: "fine"), store, moderated=True)
    made.judge = judge_of(ask)

    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(made)), base_url="http://localhost") as client:
            stream = await client.post("/v1/chat/completions", json=ASK | {"stream": True})
            texts = await client.post("/v1/moderations", json={"input": "hi"})
            return [await client.post("/v1/chat/completions", json=ASK), stream, texts]

    for answer in run(scenario):
        assert (answer.status_code, answer.json()["error"]["code"]) == UNJUDGED
        assert answer.headers["retry-after"] == "2"
    store.close()


@pytest.mark.parametrize("ended", [asyncio.CancelledError, OSError, ValueError])
def test_a_line_whose_opening_ends_badly_is_an_error_for_all_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, ended: type[BaseException]
) -> None:
    async def scenario() -> None:
        serve, lines = Serve(), Lines(0.0)
        monkeypatch.setattr(Lines, "_open", lambda *_: serve.call())
        to = Address("127.0.0.1", 1, b"")
        waiters = [asyncio.create_task(lines.to(to)) for _ in range(2)]
        await serve.called(1)
        serve.calls[0][1].set_exception(ended()) if ended is not asyncio.CancelledError else serve.calls[0][1].cancel()
        assert [await refused(waiter) for waiter in waiters] == [(503, "engine_lost")] * 2
        again = asyncio.create_task(lines.to(to))
        await serve.called(2)
        line = Line(b"", 0.0)
        serve.calls[1][1].set_result(line)
        assert await again is line

    run(scenario)


def test_a_store_that_does_not_answer_is_an_error_in_time() -> None:
    gate = threading.Event()

    async def scenario() -> None:
        made = service(ScriptedEngine(lambda _: ""), None, with_settings=settings(seconds=0.05))
        assert (await refused(made.stored(gate.wait, 20)))[0] == 504
        gate.set()

    run(scenario)


# threads


@pytest.mark.parametrize("where", ["in this process", "in a replica"])
def test_a_moderator_is_asked_by_one_thread_at_a_time_though_clients_leave(where: str) -> None:
    gate, at_once, most = threading.Event(), [0], [0]

    class Slow(WordModerator):
        def scores(self, texts: Any) -> list[dict[str, float]]:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            gate.wait(10)
            at_once[0] -= 1
            return [{} for _ in texts]

    async def scenario() -> None:
        replica = Moderation()
        replica.moderator = Slow()
        ask: Any = in_process(replica.moderator, {}).ask if where == "in this process" else replica.scores
        first = asyncio.create_task(ask(["a"]))
        while not at_once[0]:
            await asyncio.sleep(0.001)
        first.cancel()
        second = asyncio.create_task(ask(["b"]))
        await asyncio.sleep(0.05)
        gate.set()
        assert await second == [{}]
        assert most == [1]

    run(scenario)


# the engine


class Model:
    """A step engine that writes one token of each reply at each step, while it may."""

    exclusive = True

    def __init__(self) -> None:
        self.going, self.left, self.closed = threading.Event(), set[str](), False

    def add(self, request: Request) -> None:
        if request.id == "bad":
            raise ValueError("a prompt of 0 tokens")
        self.left.add(request.id)

    def abort(self, name: str) -> None:
        self.left.discard(name)

    def busy(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Delta]:
        self.going.wait(10)
        found, self.left = [Delta(name, [1], finish="length") for name in self.left], set()
        return found

    def close(self) -> None:
        self.closed = True


def asked(loop: EngineLoop, name: str) -> Mailbox:
    return loop.submit(Request(name, [1], Drawing(1)))


async def ends(box: Mailbox) -> str | None:
    while True:
        delta = await asyncio.wait_for(box.take(5), 10)
        assert delta is not None, "it hangs"
        if delta.finish:
            return delta.finish


def test_a_request_that_the_engine_refuses_is_the_only_one_that_ends() -> None:
    model = Model()
    loop = EngineLoop(lambda: model, 4, 0.0, 4)

    async def scenario() -> list[str | None]:
        boxes = [asked(loop, name) for name in ("good", "bad", "better")]
        model.going.set()
        found = [await ends(box) for box in boxes]
        return [*found, await ends(asked(loop, "later"))]

    assert run(scenario) == ["length", "error", "length", "length"]
    loop.check()
    loop.close()


@pytest.mark.parametrize("ended", ["cancelled", "failed"])
def test_requests_that_wait_for_new_weights_hear_that_these_will_not_come(ended: str) -> None:
    model, began, gate = Model(), threading.Event(), threading.Event()
    loop = EngineLoop(lambda: model, 4, 0.0, 4)

    def load() -> Any:
        began.set()
        gate.wait(10)
        raise OSError("no such file")

    async def scenario() -> None:
        swap = asyncio.create_task(loop.swap(load))
        while not began.is_set():
            await asyncio.sleep(0.001)
        waiting = asked(loop, "a")
        if ended == "cancelled":
            swap.cancel()
            await asyncio.wait({swap})
        gate.set()
        await asyncio.wait({swap})
        assert await ends(waiting) == "error"
        with pytest.raises(ApiError):
            asked(loop, "b")

    run(scenario)
    assert model.closed
    with pytest.raises(RuntimeError):
        loop.check()
    loop.close()


def test_a_swap_does_not_wait_for_an_engine_that_has_stopped() -> None:
    model = Model()
    loop = EngineLoop(lambda: model, 4, 0.0, 4)

    async def scenario() -> None:
        box = asked(loop, "a")
        swap = asyncio.create_task(loop.swap(Model))
        await asyncio.sleep(0)
        model.step = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        model.going.set()
        while loop.thread.is_alive():
            await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(swap, 10)
        assert await ends(box) in ("error", "length")

    run(scenario)
    loop.close()


def test_replies_of_an_event_loop_that_has_ended_take_nothing_from_those_of_another() -> None:
    model = Model()
    loop = EngineLoop(lambda: model, 4, 0.0, 4)

    async def leaves() -> None:
        asked(loop, "gone")

    asyncio.run(leaves())

    async def scenario() -> str | None:
        box = asked(loop, "there")
        model.going.set()
        return await ends(box)

    assert run(scenario) == "length"
    loop.check()
    loop.close()


# where else work is begun

BEGUN = {
    "apart.py": "the empty context itself",
    "api/streaming.py": "a request's own work, cancelled with it",
    "writing.py": "replies of one request, cancelled with it",
    "deployments.py": "a reply's own call to its engine, cancelled with it",
    "page/flow.py": "one page's reply, stopped by it",
}


def test_all_work_that_is_begun_in_a_requests_context_is_that_requests_own() -> None:
    """Whoever adds a task says here why no other request waits for it, or begins it by `apart`."""
    root = Path(orchestration.serving.__file__).parent
    begins = re.compile(r"\b(create_task|ensure_future)\(")
    assert {path.relative_to(root).as_posix() for path in root.rglob("*.py") if begins.search(path.read_text())} == BEGUN.keys()


def test_tasks_of_the_service_carry_no_request() -> None:
    async def scenario() -> None:
        made: Service = service(ScriptedEngine(lambda _: ""), None)
        seen: list[str] = []

        async def look() -> None:
            seen.append(REQUEST.get())

        async def ask() -> None:
            made.later(look())
            await made.whatever_comes(look())

        await Serve().request("first", ask())
        await made.settle()
        assert seen == ["", ""]

    run(scenario)
