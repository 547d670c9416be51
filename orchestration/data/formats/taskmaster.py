"""Taskmaster-4: coffee orders that one person wrote both sides of, with the assistant's API calls, and human 0/1 judgements of actions.

Released with PERL (arXiv 2403.10704). An API call becomes an assistant turn, its response a tool turn:

    user: one Chai Latte please     assistant: call get_menu_items {"query":"Chai Latte"}     tool: {"menu_items":[…]}

An assistant may speak and then call: two of its turns in a row are part of this format.
"""

from __future__ import annotations

import json
from typing import Any

from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.formats.sample import Sample, checked, text_in
from orchestration.data.preferences import Judgement

ELISION = " … "
SPEAKERS = ("user", "assistant")


def sample(row: dict[str, Any], identifier: str, response_chars: int) -> Sample:
    """A dialogue (of `data/`) or a judgement (of `reward/`). API responses are shortened to `response_chars` characters."""
    name = text_in(row, "conversation_id")
    if "utterances" in row:
        return Sample(name, demonstrations=(_dialogue(row, name, response_chars),))
    return Sample(name, judgement=_judgement(row, name, response_chars))


def _dialogue(row: dict[str, Any], name: str, room: int) -> Dialogue:
    messages: list[Message] = []
    for number, turn in enumerate(_objects(row["utterances"], "'utterances'"), start=1):
        if turn.get("speaker") not in SPEAKERS:
            raise ValueError(f"utterance {number}: unknown speaker {turn.get('speaker')!r:.50}")
        if text := text_in(turn, "text", empty=True):  # a turn without words is one of calls
            messages.append(Message(turn["speaker"], text))
        messages += _calls(_objects(turn.get("annotations") or [], f"annotations of utterance {number}"), room)
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("there is no assistant turn: nothing to learn from")
    return Dialogue(name, tuple(messages))


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{name} is not a list of objects")
    return value


def _calls(annotations: list[dict[str, Any]], room: int) -> list[Message]:
    """API calls and responses, in the order they were made. Annotations come as name, request, name, response."""
    found, name = [], ""
    for annotation in annotations:
        kind, value = text_in(annotation, "name"), text_in(annotation, "value", empty=True)
        if kind in ("api_call", "api_response"):
            name = value
        elif kind == "request":
            found.append(Message("assistant", f"call {name} {_compact(value)}"))
        elif kind == "response":
            found.append(Message("tool", _shortened(_compact(value), room)))
    return found


def _shortened(text: str, room: int) -> str:
    if len(text) <= room:
        return text
    if room < len(ELISION):
        return text[:room]
    head = (room - len(ELISION)) // 2
    return text[:head] + ELISION + text[len(text) - head :]


def _judgement(row: dict[str, Any], name: str, room: int) -> Judgement:
    turns = _objects(_json(text_in(row, "context"), "context"), "'context'")
    context = [_turn(turn, f"turn {number} of the context", room) for number, turn in enumerate(turns, start=1)]
    (generation,) = _objects([_json(text_in(row, "generation"), "generation")], "'generation'")
    reply = _turn(generation, "the generation", room)
    if isinstance(row.get("reward"), bool) or row.get("reward") not in (0, 1):
        raise ValueError(f"reward {row.get('reward')!r:.50} is neither 0 nor 1")
    if reply.role != "assistant":
        raise ValueError(f"the generation is not the agent's but {generation.get('role')!r:.50}")
    return Judgement(Dialogue(name, tuple(context)), reply.content, row["reward"] == 1)


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as cause:
        raise ValueError(f"{field!r} is not JSON that can be read: nested too deeply") from cause
    except ValueError as cause:
        raise ValueError(f"{field!r} is not JSON ({cause})") from cause


def _turn(turn: dict[str, Any], name: str, room: int) -> Message:
    role = {"agent": "assistant", "user": "user", "api": "tool"}.get(str(turn.get("role")))
    if role is None:
        raise ValueError(f"{name}: unknown role {turn.get('role')!r:.50}")
    if role == "tool":
        _, response = _only(turn.get("response"), f"response in {name}")
        return Message("tool", _shortened(_compact(response), room))
    if "api" in turn:
        called, request = _only(turn["api"], f"call in {name}")
        return Message(role, f"call {called} {_compact(request)}")
    return Message(role, text_in(turn, "text"))


def _only(value: Any, name: str) -> tuple[str, Any]:
    """The one key and value of an object."""
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"the {name} is not an object with one API's name")
    ((key, content),) = value.items()
    return key, content


def _compact(value: Any) -> str:
    """JSON without spaces; what is not JSON stays as it is."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value.strip()
    return checked(json.dumps(value, separators=(",", ":"), ensure_ascii=False), "an API's request or response")
