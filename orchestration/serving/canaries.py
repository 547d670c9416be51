"""Keeps a model from reciting its hidden prompt: as many of its words in a row as `serving.canary_words` never leave the service.

Texts are compared by their letters and digits alone, and once more by their letters alone (numbered lists), without case, accents and
compatibility forms (NFKD), so spaces, line breaks, punctuation, markup and invisible characters between them do not help. They are read
forwards and backwards. A paraphrase, a translation, a cipher, or other words between its words are not seen.

What the client itself wrote is no secret: n-grams of the client's texts are left out, which also keeps the filter from confirming guesses.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

LEAST_LETTERS = 8
"""Fewer letters are said by chance, whatever the number of words."""
LETTERS_PER_WORD = 8
"""Words longer than that count as several: a canary has at most so many letters for each of its words."""


def letters(text: str) -> Iterator[tuple[str, int]]:
    """The letters and digits of a text, normalised, each with the place it is from."""
    for place, character in enumerate(text):
        for letter in unicodedata.normalize("NFKD", character).casefold():
            if letter.isalnum():
                yield letter, place


def normalised(text: str) -> str:
    return "".join(letter for letter, _ in letters(text))


def _words(text: str) -> list[str]:
    """Normalised words; scripts written without spaces have a word in each character."""
    found = []
    for word in text.split():
        plain = normalised(word)
        found += list(plain) if any(ord(letter) > 0x2E80 for letter in plain) else [plain] if plain else []
    return found


class Secret:
    """A hidden prompt as what may not be said of it."""

    def __init__(self, texts: Iterable[str], words: int) -> None:
        whole, bare = set[str](), set[str]()
        for text in texts:
            for found, plain in ((whole, text), (bare, _without_digits(text))):
                forwards = _words(plain)
                found |= _canaries(forwards, words)
                found |= _canaries([word[::-1] for word in reversed(forwards)], words)
        self._keep(frozenset(whole), frozenset(bare))

    def _keep(self, whole: frozenset[str], bare: frozenset[str]) -> None:
        self.whole, self.bare = whole, bare
        """Canaries of letters and digits, and of letters alone."""
        self.trees = _tree(whole), _tree(bare)

    def known(self, texts: Iterable[str]) -> Secret:
        """This secret without what the client has said itself."""
        said = [normalised(text) for text in texts] if self.whole else []
        bare = [_without_digits(text) for text in said]
        common = {canary for canary in self.whole if any(canary in one for one in said)}
        common_bare = {canary for canary in self.bare if any(canary in one for one in bare)}
        if not common and not common_bare:
            return self
        rest = Secret((), 2)
        rest._keep(self.whole - common, self.bare - common_bare)
        return rest


def _without_digits(text: str) -> str:
    return "".join(character for character in text if not character.isnumeric())


def _canaries(words: Sequence[str], count: int) -> set[str]:
    """From each word's start on the letters of `count` words, or of all if there are fewer."""
    text = "".join(words)
    starts = [0, *accumulate(map(len, words))]
    found = set()
    for first in range(max(1, len(words) - count + 1)):
        until = starts[min(first + count, len(words))]
        length = max(min(until - starts[first], count * LETTERS_PER_WORD), LEAST_LETTERS)
        if words and starts[first] + length <= len(text):
            found.add(text[starts[first] : starts[first] + length])
    return found


def _tree(canaries: Iterable[str]) -> dict[str, Any]:
    """Letter -> what may follow; a canary ends where "" may."""
    root: dict[str, Any] = {}
    for canary in canaries:
        node = root
        for letter in canary:
            node = node.setdefault(letter, {})
        node[""] = {}
    return root


class Guard:
    """Reads one reply as it grows."""

    def __init__(self, secret: Secret) -> None:
        self.readers = [Reader(tree) for tree in secret.trees if tree]
        self.length = 0
        self.broken: int | None = None
        """Where the recital begins that was found."""

    def push(self, text: str) -> None:
        """Read on."""
        if self.readers and self.broken is None:
            whole, bare = self.readers[0], self.readers[-1]
            for letter, place in letters(text):
                whole.read(letter, self.length + place)
                if not letter.isnumeric() and bare is not whole:
                    bare.read(letter, self.length + place)
                self.broken = min((r.broken for r in self.readers if r.broken is not None), default=None)
                if self.broken is not None:
                    return
        self.length += len(text)

    def safe(self) -> int:
        """How many characters of the reply are not part of a recital, nor of what may become one."""
        if self.broken is not None:
            return self.broken
        return min((start for reader in self.readers for start, _ in reader.active), default=self.length)


class Reader:
    """Follows all canaries of a tree at once."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree
        self.active: list[tuple[int, dict[str, Any]]] = []
        """Canaries begun: the place of their beginning in the reply, and what would follow."""
        self.broken: int | None = None

    def read(self, letter: str, place: int) -> None:
        begun = [*self.active, (place, self.tree)]
        self.active = [(start, node[letter]) for start, node in begun if letter in node]
        self.broken = min((start for start, node in self.active if "" in node), default=None)
