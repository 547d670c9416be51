"""The chat page's parts that need no browser: markdown, sessions, notices, turns, and streams that are stopped."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration.serving.errors import ApiError, engine_lost, overloaded, too_many
from orchestration.serving.keys import Keys, Owner, hashed
from orchestration.serving.page import notes
from orchestration.serving.page.flow import until
from orchestration.serving.page.rendering import rendered
from orchestration.serving.page.sessions import IDLE_SECONDS, Sessions
from orchestration.serving.page.turns import Answer, Turn, prompt_of, title_of, turns_of
from tests.serving_stand_ins import settings

ATTACKS = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "[x](data:text/html,<script>)",
    "<a href='javascript:x'>y</a>",
    '![a" onerror="alert(1)](http://host/x.png)', "```html\n<script>alert(1)</script>\n```", "```\"><script>alert(1)</script>\nx\n```",
    "<svg/onload=alert(1)>",
    "[a]: javascript:alert(1)\n[a]", "<http://host/\"onclick=alert(1)>", "| <b> |\n|---|\n| <i onclick=x> |",
)  # fmt: skip
TAGS = {
    "p", "em", "strong", "a", "br", "ul", "ol", "li", "code", "pre", "span", "table", "thead", "tbody", "tr", "th", "td", "blockquote",
    "h1", "h2", "h3", "h4", "h5", "h6", "hr", "s",
}  # fmt: skip


def harmful(html: str) -> list[str]:
    """The tags that no page should get from a model."""
    return [f"<{tag}{attributes}>" for tag, attributes in re.findall(r"</?([a-zA-Z0-9]+)([^>]*)>", html) if not _harmless(tag, attributes)]


def _harmless(tag: str, attributes: str) -> bool:
    names = set(re.findall(r'([a-z-]+)="', attributes))
    linked = re.search(r'href="\s*(javascript|data|vbscript):', attributes, re.IGNORECASE)
    styled = "style" not in names or re.search(r'style="text-align:(left|right|center)"', attributes)
    return tag in TAGS and names <= {"href", "class", "title", "start", "style"} and not linked and bool(styled)


@pytest.mark.parametrize("text", ATTACKS)
def test_markup_of_a_model_is_text(text: str) -> None:
    assert harmful(rendered(text)) == []


@given(st.lists(st.sampled_from([*ATTACKS, "`", "*", "\n", "](", "<", ">", '"', "|", "x", "    "]), max_size=12))
def test_markup_stays_text_in_whatever_it_stands(parts: list[str]) -> None:
    assert harmful(rendered("".join(parts))) == []


def test_markdown_is_rendered() -> None:
    html = rendered("**b** [l](https://host/)\n\n```python\ndef f(): pass\n```\n\n![a picture](https://host/x.png)")
    assert "<strong>b</strong>" in html and 'href="https://host/"' in html
    assert '<span class="k-k">def</span>' in html
    assert "[image: a picture]" in html and "x.png" not in html


def keys(*names: str) -> Keys:
    return Keys([(hashed(f"key of {name}"), Owner(f"key-{name}", name, 0, 0)) for name in names], settings().limits)


@dataclass
class Keyed:
    keys: Keys


def test_a_session_ends_with_its_key_and_after_idling() -> None:
    now = [0.0]
    service: Any = Keyed(keys("alice", "bob"))
    sessions = Sessions(lambda: service, lambda: now[0])
    with pytest.raises(ApiError):
        sessions.sign_in("s1", "key of nobody")
    assert sessions.owner("s1") is None
    sessions.sign_in("s1", "key of alice")
    sessions.sign_in("s2", "key of bob")
    now[0] = IDLE_SECONDS - 1
    assert (sessions.owner("s1") or service).name == "alice"
    now[0] = IDLE_SECONDS + 1
    assert sessions.owner("s2") is None
    service.keys = keys("bob")
    assert sessions.owner("s1") is None
    assert "key of" not in repr(vars(sessions))


def test_without_keys_everybody_is_one_owner() -> None:
    service: Any = Keyed(Keys(None, settings().limits))
    owner = Sessions(lambda: service).owner("anyone")
    assert owner is not None and owner.id == "local"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (too_many("no", 12.4), "Wait 12 seconds"), (overloaded(), "Wait 1 second,"), (engine_lost(), "Try again in a moment"),
        (too_many("no", 60.0, "insufficient_quota", "insufficient_quota"), "used up"), (ApiError(500, "inner text"), "had an error"),
        (ApiError(400, "There is no such message.", code="not_found"), "no such message"), (ApiError(401, "x"), "signed out"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(error: ApiError, said: str) -> None:
    assert said in notes.told(error)
    assert "inner text" not in notes.told(error)


def test_moderation_is_told_once() -> None:
    assert "hate: slurs" in (notes.of_output(Answer("x", finish="content_filter", action="block", categories=("hate/slurs",))) or "")
    assert notes.of_output(Answer("x", finish="stop")) is None
    assert "not passed on" in (notes.of_input(Turn("x", action="block")) or "")


@dataclass
class Stored:
    id: str
    role: str
    content: str
    model: str | None = None
    extra: dict[str, Any] | None = None


def test_turns_of_a_conversation_and_what_feedback_is_about() -> None:
    turns = turns_of([
        Stored("1", "user", "bad", extra={"moderation": "block", "categories": ["violence"], "untold": True}),
        Stored("2", "assistant", "no.", "m", {"finish": "content_filter", "untold": True}),
        Stored("3", "user", "good", extra={"moderation": "allow", "categories": []}),
        Stored("4", "assistant", "fine", "m", {"finish": "stop", "version": "v"}),
        Stored("5", "user", "again"),
    ])  # fmt: skip
    assert [(turn.id, turn.answer and turn.answer.id) for turn in turns] == [("1", "2"), ("3", "4"), ("5", None)]
    assert not turns[0].told and turns[1].told
    assert prompt_of(turns, turns[2]) == [
        {"role": "user", "content": "good"}, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "again"},
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "title"), [("a\n  b", "a b"), ("word " * 40, "word " * 11 + "word…"), ("x" * 90, "x" * 60 + "…")])
def test_titles_are_short(text: str, title: str) -> None:
    assert title_of(text) == title


def test_a_stream_ends_when_it_is_stopped_and_is_closed() -> None:
    closed = []

    async def endless() -> AsyncIterator[int]:
        try:
            for number in range(3):
                yield number
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def read() -> list[int]:
        stop, found = asyncio.Event(), []
        async for number in until(endless(), stop):
            found.append(number)
            if number == 2:
                stop.set()
        return found

    assert asyncio.run(asyncio.wait_for(read(), 10)) == [0, 1, 2]
    assert closed == [True]


def test_a_stream_that_fails_passes_its_error_on() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise engine_lost()

    async def read() -> None:
        async for _ in until(broken(), asyncio.Event()):
            pass

    with pytest.raises(ApiError, match="stopped"):
        asyncio.run(read())
