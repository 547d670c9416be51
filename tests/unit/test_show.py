"""`chatray data show`, and the assistant-only mask on a dialogue that was marked by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from orchestration import cli, show
from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.source import Corpus, Judgement
from orchestration.errors import RequestError
from tests.fakes import smoke

DIALOGUE = Dialogue(
    "by hand",
    (
        Message("system", "be brief."),
        Message("user", "a chai, please."),
        Message("assistant", 'call find {"q":"chaï"}'),
        Message("tool", '{"id":7}'),
        Message("assistant", "one chai. right?"),
        Message("user", "what did i order?"),
        Message("assistant", "a tea.", scripted=True),
        Message("user", "no."),
        Message("assistant", "sorry, a chai."),
    ),
)
MARKED = (
    "<|system|>be brief.<|end|><|user|>a chai, please.<|end|>"
    '<|assistant|>«call find {"q":"chaï"}<|end|>»<|tool|>{"id":7}<|end|>'
    "<|assistant|>«one chai. right?<|end|>»<|user|>what did i order?<|end|>"
    "<|assistant|>a tea.<|end|><|user|>no.<|end|><|assistant|>«sorry, a chai.<|end|>»"
)
"""What is learned from stands in «»: the words and the end of each turn that the assistant wrote itself, and nothing else."""
CORPUS = Corpus(
    [DIALOGUE], [DIALOGUE], [DIALOGUE.before(4)], [], [], judgements=[Judgement(DIALOGUE.before(2), "hello.", False)], texts=["a b.", "c."]
)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(learn_tokenizer([DIALOGUE] * 4, 320))


def shown(chat: Chat, which: str, index: int = 0) -> str:
    (sample,) = show.samples_of(smoke(), CORPUS, chat, which, index)
    return show.coloured(chat, sample.ids, sample.mask).plain


def test_the_mask_is_the_one_marked_by_hand(chat: Chat) -> None:
    assert shown(chat, "demonstrations") == MARKED
    assert shown(chat, "held_out") == MARKED


def test_the_mask_of_a_batch_is_the_one_marked_by_hand(chat: Chat) -> None:
    rows = chat.dialogues([DIALOGUE])
    written = "".join(part.split("»")[0] for part in MARKED.split("«")[1:])
    assert chat.tokenizer.decode(rows.tokens[0][rows.mask[0]]) == written


def test_each_kind_of_token_has_its_colour(chat: Chat) -> None:
    ids, mask = chat.encode(DIALOGUE)
    text = show.coloured(chat, ids, mask)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["one chai. right?"] == show.LEARNED
    assert styles["what did i order?"] == styles["a tea."] == show.CONTEXT
    assert styles["<|tool|>"] == show.SPECIAL


def test_prompts_have_nothing_to_learn_from_texts_everything_and_comparisons_the_judged_reply(chat: Chat) -> None:
    assert "«" not in shown(chat, "prompts")
    assert shown(chat, "prompts").endswith('<|tool|>{"id":7}<|end|><|assistant|>')
    assert shown(chat, "texts", 1) == "«c.<|end|>»"
    assert shown(chat, "comparisons") == "<|system|>be brief.<|end|><|user|>a chai, please.<|end|><|assistant|>«hello.<|end|>»"


def test_comparisons_of_a_run_are_shown_with_each_answer_and_its_rank(chat: Chat, tmp_path: Path) -> None:
    config = dataclasses.replace(smoke(), run_dir=str(tmp_path))
    corpus = dataclasses.replace(CORPUS, judgements=[])
    with pytest.raises(RequestError, match="run stage=compare first"):
        show.samples_of(config, corpus, chat, "comparisons", 0)
    folder = tmp_path / "round_01/compare/checkpoint"
    folder.mkdir(parents=True)
    row = {"id": "x", "context": DIALOGUE.before(2).as_list(), "answers": ["yes.", "no."], "finished": [True, False], "ranks": [1, 0]}
    (folder / "comparisons.jsonl").write_text(json.dumps(row) + "\n")
    found = show.samples_of(config, corpus, chat, "comparisons", 0)
    assert [sample.title for sample in found] == ["comparisons 0: rank 1 of 2 (0 is best)", "comparisons 0: rank 0 of 2 (0 is best)"]
    assert show.coloured(chat, found[1].ids, found[1].mask).plain.endswith("<|assistant|>«no.»")


def test_counts_are_those_of_the_mask_and_a_sample_too_long_says_so() -> None:
    sample = show.Sample("x", [1, 2, 3, 4], [False, True, True, False])
    assert show.counted(sample, 4) == "4 tokens, 2 learned from «», 2 context"
    assert "longer than the context of 3" in show.counted(sample, 3)


def test_the_plain_form_of_a_whole_sample(tmp_path: Path) -> None:
    config = smoke(f"run_dir={tmp_path}", "data.demonstrations=20", "data.texts=5")
    page = Console(file=io.StringIO(), width=300)
    show.show(config, "demonstrations", 2, page)
    title, text, counts = page.file.getvalue().splitlines()
    assert title == "demonstrations 2 of 20: demo-0-2"
    assert text.startswith("<|user|>")
    assert text.endswith("<|end|>»")
    assert re.fullmatch(r"\d+ tokens, \d+ learned from «», \d+ context", counts)
    show.show(config, "texts", 0, page)
    assert "texts 0 of 5" in page.file.getvalue()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["data"], "chatray data show"),
        (["data", "list"], "chatray data show"),
        (["data", "show", "experiment=smoke", "set=rows"], "set=rows: no such set; choose from demonstrations"),
        (["data", "show", "experiment=smoke", "index=x"], "index=x: not a whole number"),
        (["data", "show", "experiment=smoke", "index=9999"], "index=9999: set=demonstrations has 400 samples, 0 to 399"),
        (["data", "show", "experiment=smoke", "data.nothing=1"], "data.nothing: no such setting"),
    ],
)
def test_a_wrong_request_is_one_clear_error(words: list[str], wanted: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words) == 2
    assert wanted in capsys.readouterr().err
