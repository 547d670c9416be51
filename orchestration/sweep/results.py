"""What a sweep found: the best trial as a file of settings that runs, a table of all, figures for programs, and plots."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from conf.sweeps import Sweep
from orchestration.config import as_word
from orchestration.run_directory import write_json
from orchestration.sweep import importance, plots
from orchestration.sweep import objective as objectives
from orchestration.sweep.records import Trial, trials
from orchestration.sweep.space import Space
from orchestration.sweep.table import table
from orchestration.sweep.trial import Task

LEFT_OUT = ("run_dir", "policy_checkpoint", "reward_checkpoint")
"""Words of the sweep that a run of the best settings does not take over: it is a whole run in a folder of its own."""


def best(found: Sequence[Trial], task: Task) -> Trial | None:
    """The trial with the highest last score of the judge among those that can win."""
    can_win = [
        which for which in found if objectives.ineligible(which.status, which.points(), task.config.ppo.steps, task.kl_budget) is None
    ]
    return max(can_win, key=lambda which: which.points()[-1].score, default=None)


def write(folder: Path, sweep: Sweep, space: Space, task: Task, words: Sequence[str]) -> dict[str, Any]:
    """Write everything; returns the content of summary.json and the drawn table."""
    found = trials(folder)
    winner = best(found, task)
    rows = [_row(which, task, winner) for which in found]
    _write_csv(folder / "trials.csv", rows, [dimension.key for dimension in space.dimensions])
    weights = importance.importances(space, found, task)
    summary = {
        "best": winner.name if winner else None, "kl_budget": task.kl_budget, "objective": f"mean score of {objectives.JUDGE}",
        "statuses": {status: sum(which.status == status for which in found) for status in ("finished", "stopped", "failed", "running")},
        "importance": weights, "importance_method": importance.METHOD, "trials": rows,
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    (folder / "best.yaml").unlink(missing_ok=True)
    if winner:
        (folder / "best.yaml").write_text(best_yaml(winner, task, words), encoding="utf-8")
    plots.write(folder, space, found, task, winner, weights)
    return summary | {"table": table(found, task, winner)}


def _row(which: Trial, task: Task, winner: Trial | None) -> dict[str, Any]:
    points = which.points()
    last = points[-1] if points else None
    reason = objectives.ineligible(which.status, points, task.config.ppo.steps, task.kl_budget)
    return {
        "trial": which.name, "status": which.status, "best": winner is not None and which.number == winner.number,
        "step": last.step if last else 0, "score": last.score if last else None, "kl": last.kl if last else None,
        "why_not": which.reason or reason or "", "lineage": which.lineage(), "values": which.values, "run": f"trials/{which.name}",
    }  # fmt: skip


def _write_csv(path: Path, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        plain = ["trial", "status", "best", "step", "score", "kl"]
        writer = csv.writer(file)
        writer.writerow([*plain, *keys, "took_over", "why_not"])
        for row in rows:
            values = [row["values"].get(key, "") for key in keys]
            taken = " ".join(f"{taken['from']:03d}@{taken['step']}" for taken in row["lineage"])
            writer.writerow([*(row[name] if row[name] is not None else "" for name in plain), *values, taken, row["why_not"]])


def best_yaml(winner: Trial, task: Task, words: Sequence[str]) -> str:
    """The words of a whole run with the best trial's settings, as a YAML list; `chatray run @FILE` reads it."""
    kept = [word for word in words if word.partition("=")[0] not in (*LEFT_OUT, *winner.values)]
    last = winner.points()[-1]
    notes = [
        f"# The best trial of {task.folder.name}: {winner.name}, judge {last.score:.4g}, KL {last.kl:.3g} of {task.kl_budget:.3g}.",
        "# A whole run with its settings, and any other words after them:",
        f"#   chatray run @{_short(task.folder)}/best.yaml run_dir=runs/best",
    ]
    if winner.lineage():
        notes.append("# PBT changed its settings on the way (lineage in summary.json); these are its last ones.")
    lines = [*kept, *(as_word(key, value) for key, value in winner.values.items())]
    return "\n".join([*notes, *(f"- {_quoted(line)}" for line in lines)]) + "\n"


def _short(folder: Path) -> str:
    """From where the command was given, as far as it is below there."""
    here = os.environ.get("PWD", ".")
    return os.path.relpath(folder, here) if folder.is_relative_to(here) else str(folder)


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "''") + "'"


def show(found: dict[str, Any], folder: Path) -> None:
    """Print the table, the winner and how to run it."""
    console = Console(highlight=False)
    console.print(found["table"])
    if found["importance"]:
        console.print(f"importance ({found['importance_method']}): " + ", ".join(f"{k} {v:.2f}" for k, v in found["importance"].items()))
    short = _short(folder)
    if found["best"]:
        console.print(f"best: trial {found['best']}; run its settings: chatray run @{short}/best.yaml run_dir=runs/best", soft_wrap=True)
    console.print(f"plots, trials.csv and summary.json are in {short}", soft_wrap=True)
