"""A contestant's side of taking turns: it works when it is told to, and is blocked on a pipe otherwise. The standard library alone, since
TRL runs it in an environment of its own.

One line of JSON is handed over after each step; the next step begins when the other side writes `go`.
"""

from __future__ import annotations

import json
import os
from typing import Any


class EndedError(Exception):
    """The other side wants no more steps."""


class Turns:
    """Standard input and output are the two pipes; whatever else the process prints goes to standard error."""

    def __init__(self) -> None:
        self.orders = os.fdopen(os.dup(0), "r", encoding="utf-8")
        self.answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def hand_over(self, answer: dict[str, Any]) -> None:
        """Say that a step is done, and wait for the next.

        Raises:
            EndedError: there is none.
        """
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()
        if self.orders.readline().strip() != "go":
            raise EndedError
