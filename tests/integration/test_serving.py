"""The service as it is started by its users: `chatray serve` on Ray Serve, spoken to by OpenAI's own client."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from orchestration.serving.keys import make_key
from tests.conftest import COMMAND
from tests.serving_stand_ins import TINY_CONTEXT, tiny_checkpoint, write_yaml

pytestmark = pytest.mark.ray

ASK: Any = [{"role": "user", "content": "where is the cat?"}]
SECONDS = 180


@dataclass
class Served:
    """A running service."""

    process: subprocess.Popen
    url: str
    key: str
    folder: Path

    def client(self, **further: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60, **further)

    def version(self) -> str:
        found = self.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=1)
        return str((found.model_extra or {})["chatray"]["model_version"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(line: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + SECONDS
    while line not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    tiny_checkpoint(folder / "tiny", seed=0)
    key = make_key(folder / "keys.yaml", "test")
    write_yaml(folder / "prompts.yaml", {"*": {"version": 1, "before": "Be brief and kind to every one of the cats of this house."}})
    port, log = free_port(), folder / "log"
    words = [
        "serve", "checkpoint=tiny", f"serving.port={port}", "serving.keys=keys.yaml", "serving.prompts=prompts.yaml",
        "serving.tools=taskmaster", "serving.moderation.kind=trained", "serving.limits.waiting=4", "serving.engine.sequences=8",
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen([str(COMMAND), *words], cwd=folder, stdout=out, stderr=out)
        try:
            wait_for("serving tiny at", process, log)
            yield Served(process, f"http://127.0.0.1:{port}", key, folder)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=90)
    assert key not in log.read_text()
    assert process.returncode == 0, log.read_text()


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


def test_conversations_live_in_the_store(service: Served) -> None:
    with httpx.Client(base_url=service.url, headers={"authorization": f"Bearer {service.key}"}, timeout=60) as asked:
        name = asked.post("/v1/conversations", json={"title": "cats"}).json()["id"]
        service.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=4, extra_body={"conversation": name})
        roles = [message["role"] for message in asked.get(f"/v1/conversations/{name}").json()["messages"]]
    assert roles == ["user", "assistant"]


def test_another_checkpoint_and_prompt_are_swapped_in_without_losing_a_request(service: Served) -> None:
    """SIGHUP while requests go on: none fails, and later ones are of the new version."""
    before = service.version()

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


def test_health_needs_no_key(service: Served) -> None:
    assert httpx.get(f"{service.url}/health", timeout=30).json() == {"status": "ok"}
