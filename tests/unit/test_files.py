from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestration.data.files import FilesSource
from orchestration.data.source import Corpus
from orchestration.errors import RequestError
from tests.fakes import files_data


def talk(number: int, words: str = "") -> dict[str, Any]:
    said = [
        ("user", f"question {number} {words}"),
        ("assistant", f"first answer {number}"),
        ("user", "and?"),
        ("assistant", f"more {number}"),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def pair(number: int, group: int | None = None) -> dict[str, Any]:
    before = f"\n\nHuman: question {number if group is None else group}\n\nAssistant: a\n\nHuman: b{number}\n\nAssistant:"
    return {"chosen": f"{before} yes {number}", "rejected": f"{before} no {number}"}


def write(file: Path, rows: list[Any]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return str(file)


def load(*parts: dict[str, Any], seed: int = 0, **changes: Any) -> Corpus:
    return FilesSource(files_data(*parts, **changes), judge_prompts=6, seed=seed).load()


def counts(corpus: Corpus, number: int = 0) -> tuple[int, ...]:
    account = corpus.report["sources"][number]
    assert account["read"] == sum(account[name] for name in ("used", "held_out", "skipped", "duplicates"))
    return tuple(account[name] for name in ("read", "used", "held_out", "skipped", "duplicates"))


def test_dialogues_are_used_or_held_out_and_prompts_are_contexts_of_assistant_turns(tmp_path: Path) -> None:
    corpus = load({"format": "messages", "path": write(tmp_path / "a.jsonl.gz", [talk(n) for n in range(30)])}, heldout=5)
    assert (len(corpus.demonstrations), len(corpus.held_out)) == (25, 5)
    assert counts(corpus) == (30, 25, 5, 0, 0)
    for prompts, origin in ((corpus.prompts, corpus.demonstrations), (corpus.judge_prompts, corpus.held_out)):
        whole = {d.id: d for d in origin}
        for prompt in prompts:
            name, _, turn = prompt.id.rpartition("@")
            assert prompt.messages == whole[name].messages[: int(turn)]
            assert whole[name].messages[int(turn)].role == "assistant"
    assert {len(prompt.messages) for prompt in corpus.prompts} == {1, 3}
    assert any("30 rows read = 25 used + 5 held out + 0 skipped" in note for note in corpus.notes)


def test_pairs_are_held_out_by_conversation_and_their_chosen_side_is_not_learned_from(tmp_path: Path) -> None:
    rows = [pair(n, n // 3) for n in range(60)]
    corpus = load({"format": "hh", "path": write(tmp_path / "a.jsonl", rows)}, heldout=4, heldout_preferences=10)
    assert corpus.ranked()
    assert len(corpus.held_out_comparisons) == 12  # whole conversations of three
    assert len(corpus.comparisons) == len(corpus.demonstrations) == 48
    openings = [{c.context.messages[0].content for c in some} for some in (corpus.comparisons, corpus.held_out_comparisons)]
    assert not openings[0] & openings[1]
    assert not {d.messages[0].content for d in corpus.demonstrations} & openings[1]
    assert len(corpus.held_out) == 4
    assert counts(corpus) == (60, 48, 12, 0, 0)


def test_a_bad_row_is_refused_with_file_line_reason_and_setting(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [talk(0), talk(1), {"messages": []}])
    with pytest.raises(RequestError) as refused:
        load({"format": "messages", "path": file})
    assert f"{file}, line 3: there is no assistant turn" in str(refused.value)
    assert "data.on_bad_row=skip" in str(refused.value)


def test_skipped_rows_are_counted_and_listed(tmp_path: Path) -> None:
    rows = [talk(n) for n in range(9)] + ["{", {"messages": [{"role": "robot", "content": "x"}]}, {"messages": [{"role": "robot"}]}]
    corpus = load({"format": "messages", "path": write(tmp_path / "a.jsonl", rows)}, on_bad_row="skip")
    assert counts(corpus) == (12, 7, 2, 3, 0)
    listed = corpus.report["sources"][0]["skipped_rows"]
    assert [text.partition(": ")[0] for text in listed] == [f"{tmp_path / 'a.jsonl'}, line {line}" for line in (10, 11, 12)]
    assert sum(corpus.report["sources"][0]["reasons"].values()) == 3


def test_a_mixture_meets_its_weights_in_the_prompts_and_names_each_dialogues_source(tmp_path: Path) -> None:
    instructions = [{"instruction": f"do {n}", "output": f"done {n}"} for n in range(20)]
    parts = (
        {"format": "messages", "path": write(tmp_path / "a.jsonl", [talk(n) for n in range(400)]), "weight": 3.0},
        {"format": "instructions", "path": write(tmp_path / "b.jsonl", instructions)},
    )
    corpus = load(*parts, heldout=20)
    assert corpus.weights == {"messages": 3.0, "instructions": 1.0}
    share = sum(p.messages[0].content.startswith("do ") for p in corpus.prompts) / len(corpus.prompts)
    assert abs(share - 0.25) < 0.01
    assert abs(corpus.report["mixture"]["instructions"]["share"] - 0.25) < 0.01
    assert sum(p["read"] for p in corpus.report["sources"]) == 420


def test_duplicates_of_held_out_rows_are_reported_and_left_out_on_request(tmp_path: Path) -> None:
    rows = [talk(n, " ".join(f"w{i}" for i in range(99))) if n < 12 else talk(n) for n in range(60)]
    rows += [talk(30)] * 20
    file = write(tmp_path / "a.jsonl", rows)
    told = load({"format": "messages", "path": file}, heldout=20)
    found = told.report["duplicates"]
    assert found["exact"] > 0 and found["near"] > 0 and len(told.demonstrations) == 60
    assert found["listed"][0]["similarity"] == 1.0
    dropped = load({"format": "messages", "path": file}, heldout=20, drop_duplicates=True)
    assert counts(dropped) == (80, 60 - found["exact"] - found["near"], 20, 0, found["exact"] + found["near"])
    said = [{" ".join(m.content for m in d.messages) for d in some} for some in (dropped.demonstrations, dropped.held_out)]
    assert not said[0] & said[1]


def test_texts_are_kept_apart_from_dialogues(tmp_path: Path) -> None:
    texts = write(tmp_path / "books.txt", [f"chapter {n}\n" for n in range(100)])
    more = load(
        {"format": "messages", "path": write(tmp_path / "a.jsonl", [talk(n) for n in range(9)])},
        {"format": "text", "path": texts},
    )
    assert (len(more.texts), len(more.held_out_texts), len(more.demonstrations)) == (95, 5, 7)
    assert more.weights == {"messages": 1.0}


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl"])
def test_a_local_data_set_is_read_by_its_columns(tmp_path: Path, suffix: str) -> None:
    rows = [{"instruction": f"do {n}", "input": None, "output": f"done {n}"} for n in range(9)]
    table, file = pyarrow.Table.from_pylist(rows), tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, file)
    elif suffix == "arrow":
        with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    else:
        write(file, rows)
    corpus = load({"format": "dataset", "name": str(tmp_path), "columns": "instructions"})
    assert counts(corpus) == (9, 7, 2, 0, 0)
    assert corpus.weights == {"instructions": 1.0}


def test_a_data_set_of_the_hub_is_streamed_and_its_failure_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def streamed(name: str, split: str, streaming: bool):
        assert (name, split, streaming) == ("people/talk", "test", True)
        yield from (talk(n) for n in range(9))
        if broken:
            raise ConnectionError("gone")

    monkeypatch.setattr("datasets.load_dataset", streamed)
    part = {"format": "dataset", "name": "people/talk", "split": "test", "columns": "messages"}
    broken = False
    assert counts(load(part)) == (9, 7, 2, 0, 0)
    broken = True
    with pytest.raises(RequestError, match=r"'people/talk', split 'test', cannot be read beyond row 9 \(gone\)"):
        load(part)


def test_preferences_that_cannot_be_learned_from_are_refused(tmp_path: Path) -> None:
    tied = [{"prompt": f"q{n}", "answers": ["a", "b"], "ranks": [0, 0]} for n in range(9)]
    corpus = load(
        {"format": "rankings", "path": write(tmp_path / "r.jsonl", tied)},
        {"format": "messages", "path": write(tmp_path / "a.jsonl", [talk(n) for n in range(9)])},
        heldout_preferences=3,
    )
    with pytest.raises(RequestError, match="all 6 comparisons to learn from are ties"):
        corpus.ranked()
    with pytest.raises(RequestError, match="0 comparisons or judgements to learn from"):
        load({"format": "messages", "path": str(tmp_path / "a.jsonl")}).ranked()


def test_the_fingerprint_follows_content_and_settings_not_the_place(tmp_path: Path) -> None:
    marks = set()
    for folder in ("one", "two"):
        data = files_data({"format": "messages", "path": str(Path(write(tmp_path / folder / "a.jsonl", [talk(1)])).parent)})
        marks.add(FilesSource(data, 1, 0).fingerprint())
    assert len(marks) == 1
    write(tmp_path / "two" / "a.jsonl", [talk(2)])
    marks.add(FilesSource(data, 1, 0).fingerprint())
    marks.add(FilesSource(files_data({"format": "messages", "path": str(tmp_path / "two")}, heldout=1), 1, 0).fingerprint())
    assert len(marks) == 3


def test_the_same_seed_gives_the_same_corpus(tmp_path: Path) -> None:
    part = {"format": "hh", "path": write(tmp_path / "a.jsonl", [pair(n) for n in range(30)])}
    assert load(part, heldout_preferences=5) == load(part, heldout_preferences=5) != load(part, heldout_preferences=5, seed=1)


@settings(derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spoilt=st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=3)), max_size=4),
    form=st.sampled_from(["messages", "hh", "instructions", "taskmaster", "rankings", "text"]),
    name=st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.json"]),
    policy=st.sampled_from(["refuse", "skip"]),
)
def test_spoilt_files_are_refused_or_their_rows_counted(tmp_path: Path, spoilt: list, form: str, name: str, policy: str) -> None:
    file = tmp_path / name
    rows = [
        talk(n) | pair(n) | {"instruction": "a", "output": "b", "text": "c", "prompt": "p", "answers": ["a", "b"], "ranks": [0, 1]}
        for n in range(12)
    ]
    content = bytearray(json.dumps(rows).encode() if name == "a.json" else "\n".join(map(json.dumps, rows)).encode())
    content = bytearray(gzip.compress(bytes(content))) if name.endswith(".gz") else content
    for at, change in spoilt:
        content[at % len(content) : at % len(content) + len(change)] = change
    file.write_bytes(content)
    with contextlib.suppress(RequestError):  # nothing else may be raised
        read, *places = counts(load({"format": form, "path": str(file)}, on_bad_row=policy))
        assert read == sum(places)


def test_the_published_pairs_are_read_and_the_few_bad_rows_named(real_data: Path) -> None:
    corpus = load(
        {"format": "hh", "path": str(real_data / "hh-rlhf" / "harmless-base.jsonl.gz")}, on_bad_row="skip", heldout_preferences=400
    )
    assert counts(corpus) == (1900, 1490, 400, 10, 0)


def test_the_published_sets_mix_in_the_proportions_asked_for(real_data: Path) -> None:
    parts = (
        {"format": "taskmaster", "path": str(real_data / "taskmaster-4"), "weight": 3.0},
        {"format": "instructions", "path": str(real_data / "self-instruct")},
    )
    corpus = load(*parts, heldout=200, heldout_preferences=500, near_duplicate=0.0)
    assert counts(corpus, 1)[0] == 175
    for name, share in (("taskmaster", 0.75), ("instructions", 0.25)):
        assert abs(corpus.report["mixture"][name]["share"] - share) < 0.01
