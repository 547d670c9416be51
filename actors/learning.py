"""One optimizer step over micro-batches, the same for every role that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from actors.batch import Batch, Comparisons
from actors.engine import Engine

B = TypeVar("B", bound=Batch)


def minibatches(share: B, epochs: int, count: int, key: tuple[int, ...]) -> Iterator[B]:
    """`count` equal random parts of this rank's share per epoch; the order is a function of `key` and the epoch."""
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(hash((*key, epoch)) % 2**63)
        order = torch.randperm(len(share), generator=generator) if count > 1 else torch.arange(len(share))
        for rows in order.chunk(count):
            yield share.select(rows)


def micro_batches(rows: B, size: int) -> list[B]:
    """Pieces of about `size` rows of similar length, without columns that are padding throughout.

    Rows that are compared with each other (`Comparisons.group`) stay in one piece, which may make it larger than `size`.
    """
    by_length = rows.lengths.argsort(stable=True)  # type: ignore[attr-defined]
    index = _whole_groups(rows, size) if isinstance(rows, Comparisons) else by_length.split(size)
    return [rows.select(chosen).trimmed() for chosen in index]


def _whole_groups(rows: Comparisons, size: int) -> list[Tensor]:
    names, number = torch.unique(rows.group, return_inverse=True)
    longest = torch.zeros(len(names), dtype=torch.long).scatter_reduce(0, number, rows.lengths, "amax")
    pieces: list[list[Tensor]] = [[]]
    for name in longest.argsort(stable=True):
        members = (number == name).nonzero()[:, 0]
        if pieces[-1] and sum(map(len, pieces[-1])) + len(members) > size:
            pieces.append([])
        pieces[-1].append(members)
    return [torch.cat(piece) for piece in pieces]


def optimizer_step(
    engine: Engine,
    losses: Sequence[tuple[Callable[[Any], Tensor], Batch]],
    micro_batch: int,
    lr: float,
    total: Tensor | None = None,
) -> float:
    """Accumulate the gradients of every (loss function, its rows) pair, then step. Returns the gradients' norm.

    Each loss function gives a sum over the global denominator, so neither the size of micro-batches nor the number of ranks matters.
    Ranks agree on the number of backward passes: one with fewer adds passes that weigh nothing (under ZeRO-3 it would hang otherwise).

    Args:
        total: a CPU scalar that this rank's share of the loss is added to.
    """
    work = [(loss, piece) for loss, rows in losses for piece in micro_batches(rows, micro_batch)]
    wanted = _most_over_ranks(len(work), engine)
    for number in range(wanted):
        loss, piece = work[min(number, len(work) - 1)]
        value = loss(piece)
        real = number < len(work)
        if real and total is not None:
            total.add_(value.detach().cpu())
        engine.backward(value if real else 0.0 * value, last=number == wanted - 1)
    return engine.step(lr)


def _most_over_ranks(count: int, engine: Engine) -> int:
    if dist.get_world_size() == 1:
        return count
    most = torch.tensor(count, device=engine.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
