"""Feedback over HTTP: on kept conversations and on what the client kept itself, and what is left when it is deleted."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from sqlalchemy import text

from orchestration.serving.prompts import hidden_prompt
from orchestration.serving.service import Service
from orchestration.serving.store.tables import Base
from tests.serving_stand_ins import ALICE, BOB, ScriptedEngine, served, two_owners

HIDDEN = hidden_prompt("Be brief, always and everywhere.", "Now answer.", 6)
HI = [{"role": "user", "content": "hi"}]


class Talk:
    """A client with a conversation of one turn."""

    def __init__(self, asked: httpx.Client, service: Service) -> None:
        self.asked, self.service = asked, service
        self.conversation = asked.post("/v1/conversations", json={"consent": True}, headers=ALICE).json()["id"]
        self.message = self.said("one")

    def said(self, words: str) -> str:
        body = {"model": "tiny", "messages": [{"role": "user", "content": words}], "conversation": self.conversation}
        return self.asked.post("/v1/chat/completions", json=body, headers=ALICE).json()["chatray"]["message"]

    def give(self, headers: dict[str, str] = ALICE, **body: Any) -> httpx.Response:
        return self.asked.post("/v1/feedback", json=body, headers=headers)

    def on_reply(self, **body: Any) -> httpx.Response:
        return self.give(conversation=self.conversation, message=self.message, **body)

    def mine(self) -> list[dict[str, Any]]:
        return self.asked.get("/v1/feedback", headers=ALICE).json()["data"]

    def everything(self) -> str:
        with self.service.store.engine.connect() as connection:
            return str([list(connection.execute(table.select())) for table in Base.metadata.sorted_tables])


@pytest.fixture
def talk() -> Any:
    engine = ScriptedEngine(lambda prompt: f"answer {prompt.count('<|user|>')}")
    with served(engine, keys=two_owners(), hidden=HIDDEN) as (url, made), httpx.Client(base_url=url, timeout=30) as asked:
        yield Talk(asked, made)


def test_a_thumb_on_a_kept_reply_is_stored_with_what_it_answers(talk: Talk) -> None:
    given = talk.on_reply(kind="thumbs", value="up", consent=True).json()
    [learned] = talk.service.store.learnable()
    assert given["object"] == "feedback" and given["value"] == "up" and given["consent"]
    assert learned.feedback.id == given["id"]
    assert learned.prompt == ({"role": "user", "content": "one"},)
    assert learned.texts == ("answer 1",)
    assert learned.models == ("tiny@v1",)
    assert learned.conversation_id == talk.conversation


def test_hidden_prompts_are_no_part_of_it(talk: Talk) -> None:
    talk.on_reply(kind="thumbs", value="up", consent=True)
    assert "always and everywhere" not in talk.everything()


def test_a_thumb_said_again_takes_the_place_of_the_first(talk: Talk) -> None:
    first = talk.on_reply(kind="thumbs", value="up").json()
    second = talk.on_reply(kind="thumbs", value="down").json()
    assert second["answers"] == first["answers"]
    assert [one["value"] for one in talk.mine()] == ["down"]


def test_an_edit_and_a_comment_stand_beside_each_other(talk: Talk) -> None:
    answers = talk.on_reply(kind="edit", value="a better answer").json()["answers"]
    assert talk.give(kind="comment", value="why so short?", of=answers).status_code == 200
    assert [one["kind"] for one in talk.mine()] == ["edit", "comment"]


def test_the_prompt_of_a_later_reply_has_the_turns_before(talk: Talk) -> None:
    talk.message = talk.said("two")
    talk.on_reply(kind="thumbs", value="up", consent=True)
    [learned] = talk.service.store.learnable()
    assert [turn["content"] for turn in learned.prompt] == ["one", "answer 1", "two"]


def test_a_choice_between_replies_that_the_client_kept(talk: Talk) -> None:
    given = talk.give(kind="choice", value="1", messages=HI, answers=["hello", "hello there"], model="tiny", consent=True).json()
    [learned] = talk.service.store.learnable()
    assert given["value"] == given["answers"][1]
    assert learned.texts == ("hello", "hello there")
    assert learned.prompt == tuple(HI)


def test_a_choice_beside_the_kept_reply_may_be_a_tie(talk: Talk) -> None:
    given = talk.on_reply(kind="choice", value="tie", answers=["another one"]).json()
    assert len(given["answers"]) == 2 and given["value"] == "tie"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"kind": "thumbs", "value": "up"}, "messages"),
        ({"kind": "thumbs", "value": "sideways", "messages": HI, "answers": ["a"], "model": "tiny"}, "value"),
        ({"kind": "choice", "value": "2", "messages": HI, "answers": ["a", "b"], "model": "tiny"}, "value"),
        ({"kind": "choice", "value": "0", "messages": HI, "answers": ["a"], "model": "tiny"}, "answers"),
        ({"kind": "edit", "value": "c", "messages": HI, "answers": ["a", "b"], "model": "tiny"}, "answers"),
        ({"kind": "thumbs", "value": "up", "messages": HI, "model": "tiny"}, "answers"),
        ({"kind": "thumbs", "value": "up", "messages": HI, "answers": ["a"]}, "model"),
        ({"kind": "thumbs", "value": "up", "message": "msg_1"}, "conversation"),
        ({"kind": "stars", "value": "5", "messages": HI, "answers": ["a"], "model": "tiny"}, "kind"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_fields_name_and_leaves_nothing(talk: Talk, body: dict[str, Any], param: str) -> None:
    answer = talk.give(**body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert talk.mine() == []
    assert "hi" not in talk.everything()


def test_a_user_turn_is_no_reply(talk: Talk) -> None:
    kept = talk.asked.get(f"/v1/conversations/{talk.conversation}", headers=ALICE).json()["messages"]
    talk.message = kept[0]["id"]
    assert talk.on_reply(kind="thumbs", value="up").json()["error"]["param"] == "message"


def test_nobody_else_can_say_something_of_it_or_delete_it(talk: Talk) -> None:
    given = talk.on_reply(kind="thumbs", value="up").json()
    answers = [
        talk.give(BOB, conversation=talk.conversation, message=talk.message, kind="thumbs", value="down"),
        talk.give(BOB, of=given["answers"], kind="thumbs", value="down"),
        talk.asked.delete(f"/v1/feedback/{given['id']}", headers=BOB),
    ]
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert "no such answer" in answers[1].json()["error"]["message"]
    assert talk.asked.get("/v1/feedback", headers=BOB).json()["data"] == []
    assert [one["value"] for one in talk.mine()] == ["up"]


def test_feedback_is_listed_page_by_page(talk: Talk) -> None:
    given = [talk.on_reply(kind="comment", value=f"thought {number}").json()["id"] for number in range(5)]
    pages, place = [], {}
    for _ in range(4):
        pages.append(talk.asked.get("/v1/feedback", params={"limit": 2, **place}, headers=ALICE).json()["data"])
        place = {"after": pages[-1][-1]["id"]} if pages[-1] else {}
    assert [[one["id"] for one in page] for page in pages] == [given[:2], given[2:4], given[4:], []]
    elsewhere = talk.asked.get("/v1/feedback", params={"after": given[0]}, headers=BOB)
    assert (elsewhere.status_code, talk.asked.get("/v1/feedback?limit=0", headers=ALICE).status_code) == (404, 400)


def test_deleted_feedback_on_the_clients_own_texts_leaves_none_of_them(talk: Talk) -> None:
    given = talk.give(kind="comment", value="sensible", messages=HI, answers=["a secret word"], model="tiny").json()
    assert "a secret word" in talk.everything()
    assert talk.asked.delete(f"/v1/feedback/{given['id']}", headers=ALICE).json()["deleted"]
    assert "a secret word" not in talk.everything()


def test_all_data_of_an_owner_are_deleted_at_once(talk: Talk) -> None:
    talk.on_reply(kind="comment", value="sensible")
    talk.asked.post("/v1/conversations", json={"title": "of bob"}, headers=BOB)
    assert talk.asked.delete("/v1/data", headers=ALICE).json()["deleted"]
    left = talk.everything()
    assert "answer 1" not in left and "sensible" not in left
    assert "of bob" in left


def test_consent_taken_back_from_a_conversation_keeps_its_feedback_from_training(talk: Talk) -> None:
    talk.on_reply(kind="thumbs", value="up", consent=True)
    changed = talk.asked.post(f"/v1/conversations/{talk.conversation}", json={"consent": False, "title": "cats"}, headers=ALICE).json()
    assert (changed["title"], changed["consent"]) == ("cats", False)
    assert talk.service.store.learnable() == []


def test_a_locked_store_answers_503_and_the_same_request_is_kept_later() -> None:
    """Nothing is lost: what was not stored was not accepted."""
    with served(ScriptedEngine(lambda _: "yes")) as (url, made), httpx.Client(base_url=url, timeout=60) as asked:
        made.store.wait = 0.2
        body = {"kind": "thumbs", "value": "up", "messages": HI, "answers": ["a"], "model": "tiny"}
        with made.store.engine.connect().execution_options(writes=True) as writing:
            writing.execute(text("SELECT 1"))  # its transaction has taken the lock
            refused = asked.post("/v1/feedback", json=body)
        accepted = asked.post("/v1/feedback", json=body)
        kept = asked.get("/v1/feedback").json()["data"]
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert accepted.status_code == 200
    assert [one["id"] for one in kept] == [accepted.json()["id"]]
