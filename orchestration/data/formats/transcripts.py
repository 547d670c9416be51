r"""Anthropic HH: `{"chosen": "\n\nHuman: … \n\nAssistant: …", "rejected": …}`, two transcripts that differ in the last reply."""

from __future__ import annotations

import re
from typing import Any

from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.formats.sample import Sample, checked, dialogue, opening, text_in
from orchestration.data.preferences import Comparison

SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def sample(row: dict[str, Any], identifier: str, demonstrate: bool = True) -> Sample:
    """A pair, its conversation known by its first question; the chosen transcript is a demonstration too."""
    chosen, rejected = (dialogue(identifier, transcript(row, field)) for field in ("chosen", "rejected"))
    for field, found in (("chosen", chosen), ("rejected", rejected)):
        if found.messages[-1].role != "assistant":
            raise ValueError(f"{field!r} does not end with the assistant's reply")
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise ValueError("the contexts of 'chosen' and 'rejected' differ before the last assistant turn")
    answers = (chosen.messages[-1].content, rejected.messages[-1].content)
    if answers[0] == answers[1]:
        raise ValueError("'chosen' and 'rejected' are the same")
    apart = _margin(row["margin"]) if row.get("margin") is not None else 1
    pair = Comparison(Dialogue(identifier, chosen.messages[:-1]), answers, (True, True), (0, apart))
    return Sample(opening(chosen.messages), (chosen,) if demonstrate else (), comparison=pair)


def transcript(row: dict[str, Any], field: str) -> list[Message]:
    """Turns of a transcript.

    Raises:
        ValueError: it does not begin with a speaker, or a turn is empty.
    """
    before, *parts = SPEAKER.split(text_in(row, field))
    if before.strip() or not parts:
        raise ValueError(f"{field!r} does not begin with 'Human:' or 'Assistant:'")
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return [Message(ROLES[who], checked(text, f"turn {n} of {field!r} ({who})")) for n, (who, text) in enumerate(spoken, start=1)]


def _margin(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"'margin' is {value!r:.50}, not a number above 0")
    return float(value)
