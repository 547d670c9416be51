"""How a batch is spread over ranks: in pieces, consecutive pieces to each rank.

The driver cuts a batch once; from then on pieces keep their order and their rows, whichever role works on them. So the pieces that one
role gives back line up with those of every other role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Generic, TypeVar

from actors.batch import Batch

T = TypeVar("T")
B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Pieces(Generic[T]):
    """A batch in pieces: values in one process, references on a cluster."""

    items: list[Any]
    calls: list[Any]
    """What to wait for before the items are there (empty: they are)."""

    def __len__(self) -> int:
        return len(self.items)

    def chosen(self, order: Sequence[int]) -> Pieces[T]:
        """Some of them, in this order; all of the batch's calls are waited for."""
        return Pieces([self.items[index] for index in order], self.calls) if self.items else self


PIECES = 8
"""Pieces of each rank at least, where there are ranks to balance: with fewer, there is little to choose from."""


def waves_of(pieces: int, together: int, waves: int) -> list[list[int]]:
    """Indices of the pieces of each wave: of every rank's consecutive share of them its first part, its second, and so on.

    Args:
        pieces: how many there are, a multiple of `together`.
        together: a multiple of every role's rank count.
        waves: at most; no more than each share has pieces.
    """
    share = pieces // together
    count = min(waves, share)
    edges = [share * number // count for number in range(count + 1)]
    return [[rank * share + n for rank in range(together) for n in range(*span)] for span in pairwise(edges)]


def by_rank(waves: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Indices of the pieces as a role's ranks meet them: all of the first rank's, wave by wave, then the second's."""
    parts = [[wave[len(wave) * rank // ranks : len(wave) * (rank + 1) // ranks] for wave in waves] for rank in range(ranks)]
    return list(chain(*chain(*parts)))


def gathered(waves: Sequence[Pieces[T]], order: Sequence[Sequence[int]]) -> Pieces[T]:
    """The waves' results as one batch, its pieces where `waves_of` took them from."""
    items = dict(zip(chain(*order), chain(*(wave.items for wave in waves)), strict=True))
    return Pieces([items[index] for index in range(len(items))], list(chain(*(wave.calls for wave in waves))))


def cut(batch: B, together: int, micro_batch: int, whole: int = 0, least: int = 1) -> list[B]:
    """Equal pieces of at most about `micro_batch` rows, their number a multiple of `together`.

    Args:
        together: a multiple of every role's rank count; divides the number of rows.
        whole: above 0, the pieces are for being balanced over ranks: several for each, of so many rows that belong together or multiples
            of them, where the number of rows allows it.
        least: pieces of each of `together` shares, where the number of rows allows it.

    Raises:
        ValueError: it does not.
    """
    if not len(batch) or len(batch) % together:
        raise ValueError(f"a batch of {len(batch)} rows cannot be spread evenly over {together} ranks")
    share = len(batch) // together
    per_rank = next(n for n in range(min(least, share), share + 1) if share % n == 0 and share // n <= micro_batch)
    if whole and together > 1 and share % whole == 0:
        units = share // whole
        fine = (n for n in range(min(PIECES, units), units + 1) if units % n == 0 and share // n <= micro_batch)
        per_rank = next(fine, units)
    return [piece.trimmed() for piece in batch.split(share // per_rank)]


def shares(items: list[Any], ranks: int) -> list[list[Any]]:
    """Consecutive equal shares of the pieces, one per rank.

    Raises:
        ValueError: the number of pieces is not a multiple of `ranks`.
    """
    if len(items) % ranks:
        raise ValueError(f"{len(items)} pieces cannot be spread evenly over {ranks} ranks")
    size = len(items) // ranks
    return [items[i * size : (i + 1) * size] for i in range(ranks)]
