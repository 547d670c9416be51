"""Rows to learn from that held-out rows repeat: the same text, or nearly the same words in the same order.

Texts are compared without case and spacing. Near duplicates share at least a given Jaccard similarity of their sets of 5 words in a row.
MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3) proposes pairs, and the exact
similarity decides: there is no false alarm; a pair just above the limit may rarely be missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from datasketch import MinHash, MinHashLSH

WORDS = 5
PERMUTATIONS = 128
SEARCHED = 0.85
"""Pairs are proposed from this part of the limit on: hashing estimates a similarity to within about 0.1."""


@dataclass(frozen=True)
class Duplicate:
    """A row to learn from and the held-out row that it is most like."""

    train: int
    held_out: int
    similarity: float
    """1 for exact duplicates."""
    exact: bool


def find(train: Iterable[str], held_out: Sequence[str], limit: float) -> list[Duplicate]:
    """At most one duplicate for each row to learn from, in their order; a limit of 0 finds exact ones only."""
    apart = [_normal(text) for text in held_out]
    same = {text: number for number, text in reversed(list(enumerate(apart)))}
    near = _Near(apart, limit) if apart and limit > 0 else None
    found = []
    for number, text in enumerate(map(_normal, train)):
        if text in same:
            found.append(Duplicate(number, same[text], 1.0, True))
        elif near is not None and (best := near.best(text)) is not None:
            found.append(Duplicate(number, *best, exact=False))
    return found


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def shingles(text: str) -> set[str]:
    """Every 5 words in a row; a shorter text is one shingle."""
    words = text.split()
    return {" ".join(words[start : start + WORDS]) for start in range(max(len(words) - WORDS + 1, 1))}


class _Near:
    """Held-out texts, to be asked for the one that is most like another text."""

    def __init__(self, texts: Sequence[str], limit: float) -> None:
        self.limit = limit
        self.shingles = [shingles(text) for text in texts]
        self.index = MinHashLSH(threshold=max(SEARCHED * limit, 0.05), num_perm=PERMUTATIONS)
        for number, parts in enumerate(self.shingles):
            self.index.insert(number, _minhash(parts))

    def best(self, text: str) -> tuple[int, float] | None:
        """(number, similarity) of the most similar held-out text, if that is similar enough."""
        mine = shingles(text)
        proposed = [(len(mine & other) / len(mine | other), -n) for n in self.index.query(_minhash(mine)) for other in [self.shingles[n]]]
        similarity, number = max(proposed, default=(0.0, 0))
        return (-number, similarity) if similarity >= self.limit else None


def _minhash(parts: set[str]) -> MinHash:
    found = MinHash(num_perm=PERMUTATIONS, seed=1)
    found.update_batch([part.encode() for part in sorted(parts)])
    return found
