"""Rows over ranks so that each has about as many tokens: the largest differencing method of Karmarkar and Karp, with equal counts.

A rank waits for the one with the most tokens, in every pass that they make together. Counts stay equal, since ranks make as many
optimizer steps of as many rows each.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence


def balanced(weights: Sequence[int], bins: int) -> list[list[int]]:
    """Indices of the weights in `bins` bins, as many in each, their sums close to each other.

    The weights in ascending order, `bins` at a time, begin as partial solutions of one weight a bin. The two whose bins differ most are
    merged, the heaviest bin of one with the lightest of the other, until one is left (Michiels, Korst and Aarts 2003, balanced LDM).

    Raises:
        ValueError: the number of weights is not a multiple of `bins`.
    """
    if len(weights) % bins:
        raise ValueError(f"{len(weights)} rows cannot be spread evenly over {bins} ranks")
    if not weights:
        return [[] for _ in range(bins)]
    order, number = sorted(range(len(weights)), key=lambda index: (weights[index], index)), itertools.count()
    heap = [_partial([(weights[i], [i]) for i in order[start : start + bins]], number) for start in range(0, len(order), bins)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (*_, one), (*_, other) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [(a + b, [*left, *right]) for (a, left), (b, right) in zip(one, reversed(other), strict=True)]
        heapq.heappush(heap, _partial(merged, number))
    return [sorted(indices) for _, indices in heap[0][2]]


def balanced_order(tokens: Sequence[int], ranks: int, whole: bool) -> list[int]:
    """The pieces' indices in an order in which consecutive equal shares, of `ranks` ranks or of a divisor of it, have about as many tokens.

    Args:
        tokens: of each piece.
        whole: whether no row belongs together with one of another piece; otherwise the pieces stay in order.
    """
    return list(itertools.chain(*balanced(tokens, ranks))) if ranks > 1 and whole else list(range(len(tokens)))


def _partial(bins: list[tuple[int, list[int]]], number: itertools.count[int]) -> tuple[int, int, list[tuple[int, list[int]]]]:
    """Its bins from the lightest, after what the heap orders by: the largest difference first, then the earliest made."""
    bins = sorted(bins, key=lambda found: found[0])
    return bins[0][0] - bins[-1][0], next(number), bins
