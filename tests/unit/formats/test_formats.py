"""Every format: what a right row gives, and that a wrong one is a bad row with its reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.sources import Part
from orchestration.data.formats.reading import sample_of
from orchestration.data.formats.sample import Sample
from orchestration.data.rows import BadRow, Row
from tests.fakes import quickly

FORMATS = ("messages", "hh", "instructions", "rankings", "taskmaster", "text")
FIELDS = (
    "messages", "role", "content", "chosen", "rejected", "instruction", "input", "output", "instances", "prompt", "answers", "ranks",
    "margin", "margins", "conversation_id", "id", "utterances", "speaker", "text", "annotations", "name", "value", "context", "generation",
    "reward", "tool_calls", "function", "arguments", "api", "response",
)  # fmt: skip
words = st.sampled_from(
    ["user", "assistant", "tool", "api_call", "request", "", " ", "\ud800", "\n\nHuman: a\n\nAssistant: b", "{}", "[[[", '{"role": "api"}']
)
leaves = words | st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400)
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), v, max_size=4), max_leaves=12)


def of(form: str, value: Any, **part: Any) -> Sample | BadRow:
    return sample_of(Row("f.jsonl", 7, value), Part(form, **part), "f:7", 64)


def turns(sample: Sample | BadRow) -> list[tuple[str, str]]:
    assert isinstance(sample, Sample)
    return [(m.role, m.content) for m in sample.demonstrations[0].messages]


def why(form: str, value: Any) -> str:
    found = of(form, value)
    assert isinstance(found, BadRow)
    assert (found.file, found.line) == ("f.jsonl", 7)
    return found.reason


def chat(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@quickly
@given(form=st.sampled_from(FORMATS), value=st.dictionaries(st.sampled_from(FIELDS), values, max_size=8))
def test_any_row_gives_a_sample_or_a_reason(form: str, value: dict[str, Any]) -> None:
    found = of(form, value)
    assert isinstance(found, Sample) or found.reason


def test_messages_become_a_dialogue() -> None:
    row = chat(("system", "be kind"), ("user", " hi "), ("assistant", "hello")) | {"id": "mine"}
    found = of("messages", row)
    assert turns(found) == [("system", "be kind"), ("user", "hi"), ("assistant", "hello")]
    assert isinstance(found, Sample) and found.conversation == "mine"


def test_tool_calls_become_lines_of_the_assistants_turn() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"q": 1}'}}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert turns(of("messages", row))[1] == ("assistant", 'call look_up {"q": 1}')


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "there is no field 'messages'"),
        ({"messages": "hi"}, "'messages' is not a list of turns"),
        ({"messages": ["hi"]}, "turn 1 is not an object but str"),
        (chat(("user", "a"), ("robot", "b")), "turn 2: unknown role 'robot'; known are system, user, assistant, tool"),
        (chat(("user", "a"), ("assistant", " ")), "turn 2 (assistant) is empty"),
        (chat(("user", "a"), ("assistant", None)), "turn 2 (assistant) is not text but NoneType"),
        (chat(("user", 3), ("assistant", "b")), "turn 1 (user) is not text but int"),
        (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "two assistant turns in a row: turns 2 and 3"),
        (chat(("user", "a")), "there is no assistant turn"),
        (chat(("user", "\ud800"), ("assistant", "c")), "half of a character"),
    ],
)
def test_wrong_messages_are_refused_with_the_turn(row: dict[str, Any], reason: str) -> None:
    assert reason in why("messages", row)


def hh(chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected} | more


def test_a_pair_of_transcripts_is_a_comparison_and_its_chosen_one_a_demonstration() -> None:
    before = "\n\nHuman: One\n\ntwo\n\nAssistant: a\n\nHuman: three\n\nAssistant:"
    found = of("hh", hh(f"{before} yes", f"{before} no", margin=2))
    assert turns(found) == [("user", "One\n\ntwo"), ("assistant", "a"), ("user", "three"), ("assistant", "yes")]
    assert isinstance(found, Sample) and found.comparison
    assert [m.content for m in found.comparison.context.messages] == ["One\n\ntwo", "a", "three"]
    assert (found.comparison.answers, found.comparison.ranks) == (("yes", "no"), (0, 2.0))
    assert found.conversation == "one two"
    alone = of("hh", hh(f"{before} yes", f"{before} no"), best_as_demonstration=False)
    assert isinstance(alone, Sample) and alone.demonstrations == () and alone.comparison


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"}, "there is no field 'rejected'"),
        (hh("\n\nHuman: a\n\nAssistant: b", 3), "'rejected' is not text but int"),  # type: ignore[arg-type]
        (hh("\n\nHuman: a\n\nAssistant: b", "a"), "'rejected' does not begin with"),
        (hh("\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b"), "turn 2 of 'chosen' (Assistant) is empty"),
        (hh("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "\n\nHuman: a\n\nAssistant: d"), "two assistant turns in a row"),
        (hh("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: b"), "contexts of 'chosen' and 'rejected' differ"),
        (hh("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: d"), "does not end with the assistant's reply"),
        (hh("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b"), "are the same"),
        (hh("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", margin=-1), "'margin' is -1"),
    ],
)
def test_wrong_transcripts_are_refused(row: dict[str, Any], reason: str) -> None:
    assert reason in why("hh", row)


def test_instructions_become_dialogues_of_two_turns() -> None:
    assert turns(of("instructions", {"instruction": "Add", "input": "1 2", "output": "3"})) == [("user", "Add\n\n1 2"), ("assistant", "3")]
    assert turns(of("instructions", {"instruction": "Hi", "input": "", "output": "x"}))[0] == ("user", "Hi")
    some = of("instructions", {"id": "s", "instruction": "Add", "instances": [{"input": "1", "output": "2"}, {"output": "3"}]})
    assert isinstance(some, Sample)
    assert [d.id for d in some.demonstrations] == ["s.1", "s.2"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"output": "x"}, "'instruction'"),
        ({"instruction": " ", "output": "x"}, "'instruction' is empty"),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' is not text"),
        ({"instruction": "a", "instances": []}, "'instances' is not a list"),
        ({"instruction": "a", "instances": [3]}, "instance 1 is not an object"),
    ],
)
def test_wrong_instructions_are_refused(row: dict[str, Any], reason: str) -> None:
    assert reason in why("instructions", row)


def test_rankings_keep_ties_and_distances_and_may_begin_at_any_number() -> None:
    found = of("rankings", {"prompt": "q", "answers": ["a", "b", "c"], "ranks": [4.5, 1, 4.5]})
    assert isinstance(found, Sample) and found.comparison
    assert found.comparison.ranks == (3.5, 0, 3.5)
    assert turns(found) == [("user", "q"), ("assistant", "b")]
    tied = of("rankings", chat(("user", "q")) | {"answers": ["a", "b"], "ranks": [1, 1]})
    assert isinstance(tied, Sample) and tied.demonstrations == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answers": "ab"}, "'answers' is not a list of at least 2"),
        ({"answers": ["a"]}, "'answers' is not a list of at least 2"),
        ({"answers": ["a", ""]}, "answer 2 is empty"),
        ({"ranks": [0, 1, 2]}, "3 ranks for 2 answers"),
        ({"ranks": [0, "1"]}, "no number"),
        ({"ranks": [0, float("nan")]}, "no number"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the context ends with an assistant turn"),
    ],
)
def test_wrong_rankings_are_refused(change: dict[str, Any], reason: str) -> None:
    assert reason in why("rankings", {"prompt": "q", "answers": ["a", "b"], "ranks": [0, 1]} | change)


def test_plain_text_is_taken_from_a_field_or_as_it_is() -> None:
    for value in ({"text": " some words "}, " some words "):
        found = of("text", value)
        assert isinstance(found, Sample) and found.text == "some words"
    assert "there is no field 'text'" in why("text", {"body": "x"})
