from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration.data.dialogues import Dialogue
from orchestration.data.mixture import counts_for, mixed
from orchestration.errors import RequestError
from tests.fakes import quickly


def dialogues(**sizes: int) -> list[Dialogue]:
    return [Dialogue(f"{name}{n}", (), source=name) for name, size in sizes.items() for n in range(size)]


@quickly
@given(sizes=st.lists(st.integers(20, 500), min_size=2, max_size=4), weights=st.lists(st.floats(0.2, 5), min_size=4, max_size=4))
def test_shares_are_met_within_one_percent_and_nothing_is_left_out(sizes: list[int], weights: list[float]) -> None:
    names = [f"part{n}" for n in range(len(sizes))]
    wanted = dict(zip(names, weights, strict=False))
    found = counts_for(dict(zip(names, sizes, strict=True)), wanted)
    for name, size in zip(names, sizes, strict=True):
        assert found[name] >= size
        assert abs(found[name] / sum(found.values()) - wanted[name] / sum(wanted.values())) < 0.01


def test_the_smaller_part_is_repeated_in_whole_passes_and_part_of_one() -> None:
    some = dialogues(big=900, small=70)
    found, report = mixed(some, {"big": 3.0, "small": 1.0}, seed=0)
    times = Counter(d.id for d in found)
    assert {times[d.id] for d in some if d.source == "big"} == {1}
    assert {times[d.id] for d in some if d.source == "small"} == {4, 5}
    assert report["small"] == {"dialogues": 70, "used": 300, "share": 0.25, "passes": 4.286}
    assert found == mixed(some, {"big": 3.0, "small": 1.0}, seed=0)[0] != mixed(some, {"big": 3.0, "small": 1.0}, seed=1)[0]


def test_one_part_is_no_mixture() -> None:
    assert mixed(dialogues(a=3), {"a": 2.0}, 0) == (dialogues(a=3), {})
    assert mixed(dialogues(a=3), {}, 0) == (dialogues(a=3), {})


def test_an_empty_part_and_a_weight_out_of_proportion_are_refused() -> None:
    with pytest.raises(RequestError, match="no dialogue of b is left"):
        mixed(dialogues(a=3), {"a": 1.0, "b": 1.0}, 0)
    with pytest.raises(RequestError, match="2 dialogue.*b would be repeated"):
        mixed(dialogues(a=500, b=2), {"a": 1.0, "b": 10.0}, 0)
