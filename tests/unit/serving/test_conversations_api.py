"""Conversations that the service keeps, and what of them fits into the context."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from orchestration.data.dialogues import Dialogue, Message
from orchestration.serving.errors import ApiError
from orchestration.serving.prompts import HiddenPrompt, hidden_prompt
from orchestration.serving.window import fitted
from tests.serving_stand_ins import ALICE, BOB, ScriptedEngine, chat, served, two_owners

HIDDEN = hidden_prompt("Be brief, always and everywhere.", "Now answer.", 6)


def said(asked: httpx.Client, conversation: str, text: str, **further: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "conversation": conversation} | further
    return asked.post("/v1/chat/completions", json=body, headers=ALICE).json()


def test_earlier_turns_are_told_to_the_model_and_kept() -> None:
    engine = ScriptedEngine(lambda prompt: f"answer {prompt.count('<|user|>')}")
    with served(engine, keys=two_owners(), hidden=HIDDEN) as (url, _), httpx.Client(base_url=url, timeout=30) as asked:
        made = asked.post("/v1/conversations", json={"title": "cats", "consent": True}, headers=ALICE).json()
        name = made["id"]
        first, second = said(asked, name, "one"), said(asked, name, "two", stream=False)
        kept = asked.get(f"/v1/conversations/{name}", headers=ALICE).json()
        listed = asked.get("/v1/conversations", headers=ALICE).json()["data"]
    assert (made["title"], made["consent"]) == ("cats", True)
    assert first["choices"][0]["message"]["content"] == "answer 1"
    assert second["choices"][0]["message"]["content"] == "answer 2"
    assert second["chatray"]["conversation"] == name
    assert [(m["role"], m["content"]) for m in kept["messages"]] == [
        ("user", "one"), ("assistant", "answer 1"), ("user", "two"), ("assistant", "answer 2"),
    ]  # fmt: skip
    assert second["chatray"]["message"] == kept["messages"][-1]["id"]
    assert "one<|end|>" in engine.prompts[1] and "two\n\nNow answer." in engine.prompts[1]
    assert "always and everywhere" not in str(kept)
    assert [one["id"] for one in listed] == [name]


def test_nobody_but_the_owner_sees_a_conversation() -> None:
    with served(ScriptedEngine(lambda prompt: "yes"), keys=two_owners()) as (url, _), httpx.Client(base_url=url) as asked:
        name = asked.post("/v1/conversations", json={}, headers=ALICE).json()["id"]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "conversation": name}
        answers = [
            asked.get(f"/v1/conversations/{name}", headers=BOB), asked.delete(f"/v1/conversations/{name}", headers=BOB),
            asked.post("/v1/chat/completions", json=body, headers=BOB),
        ]  # fmt: skip
        theirs = asked.get("/v1/conversations", headers=BOB).json()["data"]
        still = asked.get(f"/v1/conversations/{name}", headers=ALICE)
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert theirs == []
    assert still.json()["messages"] == []


def test_a_deleted_conversation_is_gone() -> None:
    with served(ScriptedEngine(lambda prompt: "yes"), keys=two_owners()) as (url, _), httpx.Client(base_url=url) as asked:
        name = asked.post("/v1/conversations", json={}, headers=ALICE).json()["id"]
        said(asked, name, "one")
        assert asked.delete(f"/v1/conversations/{name}", headers=ALICE).json() == {
            "id": name, "object": "conversation.deleted", "deleted": True,
        }  # fmt: skip
        assert asked.get(f"/v1/conversations/{name}", headers=ALICE).status_code == 404
        assert said(asked, name, "two")["error"]["code"] == "not_found"


def test_blocked_turns_are_kept_and_not_told_again() -> None:
    engine = ScriptedEngine(lambda prompt: "fine")
    with served(engine, keys=two_owners(), moderated=True) as (url, _), httpx.Client(base_url=url, timeout=30) as asked:
        name = asked.post("/v1/conversations", json={}, headers=ALICE).json()["id"]
        for text in ("hello", "kill him", "and now"):
            said(asked, name, text)
        kept = asked.get(f"/v1/conversations/{name}", headers=ALICE).json()["messages"]
    assert [(m["content"], m["moderation"]) for m in kept][2] == ("kill him", "block")
    assert kept[3]["finish"] == "content_filter"
    assert len(kept) == 6
    assert "kill" not in engine.prompts[-1] and "hello" in engine.prompts[-1]


def test_a_request_that_fails_leaves_nothing() -> None:
    engine = ScriptedEngine(lambda prompt: "fine")
    with served(engine, keys=two_owners()) as (url, _), httpx.Client(base_url=url, timeout=30) as asked:
        name = asked.post("/v1/conversations", json={}, headers=ALICE).json()["id"]
        engine.breaks_after = 1
        assert "error" in said(asked, name, "one")
        assert asked.get(f"/v1/conversations/{name}", headers=ALICE).json()["messages"] == []


def test_a_client_that_leaves_finds_what_it_has_seen() -> None:
    engine = ScriptedEngine(lambda prompt: "the cat sat on the mat " * 5, step=2, pause=0.01)
    with served(engine, keys=two_owners()) as (url, _), httpx.Client(base_url=url, timeout=30) as asked:
        name = asked.post("/v1/conversations", json={}, headers=ALICE).json()["id"]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "conversation": name, "stream": True}
        with asked.stream("POST", "/v1/chat/completions", json=body, headers=ALICE) as answer:
            lines = answer.iter_lines()
            for _ in range(6):
                next(lines)
        assert engine.stopped.wait(10)
        kept: list[dict[str, Any]] = []
        while len(kept) < 2:
            kept = asked.get(f"/v1/conversations/{name}", headers=ALICE).json()["messages"]
    assert kept[1]["content"] and kept[1]["content"] != "the cat sat on the mat " * 5
    assert kept[1]["finish"] == "abandoned"


TURNS = (
    Message("system", "Be kind."), Message("user", "first question"), Message("assistant", "first answer"),
    Message("user", "second question"), Message("assistant", "second answer"), Message("user", "third question"),
)  # fmt: skip


@pytest.mark.parametrize("hidden", [HiddenPrompt(), HIDDEN])
def test_the_system_message_and_the_latest_turns_stay(hidden: HiddenPrompt) -> None:
    full = fitted(TURNS, chat(), hidden, 10_000)
    assert full.dropped == 0
    least = len(chat().prompt(Dialogue("", hidden.around((TURNS[0], TURNS[-1])))))
    with pytest.raises(ApiError) as caught:
        fitted(TURNS, chat(), hidden, least - 1)
    assert caught.value.code == "context_length_exceeded"
    dropped = []
    for room in range(len(full.ids) + 1, least - 1, -1):
        found = fitted(TURNS, chat(), hidden, room)
        assert len(found.ids) <= room
        kept = (TURNS[0], *TURNS[1 + found.dropped :])
        assert found.ids == chat().prompt(Dialogue("", hidden.around(kept)))
        assert found.tokens == len(chat().prompt(Dialogue("", kept)))
        dropped.append(found.dropped)
    assert sorted(set(dropped)) == [0, 2, 4]
    assert dropped == sorted(dropped)


def test_a_long_history_says_how_many_turns_were_dropped() -> None:
    engine = ScriptedEngine(lambda prompt: "yes")
    messages = [{"role": role, "content": f"{role} {n} says the cat"} for n in range(20) for role in ("user", "assistant")]
    with served(engine, context=120) as (url, _):
        body = {"model": "tiny", "messages": [*messages, {"role": "user", "content": "last"}], "max_tokens": 10}
        found = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    assert found["chatray"]["dropped_turns"] > 20
    assert found["usage"]["prompt_tokens"] == found["chatray"]["prompt_tokens"] <= 110
    assert engine.prompts[0].startswith("<|user|>") and engine.prompts[0].endswith("last<|end|><|assistant|>")
