"""What people prefer: ranked answers to one context, or single judged replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestration.data.dialogues import Dialogue


@dataclass(frozen=True)
class Comparison:
    """Answers to one context. `ranks` is empty until somebody ranked them; 0 is best, equal ranks are ties, and distances say by how much
    one answer is better."""

    context: Dialogue
    answers: tuple[str, ...]
    finished: tuple[bool, ...]
    ranks: tuple[float, ...] = ()

    def ranked(self, ranks: Sequence[float]) -> Comparison:
        return replace(self, ranks=tuple(ranks))


@dataclass(frozen=True)
class Judgement:
    """One reply that a person judged."""

    context: Dialogue
    reply: str
    good: bool
