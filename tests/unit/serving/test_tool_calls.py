"""Tool calls: as the model writes them, and as OpenAI's API has them."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from orchestration.serving.tools import called, may_become, written
from tests.serving_stand_ins import ScriptedEngine, served

TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("get_menu_items", "order")]
ASK: Any = [{"role": "user", "content": "a chai latte please"}]
CALL = 'call get_menu_items {"query":"Chai Latte"}'


def asked(text: str, stream: bool = False, step: int = 1, **further: Any) -> Any:
    engine = ScriptedEngine(lambda prompt: text, step=step)
    with served(engine, tools=True) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found: Any = client.chat.completions.create(model="tiny", messages=ASK, stream=stream, **({"tools": TOOLS} | further))
        return list(found) if stream else found.choices[0]


def test_a_call_is_a_tool_call() -> None:
    choice = asked(CALL)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls[0].function.name == "get_menu_items"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"query": "Chai Latte"}


@pytest.mark.parametrize("step", [1, 100])
def test_a_streamed_call_is_never_shown_as_text(step: int) -> None:
    chunks = asked(CALL, stream=True, step=step)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [
        (0, "get_menu_items", '{"query":"Chai Latte"}')
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "text", ["call me later", "call unknown {}", "call order {broken", "I call order {}", "callous", 'call order {"a": 1} and more']
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_stays_text(text: str, stream: bool) -> None:
    found = asked(text, stream=stream)
    shown = "".join(chunk.choices[0].delta.content or "" for chunk in found) if stream else found.message.content
    assert shown == text


def test_without_tools_or_with_none_chosen_a_call_stays_text() -> None:
    assert asked(CALL, tool_choice="none").message.content == CALL
    assert asked(CALL, tools=openai.omit).message.content == CALL


def test_tools_cannot_be_forced() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "order"}}):
        with pytest.raises(openai.BadRequestError, match="decide themselves"):
            asked(CALL, tool_choice=choice)


def test_earlier_calls_and_results_are_told_as_in_training() -> None:
    engine = ScriptedEngine(lambda prompt: "done")
    messages: Any = [
        *ASK,
        {"role": "assistant", "content": "Let me look.", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "get_menu_items", "arguments": '{"query": "Chai Latte"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"menu_items":[]}'},
    ]  # fmt: skip
    with served(engine, tools=True) as (url, _):
        openai.OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(model="tiny", messages=messages, tools=TOOLS)
    expected = f'<|assistant|>Let me look.<|end|><|assistant|>{CALL}<|end|><|tool|>{{"menu_items":[]}}<|end|><|assistant|>'
    assert engine.prompts[0].endswith(expected)


def test_texts_and_calls() -> None:
    assert written([("f", '{"a": [1, 2]}'), ("g", "no json")]) == ['call f {"a":[1,2]}', "call g no json"]
    assert called('call f {"a": 1}', {"f"}) is not None and called('call f {"a": 1}', {"g"}) is None
    assert may_become("ca", {"f"}) and may_become("call f {", {"f"}) and not may_become("call g", {"f"})
