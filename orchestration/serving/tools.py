"""Tool calls as the models were trained to write them: an assistant's turn `call NAME {json}`, the result a turn of its own
(`data/formats/taskmaster.py`). The model learned its tools by name from the data; what a client sends of them is which it may call."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

CALL = re.compile(r"\s*call (\S+) (\{.*\})\s*", re.DOTALL)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str


def written(calls: Sequence[tuple[str, str]]) -> list[str]:
    """Calls as turns; JSON without spaces, as in training."""
    return [f"call {name} {_compact(arguments)}" for name, arguments in calls]


def _compact(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments.strip()


def may_become(text: str, names: Collection[str]) -> bool:
    """Whether a reply that begins so may turn out to be a call of one of these tools."""
    text = text.lstrip()
    return any(opening.startswith(text) or text.startswith(opening) for opening in (f"call {name} {{" for name in names))


def called(text: str, names: Collection[str]) -> Call | None:
    """The call that a whole reply is; None: it is none, or of a tool that the client does not have."""
    found = CALL.fullmatch(text)
    if found is None or found[1] not in names:
        return None
    try:
        json.loads(found[2])
    except (ValueError, RecursionError):
        return None
    return Call(found[1], found[2])
