"""PPO that watches itself, in tiny runs: sound ones pass every check, broken ones are caught by name, and the guard goes back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.models import HEAD_FILE
from actors.policy import Policy
from actors.reference import Reference
from actors.rollout import Rollout
from actors.weight_sync import pack
from actors.worker import language_model, make_engine
from orchestration import checks, report
from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.world import scenarios
from orchestration.errors import RequestError, RunError
from orchestration.recipe import summarise
from orchestration.stages.judging import judge_prompts
from orchestration.stages.ppo import Loop
from tests import tiny_ppo

WORDS = ("ppo.steps=2", "ppo.batch=8", "ppo.lr=1e-2", "ppo.warmup=0", "checks=warn")
RUNAWAY = ("ppo.kl.budget=2.0", "ppo.warmup=0", "ppo.batch=8", "ppo.lr=0.3", "commit.every=1")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ppo.prepared(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def sound(start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """A run with the judge on, strict; its reward model's zero is set."""
    zeroed = tmp_path_factory.mktemp("zeroed")
    shutil.copytree(start, zeroed, dirs_exist_ok=True)
    folder = tmp_path_factory.mktemp("sound")
    first = tiny_ppo.run(tiny_ppo.context(zeroed, folder / "first", *WORDS, own_reward_model=True))[0]
    move_bias(zeroed / "rm", -first["checks"]["demonstrations"]["seen"])
    given = tiny_ppo.context(
        zeroed, folder / "run", *WORDS, "checks=strict", "ppo.steps=3", "ppo.judge.every=2", "ppo.judge.prompts=6", own_reward_model=True
    )
    result, rows, _ = tiny_ppo.run(given)
    given.run.complete("ppo", {}, result)
    return folder / "run", result, rows


def move_bias(model: Path, by: float) -> None:
    from safetensors.torch import save_file

    head = load_file(model / HEAD_FILE)
    save_file(head | {"bias": head["bias"] + by}, model / HEAD_FILE)


def test_a_sound_run_passes_every_check_and_says_so(sound: tuple) -> None:
    _, result, rows = sound
    assert set(result["checks"]) == set(checks.NAMES)
    assert all(set(found) == {"passed", "seen", "bound"} and found["passed"] for found in result["checks"].values())
    assert {"ratio", "clip", "reference", "demonstrations"} <= set(rows[0]["checks"]) and "ratio" not in rows[1]["checks"]
    assert [(row["weight_version_min"], row["weight_version_max"]) for row in rows if "kl" in row] == [(0, 0), (1, 1), (2, 2)]


def test_with_one_micro_batch_the_ratio_is_exactly_one(start: Path, tmp_path: Path) -> None:
    words = ("checks=strict", "ppo.minibatches=1", "engine.micro_batch=8", "ppo.steps=1", "ppo.batch=8")
    found = tiny_ppo.run(tiny_ppo.context(start, tmp_path, *words))[0]["checks"]["ratio"]
    assert found == {"passed": True, "seen": 0.0, "bound": 0.0}


def test_ratios_to_an_engines_log_probs_are_not_held_against_zero(start: Path, tmp_path: Path) -> None:
    words = ("checks=strict", "ppo.minibatches=1", "engine.micro_batch=8", "ppo.steps=1", "ppo.batch=8", "ppo.old_logprobs=behaviour")
    result, rows, _ = tiny_ppo.run(tiny_ppo.context(start, tmp_path, *words))
    assert rows[0]["old_from_behaviour"] == 1.0 and rows[0]["first_log_ratio_max"] > 0
    assert set(result["checks"]) == {"weights", "engine", "reference"}


def test_in_bf16_the_checks_pass_within_their_bounds(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("engine", "rollout"):  # whatever this CPU has
        monkeypatch.setattr(f"actors.{module}.computes_in_bf16", lambda device: True)
    found = tiny_ppo.run(tiny_ppo.context(start, tmp_path, *WORDS, "model.dtype=bf16"))[0]["checks"]
    assert all(result["passed"] for result in found.values()), found


def other_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Reference.logprobs
    monkeypatch.setattr(Reference, "logprobs", lambda self, pieces, temperature: whole(self, pieces, 2 * temperature))


def engines_that_keep_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Rollout.load_weights
    monkeypatch.setattr(Rollout, "load_weights", lambda self, update: whole(self, update) if update.version == 0 else 0)


def engines_that_claim_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Rollout.load_weights

    def stale(self: Rollout, update: Any) -> int:
        old = {f"lm.{name}": tensor.clone() for name, tensor in self.engine.lm.state_dict().items()}  # type: ignore[attr-defined]
        return whole(self, pack(old, update.version))

    monkeypatch.setattr(Rollout, "load_weights", stale)


def dropout_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Policy.load

    def load(self: Policy) -> None:
        whole(self)
        from actors.sharding import Optimizer

        self.engine = make_engine(self.config, language_model(self.config, self.checkpoint, 0.5), Optimizer(1e-2, 0.0, 1.0))
        self.engine.train(True)

    monkeypatch.setattr(Policy, "load", load)


BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "the reference at another temperature": (other_temperature, {"reference"}),
    "engines that missed a sync": (engines_that_keep_their_weights, {"weights", "engine"}),
    "engines with old weights under a new number": (engines_that_claim_new_weights, {"engine"}),
    "dropout left on": (dropout_left_on, {"ratio", "clip", "reference", "engine"}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_on_purpose_is_caught_by_name(case: str, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking, names = BROKEN[case]
    breaking(monkeypatch)
    found = tiny_ppo.run(tiny_ppo.context(start, tmp_path, *WORDS))[0]["checks"]
    assert {name for name, result in found.items() if not result["passed"]} == names


def test_a_moved_zero_of_the_reward_model_is_caught(start: Path, sound: tuple, tmp_path: Path) -> None:
    shutil.copytree(start, tmp_path / "models")
    move_bias(tmp_path / "models" / "rm", 5.0)
    found = tiny_ppo.run(tiny_ppo.context(tmp_path / "models", tmp_path / "run", *WORDS, own_reward_model=True))[0]["checks"]
    assert [name for name, result in found.items() if not result["passed"]] == ["demonstrations"]


def test_strict_stops_with_what_was_expected_and_keeps_what_was_committed(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Rollout.load_weights
    monkeypatch.setattr(Rollout, "load_weights", lambda self, update: whole(self, update) if update.version < 2 else 1)
    given = tiny_ppo.context(start, tmp_path, *WORDS, "checks=strict", "ppo.steps=4", "commit.every=1")
    with pytest.raises(RunError, match=r"check weights: all replies were sampled by weights of version 2 .*seen .*; look at engines"):
        tiny_ppo.run(given)
    point = given.directory.last()
    assert point is not None and point.step == 1


def test_off_checks_nothing(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_temperature(monkeypatch)
    result, rows, _ = tiny_ppo.run(tiny_ppo.context(start, tmp_path, *WORDS, "checks=off"))
    assert result["checks"] == {} and rows[0]["checks"] == {}


def test_the_curve_is_in_the_output(sound: tuple) -> None:
    folder, result, rows = sound
    assert [point["step"] for point in result["curve"]] == [0, 2, 3]
    assert {"sqrt_kl", "kl", "score", "gold", "gold_error", "reply_tokens"} <= set(result["curve"][0])
    assert result["curve"][0]["kl"] == 0 and result["curve"][1]["score"] != result["curve"][0]["score"]
    assert [row["judge"] for row in rows if "judge" in row] == result["curve"]
    from orchestration.run_directory import RunDirectory

    summary = summarise(RunDirectory(folder, 1), 1.0, 1, {})
    assert summary["stages"]["ppo"]["curve"] == result["curve"]
    report.show(folder, 1, 0)
    assert "<svg" in (folder / "report.html").read_text() and (folder / "curve.svg").exists()


def test_the_judge_changes_nothing_of_what_is_learned(start: Path, tmp_path: Path) -> None:
    without = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "a", *WORDS))
    judged = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "b", *WORDS, "ppo.judge.every=1"))
    assert all(torch.equal(without[2][name], judged[2][name]) for name in without[2])


def test_the_judges_replies_are_scored_behind_their_own_prompts(start: Path, tmp_path: Path) -> None:
    source = "ppo.rewards=[{kind: function, function: 'tests.fakes:asked'}]"
    given = tiny_ppo.context(start, tmp_path, *WORDS, source, "ppo.judge.every=1", "ppo.judge.prompts=6", own_reward_model=True)
    result, _, _ = tiny_ppo.run(given)
    wanted = [len(context.messages[-1].content) for context in judge_prompts(given)]
    learned_from = [len(context.messages[-1].content) for context in given.corpus.prompts[:6]]
    assert [point["score"] for point in result["curve"]] == pytest.approx([sum(wanted) / 6] * 3)
    assert sum(wanted) != sum(learned_from)
    assert "demonstrations" not in result["checks"], "rewards of other kinds have no zero"


def test_a_reward_model_of_another_tokenizer_is_asked_for_no_zero(start: Path, tmp_path: Path) -> None:
    shutil.copytree(start, tmp_path / "models")
    config = tiny_ppo.configuration.load(["experiment=smoke"])
    other = Chat(learn_tokenizer(scenarios.demonstrations(20, 0, config.data.flaws), config.scale.vocabulary))  # type: ignore[union-attr]
    other.save(tmp_path / "models" / "rm")
    found = tiny_ppo.run(tiny_ppo.context(tmp_path / "models", tmp_path / "run", *WORDS, "checks=strict", own_reward_model=True))[0][
        "checks"
    ]
    assert "demonstrations" not in found and found["ratio"]["passed"]


def test_a_judge_without_prompts_is_refused(start: Path, tmp_path: Path) -> None:
    given = tiny_ppo.context(start, tmp_path, *WORDS, "ppo.judge.every=1")
    given.corpus.comparison_prompts.clear()
    given.corpus.judge_prompts.clear()
    with pytest.raises(RequestError, match=r"ppo\.judge\.every=1"):
        tiny_ppo.run(given)


def test_rollback_goes_back_learns_more_gently_and_ends_within_the_budget(start: Path, tmp_path: Path) -> None:
    words = (*RUNAWAY, "ppo.steps=3", "ppo.guard={action: rollback, beta_factor: 3.0, lr_factor: 0.03, times: 3}")
    result, rows, weights = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "run", *words))
    assert result["rollbacks"] and result["stopped_by"] == "steps"
    assert result["kl"] <= result["kl_budget"]
    assert result["rollbacks"][0]["kl"] > result["kl_budget"] and result["rollbacks"][0]["beta"] == pytest.approx(0.06)
    assert [row["step"] for row in rows] == [1, 2, 3]
    before = load_file(start / "lm" / "model.safetensors")
    assert any(not torch.equal(weights[name], before[name]) for name in weights), "the run went on"


def test_after_the_last_rollback_the_run_stops_with_weights_within_the_budget(start: Path, tmp_path: Path) -> None:
    words = (*RUNAWAY, "ppo.steps=3", "ppo.guard={action: rollback, beta_factor: 2.0, lr_factor: 1.0, times: 2}")
    result, _, weights = tiny_ppo.run(tiny_ppo.context(start, tmp_path, *words))
    assert len(result["rollbacks"]) == 2 and result["stopped_by"] == "kl_budget"
    before = load_file(start / "lm" / "model.safetensors")
    assert all(torch.equal(weights[name], before[name]) for name in weights), "the first update was already too far"


@pytest.mark.parametrize("normalise", ["none", "running"])
def test_a_run_killed_after_a_rollback_ends_as_if_never_killed(
    normalise: str, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = "ppo.guard={action: rollback, beta_factor: 3.0, lr_factor: 0.03, times: 3}"
    words = (*RUNAWAY, guard, "ppo.steps=4", "ppo.judge.every=2", f"ppo.reward_normalise={normalise}")
    whole = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "whole", *words))
    record = Loop.record

    def killed(self: Loop, step: int, *rest: Any) -> None:
        if self.guard.rollbacks and step == 3:
            raise KeyboardInterrupt
        record(self, step, *rest)

    monkeypatch.setattr(Loop, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_ppo.run(tiny_ppo.context(start, tmp_path / "killed", *words))
    monkeypatch.setattr(Loop, "record", record)
    again = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "killed", *words))
    assert again[0]["rollbacks"] == whole[0]["rollbacks"] != []
    assert [without_first_checks(row) for row in again[1]] == [without_first_checks(row) for row in whole[1]]
    assert again[0]["curve"] == whole[0]["curve"]
    assert all(torch.equal(whole[2][name], again[2][name]) for name in whole[2])


def test_every_batch_of_scores_is_counted_once_whether_a_run_is_killed_or_goes_back(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*WORDS, "ppo.steps=4", "commit.every=2", "ppo.reward_normalise=running")
    given = tiny_ppo.context(start, tmp_path / "whole", *words)
    loops: list[Loop] = []
    begin = Loop.resume
    monkeypatch.setattr(Loop, "resume", lambda self: loops.append(self) or begin(self))
    whole = tiny_ppo.run(given)
    assert loops[0].seen.count == 5 * 8 and given.directory.last().memory["scores"]["count"] == 2 * 8  # type: ignore[union-attr]
    again = tiny_ppo.run(given)  # goes on from the commit of step 2
    assert loops[1].seen == loops[0].seen
    assert [without_first_checks(row) for row in again[1]] == [without_first_checks(row) for row in whole[1]]
    assert all(torch.equal(whole[2][name], again[2][name]) for name in whole[2])
    gentle = "ppo.guard={action: rollback, beta_factor: 3.0, lr_factor: 0.03, times: 3}"
    back = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "back", *RUNAWAY, gentle, "ppo.steps=3", "ppo.reward_normalise=running"))
    assert back[0]["rollbacks"] and loops[2].seen.count == 4 * 8


def without_first_checks(row: dict[str, Any]) -> dict[str, Any]:
    """The first update after going on is checked once more."""
    return row | {"checks": {name: found for name, found in row.get("checks", {}).items() if name in ("engine", "weights")}}


def test_off_learns_on_above_the_budget_and_warns(start: Path, tmp_path: Path) -> None:
    result, _, _ = tiny_ppo.run(tiny_ppo.context(start, tmp_path, *RUNAWAY, "ppo.steps=2", "ppo.guard.action=off"))
    assert result["stopped_by"] == "steps" and result["kl"] > result["kl_budget"]
    assert "kl_runaway" in result["warnings"]
