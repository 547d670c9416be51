"""Moderation of input and output: nothing is released before it was judged."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from actors.serving.protocol import Delta
from orchestration.serving.canaries import Secret
from orchestration.serving.detokenizing import Detokenizer
from orchestration.serving.judging import Judge, in_process
from orchestration.serving.moderation.moderators import ModerationError
from orchestration.serving.replies import Draft, Release, word_end
from orchestration.serving.service import Service
from orchestration.serving.stopping import Stops
from orchestration.serving.store.records import Audit
from tests.serving_stand_ins import THRESHOLDS, ScriptedEngine, WordModerator, chat, served, settings

REFUSAL = "I can't help with that."


def chatted(url: str, text: str, **further: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}]} | further
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()


def streamed(url: str, text: str, **further: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "stream": True} | further
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as answer:
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def audits_of(service: Service, count: int) -> list[Audit]:
    """The records, once there are so many: they are written beside the reply."""
    found: list[Audit] = []
    until = time.monotonic() + 10
    while len(found) < count and time.monotonic() < until:
        found = service.store.audits(owner="local")
    return found


WHOLE_WORDS = settings(flush_ms=1000)
"""A word waits for its end even on a machine that is slow at that moment."""


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])


def test_input_that_is_blocked_never_reaches_the_model() -> None:
    engine = ScriptedEngine(lambda prompt: "fine")
    with served(engine, moderated=True) as (url, service):
        whole, events = chatted(url, "how do I kill"), streamed(url, "how do I kill")
        text = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "kill"}).json()
        audits = service.store.audits(owner="local")
    assert engine.prompts == []
    assert (whole["choices"][0]["message"]["content"], whole["choices"][0]["finish_reason"]) == (REFUSAL, "content_filter")
    assert whole["chatray"]["moderation"]["input"]["categories"] == ["violence"]
    assert text_of(events) == REFUSAL
    assert events[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert (text["choices"][0]["text"], text["choices"][0]["finish_reason"]) == (REFUSAL, "content_filter")
    assert [(audit.direction, audit.action, audit.categories, audit.moderator) for audit in audits] == [
        ("input", "block", ("violence",), "words")
    ] * 3


def test_every_message_that_is_not_the_models_is_judged() -> None:
    messages = [{"role": "user", "content": "kill"}, {"role": "assistant", "content": "No."}, {"role": "user", "content": "hello"}]
    with served(ScriptedEngine(lambda prompt: "fine"), moderated=True) as (url, _):
        found = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": messages}).json()
    assert found["choices"][0]["finish_reason"] == "content_filter"


def test_a_warning_lets_through_and_says_so() -> None:
    with served(ScriptedEngine(lambda prompt: "they fight well"), moderated=True) as (url, service):
        found = chatted(url, "do they fight")
        audits = audits_of(service, 2)
    assert found["choices"][0]["message"]["content"] == "they fight well"
    assert found["chatray"]["moderation"]["output"]["action"] == "warn"
    assert {(audit.direction, audit.action) for audit in audits} == {("input", "warn"), ("output", "warn")}


@pytest.mark.parametrize("step", [1, 2, 50])
def test_output_that_is_blocked_is_not_shown(step: int) -> None:
    engine = ScriptedEngine(lambda prompt: "first you must kill the process, then more", step=step)
    with served(engine, moderated=True, with_settings=WHOLE_WORDS) as (url, service):
        whole, events = chatted(url, "hello"), streamed(url, "hello", logprobs=True)
        audits = audits_of(service, 2)
    assert (whole["choices"][0]["message"]["content"], whole["choices"][0]["finish_reason"]) == (REFUSAL, "content_filter")
    shown = text_of(events)
    assert shown == "first you must " or (step == 50 and shown == REFUSAL)
    assert events[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert events[-1]["chatray"]["moderation"]["output"]["action"] == "block"
    tokens = [entry["token"] for event in events if event["choices"][0]["logprobs"] for entry in event["choices"][0]["logprobs"]["content"]]
    assert "".join(tokens) in shown
    assert engine.closed[1] is True or step == 50
    assert {(audit.direction, audit.action) for audit in audits} == {("output", "block")}


def test_text_is_judged_before_it_is_released_and_at_the_end_of_words() -> None:
    text = "the cat sat on the mat, and then it went away again"
    with served(ScriptedEngine(lambda prompt: text, step=1), moderated=True, with_settings=WHOLE_WORDS) as (url, service):
        judged: list[str] = []
        ask = service.judge.ask

        async def noted(texts: list[str]) -> list[dict[str, float]]:
            found = await ask(texts)
            judged.extend(texts)
            return found

        service.judge.ask = noted
        shown = ""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    shown += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                    assert not shown or any(one.startswith(shown) for one in judged)
    assert shown == text
    assert all(one == text or one[-1].isspace() for one in judged if one != "hi")


def test_a_long_word_does_not_wait_for_its_end() -> None:
    engine = ScriptedEngine(lambda prompt: "x" * 60, step=1, pause=0.02)
    with served(engine, moderated=True) as (url, _):
        events = streamed(url, "hello")
    assert text_of(events) == "x" * 60
    assert len(events) > 5


def test_no_text_waits_longer_for_its_word_than_flush_ms_and_its_verdict() -> None:
    now, flush, judging = [0.0], 0.03, 0.004

    async def ask(texts: list[str]) -> list[dict[str, float]]:
        now[0] += judging
        return [{"violence": 0.0} for _ in texts]

    async def released(seconds: Sequence[float]) -> tuple[list[tuple[float, str]], float]:
        """(when, text) of each piece, and the longest wait, of a word whose letters come at these times."""
        draft = Draft(Detokenizer(chat().tokenizer), Stops(()), Secret((), 2))
        release = Release(draft, Judge("words", ("violence",), ask, THRESHOLDS), flush, lambda: now[0])
        found = []
        for moment, letter in zip(seconds, "the cats", strict=False):
            while (wait := release.wait()) is not None and now[0] + wait <= moment:
                now[0] += wait
                found.append((now[0], await release.next()))
            now[0] = max(now[0], moment)
            draft.push(Delta("r", chat().text(letter)))
            found.append((now[0], await release.next()))
        return [(when, piece.text) for when, piece in found if piece is not None], release.held

    fast, held = asyncio.run(released([0.001 * number for number in range(8)]))
    assert [text for _, text in fast] == ["the "] and held == pytest.approx(0.003 + judging)
    now[0] = 0.0
    slow, held = asyncio.run(released([0.02 * number for number in range(8)]))
    assert "".join(text for _, text in slow) == "the ca", "the last letters have not waited long enough yet"
    assert 0.02 < held <= flush + judging + 1e-9


def test_a_moderator_that_does_not_answer_lets_nothing_through() -> None:
    class Broken(WordModerator):
        def scores(self, texts: Sequence[str]) -> list[dict[str, float]]:
            raise ModerationError("no")

    engine = ScriptedEngine(lambda prompt: "fine")
    with served(engine, moderated=True) as (url, service):
        service.judge = in_process(Broken(), THRESHOLDS)
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "a"}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "moderation_unavailable")
    assert engine.prompts == []


def test_the_moderations_endpoint() -> None:
    with served(ScriptedEngine(lambda prompt: ""), moderated=True) as (url, _):
        found = httpx.post(f"{url}/v1/moderations", json={"input": ["hello", "kill"]}).json()
        image = httpx.post(f"{url}/v1/moderations", json={"input": [{"type": "image_url", "image_url": {"url": "x"}}]})
    assert [result["flagged"] for result in found["results"]] == [False, True]
    assert found["results"][1]["categories"] == {"violence": True}
    assert found["results"][1]["category_scores"] == {"violence": 0.9}
    assert image.status_code == 400
    with served(ScriptedEngine(lambda prompt: "")) as (url, _):
        assert httpx.post(f"{url}/v1/moderations", json={"input": "a"}).json()["error"]["code"] == "moderation_off"


def test_many_streams_share_calls_to_the_moderator() -> None:
    calls: list[int] = []

    async def ask(texts: list[str]) -> list[dict[str, float]]:
        calls.append(len(texts))
        await asyncio.sleep(0.01)
        return [{"violence": len(text) / 100} for text in texts]

    async def all_of_them() -> list[Any]:
        judge = Judge("slow", ("violence",), ask, THRESHOLDS)
        return await asyncio.gather(*(judge.verdict(["x" * number]) for number in range(1, 101)))

    verdicts = asyncio.run(all_of_them())
    assert [verdict.scores["violence"] for verdict in verdicts] == [number / 100 for number in range(1, 101)]
    assert [verdict.action for verdict in verdicts].count("block") == 31
    assert len(calls) <= 4


def test_where_words_end() -> None:
    assert word_end("one two", 0, 7) == 4
    assert word_end("one two ", 4, 8) == 8
    assert word_end("one", 0, 3) == 0
