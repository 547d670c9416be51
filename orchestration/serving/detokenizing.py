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
        """The text that these tokens complete."""
        self.pending += tokens
        return self._take(len(self.pending) > MOST_PENDING + len(tokens))

    def finish(self) -> str:
        """What is left at the end of the reply."""
        return self._take(True) if self.pending else ""

    def _take(self, anyhow: bool) -> str:
        base = self._decoded(self.before)
        text = self._decoded([*self.before, *self.pending])
        if text.endswith(UNFINISHED) and not anyhow:
            return ""
        self.before, self.pending = self.pending, []
        return text[len(base) :]
