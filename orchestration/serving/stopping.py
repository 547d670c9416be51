"""Stop strings: text ends before the first of them, though it comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Looks for stop strings in a growing text."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(word for word in words if word)
        self.longest = max(map(len, self.words), default=0)

    def find(self, text: str, new: int) -> int | None:
        """Where the first stop string begins, if there is one; the last `new` characters were added since the last look."""
        start = max(0, len(text) - new - self.longest + 1)
        found = [place for word in self.words if (place := text.find(word, start)) >= 0]
        return min(found, default=None)

    def safe(self, text: str) -> int:
        """How much of the text cannot be the beginning of a stop string that is still coming."""
        for start in range(max(0, len(text) - self.longest + 1), len(text)):
            end = text[start:]
            if any(word.startswith(end) for word in self.words):
                return start
        return len(text)
