"""Tokens to text as they come, never half a character."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "�"
MOST_PENDING = 8
"""A character has at most 4 bytes, so 4 tokens: what is not one after twice as many never becomes one, and is shown as it is."""


class Detokenizer:
    """The text of one reply. Tokens are decoded beside those before them, since some tokenizers write a token's space only then."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.before: list[int] = []
        """Tokens whose text was given last."""
        self.pending: list[int] = []
        """Tokens whose text was not given yet."""

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; those of a character that is still incomplete wait."""
        self.pending += tokens
        for waiting in range(min(len(self.pending), MOST_PENDING)):
            taken = self.pending[: len(self.pending) - waiting]
            text = self._decoded([*self.before, *taken])
            if not text.endswith(UNFINISHED):
                return self._take(taken, text)
        return self.finish() if len(self.pending) >= MOST_PENDING else ""

    def finish(self) -> str:
        """What is left at the end of the reply."""
        return self._take(self.pending, self._decoded([*self.before, *self.pending])) if self.pending else ""

    def _take(self, taken: list[int], text: str) -> str:
        new = text[len(self._decoded(self.before)) :]
        self.before, self.pending = taken, self.pending[len(taken) :]
        return new
