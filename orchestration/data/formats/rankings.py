"""`{"prompt": "…", "answers": ["…", "…", "…"], "ranks": [0, 1, 1]}`: K answers to one context, 0 the best, equal ranks are ties.

`messages`, a list of turns, may stand in place of `prompt`. Ranks may be any numbers, ratings times -1 for example: their distances say by
how much one answer is better (`reward_model.margin`).
"""

from __future__ import annotations

from typing import Any

from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.formats import messages
from orchestration.data.formats.sample import Sample, checked, context, name_in, opening, text_in
from orchestration.data.preferences import Comparison


def sample(row: dict[str, Any], identifier: str, demonstrate: bool = True) -> Sample:
    """A comparison; the first of the best answers makes a demonstration too, unless all are tied."""
    turns = messages.turns(row["messages"], "messages") if "messages" in row else [Message("user", text_in(row, "prompt"))]
    asked = Dialogue(identifier, context(turns))
    if turns and turns[-1].role == "assistant":
        raise ValueError("the context ends with an assistant turn: the answers would be a second one in a row")
    answers = _list(row, "answers", 2)
    texts = tuple(checked(answer, f"answer {number}") for number, answer in enumerate(answers, start=1))
    ranks = _ranks(_list(row, "ranks", 2), len(texts))
    comparison = Comparison(asked, texts, (True,) * len(texts), ranks)
    best = asked.answered(texts[ranks.index(0)])
    demonstrations = (best,) if demonstrate and max(ranks) else ()
    return Sample(name_in(row, opening(turns), ("conversation_id",)), demonstrations, comparison=comparison)


def _list(row: dict[str, Any], field: str, at_least: int) -> list[Any]:
    value = row.get(field)
    if not isinstance(value, list) or len(value) < at_least:
        raise ValueError(f"{field!r} is not a list of at least {at_least}")
    return value


def _ranks(given: list[Any], answers: int) -> tuple[float, ...]:
    """Ranks from 0, their distances kept; the smallest number given is the best."""
    if len(given) != answers:
        raise ValueError(f"{len(given)} ranks for {answers} answers")
    if not all(isinstance(rank, int | float) and not isinstance(rank, bool) and abs(rank) < float("inf") for rank in given):
        raise ValueError("'ranks' holds something that is no number")
    return tuple(rank - min(given) for rank in given)
