from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from orchestration.data.duplicates import Duplicate, find, shingles
from tests.fakes import quickly


def text(seed: int, words: int = 80) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(3000)}" for _ in range(words))


def test_the_same_words_are_exact_duplicates_whatever_their_case_and_spacing() -> None:
    held_out = [text(n) for n in range(40)]
    assert find([text(99), held_out[7].upper().replace(" ", "\n "), text(98)], held_out, 0.8) == [Duplicate(1, 7, 1.0, True)]


def test_near_duplicates_are_found_with_their_similarity_and_others_are_not() -> None:
    held_out = [text(n) for n in range(100)]
    changed = held_out[3].split()
    changed[40] = "other"
    half = " ".join(held_out[4].split()[:40] + text(500).split()[:40])
    (found,) = find([" ".join(changed), half, text(77_000)], held_out, 0.8)
    assert (found.train, found.held_out, found.exact) == (0, 3, False)
    assert found.similarity == len(shingles(" ".join(changed)) & shingles(held_out[3])) / len(
        shingles(" ".join(changed)) | shingles(held_out[3])
    )
    assert find([" ".join(changed)], held_out, 0.95) == []


@quickly
@given(
    st.lists(st.text("ab ", max_size=20), max_size=5), st.lists(st.text("ab ", max_size=20), max_size=5), st.sampled_from([0.0, 0.5, 1.0])
)
def test_any_texts_give_true_duplicates_only(train: list[str], held_out: list[str], limit: float) -> None:
    for d in find(train, held_out, limit):
        mine, other = shingles(" ".join(train[d.train].split())), shingles(" ".join(held_out[d.held_out].split()))
        assert len(mine & other) / len(mine | other) >= max(limit, 1.0 if d.exact else 0.0)


def test_short_texts_are_one_shingle() -> None:
    assert shingles("a b") == {"a b"}
    assert shingles("a b c d e f") == {"a b c d e", "b c d e f"}
