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
P = TypeVar("P")
R = TypeVar("R")


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

    Each loss function gives a sum over the global denominator, so neither the size of micro-batches nor the number of ranks matters; or a
    vector of such sums, whose first is learned from and whose others are figures to add up.
    Ranks agree on the number of backward passes: one with fewer adds passes that weigh nothing (under ZeRO-3 it would hang otherwise).

    Args:
        total: CPU sums that this rank's share of the losses and figures is added to.

    Raises:
        ValueError: a rank has no rows; all ranks raise it.
    """
    work = [(loss, piece) for loss, rows in losses if len(rows) for piece in micro_batches(rows, micro_batch)]
    wanted = agreed_count(len(work), engine)
    for number in range(wanted):
        loss, piece = work[min(number, len(work) - 1)]
        found = loss(piece).reshape(-1)
        real = number < len(work)
        if real and total is not None:
            total.view(-1)[: len(found)] += found.detach().cpu()
        engine.backward(found[0] if real else 0.0 * found[0], last=number == wanted - 1)
    return engine.step(lr)


def in_step(engine: Engine, pieces: Sequence[P], run: Callable[[P], R]) -> list[R]:
    """What `run` gives for each piece, without gradients. Under ZeRO-3 every forward pass gathers weights from all ranks, so a rank with
    fewer pieces than others runs its last one again, and nobody sees the result.

    Raises:
        ValueError: a rank has none; all ranks raise it.
    """
    wanted = agreed_count(len(pieces), engine) if engine.zero_stage == 3 else len(pieces)
    found = [run(piece) for piece in pieces]
    for _ in range(wanted - len(pieces)):
        run(pieces[-1])
    return found


def agreed_count(count: int, engine: Engine) -> int:
    """The largest count of all ranks, which each of them brings its own to.

    Raises:
        ValueError: a rank has nothing to do and others have; all ranks raise it, so that none waits.
    """
    most, least = extremes_over_ranks(count, engine)
    if least == 0 < most:
        raise ValueError(f"one rank has no rows and another has {most} micro-batches of them: give each rank at least one row")
    return most


def extremes_over_ranks(count: int, engine: Engine) -> tuple[int, int]:
    """(largest, smallest) over the ranks."""
    if dist.get_world_size() == 1:
        return count, count
    both = torch.tensor([count, -count], device=engine.device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return int(both[0]), -int(both[1])
