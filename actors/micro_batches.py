"""How rows are put into forward and backward passes: as many of similar length as are allowed together.

A pass costs its tokens and some time besides, however small it is. Where it computes padding too (`attention.py` says which models need
it) its tokens are `rows x longest row`. Rows sorted by length are cut where the sum of both is least. Losses are sums over a denominator
and roles score each row by itself, so no result depends on where that is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from actors.batch import Batch, Comparisons
from conf.sizes import Engine as EngineSettings

B = TypeVar("B", bound=Batch)

PASS_TOKENS = 64
"""What a pass costs besides its tokens, in tokens: about 20 ms of a core beside 0.2 ms a token, forward and backward, with 2.0M
parameters. 32 to 128 are alike within what the measurement can tell; larger models take more time for a token and for a pass alike."""


@dataclass(frozen=True)
class Limit:
    """What one pass may hold."""

    rows: int
    """Counts where `tokens` is None."""
    tokens: int | None = None
    """Tokens of its rows, padding that it computes included. What is longer by itself has a pass of its own."""
    padded: bool = True
    """Whether rows are filled up to the longest of their pass."""

    def times(self, factor: int) -> Limit:
        """For passes without gradients, which keep less."""
        return Limit(self.rows * factor, None if self.tokens is None else self.tokens * factor, self.padded)


class Padding(Protocol):
    """What computes passes."""

    @property
    def padded(self) -> bool: ...


def limit(settings: EngineSettings, engine: Padding) -> Limit:
    """As the configuration has it, for this engine's model."""
    return Limit(settings.micro_batch, settings.micro_tokens, engine.padded)


def spent(rows: Batch, most: Limit) -> Tensor:
    """[2] float64: tokens of these rows, and tokens that one pass over each of their micro-batches computes."""
    lengths: Tensor = rows.lengths  # type: ignore[attr-defined]
    padded = sum(len(index) * int(lengths[index].max()) for index in planned(rows, most)) if most.padded else lengths.sum()
    computed = float(padded)
    return torch.tensor([float(lengths.sum()), computed], dtype=torch.float64)


def padding_share(tokens: Tensor) -> float:
    """Of what was computed, from `spent` summed over ranks and minibatches."""
    real, computed = tokens.tolist()
    return 1 - real / max(computed, 1.0)


def micro_batches(rows: B, most: Limit) -> list[B]:
    """The rows in passes, without columns that are padding throughout, the shortest rows first.

    Rows that are compared with each other (`Comparisons.group`) stay in one pass, which may be larger than `most` then.
    """
    return [rows.select(chosen).trimmed() for chosen in planned(rows, most)]


def planned(rows: Batch, most: Limit) -> list[Tensor]:
    """Indices of the rows in each pass."""
    lengths: Tensor = rows.lengths  # type: ignore[attr-defined]
    if not isinstance(rows, Comparisons):
        order = lengths.argsort(stable=True)
        ascending = lengths[order].numpy()
        return list(order.split(_sizes(ascending, np.ones(len(order), dtype=np.int64), ascending, most)))
    names, number = torch.unique(rows.group, return_inverse=True)
    longest = torch.zeros(len(names), dtype=torch.long).scatter_reduce(0, number, lengths, "amax")
    groups = longest.argsort(stable=True)
    members = [(number == group).nonzero()[:, 0] for group in groups]
    tokens = np.array([int(lengths[rows].sum()) for rows in members])
    sizes = _sizes(longest[groups].numpy(), np.array([len(rows) for rows in members]), tokens, most)
    starts = np.cumsum([0, *sizes])
    return [torch.cat(members[start:stop]) for start, stop in itertools.pairwise(starts)]


def _sizes(longest: np.ndarray, rows: np.ndarray, tokens: np.ndarray, most: Limit) -> list[int]:
    """How many consecutive items go into each pass, so that all passes together cost least.

    Args:
        longest: [N] longest row of each item, ascending.
        rows: [N] rows of each item, which stay together.
        tokens: [N] tokens of each item.
    """
    count = len(rows)
    rows_before, tokens_before = (np.concatenate([[0], np.cumsum(each)]) for each in (rows, tokens))  # of items [0, n)
    least, first = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)  # cost of items [0, n), and where their last pass starts
    for stop in range(1, count + 1):
        held = rows_before[stop] - rows_before[:stop]  # of a pass from each item to here
        computed = held * longest[stop - 1] if most.padded else tokens_before[stop] - tokens_before[:stop]
        allowed = held <= most.rows if most.tokens is None else computed <= most.tokens
        start = int(np.argmax(allowed)) if allowed.any() else stop - 1
        costs = least[start:stop] + computed[start:]
        best = int(costs.argmin())
        least[stop], first[stop] = costs[best] + PASS_TOKENS, start + best
    sizes: list[int] = []
    while count:
        sizes.append(count - int(first[count]))
        count = int(first[count])
    return sizes[::-1]
