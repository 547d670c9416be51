"""What is found wrong with a sweep before anything starts, and how many trials fit."""

from __future__ import annotations

import dataclasses

import pytest

from orchestration import config as configuration
from orchestration.errors import RequestError
from orchestration.planner.copies import copies, trial_bundles
from orchestration.planner.machines import GIB, Node
from orchestration.run_directory import difference
from orchestration.sweep.preparing import base_stages
from orchestration.sweep.run import request


def mistakes_of(*words: str) -> list[str]:
    with pytest.raises(RequestError) as found:
        request(words)
    return found.value.mistakes


def test_mistakes_in_the_sweep_its_runs_and_its_space_are_reported_together() -> None:
    found = mistakes_of("sweep=ppo", "experiment=smoke", "sweep.trails=3", "ppo.learning_rate=1")
    assert any("sweep.trails: no such setting; did you mean sweep.trials?" in mistake for mistake in found)
    assert any(mistake.startswith("ppo.learning_rate: no such setting") for mistake in found)
    both = mistakes_of(
        "experiment=smoke", "sweep.every=50", "stage=ppo", "sweep.space.ppo.lr={uniform: [2, 1]}", "sweep.judge.path=nowhere"
    )
    for text in ("sweep.every=50: above ppo.steps=3", "stage, from:", "sweep.space.ppo.lr", "sweep.judge.path=nowhere"):
        assert any(mistake.startswith(text) for mistake in both), (text, both)


def test_a_sweep_that_does_not_exist_is_named() -> None:
    assert "no such sweep; choose from ppo" in mistakes_of("sweep=pp", "experiment=smoke")[0]


def test_values_that_contradict_each_other_are_found_before_anything_starts() -> None:
    words = ["experiment=smoke", "sweep.every=1", "sweep.space.ppo.minibatches={choice: [2, 3]}"]
    found = mistakes_of(*words)
    assert found and all(mistake.startswith("sweep.space, trial ") and "ppo.minibatches=3" in mistake for mistake in found)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["sweep=ppo_pbt", "sweep.scheduler.interval=3", "sweep.every=2"], "no multiple of sweep.every=2"),
        (["sweep=ppo_pbt", "sweep.scheduler.interval=40", "sweep.every=2"], "nothing would be exchanged"),
        (["sweep=ppo_pbt", "sweep.search=optuna", "sweep.every=2", "sweep.scheduler.interval=2"], "PBT chooses values by itself"),
        (["sweep=ppo_asha", "sweep.scheduler.grace=40"], "no trial would end early"),
        (["sweep=ppo_pbt", "sweep.scheduler.interval=5", "ppo.guard.action=rollback"], "its commits are PBT's own"),
    ],
)
def test_a_scheduler_that_could_not_act_is_refused(words: list[str], text: str) -> None:
    assert any(text in mistake for mistake in mistakes_of("experiment=smoke", "ppo.steps=20", *words))


def test_a_judge_that_saw_the_same_recorded_preferences_is_refused(tmp_path: object) -> None:
    files = ["experiment=hh_harmless", f"data.path={tmp_path}", "ppo.steps=20"]
    (tmp_path / "x.jsonl").touch()  # type: ignore[operator]
    assert any("sweep.judge: the preferences are recorded" in mistake for mistake in mistakes_of(*files))


def test_the_judge_has_other_data_and_the_same_models() -> None:
    asked = request(["experiment=smoke", "sweep.every=1", "seed=5", "sweep.judge.overrides=['compare.prompts=20']"])
    assert asked.judge.seed == 5 + 7919 and asked.judge.compare.prompts == 20 and asked.config.compare.prompts == 16
    assert asked.config.run_dir.endswith("runs/smoke-sweep")


def test_what_may_change_while_a_sweep_goes_on() -> None:
    common = ["experiment=smoke", "sweep.every=1"]
    before = request(common).identity()
    assert request([*common, "sweep.trials=17", "sweep.concurrency=1", "placement.policy.cpus=0.2", "seed=0"]).identity() == before
    assert difference(before, request([*common, "ppo.clip=0.3"]).identity()) == ["runs.ppo.clip: was 0.2, is now 0.3"]
    assert difference(before, request([*common, "sweep.space.ppo.epochs=null"]).identity())


def test_only_what_is_not_named_is_made() -> None:
    asked = request(["experiment=smoke", "sweep.every=1"])
    assert base_stages(asked.config) == ["sft", "compare", "reward_model"]
    assert base_stages(dataclasses.replace(asked.config, policy_checkpoint="x")) == ["compare", "reward_model"]
    assert base_stages(dataclasses.replace(asked.config, policy_checkpoint="x", reward_checkpoint="y")) == []


def test_as_many_trials_fit_as_have_cpus_gpus_and_memory() -> None:
    config = configuration.load(["experiment=smoke"])

    def node(cpus: float, memory: int = 64 * GIB) -> Node:
        return Node("n", cpus, 0.0, "", 0, memory, 8 * GIB, 100 * GIB)

    assert sum(bundle.cpus for bundle in trial_bundles(config)) == pytest.approx(0.5)
    assert copies(config, [node(2)], driver=0.1) == 3
    assert copies(config, [node(2), node(2)], driver=0.1) == 6
    assert copies(config, [node(2)], driver=1.6) == 0
    assert copies(config, [node(64, 64 * GIB)], driver=0.1) > copies(config, [node(64, 12 * GIB)], driver=0.1) >= 1
    local = configuration.load(["experiment=smoke", "runtime=local"])
    assert trial_bundles(local) == [] and copies(local, [node(2)], driver=0.5) == 2
