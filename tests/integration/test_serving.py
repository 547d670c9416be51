"""The service as it is started by its users: `chatray serve` on Ray Serve, spoken to by OpenAI's own client."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from playwright.sync_api import expect, sync_playwright

from orchestration.serving.store.store import Store
from tests.chat_page import chromium
from tests.intruder import Listening, attack, outside_addresses, reached
from tests.served import ASK, SECONDS, Served, load, replicas, serving
from tests.serving_stand_ins import TINY_CONTEXT, tiny_checkpoint

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    words = (
        "serving.tools=taskmaster", "serving.moderation.kind=trained", "serving.limits.waiting=4", "serving.engine.sequences=8",
    )  # fmt: skip
    with serving(tmp_path_factory.mktemp("served"), *words) as found:
        yield found


def test_whoever_reaches_the_machine_gets_the_service_and_nothing_else(service: Served, tmp_path: Path) -> None:
    """Without a token: no replica reads a pickle, the cluster's keys are not told, no agent runs a job. And from another machine not even
    these ports are reached."""
    asked_for, listening = int(service.url.rsplit(":", 1)[1]), Listening()
    listening.sample()
    assert "ServeReplica:chatray:Engine" in " ".join(listening.inet.values())
    assert listening.open_to_others(asked_for) == []
    ports = {port for _, port in listening.inet} - {asked_for}
    assert len(ports) > 10
    assert [gain for port in ports for gain in attack(port, tmp_path / "evidence")] == []
    assert not (tmp_path / "evidence").exists()
    assert [(address, port) for address in outside_addresses() for port in (*ports, asked_for) if reached(address, port)] == []
    assert list(service.client().models.list())


def _at_work(service: Served) -> set[int]:
    return {replica.pid for deployment in ("Ingress", "Engine", "Moderation") for replica in replicas(service, deployment)}


def test_the_official_client_whole_streamed_and_asynchronous(service: Served) -> None:
    client = service.client()
    arguments: Any = {"model": "tiny", "messages": ASK, "max_tokens": 12, "seed": 5, "temperature": 0.7, "top_p": 0.9}
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **arguments))

    async def both() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key) as asked:
            found = await asyncio.gather(*(asked.chat.completions.create(**arguments) for _ in range(4)))
            stream = await asked.chat.completions.create(stream=True, **arguments)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [*(one.choices[0].message.content for one in found), streamed]

    text = whole.choices[0].message.content
    assert text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None and 1 <= whole.usage.completion_tokens <= 12
    assert asyncio.run(both()) == [text] * 5


def test_completions_models_log_probs_and_several_replies(service: Served) -> None:
    client = service.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    found = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=5, n=3, logprobs=True)
    assert len(found.choices) == 3
    assert all(choice.logprobs and len(choice.logprobs.content or []) >= 1 for choice in found.choices)
    text = client.completions.create(model="tiny", prompt="the cat", echo=True, max_tokens=4)
    assert text.choices[0].text.startswith("the cat")


def test_tools_are_taken_where_the_model_knows_them(service: Served) -> None:
    tools: Any = [{"type": "function", "function": {"name": "get_menu_items", "parameters": {"type": "object"}}}]
    messages: Any = [
        *ASK, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_menu_items", "arguments": '{"query": "tea"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"menu_items": []}'},
    ]  # fmt: skip
    found = service.client().chat.completions.create(model="tiny", messages=messages, tools=tools, max_tokens=8)
    assert found.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_moderation_through_the_official_client(service: Served) -> None:
    found = service.client().moderations.create(input=["hello there", "the cat sat on the mat"])
    assert len(found.results) == 2
    assert not found.results[0].flagged


def test_errors_through_the_official_client(service: Served) -> None:
    client = service.client()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=ASK)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "cat " * TINY_CONTEXT}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_more_than_fits_is_503_with_a_time_to_wait(service: Served) -> None:
    async def burst() -> list[httpx.Response]:
        body = {"model": "tiny", "messages": ASK, "max_tokens": 120, "temperature": 1}
        headers = {"authorization": f"Bearer {service.key}"}
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=60)) as asked:
            return await asyncio.gather(*(asked.post(f"{service.url}/v1/chat/completions", json=body, headers=headers) for _ in range(60)))

    answers = asyncio.run(burst())
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 503}
    refused = [answer for answer in answers if answer.status_code == 503]
    assert all(answer.json()["error"]["code"] == "overloaded" and answer.headers["retry-after"] for answer in refused)


def test_clients_that_leave_take_nobody_with_them(service: Served) -> None:
    """Streams that are dropped at all stages, their moderation among them, and requests that come right behind them."""

    async def scenario() -> list[int]:
        body = {"model": "tiny", "messages": ASK, "max_tokens": 60, "temperature": 1}
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=service.url, timeout=15, limits=limits, headers={"authorization": f"Bearer {service.key}"}
        ) as asked:

            async def dropped(seconds: float) -> None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await asked.post("/v1/chat/completions", json=body | {"stream": True})

            async def answered() -> int:
                while (found := await asked.post("/v1/chat/completions", json=body | {"max_tokens": 4})).status_code == 503:
                    assert found.json()["error"]["code"] == "overloaded"  # those who left still have their places, for a moment
                    await asyncio.sleep(0.05)
                return found.status_code

            statuses = []
            for _ in range(3):
                await asyncio.gather(*(dropped(0.003 * number) for number in range(1, 33)))
                statuses += await asyncio.gather(*(answered() for _ in range(8)))
            return statuses

    assert asyncio.run(scenario()) == [200] * 24


def test_conversations_live_in_the_store(service: Served) -> None:
    with httpx.Client(base_url=service.url, headers={"authorization": f"Bearer {service.key}"}, timeout=60) as asked:
        name = asked.post("/v1/conversations", json={"title": "cats"}).json()["id"]
        service.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=4, extra_body={"conversation": name})
        roles = [message["role"] for message in asked.get(f"/v1/conversations/{name}").json()["messages"]]
    assert roles == ["user", "assistant"]


def test_another_checkpoint_and_prompt_are_swapped_in_without_losing_a_request(service: Served) -> None:
    """SIGHUP while requests go on: none fails, later ones are of the new version, and the replicas are those that were there."""
    before, at_work = service.version(), _at_work(service)

    async def going_on() -> tuple[set[str], int]:
        versions, count, until = set(), 0, time.monotonic() + SECONDS
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key, max_retries=3, timeout=60) as asked:
            tiny_checkpoint(service.folder / "tiny", seed=1)
            (service.folder / "prompts.yaml").write_text(yaml.safe_dump({"*": {"version": 2, "before": "Be long."}}))
            service.process.send_signal(signal.SIGHUP)
            while len(versions) < 2 and time.monotonic() < until:
                found = await asked.chat.completions.create(model="tiny", messages=ASK, max_tokens=4)
                versions.add((found.model_extra or {})["chatray"]["model_version"])
                count += 1
        return versions, count

    versions, count = asyncio.run(going_on())
    assert before in versions and len(versions) == 2
    assert count > 1
    assert service.version() != before
    assert _at_work(service) == at_work


def test_health_needs_no_key(service: Served) -> None:
    assert httpx.get(f"{service.url}/health", timeout=30).json() == {"status": "ok"}


def test_feedback_over_http_is_in_the_store_that_is_exported(service: Served) -> None:
    headers = {"authorization": f"Bearer {service.key}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as asked:
        body = {"kind": "thumbs", "value": "up", "messages": ASK, "answers": ["In the drawer."], "model": "tiny", "consent": True}
        given = asked.post("/v1/feedback", json=body).json()
        listed = asked.get("/v1/feedback").json()["data"]
    with contextlib.closing(Store.open(f"sqlite:///{service.folder}/chatray.db")) as store:
        [learned] = store.learnable()
    assert [one["id"] for one in listed] == [given["id"]]
    assert learned.texts == ("In the drawer.",)


@pytest.mark.parametrize(("deployment", "told"), [("Engine", "engine_lost"), ("Moderation", "moderation_unavailable")])
def test_a_killed_replica_loses_no_request_without_an_error_and_comes_back(service: Served, deployment: str, told: str) -> None:
    async def killed() -> Counter[str]:
        async with load(service) as clients:
            await clients.until(lambda ended: ended["complete"] >= 8)
            [replica] = replicas(service, deployment)
            replica.kill()
            until = time.monotonic() + SECONDS  # Serve may notice before any request does: an error is allowed, not asked for
            while not any(one.pid != replica.pid for one in await asyncio.to_thread(replicas, service, deployment)):
                assert time.monotonic() < until
            before = clients.ended["complete"]
            await clients.until(lambda ended: ended["complete"] >= before + 8)
        return clients.ended

    ended = asyncio.run(killed())
    assert set(ended) <= {"complete", told, "overloaded"}


def test_another_checkpoint_under_load_loses_nothing(service: Served) -> None:
    before = service.version()

    async def swapped() -> Counter[str]:
        async with load(service) as clients:
            await clients.until(lambda ended: ended["complete"] >= 4)
            tiny_checkpoint(service.folder / "tiny", seed=2)
            service.process.send_signal(signal.SIGHUP)
            until = time.monotonic() + SECONDS
            while await asyncio.to_thread(service.version) == before:
                assert time.monotonic() < until
            seen = clients.ended["complete"]
            await clients.until(lambda ended: ended["complete"] >= seen + 4)
        return clients.ended

    ended = asyncio.run(swapped())
    assert set(ended) <= {"complete", "overloaded"}


def test_a_client_that_reads_slowly_holds_nobody_up_and_gets_its_whole_reply(service: Served) -> None:
    async def slowly() -> tuple[Counter[str], str]:
        headers = {"authorization": f"Bearer {service.key}"}
        body = {"model": "tiny", "messages": ASK, "max_tokens": 100, "stream": True}
        async with (
            httpx.AsyncClient(base_url=service.url, headers=headers, timeout=90) as asked,
            asked.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            async with load(service) as clients:
                await clients.until(lambda ended: ended["complete"] >= 8)
            text = (await answer.aread()).decode()
        return clients.ended, text

    ended, text = asyncio.run(slowly())
    assert set(ended) == {"complete"}
    assert text.endswith("data: [DONE]\n\n")


def test_a_locked_store_refuses_feedback_and_loses_none(service: Served) -> None:
    """More than the store waits: 503 in OpenAI's form. What was answered with 200 is there, and nothing else is."""

    async def locked() -> tuple[list[int], list[str]]:
        headers = {"authorization": f"Bearer {service.key}"}
        store = sqlite3.connect(service.folder / "chatray.db", isolation_level=None, check_same_thread=False)
        async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=90) as asked:

            async def say(number: int) -> httpx.Response:
                body = {"kind": "comment", "value": f"thought {number}", "messages": ASK, "answers": ["Here."], "model": "tiny"}
                return await asked.post("/v1/feedback", json=body)

            store.execute("BEGIN IMMEDIATE")
            waiting = [asyncio.ensure_future(say(number)) for number in range(3)]
            async with load(service) as clients:  # who keeps no conversation does not wait for the store
                await clients.until(lambda ended: ended["complete"] >= 8)
            first = await asyncio.gather(*waiting)
            store.execute("ROLLBACK")
            store.close()
            second = [await say(number) for number in (3, 4)]
            kept = (await asked.get("/v1/feedback")).json()["data"]
        assert set(clients.ended) == {"complete"}
        return [answer.status_code for answer in [*first, *second]], sorted(one["value"] for one in kept if one["kind"] == "comment")

    statuses, kept = asyncio.run(locked())
    assert statuses == [503, 503, 503, 200, 200]
    assert kept == ["thought 3", "thought 4"]


def test_the_page_signs_in_answers_and_finds_its_conversation_again(service: Served) -> None:
    """Through Serve's proxy, websocket included."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(service.url)
        page.get_by_label("API key").fill(service.key)
        page.get_by_label("API key").press("Enter")
        composer = page.get_by_label("Message", exact=True)
        composer.fill("where is the cat?")
        composer.press("Enter")
        expect(page.locator("section.turn")).to_have_count(1)
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
        page.wait_for_url("**/c/*")
        told = page.locator("article.answer .markdown").inner_text()
        page.reload()
        expect(page.locator("article.answer .markdown")).to_have_text(told)
        name = page.url.rsplit("/c/", 1)[1]
        browser.close()
    kept = httpx.get(f"{service.url}/v1/conversations/{name}", headers={"authorization": f"Bearer {service.key}"}, timeout=30).json()
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"]
    assert kept["messages"][0]["content"] == "where is the cat?"
