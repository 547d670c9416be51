"""Plain text: blocks to learn from, and the embedded world's articles."""

from __future__ import annotations

import dataclasses
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration import config as configuration
from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.source import open_source
from orchestration.data.text import blocks, byte_count, validation_and_test
from orchestration.data.world import texts
from orchestration.data.world.grammar import ADVICE, ITEMS
from orchestration.data.world.scenarios import is_held_out
from orchestration.errors import RequestError
from orchestration.recipe import identity, inputs_of, stages_of
from orchestration.run_directory import RunDirectory
from tests.fakes import quickly, smoke

chat = Chat(learn_tokenizer([], 300, ["some text to learn from, ", "and more of it."] * 4))


@quickly
@given(documents=st.lists(st.text(max_size=20), min_size=1, max_size=8), length=st.integers(2, 12))
def test_every_token_of_every_document_and_the_end_behind_it_is_predicted_exactly_once(documents: list[str], length: int) -> None:
    rows = blocks(documents, chat, length)
    wanted = [token for ids in chat.texts(documents) for token in (*ids, chat.end)]
    assert rows.tokens[rows.mask].tolist() == wanted
    assert rows.tokens.shape[1] == length
    assert rows.tokens[0, 0] == chat.end
    assert (rows.lengths[:-1] == length).all()
    assert int((rows.lengths - 1).sum()) == len(wanted)
    for before, after in zip(rows.tokens, rows.tokens[1:], strict=False):
        assert after[0] == before[-1]


def test_special_tokens_in_a_document_stay_text() -> None:
    rows = blocks(["a<|end|>b"], chat, 64)
    assert rows.tokens[rows.mask].tolist().count(chat.end) == 1


def test_the_tokenizer_learns_from_texts_too() -> None:
    word = "zyzzyva"
    assert len(Chat(learn_tokenizer([], 300, [word] * 9)).text(word)) < len(chat.text(word))


def test_held_out_documents_are_halved_and_bytes_are_those_of_utf_8() -> None:
    assert validation_and_test(["a", "b", "c"]) == (["a"], ["b", "c"])
    assert byte_count(["aé", "b"]) == 4


def test_articles_are_a_function_of_the_seed_and_all_different() -> None:
    some = texts.documents(300, 1)
    assert some == texts.documents(400, 1)[:300]
    assert some != texts.documents(300, 2)
    assert len(set(some)) == 300
    assert all(text == text.lower() and 2 <= text.count(".") <= texts.SENTENCES for text in some)


def test_articles_say_nothing_that_is_kept_for_judging_and_every_other_advice() -> None:
    some = " ".join(texts.documents(1500, 0))
    said = {(verb, item) for verb, item in product(ADVICE, ITEMS) if f"to {verb} the {item}, {ADVICE[verb]}." in some}
    assert said == {(verb, item) for verb, item in product(ADVICE, ITEMS) if not is_held_out(verb, item)}
    assert set(re.findall(r"to (\w+) the (\w+),", some)) == said


def test_the_world_holds_a_tenth_more_documents_out_and_its_fingerprint_follows_their_number() -> None:
    config = smoke("data.texts=25")
    corpus = open_source(config).load()
    assert (len(corpus.texts), len(corpus.held_out_texts)) == (25, 3)
    assert not set(corpus.texts) & set(corpus.held_out_texts)
    assert open_source(config).fingerprint() != open_source(smoke("data.texts=24")).fingerprint()
    none = open_source(smoke("data.texts=0")).load()
    assert none.texts == none.held_out_texts == []


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["data.texts=0", "ppo.ptx=0.5"], r"ppo\.ptx=0\.5: it is a loss on pretraining text, and there is none \(data\.texts=0\)"),
        (["data.texts=0", "pretrain.steps=3"], r"pretrain\.steps=3: there is no text to pretrain on \(data\.texts=0\)"),
        (["stage=pretrain"], r"stage=pretrain: pretrain\.steps=0 leaves that stage out; set pretrain\.steps above 0"),
        (["from=pretrain"], r"from=pretrain: pretrain\.steps=0"),
        (["pretrain.steps=3", "pretrain.batch=3", "placement=split"], r"pretrain\.batch=3: not divisible"),
    ],
)
def test_pretraining_that_cannot_be_is_refused_before_anything_starts(words: list[str], wanted: str) -> None:
    with pytest.raises(RequestError, match=wanted):
        configuration.load(["experiment=smoke", *words])


def test_pretraining_is_a_stage_and_an_input_of_sft_only_when_it_has_steps(tmp_path) -> None:
    without, with_it = smoke(), smoke("pretrain.steps=3")
    assert stages_of(without)[0] == "sft"
    assert stages_of(with_it)[:2] == ("pretrain", "sft")
    assert inputs_of("sft", without) == ()
    assert inputs_of("sft", with_it) == ("pretrain",)
    run, shared = RunDirectory(tmp_path, 1), _Shared(without)
    assert "pretrain" not in identity("sft", without, run, shared)["inputs"]
    assert "pretrain" in identity("sft", with_it, run, shared)["inputs"]


def test_packing_is_no_part_of_the_identity(tmp_path) -> None:
    run, config = RunDirectory(tmp_path, 1), smoke()
    packed = dataclasses.replace(config, sft=dataclasses.replace(config.sft, packing=True, pack_length=99))
    assert identity("sft", config, run, _Shared(config)) == identity("sft", packed, run, _Shared(config))


class _Shared:
    """What `identity` asks of a run's shared state."""

    def __init__(self, config) -> None:
        self.source = open_source(config)
