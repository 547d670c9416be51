"""What one row gives, and the checks that every format makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from orchestration.data.dialogues import ROLES, Dialogue, Message
from orchestration.data.preferences import Comparison, Judgement


@dataclass(frozen=True)
class Sample:
    """One row in the forms that the recipe learns from."""

    conversation: str
    """Rows of the same conversation are held out together."""
    demonstrations: tuple[Dialogue, ...] = ()
    comparison: Comparison | None = None
    judgement: Judgement | None = None
    text: str = ""
    """Plain text, for language modelling without dialogue."""


def text_in(row: Mapping[str, Any], field: str, empty: bool = False) -> str:
    """The text of a field, without blanks around it.

    Raises:
        ValueError: it is missing, no text, empty where it may not be, or cannot be written as UTF-8.
    """
    if field not in row:
        raise ValueError(f"there is no field {field!r}")
    return checked(row[field], f"{field!r}", empty)


def checked(value: Any, name: str, empty: bool = False) -> str:
    """See `text_in`."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text but {type(value).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} holds half of a character (a lone surrogate)")
    if not value.strip() and not empty:
        raise ValueError(f"{name} is empty")
    return value.strip()


def dialogue(identifier: str, messages: Sequence[Message]) -> Dialogue:
    """A dialogue with something to learn from.

    Raises:
        ValueError: no assistant turn, or two in a row.
    """
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("there is no assistant turn: nothing to learn from")
    return Dialogue(identifier, context(messages))


def context(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Turns, none of them empty, no two of the assistant's in a row.

    Raises:
        ValueError: two assistant turns in a row.
    """
    for number, (first, second) in enumerate(pairwise(messages), start=1):
        if first.role == second.role == "assistant":
            raise ValueError(f"two assistant turns in a row: turns {number} and {number + 1}")
    return tuple(messages)


def message(turn: Any, number: int) -> Message:
    """One turn of the form `{"role": …, "content": …}`; calls in `tool_calls` become lines `call <name> <arguments>`.

    Raises:
        ValueError: not of that form, an unknown role, or an empty turn.
    """
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} is not an object but {type(turn).__name__}")
    role = turn.get("role")
    if role not in ROLES:
        raise ValueError(f"turn {number}: unknown role {role!r:.50}; known are {', '.join(ROLES)}")
    calls = _calls(turn.get("tool_calls"), number) if role == "assistant" else []
    content = checked(turn.get("content") or "" if calls else turn.get("content"), f"turn {number} ({role})", empty=bool(calls))
    return Message(role, "\n".join([*([content] if content else []), *calls]))


def _calls(calls: Any, number: int) -> list[str]:
    """Calls in the form of OpenAI's chat API."""
    if not calls:
        return []
    if not isinstance(calls, list):
        raise ValueError(f"turn {number}: tool_calls is not a list but {type(calls).__name__}")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise ValueError(f"turn {number}: a tool call without a function")
        found.append(f"call {text_in(function, 'name')} {text_in(function, 'arguments', empty=True)}".strip())
    return found


def opening(messages: Sequence[Message]) -> str:
    """What tells conversations apart where a row does not name its own: the first user turn."""
    first = next((message.content for message in messages if message.role == "user"), "")
    return " ".join(first.casefold().split())


def name_in(row: Mapping[str, Any], fallback: str, fields: Sequence[str] = ("conversation_id", "id")) -> str:
    """The row's own name, from the first of the fields that has one."""
    named = (row.get(field) for field in fields)
    return next((str(value) for value in named if isinstance(value, str | int) and str(value)), fallback)
