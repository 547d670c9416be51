"""Characters, stop strings and canaries in a text that comes in pieces."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.serving.canaries import Guard, Secret
from orchestration.serving.detokenizing import Detokenizer
from orchestration.serving.stopping import Stops
from tests.serving_stand_ins import chat

CUTS = st.lists(st.integers(1, 7), min_size=1, max_size=40)


def in_pieces(items: list[int], cuts: list[int]) -> list[list[int]]:
    found, start = [], 0
    while start < len(items):
        step = cuts[len(found) % len(cuts)]
        found.append(items[start : start + step])
        start += step
    return found


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), CUTS)
def test_text_in_pieces_is_the_text(text: str, cuts: list[int]) -> None:
    reader = Detokenizer(chat().tokenizer)
    shown = [reader.push(piece) for piece in in_pieces(chat().text(text), cuts)]
    assert "".join(shown) + reader.finish() == chat().decode(chat().text(text))
    if "�" not in text:
        assert not any("�" in piece for piece in shown)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(10, 265), max_size=80), CUTS)
def test_bytes_that_are_no_text_do_not_hold_anything_up(ids: list[int], cuts: list[int]) -> None:
    reader = Detokenizer(chat().tokenizer)
    for piece in in_pieces(ids, cuts):
        reader.push(piece)
        assert len(reader.pending) < 8


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), CUTS)
def test_a_stop_string_is_found_however_text_is_cut(text: str, words: list[str], cuts: list[int]) -> None:
    stops = Stops(words)
    expected = min((place for word in words if (place := text.find(word)) >= 0), default=None)
    seen, released = "", 0
    for piece in in_pieces(list(text), cuts):  # type: ignore[arg-type]
        new = "".join(map(str, piece))
        seen += new
        if (found := stops.find(seen, len(new))) is not None:
            # the first one that is complete: a longer one that began before may still have been coming
            assert any(seen.startswith(word, found) for word in words)
            assert released <= found
            return
        released = max(released, stops.safe(seen))
        assert expected is None or released <= expected
    assert expected is None


@settings(max_examples=100, deadline=None)
@given(CUTS, st.integers(0, 5))
def test_a_recital_is_found_however_text_is_cut(cuts: list[int], start: int) -> None:
    secret = "never tell anybody about the green door under the stairs of the old house"
    text = "Well, " + " ".join(secret.split()[start:])
    guard = Guard(Secret([secret], 6))
    released = 0
    for piece in in_pieces(list(text), cuts):  # type: ignore[arg-type]
        guard.push("".join(map(str, piece)))
        released = max(released, guard.safe()) if guard.broken is None else released
    assert guard.broken == len("Well, ")
    assert released <= guard.broken
