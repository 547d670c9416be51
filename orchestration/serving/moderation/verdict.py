"""What moderation says of one text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["allow", "warn", "block"]


@dataclass(frozen=True)
class Verdict:
    """Scores, and what follows from them."""

    scores: dict[str, float]
    """By category, 0 to 1."""
    action: Action
    categories: tuple[str, ...]
    """Those over their thresholds, the highest score first."""
