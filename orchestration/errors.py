"""The two ways a run ends badly, and their exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence


class RequestError(Exception):
    """The request was wrong: exit code 2. Holds every mistake found, each naming the value, the cause and the setting to change."""

    def __init__(self, mistakes: Sequence[str] | str) -> None:
        self.mistakes = [mistakes] if isinstance(mistakes, str) else list(mistakes)
        super().__init__("\n".join(self.mistakes))


class RunError(Exception):
    """The run failed: exit code 1. What was committed stays, and the same command goes on from there."""

    said = False
    """Whether the text was printed already."""

    def say(self) -> None:
        """Print the text, once."""
        if not self.said:
            print(f"chatray: {self}", file=sys.stderr, flush=True)
        self.said = True
