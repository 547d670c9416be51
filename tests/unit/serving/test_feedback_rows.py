"""Feedback on its way into training: which rows it becomes, and that `data=feedback` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration import cli
from orchestration import config as configuration
from orchestration.data.source import open_source
from orchestration.errors import RequestError
from orchestration.serving.store.export import export
from orchestration.serving.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(str(tmp_path / "store.db"))
    yield opened
    opened.close()


def ask(store: Store, question: str, *answers: str, owner: str = "anna") -> list[str]:
    return store.record_answer(owner, [{"role": "user", "content": question}], answers, "model@1")


def rows(folder: Path, name: str) -> list[dict]:
    file = folder / name / "feedback.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def said(store: Store, folder: Path) -> tuple[set[tuple[str, ...]], set[tuple[tuple[str, ...], tuple[int, ...]]]]:
    """(demonstrations, comparisons) of an export, without their names."""
    export(store, folder)
    demonstrations = {tuple(turn["content"] for turn in row["messages"]) for row in rows(folder, "demonstrations")}
    return demonstrations, {(tuple(row["answers"]), tuple(row["ranks"])) for row in rows(folder, "comparisons")}


def test_a_choice_becomes_a_comparison(store: Store, tmp_path: Path) -> None:
    first, second, third = ask(store, "hi", "one", "two", "three")
    store.add_feedback("anna", "choice", [first, second, third], second, consent=True)
    assert said(store, tmp_path / "out") == (set(), {(("two", "one"), (0, 1)), (("two", "three"), (0, 1))})


def test_a_tie_and_an_even_vote_say_nothing(store: Store, tmp_path: Path) -> None:
    tied = ask(store, "hi", "one", "two")
    store.add_feedback("anna", "choice", tied, "tie", consent=True)
    voted = [(owner, ask(store, "bye", "one", "two", owner=owner)) for owner in ("anna", "boris")]
    for place, (owner, answers) in enumerate(voted):
        store.add_feedback(owner, "choice", answers, answers[place], consent=True)
        store.add_feedback(owner, "thumbs", answers[:1], ("up", "down")[place], consent=True)
    assert said(store, tmp_path / "out") == (set(), set())
    extra = ask(store, "bye", "two", "one", owner="clara")
    store.add_feedback("clara", "choice", extra, extra[0], consent=True)
    assert said(store, tmp_path / "out") == (set(), {(("two", "one"), (0, 1))})


def test_an_edit_becomes_a_demonstration_and_is_better_than_the_original(store: Store, tmp_path: Path) -> None:
    (answer,) = ask(store, "hi", "one")
    store.add_feedback("anna", "edit", [answer], "one, better", consent=True)
    assert said(store, tmp_path / "out") == ({("hi", "one, better")}, {(("one, better", "one"), (0, 1))})
    store.add_feedback("anna", "edit", [answer], " one ", consent=True)  # nothing but blanks changed
    assert said(store, tmp_path / "out") == ({("hi", "one")}, set())


def test_thumbs_become_demonstrations_and_one_comparison_per_prompt(store: Store, tmp_path: Path) -> None:
    for owner, answer, thumb in (("anna", "one", "up"), ("boris", "two", "down"), ("clara", "three", "up"), ("david", "one", "up")):
        store.add_feedback(owner, "thumbs", ask(store, "hi", answer, owner=owner), thumb, consent=True)  # type: ignore[arg-type]
    store.add_feedback("anna", "thumbs", ask(store, "other", "bad"), "down", consent=True)
    demonstrations, comparisons = said(store, tmp_path / "out")
    assert demonstrations == {("hi", "one"), ("hi", "three")}
    assert comparisons == {(("one", "three", "two"), (0, 0, 1))}


def test_the_same_said_twice_is_one_row_with_the_same_name_in_every_export(store: Store, tmp_path: Path) -> None:
    for owner in ("anna", "boris"):
        answers = ask(store, "hi", "one", "two", owner=owner)
        store.add_feedback(owner, "choice", answers, answers[0], consent=True)
    export(store, tmp_path / "first")
    store.add_feedback("anna", "thumbs", ask(store, "more", "later"), "up", consent=True)
    export(store, tmp_path / "second")
    (before,), (after,) = rows(tmp_path / "first", "comparisons"), rows(tmp_path / "second", "comparisons")
    assert before == after
    assert not any(name in json.dumps(before) for name in ("anna", "boris", "ans_", "fb_", "model@1"))


def test_only_what_the_user_could_see_is_exported(store: Store, tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi", "hidden": "SECRET PROMPT", "name": "x"}]
    conversation = store.new_conversation("anna", consent=True).id
    store.add_message("anna", conversation, "user", "hi", extra={"hidden": "SECRET PROMPT"})
    (answer,) = store.record_answer("anna", prompt, "hello", "model@1", conversation)
    store.add_feedback("anna", "thumbs", [answer], "up", consent=True)
    export(store, tmp_path / "out")
    (row,) = rows(tmp_path / "out", "demonstrations")
    assert row["messages"] == [*({k: m[k] for k in ("role", "content")} for m in prompt), {"role": "assistant", "content": "hello"}]
    assert "SECRET" not in (tmp_path / "out" / "demonstrations" / "feedback.jsonl").read_text()
    store.engine.dispose()
    assert conversation not in json.dumps(row)


def test_a_folder_that_holds_something_else_is_not_written_to(store: Store, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "demonstrations.jsonl").write_text("mine")
    with pytest.raises(RequestError, match="no export of feedback"):
        export(store, tmp_path / "own")
    assert (tmp_path / "own" / "demonstrations.jsonl").read_text() == "mine"


def filled(url: str, count: int) -> None:
    """A store with demonstrations and comparisons from `count` people."""
    store = Store.open(url)
    for number in range(count):
        owner, question = f"owner{number}", f"my pet is dog. what is my pet? {number}"
        answers = ask(store, question, f"your pet is dog. {number}", f"i do not know your pet. {number}", owner=owner)
        store.add_feedback(owner, "choice", answers, answers[0], consent=True)
        store.add_feedback(owner, "edit", answers[1:], f"your pet is a dog. {number}", consent=True)
    store.close()


def test_the_exported_folder_is_data_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, out = f"sqlite:///{tmp_path}/store.db", tmp_path / "out"
    filled(url, 30)
    assert cli.main(["feedback", "export", f"store={url}", f"out={out}"]) == 0
    assert f"experiment=feedback data.path={out}" in capsys.readouterr().out
    words = ["experiment=feedback", f"data.path={out}", "data.heldout=4", "data.heldout_preferences=10"]
    corpus = open_source(configuration.load(words)).load()
    assert len(corpus.comparisons) + len(corpus.held_out_comparisons) == 60
    assert corpus.ranked()
    assert {d.messages[-1].content.split(" ")[3] for d in corpus.demonstrations} == {"a"}
    assert len(corpus.demonstrations) + len(corpus.held_out) >= 20
    asked = {d.messages[0].content for d in corpus.demonstrations}
    assert not asked & {c.context.messages[0].content for c in corpus.held_out_comparisons}  # held out together


def test_mistakes_of_the_command_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["feedback", "export", f"store={tmp_path}/none.db", f"out={tmp_path}/out"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert cli.main(["feedback", "import"]) == 2
    filled(f"{tmp_path}/store.db", 0)
    assert cli.main(["feedback", "export", f"store={tmp_path}/store.db", f"out={tmp_path}/out"]) == 0
    assert "0 demonstrations, 0 comparisons" in capsys.readouterr().out
