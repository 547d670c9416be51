from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.batch import Rollouts
from orchestration.runtime.balancing import balanced, in_balance
from orchestration.runtime.dispatch import PIECES, Pieces, cut, shares
from tests.fakes import quickly, rollouts


def sums(weights: list[int], bins: list[list[int]]) -> list[int]:
    return [sum(weights[index] for index in found) for found in bins]


@quickly
@given(data=st.data(), bins=st.integers(1, 5), each=st.integers(0, 9))
def test_every_weight_is_in_one_bin_bins_are_equally_full_and_differ_by_less_than_the_range(data, bins: int, each: int) -> None:
    weights = data.draw(st.lists(st.integers(0, 500), min_size=bins * each, max_size=bins * each))
    found = balanced(weights, bins)
    assert sorted(itertools.chain(*found)) == list(range(len(weights)))
    assert {len(part) for part in found} == {each}
    assert found == balanced(weights, bins)
    totals = sums(weights, found)
    spread = max(weights) - min(weights) if weights else 0
    assert max(totals) - min(totals) <= spread  # each merge of two differences gives one no larger than the larger


def test_a_known_case() -> None:
    weights = [8, 7, 6, 5, 4, 3, 2, 1]
    assert sums(weights, balanced(weights, 2)) == [18, 18]
    assert sums([10, 1, 1, 1, 1, 1], balanced([10, 1, 1, 1, 1, 1], 3)) in ([2, 2, 11], [2, 11, 2], [11, 2, 2])


@pytest.mark.parametrize("seed", range(5))
def test_many_rows_come_out_nearly_even(seed: int) -> None:
    weights = torch.randint(20, 400, (256,), generator=torch.Generator().manual_seed(seed)).tolist()
    found = sums(weights, balanced(weights, 4))
    assert max(found) - min(found) <= 4  # of 13,000 in each


def test_weights_that_cannot_be_spread_are_refused() -> None:
    with pytest.raises(ValueError, match=r"5 rows.*2 ranks"):
        balanced([1, 2, 3, 4, 5], 2)


def test_pieces_are_reordered_for_ranks_and_for_every_divisor_of_them_and_stay_if_rows_belong_together() -> None:
    tokens = [9, 9, 9, 9, 1, 1, 1, 1]
    pieces = Pieces([f"{number}:{count}" for number, count in enumerate(tokens)], ["call"])
    found = in_balance(pieces, tokens, 4, whole=True)
    assert sorted(found.items) == sorted(pieces.items) and found.calls == ["call"]
    for ranks in (2, 4):
        assert {sum(int(item.split(":")[1]) for item in part) for part in shares(found.items, ranks)} == {40 // ranks}
    assert in_balance(pieces, tokens, 4, whole=False) is pieces
    assert in_balance(pieces, tokens, 1, whole=True) is pieces


@pytest.mark.parametrize(
    ("rows", "together", "micro", "whole"), [(64, 2, 16, 1), (64, 2, 16, 4), (24, 2, 64, 4), (36, 2, 4, 3), (8, 2, 2, 4)]
)
def test_pieces_to_be_balanced_are_several_and_hold_whole_prompts(rows: int, together: int, micro: int, whole: int) -> None:
    batch = rollouts(0, rows)
    pieces = cut(batch, together, micro, whole)
    assert len(pieces) % together == 0 and len({len(piece) for piece in pieces}) == 1
    assert len(pieces[0]) % whole == 0
    assert len(pieces[0]) <= max(micro, whole)
    assert len(pieces) >= min(PIECES * together, rows // whole)
    assert Rollouts.join(pieces).keys.equal(batch.keys)
    assert len(cut(rollouts(0, 8), 1, 8, 2)) == 1  # nothing to balance
