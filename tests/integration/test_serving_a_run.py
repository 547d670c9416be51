"""What the recipe trained, served as its users would: `chatray serve run=…`, asked by the official client. The run is the recipe of the
quickstart in its smallest size."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.served import Served, serving

pytestmark = pytest.mark.ray
ASK: Any = [{"role": "user", "content": "Where is the key?"}]


@pytest.fixture(scope="module")
def trained(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("trained"), run=smoke_run) as found:
        yield found


@pytest.fixture(scope="module")
def name(smoke_run: Path) -> str:
    return smoke_run.name


def test_a_trained_model_answers_whole_streamed_and_asynchronously(trained: Served, name: str) -> None:
    client = trained.client()
    assert [model.id for model in client.models.list()] == [name]
    arguments: Any = {"model": name, "messages": ASK, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **arguments))

    async def asynchronously() -> str | None:
        async with openai.AsyncOpenAI(base_url=f"{trained.url}/v1", api_key=trained.key) as asked:
            return (await asked.chat.completions.create(**arguments)).choices[0].message.content

    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason in ("stop", "length")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert whole.usage is not None and chunks[-1].usage == whole.usage
    assert asyncio.run(asynchronously()) == text


def test_tools_that_it_was_not_trained_to_call_are_refused(trained: Served, name: str) -> None:
    tools: Any = [{"type": "function", "function": {"name": "get_menu", "parameters": {"type": "object"}}}]
    with pytest.raises(openai.BadRequestError) as caught:
        trained.client().chat.completions.create(model=name, messages=ASK, tools=tools, max_tokens=4)
    assert caught.value.code == "unsupported_parameter" and caught.value.param == "tools"


def test_errors_moderation_and_feedback(trained: Served, name: str) -> None:
    client = trained.client()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=ASK)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{trained.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert not client.moderations.create(input="Where is the key?").results[0].flagged
    with httpx.Client(base_url=trained.url, headers={"authorization": f"Bearer {trained.key}"}, timeout=60) as asked:
        thread = asked.post("/v1/conversations", json={"title": "keys"}).json()["id"]
        said = client.chat.completions.create(model=name, messages=ASK, max_tokens=8, extra_body={"conversation": thread})
        message = (said.model_extra or {})["chatray"]["message"]
        given = asked.post("/v1/feedback", json={"kind": "thumbs", "value": "up", "conversation": thread, "message": message})
    assert given.status_code == 200
