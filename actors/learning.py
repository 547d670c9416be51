"""One optimizer step over micro-batches, the same for every role that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from actors.batch import Batch, Dialogues
from actors.engine import Engine
from actors.micro_batches import Limit, micro_batches, planned

B = TypeVar("B", bound=Batch)
P = TypeVar("P")
R = TypeVar("R")


class Scorable(Protocol):
    """Rows that are scored one by one."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def lengths(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor: ...

    def __len__(self) -> int: ...


def minibatches(share: B, epochs: int, count: int, key: tuple[int, ...]) -> Iterator[B]:
    """`count` equal random parts of this rank's share per epoch; the order is a function of `key` and the epoch."""
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(hash((*key, epoch)) % 2**63)
        order = torch.randperm(len(share), generator=generator) if count > 1 else torch.arange(len(share))
        for rows in order.chunk(count):
            yield share.select(rows)


def optimizer_step(
    engine: Engine,
    losses: Sequence[tuple[Callable[[Any], Tensor], Batch]],
    most: Limit,
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
    work = [(loss, piece) for loss, rows in losses if len(rows) for piece in micro_batches(rows, most)]
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


def in_passes(engine: Engine, pieces: Sequence[Scorable], run: Callable[[Dialogues], Tensor], most: Limit) -> list[Tensor]:
    """What `run` gives for each piece, [B] or [B, T], computed in passes that are cut from the rows of all pieces together.

    Args:
        run: gives [b] or [b, t] for some rows, without gradients; each row's numbers may depend on that row alone.

    Raises:
        ValueError: as `in_step`.
    """
    if not pieces:
        return in_step(engine, [], run)
    rows = Dialogues.join([Dialogues(piece.tokens, piece.lengths, piece.mask) for piece in pieces])
    plan = planned(rows, most)
    passes = [rows.select(index).trimmed() for index in plan]
    results = in_step(engine, passes, lambda part: run(part).cpu())
    found = torch.zeros(rows.tokens.shape if results[0].dim() > 1 else rows.lengths.shape, dtype=results[0].dtype)
    for index, result in zip(plan, results, strict=True):
        if result.dim() > 1:
            found[index, : result.shape[1]] = result
        else:
            found[index] = result
    parts = found.split([len(piece) for piece in pieces])
    return [part[:, : piece.tokens.shape[1]].clone() if part.dim() > 1 else part.clone() for part, piece in zip(parts, pieces, strict=True)]


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
