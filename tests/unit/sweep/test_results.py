"""Which trial wins, and what a sweep leaves: tables, plots, and settings that run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from conf.schema import Config
from orchestration import cli
from orchestration import config as configuration
from orchestration.errors import RequestError
from orchestration.run_directory import RunDirectory
from orchestration.sweep import objective as objectives
from orchestration.sweep import records, results
from orchestration.sweep.importance import importances
from orchestration.sweep.objective import JUDGE, Point, ineligible, objective
from orchestration.sweep.space import Space, parsed
from orchestration.sweep.trial import Task

SPACE = {"ppo.lr": {"loguniform": [1e-5, 1e-3]}, "ppo.kl.beta": {"loguniform": [0.005, 0.5]}, "ppo.epochs": {"choice": [1, 2, 4]}}
BUDGET, STEPS = 5.0, 3


@pytest.fixture(scope="module")
def config() -> Config:
    return configuration.load(["experiment=smoke"])


@pytest.fixture
def sweep(tmp_path: Path, config: Config) -> tuple[Task, Space]:
    """A folder with seven trials: 3 scores best above the budget, 2 best within it."""
    settings, _ = configuration.load_sweep(["sweep=ppo", f"sweep.objective.kl_budget={BUDGET}"])
    task, space = Task(tmp_path, settings, config, BUDGET), parsed(SPACE, config)
    ends = [(0.1, 1.0), (0.3, 2.0), (0.8, 4.0), (2.0, 9.0), (0.2, 1.5), (0.5, 3.0), (0.6, 3.5)]
    for number, (score, kl) in enumerate(ends):
        which = records.trial(tmp_path, number)
        which.begin({"ppo.lr": 1e-5 * 2**number, "ppo.kl.beta": 0.02, "ppo.epochs": (1, 2, 4)[number % 3]})
        for step in (0, 1, STEPS):
            which.measured(Point(step, kl * step / STEPS, score * step / STEPS))
        which.end("finished")
    return task, space


def test_the_objective_is_the_score_less_what_is_above_the_budget() -> None:
    assert objective(Point(3, 4.0, 1.0), 5.0, 0.5) == 1.0
    assert objective(Point(3, 7.0, 1.0), 5.0, 0.5) == 0.0


def test_only_a_whole_trial_within_the_budget_can_win() -> None:
    within, above = [Point(0, 0, 0), Point(3, 4.9, 1.0)], [Point(3, 5.1, 9.0)]
    assert ineligible("finished", within, 3, 5.0) is None
    assert "above the budget" in str(ineligible("finished", above, 3, 5.0))
    assert "guard" in str(ineligible("finished", within, 4, 5.0))
    assert ineligible("stopped", within, 3, 5.0) and ineligible("failed", within, 3, 5.0) and ineligible("running", within, 3, 5.0)


def test_of_a_measurement_the_judge_and_the_kl_are_kept_and_no_exact_grade() -> None:
    measured = {"step": 2.0, "kl": 1.5, "score": 7.0, f"score_{JUDGE}": 0.25, "gold": 0.9, "gold_error": 0.1}
    assert objectives.point(measured) == objectives.point(measured | {"gold": -5.0}) == Point(2, 1.5, 0.25)


def test_the_best_within_the_budget_wins_whatever_scores_more_above_it(sweep: tuple[Task, Space]) -> None:
    task, space = sweep
    found = results.write(task.folder, task.sweep, space, task, ["experiment=smoke", "ppo.lr=3e-4", "seed=4", "run_dir=elsewhere"])
    assert found["best"] == "002" and json.loads((task.folder / "summary.json").read_text())["best"] == "002"
    with open(task.folder / "trials.csv", newline="") as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    assert len(rows) == 7 and rows["002"]["best"] == "True" and rows["003"]["why_not"] == "KL 9 above the budget of 5"
    for name in ("score_against_kl", "parallel_coordinates", "importance"):
        assert (task.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_best_yaml_stands_for_words_that_run(sweep: tuple[Task, Space], capsys: pytest.CaptureFixture) -> None:
    task, space = sweep
    words = ["experiment=smoke", "ppo.lr=3e-4", "seed=4", "run_dir=elsewhere", "labeler.agreement=0.7", "policy_checkpoint=gone"]
    results.write(task.folder, task.sweep, space, task, words)
    assert cli.main(["config", f"@{task.folder}/best.yaml", "run_dir=mine"]) == 0
    shown = capsys.readouterr().out
    assert "lr: 4.0e-05" in shown and "beta: 0.02" in shown and "epochs: 4" in shown and "seed: 4" in shown and "agreement: 0.7" in shown
    assert (task.folder / "best.yaml").read_text().count("ppo.lr=") == 1
    assert "elsewhere" not in shown and "gone" not in shown and "/mine" in shown


def test_no_winner_leaves_no_best_yaml(tmp_path: Path, config: Config) -> None:
    settings, _ = configuration.load_sweep(["sweep=ppo"])
    which = records.trial(tmp_path, 0)
    which.begin({"ppo.lr": 1e-4})
    which.end("failed", "RunError: policy rank 0 died")
    (tmp_path / "best.yaml").write_text("- old=1\n")
    task = Task(tmp_path, settings, config, BUDGET)
    found = results.write(tmp_path, settings, parsed(SPACE, config), task, [])
    assert found["best"] is None and not (tmp_path / "best.yaml").exists()
    assert found["trials"][0]["why_not"] == "RunError: policy rank 0 died"


@pytest.mark.parametrize("text", ["a: 1\n", "- 3\n", "- [1\n", "- word\n"])
def test_a_file_of_words_that_is_none_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert cli.main(["config", f"@{tmp_path}/x.yaml"]) == 2
    assert "x.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", [1e-5, 3, True, None, "gae", "it's, {odd}: \\ [text]", "a\\\\", [1, [2.5, "a"]], [{"kind": "model", "path": None}]]
)
def test_any_value_survives_as_a_word(value: object) -> None:
    override, mistakes = configuration._parse([configuration.as_word("a.b", value)])
    assert mistakes == [] and override[0].value() == value


def test_the_setting_that_matters_has_the_larger_share(sweep: tuple[Task, Space]) -> None:
    task, space = sweep
    shares = importances(space, records.trials(task.folder), task)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["ppo.lr"] > shares["ppo.kl.beta"] == 0.0


def test_what_is_measured_again_counts_once(tmp_path: Path) -> None:
    which = records.trial(tmp_path, 5)
    which.begin({})
    for step, score in ((0, 0.0), (2, 1.0), (4, 2.0), (2, 1.5)):
        which.measured(Point(step, 0.0, score))
    with open(which.folder / "points.jsonl", "a") as file:
        file.write('{"step": 4, "kl"')  # a kill in the middle of a line
    assert [(at.step, at.score) for at in which.points()] == [(0, 0.0), (2, 1.5)]
    which.measured(Point(4, 0.0, 3.0))
    assert [(at.step, at.score) for at in which.points()] == [(0, 0.0), (2, 1.5), (4, 3.0)]


def test_a_folder_of_another_sweep_or_of_a_run_is_refused(tmp_path: Path) -> None:
    assert not records.check(tmp_path / "a", {"sweep": {"every": 2}})
    records.claim(tmp_path / "a", {"sweep": {"every": 2}})
    assert records.check(tmp_path / "a", {"sweep": {"every": 2}})
    with pytest.raises(RequestError, match="sweep.every: was 2, is now 3"):
        records.check(tmp_path / "a", {"sweep": {"every": 3}})
    RunDirectory(tmp_path / "b", 1).begin("sft", {}) if (tmp_path / "b").mkdir() is None else None
    with pytest.raises(RequestError, match="it holds a run"):
        records.check(tmp_path / "b", {})
