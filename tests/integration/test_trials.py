"""One trial of a sweep without Ray: what it reports, how it goes on, and how it takes over another's weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestration import config as configuration
from orchestration.errors import RunError
from orchestration.run_directory import RunDirectory
from orchestration.runtime.trials import Channel, Handed, Point
from orchestration.sweep import records
from orchestration.sweep.objective import JUDGE
from orchestration.sweep.trial import Task, of_trials, run, state_digest
from tests import tiny_ppo


class Interrupted(Exception):
    """In place of a kill."""


class Told(Channel):
    """Keeps what a trial reports, and copies its state as Tune does."""

    def __init__(self, folder: Path, given: Handed | None = None, until: int = 99) -> None:
        self.folder, self.given, self.until = folder, given, until
        self.reports: list[dict[str, Any]] = []
        self.states: dict[int, Handed] = {}

    def handed(self) -> Handed | None:
        return self.given

    def report(
        self, figures: dict[str, float], state: Path | None = None, origin: dict[str, Any] | None = None, last: bool = False
    ) -> None:
        step = int(figures["step"])
        self.reports.append({**figures, "last": last})
        if state is not None:
            copy = self.folder / f"state-{step}"
            shutil.copytree(state, copy)
            self.states[step] = Handed(copy, json.loads(json.dumps(origin)))
        if step >= self.until:
            raise Interrupted


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ppo.prepared(tmp_path_factory.mktemp("models"))


@pytest.fixture
def task(start: Path, tmp_path: Path) -> Task:
    return task_in(tmp_path / "sweep", start, "ppo_pbt")


def task_in(folder: Path, start: Path, name: str) -> Task:
    words = ["experiment=smoke", "runtime=local", "ppo.steps=4", "ppo.batch=8", "ppo.minibatches=1", "ppo.max_new_tokens=6",
             "ppo.warmup=0", "data.demonstrations=64", "data.prompts=64"]  # fmt: skip
    sweep, _ = configuration.load_sweep([f"sweep={name}", "sweep.every=2", "sweep.prompts=8"])
    models = {"policy_checkpoint": str(start / "lm"), "reward_checkpoint": str(start / "rm")}
    return Task(folder, sweep, of_trials(configuration.load(words), sweep, models, str(start / "rm"), "sweep"), kl_budget=50.0)


def begun(task: Task, number: int, values: dict[str, Any]) -> records.Trial:
    which = records.trial(task.folder, number)
    which.begin(values)
    return which


def test_a_trial_is_a_whole_run_judged_by_a_source_that_weighs_nothing(task: Task, tmp_path: Path) -> None:
    which, told = begun(task, 0, {"ppo.lr": 1e-3}), Told(tmp_path / "a")
    run(task, Point(0, which.values), told)
    assert [(report["step"], report["last"]) for report in told.reports] == [(2, False), (4, True)]
    assert [at.step for at in which.points()] == [0, 2, 4]
    assert task.config.logging.wandb_group == "sweep"
    assert task.is_done(which) and (which.folder / "round_01/ppo/checkpoint/config.json").exists()
    settings = json.loads((which.folder / "manifest.json").read_text())["stages"]["ppo"]["identity"]["settings"]["ppo"]
    assert settings["lr"] == 1e-3
    assert [(source["name"], source["weight"]) for source in settings["rewards"]] == [("model", 1.0), (JUDGE, 0.0)]
    curve = RunDirectory(which.folder, 1).results()["ppo"]["curve"]
    assert [at.score for at in which.points()] == [measured[f"score_{JUDGE}"] for measured in curve]
    assert "gold" in curve[0] and "gold" not in (which.folder / "points.jsonl").read_text()
    again = Told(tmp_path / "b")
    run(task, Point(0, which.values), again)
    assert [(report["step"], report["last"]) for report in again.reports] == [(4, True)], "it is done, and says so at once"


def test_an_interrupted_trial_goes_on_to_the_same_numbers(task: Task, start: Path, tmp_path: Path) -> None:
    which = begun(task, 0, {"ppo.lr": 1e-3})
    with pytest.raises(Interrupted):
        run(task, Point(0, which.values), Told(tmp_path / "a", until=2))
    run(task, Point(0, which.values), Told(tmp_path / "b"))
    whole = task_in(tmp_path / "other", start, "ppo_pbt")
    other = begun(whole, 0, {"ppo.lr": 1e-3})
    run(whole, Point(0, other.values), Told(tmp_path / "c"))
    assert which.points() == other.points()


def test_asha_is_told_again_what_was_measured_before_an_interruption(start: Path, tmp_path: Path) -> None:
    task = task_in(tmp_path / "sweep", start, "ppo_asha")
    which = begun(task, 0, {"ppo.lr": 1e-3})
    with pytest.raises(Interrupted):
        run(task, Point(0, which.values), Told(tmp_path / "a", until=2))
    told = Told(tmp_path / "b")
    run(task, Point(0, which.values), told)
    assert [report["step"] for report in told.reports] == [2, 4]
    which.end("stopped", "by asha")
    replayed = Told(tmp_path / "c")
    run(task, Point(0, which.values, replay=True), replayed)
    assert [report["step"] for report in replayed.reports] == [2]


def test_a_trial_takes_over_weights_optimizers_and_step_and_goes_on_with_its_own_values(task: Task, tmp_path: Path) -> None:
    good, bad = begun(task, 0, {"ppo.lr": 1e-4, "ppo.kl.beta": 0.02}), begun(task, 1, {"ppo.lr": 1e-2, "ppo.kl.beta": 0.02})
    first = Told(tmp_path / "a")
    run(task, Point(0, good.values), first)
    with pytest.raises(Interrupted):
        run(task, Point(1, bad.values), Told(tmp_path / "b", until=2))
    own = bad.points()[-1]
    handed = first.states[2]
    values = {"ppo.lr": 1.25e-4, "ppo.kl.beta": 0.05}
    second = Told(tmp_path / "c", handed, until=2)
    with pytest.raises(Interrupted):
        run(task, Point(1, values), second)
    taken = bad.lineage()[0]
    assert (taken["step"], taken["from"], taken["values"]) == (2, 0, values) and bad.values == values
    assert taken["state"] == handed.origin["state"] == state_digest(handed.folder)
    here = RunDirectory(bad.folder, 1).stage("ppo").last()
    assert here is not None and state_digest(here.folder) == taken["state"] and here.memory["beta"] == pytest.approx(0.05)
    copied, theirs = bad.points()[-1], good.points()[1]
    assert (copied.kl, copied.score) == pytest.approx((theirs.kl, theirs.score)) and copied.kl != pytest.approx(own.kl)
    run(task, Point(1, values), Told(tmp_path / "d"))
    assert task.is_done(bad) and [at.step for at in bad.points()] == [0, 2, 4]
    settings = json.loads((bad.folder / "manifest.json").read_text())["stages"]["ppo"]["identity"]["settings"]["ppo"]
    assert (settings["lr"], settings["kl"]["beta"]) == (1.25e-4, 0.05)


def test_weights_that_do_not_arrive_whole_fail_the_trial(task: Task, tmp_path: Path) -> None:
    begun(task, 0, {"ppo.lr": 1e-4}), begun(task, 1, {"ppo.lr": 1e-2})
    first = Told(tmp_path / "a", until=2)
    with pytest.raises(Interrupted):
        run(task, Point(0, {"ppo.lr": 1e-4}), first)
    handed = dataclasses.replace(first.states[2], origin=first.states[2].origin | {"state": "other"})
    with pytest.raises(RunError, match="did not arrive whole"):
        run(task, Point(1, {"ppo.lr": 2e-4}), Told(tmp_path / "b", handed))
