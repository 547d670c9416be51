from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.batch import Rollouts
from orchestration.runtime.dispatch import Pieces, cut, shares
from tests.fakes import quickly, rollouts


@quickly
@given(
    seed=st.integers(0, 10**6), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3), each=st.integers(1, 5), micro=st.integers(1, 7)
)
def test_pieces_are_equal_small_enough_in_order_and_can_be_shared_evenly(seed: int, ranks: list[int], each: int, micro: int) -> None:
    together = math.lcm(*ranks)
    batch = rollouts(seed % 100, together * each)
    pieces = cut(batch, together, micro)
    assert len({len(piece) for piece in pieces}) == 1
    assert len(pieces[0]) <= micro
    whole = Rollouts.join(pieces)
    assert torch.equal(whole.tokens, batch.trimmed().tokens)
    assert torch.equal(whole.keys, batch.keys)
    for count in ranks:
        parts = shares(pieces, count)
        assert len({len(part) for part in parts}) == 1
        assert [piece for part in parts for piece in part] == pieces


def test_pieces_are_as_large_as_the_micro_batch_allows() -> None:
    assert [len(piece) for piece in cut(rollouts(0, 24), 2, 6)] == [6] * 4
    assert [len(piece) for piece in cut(rollouts(0, 24), 2, 5)] == [4] * 6
    assert [len(piece) for piece in cut(rollouts(0, 14), 2, 6)] == [1] * 14  # seven rows for each rank: a prime


def test_a_batch_that_cannot_be_spread_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10 rows.*4 ranks"):
        cut(rollouts(0, 10), 4, 8)
    with pytest.raises(ValueError, match=r"3 pieces.*2 ranks"):
        shares([1, 2, 3], 2)


def test_pieces_count_their_items() -> None:
    assert len(Pieces([1, 2, 3], [])) == 3
