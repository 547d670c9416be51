"""A kept conversation that is gone on with from an earlier message: what an edited or repeated turn is, over the API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving_stand_ins import ScriptedEngine, served

OWNER = "local"


@pytest.fixture
def site() -> Iterator[tuple[str, Any, ScriptedEngine]]:
    engine = ScriptedEngine(lambda prompt: f"answer {prompt.count('<|user|>')}", step=4)
    with served(engine) as (url, service):
        yield url, service, engine


def say(url: str, text: str, conversation: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "conversation": conversation}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)


def test_a_request_takes_the_place_of_a_message_and_all_after_it(site: Any) -> None:
    url, service, engine = site
    name = httpx.post(f"{url}/v1/conversations", json={}).json()["id"]
    for text in ("one", "two", "three"):
        assert say(url, text, name).status_code == 200
    second = service.store.messages(OWNER, name)[2]
    assert say(url, "other", {"id": name, "before": second.id}).status_code == 200
    assert [m.content for m in service.store.messages(OWNER, name)] == ["one", "answer 1", "other", "answer 2"]
    assert "three" not in engine.prompts[-1] and "two" not in engine.prompts[-1]


def test_nothing_is_cut_where_there_is_no_reply(site: Any) -> None:
    url, service, engine = site
    name, other = (httpx.post(f"{url}/v1/conversations", json={}).json()["id"] for _ in range(2))
    say(url, "one", name)
    first = service.store.messages(OWNER, name)[0].id
    engine.breaks_after = 0
    assert say(url, "again", {"id": name, "before": first}).status_code == 503
    engine.breaks_after = None
    assert say(url, "again", {"id": name, "before": "msg_none"}).status_code == 404
    assert say(url, "again", {"id": other, "before": first}).status_code == 404
    assert [m.content for m in service.store.messages(OWNER, name)] == ["one", "answer 1"]


def test_recorded_answers_of_a_conversation_are_found_by_their_owner(site: Any) -> None:
    _, service, _ = site
    store = service.store
    mine = store.new_conversation(OWNER).id
    prompt = [{"role": "user", "content": "one"}]
    [first] = store.record_answer(OWNER, prompt, "a", "tiny", mine)
    [second] = store.record_answer(OWNER, prompt, "b", "tiny", mine)
    store.record_answer(OWNER, prompt, "c", "tiny")
    found = store.given(OWNER, mine)
    assert [(name, text) for name, _, text in found] == [(first, "a"), (second, "b")]
    assert found[0][1] == found[1][1]
    with pytest.raises(LookupError):
        store.given("somebody", mine)
