"""The whole service in one process, with a real engine and the moderator that chatray comes with."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from orchestration.run_directory import seal
from orchestration.serving.app import create_app
from orchestration.serving.building import load_engine
from orchestration.serving.launch import launch
from orchestration.serving.local import opened
from orchestration.serving.service import Service
from tests.serving_stand_ins import listening, tiny_checkpoint

ASK: Any = {"model": "own", "messages": [{"role": "user", "content": "where is the cat?"}], "max_tokens": 20}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service, Path]]:
    folder = tmp_path_factory.mktemp("own")
    for number, stage in enumerate(("sft", "ppo")):
        checkpoint = folder / "own" / "round_01" / stage / "checkpoint"
        tiny_checkpoint(checkpoint, seed=number)
        seal(checkpoint, {})
    (folder / "own" / "config.yaml").write_text("data: {mix: [{format: taskmaster}]}")
    wanted = launch(["run=own", "stage=ppo,sft", "runtime=local", "serving.engine.interval_ms=0"], folder)
    with opened(wanted) as service, listening(create_app(service)) as url:
        yield url, service, folder


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_both_stages_of_a_run_are_served(running: tuple[str, Service, Path]) -> None:
    url, service, _ = running
    assert [model.id for model in client(url).models.list()] == ["own", "own-sft"]
    texts = {
        name: client(url).chat.completions.create(**(ASK | {"model": name}), temperature=0).choices[0].message.content
        for name in service.models
    }
    assert len(set(texts.values())) == 2
    assert all(model.tools for model in service.models.values())


def test_a_seed_gives_the_same_reply_alone_and_among_others(running: tuple[str, Service, Path]) -> None:
    url, _, _ = running

    async def many() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as asked:
            found = await asyncio.gather(*(asked.chat.completions.create(**ASK, seed=seed % 5) for seed in range(30)))
            return [one.choices[0].message.content for one in found]

    alone = [client(url).chat.completions.create(**ASK, seed=seed).choices[0].message.content for seed in range(5)]
    assert asyncio.run(many()) == alone * 6
    assert len(set(alone)) > 1
    several = client(url).chat.completions.create(**ASK, seed=3, n=4).choices
    assert several[0].message.content == alone[3]
    assert len({choice.message.content for choice in several}) > 1


def test_a_stream_says_what_the_whole_reply_says(running: tuple[str, Service, Path]) -> None:
    url, _, _ = running
    whole = client(url).chat.completions.create(**ASK, seed=11, logprobs=True, top_logprobs=2).choices[0]
    chunks = list(client(url).chat.completions.create(**ASK, seed=11, logprobs=True, top_logprobs=2, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    entries = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or []]
    assert whole.logprobs is not None and entries == whole.logprobs.content
    assert all(entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob for entry in entries)


def test_new_weights_while_replies_are_written(running: tuple[str, Service, Path]) -> None:
    """Greedy replies before, during and after a swap are those of the old or of the new model, and of nothing between."""
    url, service, folder = running
    tiny_checkpoint(folder / "new", seed=7)
    loop: Any = service.models["own"].engine
    request = ASK | {"temperature": 0, "max_tokens": 60}
    old = client(url).chat.completions.create(**request).choices[0].message.content

    async def swapping() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as asked:
            first = [asyncio.ensure_future(asked.chat.completions.create(**request)) for _ in range(8)]
            await loop.swap(lambda: load_engine(str(folder / "new"), service.settings))
            later = [asyncio.ensure_future(asked.chat.completions.create(**request)) for _ in range(8)]
            return [one.choices[0].message.content for one in await asyncio.gather(*first, *later)]

    texts = asyncio.run(swapping())
    new = client(url).chat.completions.create(**request).choices[0].message.content
    assert new != old
    assert set(texts) <= {old, new}
    assert texts[-1] == new


def test_the_moderator_that_comes_with_chatray(running: tuple[str, Service, Path]) -> None:
    url, service, _ = running
    found = client(url).moderations.create(input=["what a lovely day", "i will murder you and your family"])
    assert len(found.results) == 2
    assert service.judge.on
    assert set(service.judge.thresholds) == set(service.judge.categories)
