"""The OpenAI contract, with the official client on a real port; the engine is scripted."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import APIRoute

from orchestration.serving.app import create_app
from orchestration.serving.errors import overloaded
from tests.serving_stand_ins import ScriptedEngine, chat, served, settings

HELLO = "the cat sat on the mat. 世界 🙂 naïve"
ASK: Any = [{"role": "user", "content": "where is the cat?"}]


def client(url: str, **further: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **further)


@pytest.fixture(scope="module")
def url() -> Any:
    with served(ScriptedEngine(lambda prompt: HELLO, step=2)) as (url, _):
        yield url


def test_no_request_waits_for_a_thread_before_its_endpoint() -> None:
    """FastAPI hands dependencies that are plain functions to threads, which took much of the throughput with many streams."""

    def calls(dependant: Any) -> list[Any]:
        return [one for each in dependant.dependencies for one in [each.call, *calls(each)]]

    routes = [route for route in create_app().routes if isinstance(route, APIRoute)]
    found = {call for route in routes for call in calls(route.dependant)}
    assert len(routes) > 10 and len(found) >= 3
    assert [call for call in found if not inspect.iscoroutinefunction(call) and not inspect.iscoroutinefunction(type(call).__call__)] == []


def test_a_reply_in_one_body(url: str) -> None:
    found = client(url).chat.completions.create(model="tiny", messages=ASK)
    assert found.choices[0].message.content == HELLO
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None and found.usage.completion_tokens == len(chat().text(HELLO)) + 1
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_reply_as_a_stream_never_breaks_a_character(url: str) -> None:
    with client(url).chat.completions.create(model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == HELLO
    assert len([text for text in texts if text]) > 3
    assert not any("�" in text for text in texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(chat().text(HELLO)) + 1


def test_the_asynchronous_client(url: str) -> None:
    async def both() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as asked:
            whole, stream = await asyncio.gather(
                asked.chat.completions.create(model="tiny", messages=ASK),
                asked.chat.completions.create(model="tiny", messages=ASK, stream=True),
            )
            return whole.choices[0].message.content, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(both()) == (HELLO, HELLO)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "expected"), [("mat.", "the cat sat on the "), (["zzz", "cat"], "the "), ("nowhere", HELLO)])
def test_text_ends_before_a_stop_string(url: str, stream: bool, stop: Any, expected: str) -> None:
    asked = client(url).chat.completions
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in asked.create(model="tiny", messages=ASK, stop=stop, stream=True))
    else:
        text = asked.create(model="tiny", messages=ASK, stop=stop).choices[0].message.content or ""
    assert text == expected


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_reply_that_is_cut_says_so(url: str, name: str) -> None:
    limit: Any = {name: 3}
    found = client(url).chat.completions.create(model="tiny", messages=ASK, **limit)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None and found.usage.completion_tokens == 3


def test_several_replies_streamed_and_whole(url: str) -> None:
    found = client(url).chat.completions.create(model="tiny", messages=ASK, n=3)
    assert [(choice.index, choice.message.content) for choice in found.choices] == [(n, HELLO) for n in range(3)]
    texts = ["", "", ""]
    for chunk in client(url).chat.completions.create(model="tiny", messages=ASK, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [HELLO] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_log_probs_are_those_of_the_text(url: str, stream: bool) -> None:
    asked = client(url).chat.completions
    arguments: Any = {"model": "tiny", "messages": ASK, "logprobs": True, "top_logprobs": 1}
    if stream:
        chunks = [chunk for chunk in asked.create(stream=True, **arguments) if chunk.choices[0].logprobs]
        entries = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content or []]
    else:
        entries = asked.create(**arguments).choices[0].logprobs.content or []
    assert b"".join(bytes(chat().tokenizer.decode([i]).encode()) for i in chat().text("the cat")) == b"the cat"
    assert len(entries) == len(chat().text(HELLO))
    assert {entry.logprob for entry in entries} == {-0.5}
    assert all(len(entry.top_logprobs) == 1 for entry in entries)


def test_completions_echo_and_several_prompts(url: str) -> None:
    found = client(url).completions.create(model="tiny", prompt=["a cat", "a mat"], echo=True, n=2, max_tokens=100)
    assert [choice.text for choice in found.choices] == [f"{prompt}{HELLO}" for prompt in ("a cat", "a cat", "a mat", "a mat")]
    assert found.usage is not None and found.usage.prompt_tokens == len(chat().text("a cat")) + len(chat().text("a mat"))
    streamed = client(url).completions.create(model="tiny", prompt="a cat", echo=True, stream=True, max_tokens=100)
    assert "".join(chunk.choices[0].text for chunk in streamed) == f"a cat{HELLO}"


def test_completions_tell_log_probs_with_offsets(url: str) -> None:
    found = client(url).completions.create(model="tiny", prompt="a", logprobs=1, max_tokens=4).choices[0].logprobs
    assert found is not None and found.tokens and found.text_offset
    assert found.text_offset == [sum(map(len, found.tokens[:n])) for n in range(4)]


def test_models_are_listed(url: str) -> None:
    assert [model.id for model in client(url).models.list()] == ["tiny"]
    assert client(url).models.retrieve("tiny").owned_by == "chatray"


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "the cat " * 300}]}, 400, "messages"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 17}, 400, "n"),
        ({"max_tokens": 100000}, 400, "max_tokens"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"conversation": "conv_nowhere"}, 404, None),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(url: str, changes: dict[str, Any], status: int, param: str | None) -> None:
    body = {"model": "tiny", "messages": ASK} | changes
    answer = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param


def test_fields_that_ask_for_nothing_or_are_unknown_are_accepted(url: str) -> None:
    further: Any = {"frequency_penalty": 0, "user": "me", "metadata": {"a": "b"}, "store": False, "extra_body": {"something_new": [1]}}
    found = client(url).chat.completions.create(model="tiny", messages=ASK, response_format={"type": "text"}, **further)
    assert found.choices[0].message.content == HELLO


def test_bodies_that_are_no_json_and_paths_that_do_not_exist(url: str) -> None:
    broken = httpx.post(f"{url}/v1/chat/completions", content="{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{url}/v1/chat/completions").status_code == 405


def test_an_engine_without_room_is_503_in_openais_form_streamed_or_not() -> None:
    engine = ScriptedEngine(lambda prompt: HELLO)
    engine.error = overloaded()
    with served(engine) as (url, _):
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                client(url).chat.completions.create(model="tiny", messages=ASK, stream=stream)
            assert caught.value.status_code == 503
            assert caught.value.code == "overloaded"
            assert int(caught.value.response.headers["retry-after"]) >= 1


def test_an_engine_that_breaks_in_mid_stream_is_an_event() -> None:
    engine = ScriptedEngine(lambda prompt: HELLO)
    engine.breaks_after = 6
    with served(engine) as (url, _):
        stream = iter(client(url).chat.completions.create(model="tiny", messages=ASK, stream=True))
        seen = next(stream).choices[0].delta.content or ""
        with pytest.raises(openai.APIError, match="engine that wrote this reply stopped"):
            seen += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert seen and HELLO.startswith(seen)
        with pytest.raises(openai.InternalServerError) as caught:
            client(url).chat.completions.create(model="tiny", messages=ASK)
        assert caught.value.status_code == 503


def test_more_requests_than_are_taken_at_once_are_429() -> None:
    engine = ScriptedEngine(lambda prompt: HELLO, step=1)
    with served(engine, with_settings=settings(ongoing=1)) as (url, _):
        engine.going.clear()

        async def two() -> list[int]:
            async with httpx.AsyncClient(timeout=30) as asked:
                body = {"model": "tiny", "messages": ASK}
                first = asyncio.ensure_future(asked.post(f"{url}/v1/chat/completions", json=body))
                second = None
                while second is None or second.status_code != 429:
                    second = await asked.post(f"{url}/v1/chat/completions", json=body, timeout=2) if engine.prompts else None
                    await asyncio.sleep(0.01)
                engine.going._loop.call_soon_threadsafe(engine.going.set)  # type: ignore[attr-defined]
                return [(await first).status_code, second.status_code]

        assert asyncio.run(two()) == [200, 429]


def test_streams_are_counted_once_and_until_their_end() -> None:
    with served(ScriptedEngine(lambda prompt: HELLO), with_settings=settings(ongoing=1)) as (url, service):
        for _ in range(3):
            chunks = list(client(url).chat.completions.create(model="tiny", messages=ASK, stream=True))
            assert chunks[-1].choices[0].finish_reason == "stop"
        texts = list(client(url).completions.create(model="tiny", prompt="a", stream=True))
        assert texts
        assert client(url).models.list().data
    assert service.ongoing == 0


def test_a_client_that_leaves_stops_its_reply_streamed_or_not() -> None:
    for stream in (True, False):
        engine = ScriptedEngine(lambda prompt: HELLO * 3, pause=0.02)
        with served(engine) as (url, _):
            body = {"model": "tiny", "messages": ASK, "stream": stream}
            with httpx.Client(timeout=0.3 if not stream else 10) as asked:
                if stream:
                    with asked.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                        next(answer.iter_lines())
                else:
                    with pytest.raises(httpx.ReadTimeout):
                        asked.post(f"{url}/v1/chat/completions", json=body)
            assert engine.stopped.wait(10), f"stream={stream}: the engine went on"
            assert engine.closed == [True]


def test_a_reply_that_takes_too_long_is_504() -> None:
    engine = ScriptedEngine(lambda prompt: HELLO, pause=0.05)
    with served(engine, with_settings=settings(seconds=0.2)) as (url, _):
        with pytest.raises(openai.InternalServerError) as caught:
            client(url).chat.completions.create(model="tiny", messages=ASK)
        assert caught.value.status_code == 504
        assert engine.stopped.wait(10)
