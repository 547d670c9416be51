"""`{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`: whole dialogues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestration.data.dialogues import Message
from orchestration.data.formats.sample import Sample, dialogue, message, name_in


def sample(row: dict[str, Any], identifier: str) -> Sample:
    name = name_in(row, identifier)
    return Sample(name, demonstrations=(dialogue(name, turns(row.get("messages"), "messages")),))


def turns(value: Any, field: str) -> Sequence[Message]:
    """A list of messages.

    Raises:
        ValueError: it is none; names the field and the turn.
    """
    if not isinstance(value, list):
        raise ValueError(f"{field!r} is not a list of turns" if value is not None else f"there is no field {field!r}")
    return [message(turn, number) for number, turn in enumerate(value, start=1)]
