from __future__ import annotations

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.batch import Comparisons, Dialogues, Prompts, Rollouts, join_rows, pad_rows
from tests.fakes import comparisons, dialogues, quickly, rollouts


def same(one: object, other: object) -> bool:
    names = [f.name for f in dataclasses.fields(one)]
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


@quickly
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 7), size=st.integers(1, 8))
def test_splitting_trimming_and_joining_gives_the_batch_back(seed: int, rows: int, size: int) -> None:
    batch = rollouts(seed, rows)
    pieces = [piece.trimmed() for piece in batch.split(size)]
    assert [len(piece) for piece in pieces] == [size] * (rows // size) + [rows % size] * (rows % size > 0)
    assert same(Rollouts.join(pieces), batch.trimmed())


@quickly
@given(rows=st.lists(st.lists(st.integers(1, 99), max_size=6), min_size=1, max_size=5).filter(lambda rows: any(rows)))
def test_padded_rows_hold_each_row_then_zeros(rows: list[list[int]]) -> None:
    tokens, lengths = pad_rows(rows)
    width = max(map(len, rows))
    assert lengths.tolist() == [len(row) for row in rows]
    assert tokens.tolist() == [row + [0] * (width - len(row)) for row in rows]


def test_padding_a_mask_keeps_its_type() -> None:
    mask, _ = pad_rows([[True], [False, True]], torch.bool)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, False], [False, True]]


def test_selecting_names_rows_in_the_order_asked_for() -> None:
    batch = dialogues(0, 5)
    chosen = batch.select([4, 0, 4])
    for name in ("tokens", "lengths", "mask"):
        assert torch.equal(getattr(chosen, name), getattr(batch, name)[torch.tensor([4, 0, 4])])


def test_trimming_cuts_columns_of_padding_and_nothing_else() -> None:
    batch = comparisons(1)
    wide = Comparisons.join([batch, batch])
    wide = dataclasses.replace(
        wide,
        tokens=join_rows([wide.tokens, torch.zeros(0, 40, dtype=torch.long)]),
        mask=join_rows([wide.mask, torch.zeros(0, 40, dtype=torch.bool)]),
    )
    assert wide.tokens.shape[1] == 40
    narrow = wide.trimmed()
    assert narrow.tokens.shape[1] == narrow.mask.shape[1] == int(batch.lengths.max())
    assert same(narrow, Comparisons.join([batch, batch]).trimmed())


def test_trimming_leaves_columns_that_are_not_tokens_alone_even_where_the_numbers_of_columns_differ() -> None:
    batch = rollouts(3, 4)
    short = batch.select([int(batch.lengths.argmin())]).trimmed()
    assert short.tokens.shape[1] == int(batch.lengths.min())
    assert short.keys.shape == (1, 2)


def test_joining_pads_on_the_right_with_zeros() -> None:
    one, other = Dialogues(*_row([5, 6])), Dialogues(*_row([7, 8, 9]))
    assert Dialogues.join([one, other]).tokens.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert Dialogues.join([one, other]).mask.tolist() == [[True, True, False], [True, True, True]]


def _row(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor([ids]), torch.tensor([len(ids)]), torch.ones(1, len(ids), dtype=torch.bool)


def test_moving_to_a_device_moves_every_field() -> None:
    moved = dialogues(0, 2).to(torch.device("meta"))
    assert {getattr(moved, f.name).device.type for f in dataclasses.fields(moved)} == {"meta"}


def test_trimming_does_not_mistake_keys_for_tokens() -> None:
    tokens, lengths, mask = torch.tensor([[5, 0]]), torch.tensor([1]), torch.tensor([[True, False]])
    rows = Rollouts(tokens, lengths, mask, torch.zeros(1, 2), torch.tensor([True]), torch.tensor([[3, 4]]), torch.tensor([0]))
    assert rows.trimmed().keys.tolist() == [[3, 4]]


def test_repeated_prompts_stand_next_to_each_other_with_their_samples_counted() -> None:
    prompts = Prompts(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]), torch.tensor([[7, 0], [4, 0]]))
    found = prompts.repeated(3)
    assert found.keys.tolist() == [[7, 0], [7, 1], [7, 2], [4, 0], [4, 1], [4, 2]]
    assert found.tokens.tolist() == [[1, 2]] * 3 + [[3, 0]] * 3
    assert found.lengths.tolist() == [2, 2, 2, 1, 1, 1]
    assert prompts.repeated(1).keys.tolist() == prompts.keys.tolist() == [[7, 0], [4, 0]]
