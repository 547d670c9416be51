from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from orchestration.data.files import FilesSource
from orchestration.errors import RequestError
from tests.fakes import files_data


def call(name: str, request: str, response: str) -> list[dict[str, str]]:
    kinds = (("api_call", name), ("request", request), ("api_response", name), ("response", response))
    return [{"name": kind, "value": value, "context": "c"} for kind, value in kinds]


def dialogue(number: int) -> dict[str, Any]:
    made = call("get_menu_items", '{"query": "Latte"}', '{"items": [{"id": "latte-1"}]}') + call("add", '{"id": 1}', "not json ")
    return {
        "conversation_id": f"d{number}",
        "utterances": [
            {"speaker": "user", "text": " one latte please ", "annotations": made},
            {"speaker": "assistant", "text": "anything else?", "annotations": []},
            {"speaker": "user", "text": "", "annotations": call("finish", "{}", '{"success": true}')},
            {"speaker": "assistant", "text": f"goodbye {number}", "annotations": None},
        ],
    }


def judgement(conversation: str, reward: Any = 1, generation: Any = None) -> dict[str, Any]:
    context = [
        {"role": "agent", "text": "welcome"},
        {"role": "user", "text": " a latte "},
        {"role": "api", "response": {"get": {"items": ["é"]}}},
    ]
    return {
        "conversation_id": conversation,
        "context": json.dumps(context),
        "generation": json.dumps(generation or {"role": "agent", "api": {"add": {"id": "latte", "n": 2}}}),
        "reward": reward,
    }


def write(folder: Path, dialogues: Any, judgements: Any) -> Path:
    for part, rows in (("data", dialogues), ("reward", judgements)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        with gzip.open(folder / part / "a.json.gz", "wt", encoding="utf-8") as file:
            json.dump(rows, file)
    return folder


def settings(path: Path, **changes: Any):
    given = {"heldout": 2, "heldout_preferences": 3} | changes
    return files_data({"format": "taskmaster", "path": str(path)}, **given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, [dialogue(n) for n in range(6)], [judgement(f"c{n // 2}", n % 2) for n in range(12)])


def source(path: Path, **changes: Any) -> FilesSource:
    return FilesSource(settings(path, **changes), judge_prompts=5, seed=0)


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(RequestError) as refused:
        source(path, **changes).load()
    return str(refused.value)


def test_api_calls_become_assistant_turns_and_responses_tool_turns(folder: Path) -> None:
    corpus = source(folder).load()
    found = next(d for d in [*corpus.demonstrations, *corpus.held_out] if d.id == "d3")
    assert [(m.role, m.content) for m in found.messages] == [
        ("user", "one latte please"),
        ("assistant", 'call get_menu_items {"query":"Latte"}'),
        ("tool", '{"items":[{"id":"latte-1"}]}'),
        ("assistant", 'call add {"id":1}'),
        ("tool", "not json"),
        ("assistant", "anything else?"),
        ("assistant", "call finish {}"),
        ("tool", '{"success":true}'),
        ("assistant", "goodbye 3"),
    ]


def test_judgements_keep_context_reply_and_verdict(folder: Path) -> None:
    corpus = source(folder).load()
    for found in [*corpus.judgements, *corpus.held_out_judgements]:
        assert [(m.role, m.content) for m in found.context.messages] == [
            ("assistant", "welcome"),
            ("user", "a latte"),
            ("tool", '{"items":["é"]}'),
        ]
        assert found.reply == 'call add {"id":"latte","n":2}'
    assert sorted(j.good for j in [*corpus.judgements, *corpus.held_out_judgements]) == [False] * 6 + [True] * 6


def test_a_judged_reply_in_words_is_kept_as_words(tmp_path: Path) -> None:
    rows = [judgement(f"c{n}", 1, {"role": "agent", "text": " hello "}) for n in range(6)]
    corpus = source(write(tmp_path, [dialogue(n) for n in range(6)], rows)).load()
    assert {j.reply for j in corpus.judgements} == {"hello"}


def test_the_held_out_parts_have_the_sizes_asked_for_and_share_no_conversation(folder: Path) -> None:
    corpus = source(folder).load()
    assert len(corpus.held_out) == 2
    assert len(corpus.demonstrations) == 4
    assert not {d.id for d in corpus.held_out} & {d.id for d in corpus.demonstrations}
    assert len(corpus.held_out_judgements) == 4  # at least 3, in whole conversations of two
    assert not {j.context.id for j in corpus.held_out_judgements} & {j.context.id for j in corpus.judgements}


def test_prompts_are_contexts_of_assistant_turns_from_the_right_dialogues(folder: Path) -> None:
    corpus = source(folder).load()
    assert len(corpus.judge_prompts) == 5
    for prompts, origin in ((corpus.prompts, corpus.demonstrations), (corpus.judge_prompts, corpus.held_out)):
        whole = {d.id: d for d in origin}
        for prompt in prompts:
            name, _, turn = prompt.id.partition("@")
            assert prompt.messages == whole[name].messages[: int(turn)]
            assert whole[name].messages[int(turn)].role == "assistant"


def test_the_same_seed_gives_the_same_corpus(folder: Path) -> None:
    assert source(folder).load() == source(folder).load()
    assert FilesSource(settings(folder), 5, seed=1).load() != source(folder).load()


@pytest.mark.parametrize("room", [16, 27])
def test_long_responses_lose_their_middle(folder: Path, room: int) -> None:
    corpus = source(folder, tool_response_chars=room).load()
    responses = [m.content for d in corpus.demonstrations for m in d.messages if m.role == "tool"]
    assert max(map(len, responses)) <= room
    assert any("…" in text for text in responses)
    if room == 27:
        assert '{"items":[{" … "latte-1"}]}' in responses


def test_plain_json_files_are_read_like_packed_ones(folder: Path, tmp_path: Path) -> None:
    packed = folder / "data" / "a.json.gz"
    (folder / "data" / "a.json").write_bytes(gzip.decompress(packed.read_bytes()))
    wanted = source(folder).load()
    packed.unlink()
    assert len(source(folder).load().demonstrations) == 4
    assert len(wanted.demonstrations) == 10


def test_the_fingerprint_follows_the_files_and_settings_not_the_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    mark = source(folder).fingerprint()
    moved = tmp_path_factory.mktemp("moved")
    for file in folder.rglob("*.gz"):
        (moved / file.parent.name).mkdir(exist_ok=True)
        (moved / file.parent.name / file.name).write_bytes(file.read_bytes())
    assert source(moved).fingerprint() == mark
    assert source(moved, heldout=1).fingerprint() != mark
    write(moved, [dialogue(n) for n in range(7)], [judgement("c", 1)])
    assert source(moved).fingerprint() != mark


def test_a_reward_that_is_no_judgement_is_refused_with_file_line_and_value(folder: Path) -> None:
    write(folder, [dialogue(0)], [judgement("c0"), judgement("c1", 0.5)])
    assert f"{folder / 'reward' / 'a.json.gz'}, line 2: reward 0.5 is neither 0 nor 1" in refusal(folder)


@pytest.mark.parametrize("missing", ["context", "generation", "reward", "conversation_id"])
def test_a_judgement_without_a_field_is_refused_by_name(folder: Path, missing: str) -> None:
    row = judgement("c9")
    del row[missing]
    write(folder, [dialogue(0)], [row])
    text = refusal(folder)
    assert "a.json.gz, line 1: " in text
    assert missing in text


def test_a_dialogue_with_an_unknown_speaker_is_refused_by_name(folder: Path) -> None:
    row = dialogue(4)
    row["utterances"][1]["speaker"] = "robot"
    write(folder, [dialogue(0), row], [judgement("c0")])
    assert "data/a.json.gz, line 2: utterance 2: unknown speaker 'robot'" in refusal(folder)


@pytest.mark.parametrize(
    "generation",
    [{"role": "agent", "api": "add"}, {"role": "agent", "api": {}}, {"role": "user", "text": "x"}, {"role": "agent"}, {"role": "x"}, [], 3],
)
def test_a_generation_of_another_form_is_refused(folder: Path, generation: Any) -> None:
    write(folder, [dialogue(0)], [judgement("c0") | {"generation": json.dumps(generation)}])
    assert "reward/a.json.gz, line 1: " in refusal(folder)


def test_data_that_leave_nothing_to_learn_from_are_refused_with_the_settings_to_lower(folder: Path) -> None:
    assert "lower data.heldout" in refusal(folder, heldout=6)
    assert "data.heldout_preferences" in refusal(folder, heldout_preferences=12)


def test_the_published_data_are_read_whole(real_data: Path) -> None:
    data = settings(real_data / "taskmaster-4", heldout=200, heldout_preferences=500)
    corpus = FilesSource(data, judge_prompts=160, seed=0).load()
    assert len(corpus.held_out) == 200
    assert len(corpus.demonstrations) > 2000
    assert len(corpus.judge_prompts) == 160
    assert len(corpus.held_out_judgements) >= 500
    assert not {j.context.id for j in corpus.held_out_judgements} & {j.context.id for j in corpus.judgements}
    assert {m.role for d in corpus.demonstrations for m in d.messages} == {"user", "assistant", "tool"}
    assert all(len(m.content) <= 160 for d in corpus.demonstrations for m in d.messages if m.role == "tool")
    assert all(m.content for d in corpus.demonstrations for m in d.messages)
    assert any(m.content.startswith("call ") for d in corpus.demonstrations for m in d.messages if m.role == "assistant")
