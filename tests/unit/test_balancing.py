from __future__ import annotations

import itertools
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.batch import Prompts, Rollouts
from orchestration.runtime.balancing import balanced, balanced_order
from orchestration.runtime.dispatch import PIECES, Pieces, by_rank, cut, gathered, shares, waves_of
from orchestration.stages.ppo import Loop
from tests.fakes import quickly, rollouts, smoke, with_section


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
    found = pieces.chosen(balanced_order(tokens, 4, whole=True))
    assert sorted(found.items) == sorted(pieces.items) and found.calls == ["call"]
    for ranks in (2, 4):
        assert {sum(int(item.split(":")[1]) for item in part) for part in shares(found.items, ranks)} == {40 // ranks}
    assert balanced_order(tokens, 4, whole=False) == balanced_order(tokens, 1, whole=True) == list(range(8))


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


@quickly
@given(together=st.sampled_from([1, 2, 4, 6]), each=st.integers(1, 7), waves=st.integers(1, 9), ranks=st.sampled_from([1, 2]))
def test_waves_take_as_much_from_every_rank_and_come_back_in_place(together: int, each: int, waves: int, ranks: int) -> None:
    ranks = ranks if together % ranks == 0 else 1
    pieces = Pieces([f"piece {number}" for number in range(together * each)], [])
    order = waves_of(len(pieces), together, waves)
    assert len(order) == min(waves, each)
    assert sorted(itertools.chain(*order)) == list(range(len(pieces)))
    for wave in order:
        for rank, part in enumerate(shares(wave, together)):
            assert part and all(number // each == rank for number in part)
    found = gathered([Pieces(pieces.chosen(wave).items, [number]) for number, wave in enumerate(order)], order)
    assert found.items == pieces.items and found.calls == list(range(len(order)))
    met = [[number for wave in order for number in shares(wave, ranks)[rank]] for rank in range(ranks)]
    assert by_rank(order, ranks) == list(itertools.chain(*met))
    assert waves > 1 or order == [list(range(len(pieces)))]


@pytest.mark.parametrize(("samples", "waves"), [(1, 1), (4, 1), (1, 3), (4, 2)])
def test_ppos_replies_reach_the_ranks_by_their_tokens_and_no_prompt_is_torn(samples: int, waves: int) -> None:
    asked = rollouts(0, 32)
    prompts = Prompts(asked.tokens, asked.lengths, torch.stack([torch.arange(32), torch.zeros(32, dtype=torch.long)], dim=1))
    given: list[list[Prompts]] = [[], []]  # two ranks, each of its own share
    coming: list[Prompts] = []

    def generate(pieces: Pieces[Prompts], sampling: object, later: Any = None, first: bool = True) -> Pieces[Prompts]:
        assert first == (not given[0])
        for rank, part in enumerate(shares(pieces.items, 2)):
            given[rank].extend(part)
        coming.extend(later.items if later else [])
        return Pieces(pieces.items, [])

    def counts() -> Pieces[list[int]]:
        return Pieces([[int(piece.lengths.sum()) ** 2 for piece in part] for part in given], [])

    def scored(what: str) -> Any:
        return lambda pieces, *_, **__: Pieces([f"{what} of {id(piece)}" for piece in pieces.items], [])

    config = with_section(smoke(), "ppo", batch=32, samples_per_prompt=samples, minibatches=1, waves=waves)
    loop = SimpleNamespace(
        ppo=config.ppo, config=config, prompts=prompts, together=2, timed=lambda *_: None,
        runtime=SimpleNamespace(put=lambda items: Pieces(items, []), get=lambda pieces, what: pieces.items),
        roles=SimpleNamespace(
            rollout=SimpleNamespace(generate=generate, token_counts=counts, group=SimpleNamespace(size=2)),
            reward=SimpleNamespace(score=scored("score")), reference=SimpleNamespace(logprobs=scored("reference")),
            critic=SimpleNamespace(values=scored("value")),
        ),
    )  # fmt: skip
    for name in ("order_of", "waves_of", "scored", "generate"):
        setattr(loop, name, partial(getattr(Loop, name), loop))
    loop.ahead = SimpleNamespace(take=lambda step: Loop.generate(loop, step))  # type: ignore[arg-type]
    sampled = Loop.sample(loop, 0)  # type: ignore[arg-type]
    found = sampled.rollouts
    assert sorted(map(id, found.items)) == sorted(map(id, chain(*given)))
    for what, pieces in (("score", sampled.scores), ("reference", sampled.reference), ("value", sampled.values)):
        assert pieces.items == [f"{what} of {id(piece)}" for piece in found.items]
    assert {id(piece) for piece in coming} <= {id(piece) for piece in found.items}
    assert len(coming) == (len(found) - len(waves_of(len(found), 2, waves)[0]) if waves > 1 else 0)
    prompts_of = [{int(name) for piece in part for name in piece.keys[:, 0]} for part in shares(found.items, 2)]
    assert not prompts_of[0] & prompts_of[1] and len(prompts_of[0] | prompts_of[1]) == 32 // samples
    prompted = [sum(int(piece.lengths.sum()) for piece in part) for part in given]
    assert abs(prompted[0] - prompted[1]) <= 2 * samples
    replied = [sum(int(piece.lengths.sum()) ** 2 for piece in part) for part in shares(found.items, 2)]
    as_sampled = [sum(int(piece.lengths.sum()) ** 2 for piece in part) for part in given]
    assert abs(replied[0] - replied[1]) <= abs(as_sampled[0] - as_sampled[1])
