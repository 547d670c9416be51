from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors import learning, trainer
from actors.language_task import POOL, step_rows
from actors.learning import minibatches, optimizer_step
from actors.micro_batches import Limit, micro_batches
from actors.worker import process_group_of_one
from tests.fakes import comparisons, dialogues, experience, quickly, smoke


def names_of(rows: object) -> list[int]:
    """Rows by their first token, which the tests below set to the row's number."""
    return rows.tokens[:, 0].tolist()


def numbered(batch):
    batch.tokens[:, 0] = torch.arange(len(batch))
    return batch


class CountingEngine:
    """Adds up what is asked of it."""

    device = torch.device("cpu")
    padded = True

    def __init__(self) -> None:
        self.values: list[float] = []
        self.last: list[bool] = []
        self.rates: list[float] = []

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.values.append(float(loss))
        self.last.append(last)

    def step(self, lr: float) -> float:
        self.rates.append(lr)
        return 3.5

    def train(self, on: bool = True) -> None:
        pass

    def sum_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        return x


@quickly
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), size=st.integers(1, 13))
def test_micro_batches_hold_each_row_once_at_most_size_of_them_and_no_column_of_padding(seed: int, rows: int, size: int) -> None:
    batch = numbered(dialogues(seed, rows))
    pieces = micro_batches(batch, Limit(size))
    assert sorted(name for piece in pieces for name in names_of(piece)) == list(range(rows))
    for piece in pieces:
        assert len(piece) <= size
        assert piece.tokens.shape[1] == int(piece.lengths.max())
        for row, name in enumerate(names_of(piece)):
            length = int(batch.lengths[name])
            assert torch.equal(piece.tokens[row, :length], batch.tokens[name, :length])
    lengths = [int(length) for piece in pieces for length in piece.lengths]
    assert lengths == sorted(lengths)


@quickly
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(2, 6), min_size=1, max_size=6), size=st.integers(1, 12))
def test_micro_batches_of_comparisons_keep_groups_whole(seed: int, sizes: list[int], size: int) -> None:
    batch = numbered(comparisons(seed, tuple(sizes)))
    pieces = micro_batches(batch, Limit(size))
    assert sorted(name for piece in pieces for name in names_of(piece)) == list(range(len(batch)))
    where: dict[int, int] = {}
    for number, piece in enumerate(pieces):
        for group in piece.group.tolist():
            assert where.setdefault(group, number) == number
        assert len(piece) <= size or len(piece.group.unique()) == 1


@quickly
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), each=st.integers(1, 3), epochs=st.integers(1, 3))
def test_minibatches_are_equal_parts_that_cover_each_row_once_per_epoch(seed: int, count: int, each: int, epochs: int) -> None:
    share = numbered(experience(seed % 50, count * each))
    found = list(minibatches(share, epochs, count, (seed, 0, 0)))
    assert [len(part) for part in found] == [each] * (count * epochs)
    for epoch in range(epochs):
        parts = found[epoch * count : (epoch + 1) * count]
        assert sorted(name for part in parts for name in names_of(part)) == list(range(count * each))


def test_the_order_of_minibatches_is_a_function_of_key_and_epoch() -> None:
    share = numbered(dialogues(0, 12))

    def order(key: tuple[int, ...]) -> list[list[int]]:
        return [names_of(part) for part in minibatches(share, 2, 3, key)]

    assert order((0, 1, 0)) == order((0, 1, 0))
    assert order((0, 1, 0)) != order((0, 2, 0))
    assert order((0, 1, 0)) != order((0, 1, 1))
    assert order((0, 1, 0))[:3] != order((0, 1, 0))[3:]


@quickly
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 8), batches=st.integers(1, 40))
def test_the_rows_of_an_epochs_steps_cover_each_row_once(seed: int, batch: int, batches: int) -> None:
    lengths = torch.randint(3, 60, (batch * batches,), generator=torch.Generator().manual_seed(seed))
    for epoch in (0, 1):
        steps = [step_rows(lengths, batch, epoch * batches + number, seed) for number in range(batches)]
        assert all(len(rows) == batch for rows in steps)
        assert sorted(torch.cat(steps).tolist()) == list(range(batch * batches))


@quickly
@given(seed=st.integers(0, 10**6), batch=st.integers(2, 8), batches=st.integers(1, 20), rest=st.integers(0, 1))
def test_rows_that_do_not_fill_a_batch_wait_for_another_epoch(seed: int, batch: int, batches: int, rest: int) -> None:
    lengths = torch.ones(batch * batches + rest, dtype=torch.long)
    rows = torch.cat([step_rows(lengths, batch, number, seed) for number in range(batches)]).tolist()
    assert len(set(rows)) == batch * batches


def test_epochs_differ_and_so_do_seeds_while_the_same_step_is_always_the_same() -> None:
    lengths = torch.arange(1, 65)
    assert torch.equal(step_rows(lengths, 8, 5, 0), step_rows(lengths, 8, 5, 0))
    assert not torch.equal(step_rows(lengths, 8, 5, 0), step_rows(lengths, 8, 13, 0))
    assert not torch.equal(step_rows(lengths, 8, 5, 0), step_rows(lengths, 8, 5, 1))


def test_batches_of_one_pool_hold_rows_of_similar_length() -> None:
    lengths = torch.arange(8 * POOL)
    for number in range(POOL):
        rows = lengths[step_rows(lengths, 8, number, 0)]
        assert int(rows.max() - rows.min()) == 7


def test_a_set_smaller_than_the_batch_repeats_its_rows_evenly() -> None:
    rows = step_rows(torch.tensor([4, 5, 6]), 7, 3, 0)
    assert len(rows) == 7
    assert rows.bincount(minlength=3).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])


def test_an_optimizer_step_adds_up_all_losses_over_all_rows_and_says_which_pass_is_the_last() -> None:
    process_group_of_one()
    engine, rows, extra = CountingEngine(), dialogues(0, 7), dialogues(1, 3)
    losses = [(lambda piece: piece.lengths.sum().float(), rows), (lambda piece: 100 * piece.lengths.sum().float(), extra)]
    assert optimizer_step(engine, losses, Limit(2), 0.25) == 3.5
    assert sum(engine.values) == float(rows.lengths.sum() + 100 * extra.lengths.sum())
    assert engine.last == [False] * 5 + [True]
    assert engine.rates == [0.25]


def test_a_rank_with_fewer_micro_batches_adds_passes_that_weigh_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "agreed_count", lambda count, engine: count + 2)
    engine, rows = CountingEngine(), dialogues(0, 4)
    optimizer_step(engine, [(lambda piece: piece.lengths.sum().float(), rows)], Limit(2), 0.1)
    assert sum(engine.values) == float(rows.lengths.sum())
    assert engine.last == [False, False, False, True]


def test_passes_that_weigh_nothing_do_not_count_in_the_reported_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dialogues(0, 4)
    task = SimpleNamespace(
        settings=smoke().sft,
        batch=lambda step, rank, ranks: rows,
        loss=lambda engine, part: [(lambda piece: piece.lengths.sum().float(), part)],
    )
    monkeypatch.setattr(learning, "agreed_count", lambda count, engine: count + 2)
    figures = trainer._step(smoke("engine.micro_batch=2"), task, CountingEngine(), SimpleNamespace(rank=0, world_size=1), 0)
    assert figures["loss"] == float(rows.lengths.sum())
