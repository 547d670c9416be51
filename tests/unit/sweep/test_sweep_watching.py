"""Which trials a sweep asks for, and what it notes of them, without Tune."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from orchestration import config as configuration
from orchestration.sweep import records
from orchestration.sweep.objective import Point
from orchestration.sweep.space import parsed
from orchestration.sweep.table import Table
from orchestration.sweep.trial import Task
from orchestration.sweep.watching import Sweeping


def sweeping(folder: Path, *words: str) -> Sweeping:
    config = configuration.load(["experiment=smoke", "ppo.lr=2e-4"])
    sweep, _ = configuration.load_sweep(["sweep.trials=4", *words])
    task = Task(folder, sweep, config, 5.0)
    return Sweeping(task, parsed(sweep.space, config), Table(folder, sweep, task, draws=False), random.Random(0))


def asked(watcher: Sweeping) -> list[Any]:
    return list(iter(watcher.next, None))


def ended(folder: Path, number: int, status: str, values: dict[str, Any] | None = None) -> None:
    which = records.trial(folder, number)
    which.begin(values or {"ppo.lr": 1e-4, "ppo.kl.beta": 0.1, "ppo.epochs": 1})
    which.measured(Point(1, 1.0, 0.5))
    if status != "running":
        which.end(status, "it did")


def test_the_first_trial_has_the_experiments_own_settings_and_all_are_noted_before_they_start(tmp_path: Path) -> None:
    points = asked(sweeping(tmp_path))
    assert [point.number for point in points] == [0, 1, 2, 3]
    assert points[0].values == {"ppo.lr": 2e-4, "ppo.kl.beta": 0.02, "ppo.epochs": 1}
    assert [which.values for which in records.trials(tmp_path)] == [point.values for point in points]
    assert asked(sweeping(tmp_path / "other", "sweep.default_first=false"))[0].values != points[0].values


def test_ended_trials_are_not_asked_for_again_and_those_that_were_running_come_first(tmp_path: Path) -> None:
    for number, status in enumerate(("finished", "failed", "running")):
        ended(tmp_path, number, status)
    watcher = sweeping(tmp_path)
    assert (watcher.count, watcher.replays) == (2, 0)
    assert [(point.number, point.replay) for point in asked(watcher)] == [(2, False), (3, False)]
    assert records.trial(tmp_path, 1).reason == "it did"


def test_asha_sees_those_that_ended_again_as_replays(tmp_path: Path) -> None:
    ended(tmp_path, 0, "finished")
    ended(tmp_path, 1, "stopped")
    watcher = sweeping(tmp_path, "sweep=ppo_asha", "sweep.trials=3")
    assert (watcher.count, watcher.replays) == (1, 2)
    assert [(point.number, point.replay) for point in asked(watcher)] == [(0, True), (1, True), (2, False)]
    watcher.ended(1, None)
    assert (records.trial(tmp_path, 1).status, records.trial(tmp_path, 1).reason) == ("stopped", "it did"), "it ended before"


def test_failed_trials_are_run_again_when_asked_for(tmp_path: Path) -> None:
    for number in range(4):
        ended(tmp_path, number, "failed" if number == 2 else "finished")
    again, plain = (configuration.load_sweep([f"sweep.retry_failed={value}", "sweep.trials=4"])[0] for value in ("true", "false"))
    assert records.is_over(tmp_path, plain) and not records.is_over(tmp_path, again)
    assert [point.number for point in asked(sweeping(tmp_path, "sweep.retry_failed=true"))] == [2]


def test_a_trial_that_tune_ends_before_its_ppo_is_done_was_stopped(tmp_path: Path) -> None:
    watcher = sweeping(tmp_path, "sweep=ppo_asha", "sweep.trials=2")
    asked(watcher)
    for number in (0, 1):
        records.trial(tmp_path, number).measured(Point(2, 0.1, 0.3))
    watcher.ended(0, None)
    watcher.ended(1, "RunError: no", "Traceback: no")
    first, second = records.trials(tmp_path)
    assert (first.status, first.reason) == ("stopped", "by asha after 2 of 3 steps")
    assert (second.status, second.reason) == ("failed", "RunError: no") and (second.folder / "error.txt").read_text() == "Traceback: no"


def test_with_optuna_a_sweep_that_goes_on_has_learned_from_what_ended(tmp_path: Path) -> None:
    for number in range(3):
        ended(tmp_path, number, "finished")
    watcher = sweeping(tmp_path, "sweep=ppo_optuna")
    assert [trial.value for trial in watcher.search.study.trials] == [0.5, 0.5, 0.5]  # type: ignore[attr-defined]
