"""The classifier: what it learns from, what it must not learn from, its file, and the one that chatray comes with."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from conf.moderation import Moderation
from orchestration import cli
from orchestration.errors import RequestError
from orchestration.serving.moderation.features import normal
from orchestration.serving.moderation.harmless import read_harmless
from orchestration.serving.moderation.labelled import Labelled, read_labelled
from orchestration.serving.moderation.linear import LinearModel
from orchestration.serving.moderation.moderators import decide, open_moderator, thresholds_of
from orchestration.serving.moderation.training import chosen, fitted, log_count_ratio, train

RUDE = "dolt oaf lout boor cad churl knave".split()
HARM = "stab burn crush strike smash".split()
WORDS = "table window garden river letter music bread winter paper mirror".split()


def rows(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Texts of an invented language of abuse; `violence` is known for every other text only."""
    rng, found = random.Random(seed), []
    for number in range(count):
        rude, harm = rng.random() < 0.3, rng.random() < 0.25
        words = [*rng.choices(WORDS, k=8), *(["you", rng.choice(RUDE)] if rude else []), *(["i", "will", rng.choice(HARM)] if harm else [])]
        rng.shuffle(words)
        row: dict[str, object] = {"prompt": " ".join(words), "HR": int(rude)}
        found.append(row | ({"V": int(harm)} if number % 2 else {}))
    return found


def written(file: Path, found: list[dict[str, object]]) -> Path:
    file.write_text("\n".join(map(json.dumps, found)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    return read_labelled(written(tmp_path_factory.mktemp("data") / "texts.jsonl", rows(240)))


@pytest.fixture(scope="module")
def model(data: Labelled) -> LinearModel:
    return train(data)


@pytest.fixture(scope="module")
def shipped() -> LinearModel:
    return LinearModel.load(Path(open_moderator.__code__.co_filename).with_name("default.safetensors"))


def test_what_is_missing_is_unknown_and_any_zero_is_known(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"text": "a", "H": 1}, {"text": "b", "V2": 0, "H": None}, {"prompt": "c", "any": 0}]
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, lines)))
    found = read_labelled(tmp_path)
    assert found.texts == ("a", "b", "c")
    assert found.categories == ("hate", "violence/graphic")
    np.testing.assert_array_equal(found.labels, [[1, np.nan], [np.nan, 0], [0, 0]])
    assert found.flagged().tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a", "H": 2}', "'H' is neither 1 nor 0"), ('{"text": "a", "H": "yes"}', "neither 1 nor 0"), ('{"H": 1}', "no text"),
        ('{"text": "a", "any": 1}', "'any' may only be 0"), ('{"text": "a", "any": 0, "H": 1}', "'any' may only be 0"), ("[", "line 1"),
        ('{"text": "a"}', "no text has a label"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(RequestError, match=says):
        read_labelled(tmp_path / "x.jsonl")


def test_it_learns_each_category_from_the_rows_where_it_is_known(data: Labelled, model: LinearModel) -> None:
    assert model.categories == ("any", "harassment", "violence")
    assert model.report["measured"]["violence"]["known"] == 120
    p = dict(
        zip(model.categories, model.probabilities(["table you dolt river", "bread i will stab music", "music bread table"]).T, strict=True)
    )
    assert p["harassment"][0] > max(0.5, *p["harassment"][1:])
    assert p["violence"][1] > max(0.5, p["violence"][0], p["violence"][2])
    assert p["any"][2] < min(p["any"][:2])
    assert model.report["measured"]["harassment"]["average_precision"] > 0.9


@given(
    st.lists(
        st.one_of(st.text(max_size=60), st.lists(st.sampled_from([*RUDE, *HARM, *WORDS, "you", "I"])).map(" ".join)), min_size=1, max_size=4
    )
)
@example(["", " ", "\u200b", "k i l l", "you you you you dolt dolt"])
def test_one_text_gets_the_scores_that_it_has_in_a_matrix(shipped: LinearModel, texts: list[str]) -> None:
    """A few texts at a time are what the service asks about; training works on matrices of all of them."""
    rows = [shipped.features.row(normal(text)) for text in texts]
    x = shipped.features.of([normal(text) for text in texts])
    for number, (columns, values, characters) in enumerate(rows):
        dense = np.zeros(x.shape[1], np.float32)
        dense[columns] = values
        np.testing.assert_allclose(dense, x[number].toarray()[0], atol=1e-6)
        assert (columns < shipped.features.characters).sum() == characters
    bayes = shipped.bayes.scores(x[:, : shipped.features.characters])
    expected = expit(x @ shipped.weights + bayes @ shipped.mix + shipped.bias)
    np.testing.assert_allclose(shipped.probabilities(texts), expected, atol=1e-5)


def test_unknown_labels_decide_nothing(data: Labelled) -> None:
    """A category is learned from the rows where it is known, and from no other."""
    texts = [normal(text) for text in data.texts]
    fit = fitted(data, texts, 0)
    column = data.categories.index("violence")
    known = np.flatnonzero(~np.isnan(data.labels[:, column]))
    assert 0 < len(known) < len(texts)
    spell = fit.features.of([texts[i] for i in known])[:, : fit.features.characters]
    expected = log_count_ratio(spell, data.labels[known, column])
    np.testing.assert_allclose(fit.bayes.ratio[:, column], expected, atol=1e-5)
    lr = LogisticRegression(C=10.0, class_weight="balanced", solver="liblinear", dual=True, max_iter=2000, random_state=0, tol=1e-3)
    lr.fit(spell, data.labels[known, column])
    np.testing.assert_allclose(fit.weights[: fit.features.characters, column, 0], lr.coef_[0], atol=1e-2)


def test_log_count_ratios_are_those_of_the_paper() -> None:
    from scipy.sparse import csr_matrix

    x = csr_matrix(np.array([[1.0, 0, 2], [1, 1, 0], [0, 3, 0]]))
    p, q = np.array([2.3, 1.3, 1.3]), np.array([0.3, 1.3, 0.3])
    assert np.allclose(log_count_ratio(x, np.array([1, 1, 0])), np.log((p / p.sum()) / (q / q.sum())), rtol=1e-6, atol=0)


def test_the_same_data_and_seed_give_the_same_model(data: Labelled, model: LinearModel) -> None:
    again = train(data)
    np.testing.assert_allclose(again.probabilities(data.texts[:20]), model.probabilities(data.texts[:20]), atol=1e-6)
    assert again.report == model.report


def test_too_few_flagged_texts_are_refused_and_a_rare_category_is_left_out() -> None:
    few = [{"text": f"table {n}", "H": int(n < 3)} for n in range(30)]
    texts = Labelled(tuple(str(row["text"]) for row in few), ("hate",), np.array([[float(row["H"])] for row in few]))
    with pytest.raises(RequestError, match="3 of 30 texts"):
        train(texts)
    labels = np.array([[float(n % 2), float(n < 2)] for n in range(30)])
    texts = Labelled(tuple(f"{'oaf' if n % 2 else 'bread'} table {n} {n}" for n in range(30)), ("hate", "violence"), labels)
    found = train(texts)
    assert found.categories == ("any", "hate")
    assert found.report["left_out"] == ["violence"]


def test_the_file_gives_back_the_same_model(model: LinearModel, data: Labelled, tmp_path: Path) -> None:
    model.save(tmp_path / "m.safetensors")
    loaded = LinearModel.load(tmp_path / "m.safetensors")
    np.testing.assert_allclose(loaded.probabilities(data.texts), model.probabilities(data.texts), atol=2e-3)
    assert loaded.thresholds() == model.thresholds()
    assert loaded.probabilities([]).shape == (0, 3)


def test_a_file_of_another_form_is_refused(model: LinearModel, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    with pytest.raises(RequestError, match="no such file"):
        LinearModel.load(file)
    file.write_bytes(b"\x80\x04\x95garbage")
    with pytest.raises(RequestError, match="not a classifier"):
        LinearModel.load(file)
    model.save(file)
    tensors = load_file(file)
    save_file(tensors, file, {"format": "chatray moderation 99"})
    with pytest.raises(RequestError, match="its format is 'chatray moderation 99'"):
        LinearModel.load(file)
    header = {"format": "chatray moderation 1", "categories": '["any", "harassment"]', "report": "{}"}
    save_file(tensors, file, header)
    with pytest.raises(RequestError, match="do not fit together"):
        LinearModel.load(file)
    save_file(tensors | {"characters": tensors["characters"][:50]}, file, header)
    with pytest.raises(RequestError, match="breaks off, or is far"):
        LinearModel.load(file)


def test_thresholds_say_at_which_precision_and_recall_they_were_chosen() -> None:
    y = np.array([1, 1, 1, 1, 0, 1, 0, 0, 0, 0], dtype=float)
    p = np.array([0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.3, 0.2, 0.1, 0.05])
    figures, limits = chosen(y, p)
    assert figures["true"] == 5
    assert limits == {
        "warn": 0.6, "warn_precision": 0.833, "warn_recall": 1.0, "block": 0.6, "block_precision": 0.833, "block_recall": 1.0,
    }  # fmt: skip
    assert chosen(y, -p)[1] == {"warn": -0.95, "warn_precision": 0.5, "warn_recall": 1.0}
    assert chosen(np.array([1.0, 0, 0, 0, 0, 0, 0, 1]), np.arange(8.0))[1] == {}


@pytest.mark.parametrize(
    "disguised",
    ["i will k1ll you", "I W\u0130LL KILL YOU".replace("\u0130", "I"), "i will k\u200bi\u200bl\u200bl you", "i will k i l l you",
     "\uff49 \uff57\uff49\uff4c\uff4c \uff4b\uff49\uff4c\uff4c you", "i will k\u00efll you", "i will killl you"],
)  # fmt: skip
def test_common_disguises_are_undone(disguised: str) -> None:
    assert normal(disguised).replace("killl", "kill") == "i will kill you"


def test_numbers_and_plain_words_stay_what_they_are() -> None:
    assert normal("In 1984, 300 people paid 5 dollars for A to B") == "in 1984, 300 people paid 5 dollars for a to b"


def test_the_shipped_classifier_lets_everyday_talk_through(shipped: LinearModel) -> None:
    moderator = open_moderator(Moderation())
    limits = thresholds_of(Moderation(), moderator)
    texts = [
        "hello, how are you?",
        "my pet is horse. my city is rome.",
        "how do I bake bread?",
        "your job is baker.",
        "Write a poem on spring.",
    ]
    assert [decide(scores, limits).action for scores in moderator.scores(texts)] == ["allow"] * 5


def test_the_shipped_classifier_stops_what_is_plainly_meant(shipped: LinearModel) -> None:
    moderator = open_moderator(Moderation())
    limits = thresholds_of(Moderation(), moderator)
    texts = ["I want to kill myself", "I want to k1ll my\u200bself", "you are a stupid idiot"]
    verdicts = [decide(scores, limits) for scores in moderator.scores(texts)]
    assert [verdict.action for verdict in verdicts[:2]] == ["block"] * 2
    assert verdicts[2].action != "allow"
    assert "self-harm" in verdicts[0].categories
    assert "self-harm" in verdicts[1].categories


def test_the_shipped_classifier_says_how_it_was_measured(shipped: LinearModel) -> None:
    for category, limits in shipped.thresholds().items():
        stated = shipped.report["thresholds"][category]
        assert {f"{action}_{figure}" for action in limits for figure in ("precision", "recall")} <= set(stated)
        assert limits.get("block", 1) >= limits.get("warn", 0)
    assert shipped.report["false_alarms"]["any"]["warn"] < 0.03


def test_train_and_evaluate_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "train.jsonl", rows(150))
    written(tmp_path / "test.jsonl", [*rows(100, seed=7), *rows(3)])
    out = tmp_path / "m.safetensors"
    assert cli.main(["moderation", "train", f"data={tmp_path}/train.jsonl", f"out={out}", "harmless=world"]) == 0
    assert "of 100 harmless texts" in capsys.readouterr().out
    assert cli.main(["moderation", "evaluate", f"model={out}", f"data={tmp_path}/test.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "3 of 103 texts are left out" in said
    assert "100 texts, thresholds of the classifier" in said
    assert cli.main(["moderation", "evaluate", f"model={out}", f"data={tmp_path}/train.jsonl"]) == 2
    assert cli.main(["moderation", "guess"]) == 2
    assert cli.main(["moderation", "train", f"data={tmp_path}/none.jsonl", f"out={out}"]) == 2
    assert cli.main(["moderation", "train", f"data={tmp_path}/train.jsonl", f"out={out}", "harmless=forum:x"]) == 2


def test_harmless_texts_come_from_the_formats_that_are_trained_on(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "good morning"}, {"role": "assistant", "content": "good morning to you"}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(talk))
    found = read_harmless(f"world,messages:{tmp_path / 'talk.jsonl'}")
    assert found[-2:] != []
    assert set(found[-2:]) == {"good morning", "good morning to you"}
    assert not any(danger in text for text in found for danger in ("bomb", "weapon"))


@pytest.mark.slow
def test_it_beats_tfidf_on_real_texts(real_data: Path) -> None:
    from tests.benchmarks.moderation import measured, splits

    data = read_labelled(real_data / "moderation").with_any()
    folds = [measured(data, learn, test) for _, learn, test in splits(data, range(1))]
    assert np.mean([fold["ours"]["any"] - fold["fixed"]["any"] for fold in folds]) > 0
