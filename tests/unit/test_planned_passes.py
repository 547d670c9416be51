from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.batch import Dialogues
from actors.learning import in_passes
from actors.micro_batches import PASS_TOKENS, Limit, micro_batches, padding_share, planned, spent
from tests.fakes import comparisons, dialogues, quickly, rollouts


class Here:
    """An engine of one rank."""

    zero_stage = 0


def lengthy(lengths: list[int]) -> Dialogues:
    tokens = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    return Dialogues(tokens, torch.tensor(lengths), tokens.bool())


def cost(plan: list[Tensor], lengths: Tensor) -> int:
    return sum(len(index) * int(lengths[index].max()) + PASS_TOKENS for index in plan)


lengths_of_rows = st.lists(st.integers(1, 300), min_size=1, max_size=8)


@quickly
@given(lengths=lengths_of_rows, tokens=st.integers(1, 900))
def test_no_pass_has_more_tokens_than_are_allowed_but_for_a_row_that_is_longer_by_itself(lengths: list[int], tokens: int) -> None:
    rows = lengthy(lengths)
    plan = planned(rows, Limit(3, tokens))
    assert sorted(torch.cat(plan).tolist()) == list(range(len(rows)))
    for piece in micro_batches(rows, Limit(3, tokens)):
        assert piece.tokens.numel() <= tokens or len(piece) == 1
    assert spent(rows, Limit(3, tokens)).tolist() == [sum(lengths), cost(plan, rows.lengths) - PASS_TOKENS * len(plan)]


@quickly
@given(lengths=lengths_of_rows, most=st.one_of(st.integers(1, 9).map(Limit), st.integers(1, 900).map(lambda n: Limit(1, n))))
def test_no_other_way_to_cut_the_sorted_rows_costs_less(lengths: list[int], most: Limit) -> None:
    rows, ordered = lengthy(lengths), sorted(lengths)
    costs = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        edges = [0, *[n + 1 for n, cut in enumerate(cuts) if cut], len(lengths)]
        parts = [ordered[start:stop] for start, stop in itertools.pairwise(edges)]
        allowed = [len(p) <= most.rows if most.tokens is None else len(p) * p[-1] <= most.tokens or len(p) == 1 for p in parts]
        if all(allowed):
            costs.append(sum(len(p) * p[-1] + PASS_TOKENS for p in parts))
    assert cost(planned(rows, most), rows.lengths) == min(costs)


def test_short_rows_share_a_pass_and_a_long_one_does_not_stretch_them() -> None:
    rows = lengthy([10, 300, 11, 10, 12])
    assert [index.tolist() for index in planned(rows, Limit(16))] == [[0, 3, 2, 4], [1]]
    assert [index.tolist() for index in planned(rows, Limit(1, 24))] == [[0, 3], [2, 4], [1]]


def test_answers_that_are_compared_stay_together_under_a_budget_of_tokens() -> None:
    rows = comparisons(0, (3, 2, 4))
    where = {name: number for number, index in enumerate(planned(rows, Limit(1, 1))) for name in rows.group[index].tolist()}
    assert len(planned(rows, Limit(1, 1))) == 3
    assert sorted(where.values()) == [0, 1, 2]


def test_padding_is_what_was_computed_for_nothing() -> None:
    rows = lengthy([1, 3])
    assert padding_share(spent(rows, Limit(2))) == pytest.approx(2 / 6)
    assert padding_share(spent(rows, Limit(1))) == 0


@quickly
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), size=st.integers(1, 4), most=st.sampled_from([Limit(2), Limit(9), Limit(1, 30)]))
def test_scoring_in_passes_gives_every_piece_its_own_rows(seed: int, rows: int, size: int, most: Limit) -> None:
    pieces = [piece.trimmed() for piece in rollouts(seed % 1000, rows).split(size)]
    by_token = in_passes(Here(), pieces, lambda part: (part.tokens * part.mask).float(), most)  # type: ignore[arg-type]
    by_row = in_passes(Here(), pieces, lambda part: part.lengths.float(), most)  # type: ignore[arg-type]
    for piece, tokens, lengths in zip(pieces, by_token, by_row, strict=True):
        assert torch.equal(tokens, (piece.tokens * piece.mask).float())
        assert torch.equal(lengths, piece.lengths.float())


def test_a_plan_depends_on_the_lengths_alone() -> None:
    one, other = dialogues(0, 9), dialogues(0, 9)
    other.tokens.zero_()
    assert all(torch.equal(a, b) for a, b in zip(planned(one, Limit(3)), planned(other, Limit(3)), strict=True))
