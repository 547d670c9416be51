from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestration.errors import RequestError
from orchestration.run_directory import (
    MANIFEST,
    RunDirectory,
    StageDirectory,
    difference,
    digest,
    read_json,
    read_records,
    seal,
    sealed,
    write_json,
)

IDENTITY = {"settings": {"ppo": {"lr": 0.1, "steps": 3}}, "inputs": {"sft": "abc"}}


@pytest.fixture
def stage(tmp_path: Path) -> StageDirectory:
    return StageDirectory(tmp_path / "ppo", keep=2)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, keep=2)


def commit(stage: StageDirectory, step: int) -> Path:
    folder = stage.begin_state(step)
    (folder / "weights").write_text(f"weights of {step}")
    stage.seal_state(step, {"beta": step / 10})
    return folder


def finish(run: RunDirectory, name: str, text: str = "weights") -> None:
    run.begin(name, IDENTITY)
    run.stage(name).export(lambda folder: (folder / "model").write_text(text))
    run.complete(name, IDENTITY, {"kl": 1.5})


def test_a_folder_counts_once_it_is_sealed_and_no_longer_when_a_file_is_missing_or_cut(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights").write_text("whole")
    assert sealed(tmp_path) is None
    seal(tmp_path, {"step": 3})
    assert sealed(tmp_path) == {"step": 3, "files": {"deep/weights": 5}}
    (tmp_path / "deep" / "weights").write_text("who")
    assert sealed(tmp_path) is None
    (tmp_path / "deep" / "weights").unlink()
    assert sealed(tmp_path) is None


def test_a_state_that_was_never_sealed_is_never_read(stage: StageDirectory) -> None:
    commit(stage, 2)
    half = stage.begin_state(4)
    (half / "weights").write_text("half")
    assert stage.last().step == 2
    assert stage.last().memory == {"beta": 0.2}
    assert (stage.last().folder / "weights").read_text() == "weights of 2"


def test_a_damaged_state_is_passed_over_for_the_one_before(stage: StageDirectory) -> None:
    commit(stage, 2)
    (commit(stage, 4) / "weights").write_text("")
    assert stage.last().step == 2


def test_a_half_written_state_of_the_same_step_is_emptied_before_it_is_written_again(stage: StageDirectory) -> None:
    (stage.begin_state(4) / "rubbish").write_text("left by a killed run")
    folder = commit(stage, 4)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "weights"]


def test_the_newest_states_are_kept(stage: StageDirectory) -> None:
    for step in (2, 4, 6, 8):
        commit(stage, step)
    assert [point.step for point in stage.resume_points()] == [6, 8]
    assert sorted(path.name for path in (stage.path / "state").iterdir()) == ["step_000006", "step_000008"]


def test_a_stage_without_states_has_nothing_to_resume(stage: StageDirectory) -> None:
    assert stage.last() is None
    assert stage.resume_points() == []


def test_an_export_counts_when_it_is_whole_and_replaces_the_one_before(stage: StageDirectory) -> None:
    def broken(folder: Path) -> None:
        (folder / "model").write_text("half")
        raise OSError("disk full")

    stage.export(lambda folder: (folder / "old").write_text("old"), {"note": 1})
    with pytest.raises(OSError, match="disk full"):
        stage.export(broken)
    assert sealed(stage.checkpoint) is None
    stage.export(lambda folder: (folder / "model").write_text("new"), {"note": 2})
    assert sealed(stage.checkpoint) == {"note": 2, "files": {"model": 3}}


def test_extending_an_export_keeps_what_is_there_and_it_does_not_count_meanwhile(stage: StageDirectory) -> None:
    stage.export(lambda folder: (folder / "model").write_text("weights"), {"note": 1})
    seen = []

    def add(folder: Path) -> None:
        seen.append(sealed(folder))
        (folder / "tokenizer").write_text("tokens")

    stage.extend(add)
    assert seen == [None]
    assert sealed(stage.checkpoint) == {"note": 1, "files": {"model": 7, "tokenizer": 6}}


def test_metrics_of_steps_to_come_are_forgotten_and_so_is_a_line_cut_off_by_a_kill(stage: StageDirectory) -> None:
    stage.path.mkdir()
    for step in (1, 2, 3, 4):
        stage.append({"step": step, "kl": step / 2})
    with open(stage.metrics, "a") as file:
        file.write('{"step": 2, "kl"')
    assert [record["step"] for record in read_records(stage.metrics)] == [1, 2, 3, 4]
    stage.forget_after(2)
    stage.append({"step": 3, "kl": 9.0})
    assert [json.loads(line) for line in stage.metrics.read_text().splitlines()] == [
        {"step": 1, "kl": 0.5},
        {"step": 2, "kl": 1.0},
        {"step": 3, "kl": 9.0},
    ]


def test_forgetting_works_before_any_metric_was_written(stage: StageDirectory) -> None:
    stage.path.mkdir()
    stage.forget_after(0)
    assert read_records(stage.metrics) == []


def test_a_stage_is_complete_only_after_it_was_completed_under_this_identity(run: RunDirectory) -> None:
    assert not run.is_complete("sft", IDENTITY)
    run.begin("sft", IDENTITY)
    assert not run.is_complete("sft", IDENTITY)
    assert run.results() == {}
    finish(run, "sft")
    assert run.is_complete("sft", IDENTITY)
    assert run.results() == {"sft": {"kl": 1.5}}


@pytest.mark.parametrize("finished", [False, True])
def test_another_identity_is_refused_with_each_difference_shown(run: RunDirectory, finished: bool) -> None:
    finish(run, "ppo") if finished else run.begin("ppo", IDENTITY)
    changed = {"settings": {"ppo": {"lr": 0.2, "steps": 3}}, "inputs": {"sft": "def"}}
    with pytest.raises(RequestError) as refused:
        run.is_complete("ppo", changed)
    text = str(refused.value)
    assert "settings.ppo.lr: was 0.1, is now 0.2" in text
    assert 'inputs.sft: was "abc", is now "def"' in text
    assert "steps" not in text
    assert "from=ppo" in text


def test_completing_a_stage_deletes_its_states_and_keeps_its_result(run: RunDirectory) -> None:
    commit(run.stage("ppo"), 2)
    finish(run, "ppo")
    assert run.stage("ppo").last() is None
    assert (run.stage("ppo").checkpoint / "model").read_text() == "weights"


def test_the_output_of_a_stage_is_a_hash_of_its_files(run: RunDirectory) -> None:
    assert run.output_of("sft") is None
    finish(run, "sft", "one")
    one = run.output_of("sft")
    finish(run, "sft", "two")
    assert run.output_of("sft") != one
    finish(run, "sft", "one")
    assert run.output_of("sft") == one


def test_discarding_from_a_stage_removes_it_and_all_after_it(run: RunDirectory) -> None:
    for name in ("sft", "compare", "reward_model", "ppo"):
        finish(run, name)
    run.discard_from("compare")
    assert list(run.results()) == ["sft"]
    assert [path.name for path in (run.path / "round_01").iterdir()] == ["sft"]
    assert not run.is_complete("ppo", IDENTITY)


def test_a_json_file_is_replaced_whole_and_no_scraps_are_left(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    write_json(tmp_path / "b.json", {"x": 2})
    assert read_json(tmp_path / "b.json") == {"x": 2}
    assert read_json(tmp_path / "none.json") == {}


def test_a_manifest_that_is_not_json_is_refused_by_name(run: RunDirectory) -> None:
    (run.path / "manifest.json").write_text('{"stages": ')
    with pytest.raises(RequestError, match=r"run_dir: .*manifest\.json"):
        run.results()


def test_differences_name_each_leaf_added_changed_or_gone() -> None:
    found = difference({"a": {"b": 1, "c": [1]}, "gone": 2}, {"a": {"b": 2, "c": [1]}, "new": None, "more": 3})
    assert found == ["a.b: was 1, is now 2", "gone: was 2, is now null", "more: was null, is now 3"]


def test_a_digest_depends_on_the_value_not_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_the_last_state_is_the_one_of_the_highest_step_beyond_six_digits_too(stage: StageDirectory) -> None:
    commit(stage, 999_999)
    commit(stage, 1_000_000)
    assert stage.last().step == 1_000_000


def test_another_runs_commit_becomes_the_only_one_and_the_stage_starts_under_any_settings(tmp_path: Path) -> None:
    one, other = RunDirectory(tmp_path / "one", 2), RunDirectory(tmp_path / "other", 2)
    for run, text in ((one, "mine"), (other, "theirs")):
        run.path.mkdir()
        run.begin("ppo", IDENTITY)
        for step in (2, 4):
            (run.stage("ppo").begin_state(step) / "weights").write_text(f"{text} {step}")
            run.stage("ppo").seal_state(step, {"beta": 0.1})
            run.stage("ppo").append({"step": step, "who": text})
    theirs = other.stage("ppo").resume_points()[0]
    taken = one.take_over("ppo", theirs.folder, lambda memory: {"beta": memory["beta"] * 3})
    (point,) = one.stage("ppo").resume_points()
    assert (point.step, point.folder, point.memory) == (2, taken.folder, {"beta": pytest.approx(0.3)})
    assert (point.folder / "weights").read_text() == "theirs 2"
    assert [row["step"] for row in read_records(one.stage("ppo").metrics)] == [2]
    assert not one.is_complete("ppo", {"settings": "others"}) and len(other.stage("ppo").resume_points()) == 2
    (theirs.folder / "weights").unlink()
    with pytest.raises(RequestError, match="not a whole commit"):
        one.take_over("ppo", theirs.folder, lambda memory: memory)
    assert one.stage("ppo").last().step == 2
