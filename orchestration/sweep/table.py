"""The trials on the terminal while they run: a live table, or a line now and then where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table as Drawn

from conf.sweeps import Sweep
from orchestration.sweep import objective as objectives
from orchestration.sweep.records import Trial, trials
from orchestration.sweep.trial import Task

STEPS_OF_STATUS = {"running": "", "finished": "green", "stopped": "yellow", "failed": "red"}


def shown(value: Any) -> str:
    """A value in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Table:
    """Draws itself from the trials' folders."""

    def __init__(self, folder: Path, sweep: Sweep, task: Task, draws: bool) -> None:
        self.folder, self.sweep, self.task, self.draws = folder, sweep, task, draws
        self.console = Console(stderr=True, highlight=False)
        self.live = Live(console=self.console, refresh_per_second=2) if draws and sys.stderr.isatty() else None

    def __enter__(self) -> Table:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.show()
            self.live.stop()

    def say(self, text: str) -> None:
        if self.draws:
            self.console.print(text)

    def show(self) -> None:
        if self.live:
            self.live.update(table(trials(self.folder), self.task))

    def ended(self, which: Trial) -> None:
        """A line that stays where nothing is drawn."""
        self.show()
        if not self.live:
            row = dict(zip(COLUMNS, cells(which, self.task), strict=True))
            self.say("  " + "  ".join(f"{name} {value}" for name, value in row.items() if value))


COLUMNS = ("trial", "status", "step", "judge", "KL", "values", "remark")


def cells(which: Trial, task: Task) -> list[str]:
    """A trial's row."""
    points, values = which.points(), which.values
    last = points[-1] if points else None
    remark = which.reason or _remark(which, task)
    return [
        which.name, which.status, f"{last.step if last else 0}/{task.config.ppo.steps}", f"{last.score:.3f}" if last else "",
        f"{last.kl:.2f}" if last else "", " ".join(f"{key.removeprefix('ppo.')}={shown(value)}" for key, value in values.items()), remark,
    ]  # fmt: skip


def _remark(which: Trial, task: Task) -> str:
    taken = which.lineage()
    copied = f"took over {taken[-1]['from']:03d} at step {taken[-1]['step']}" if taken else ""
    reason = objectives.ineligible(which.status, which.points(), task.config.ppo.steps, task.kl_budget) or ""
    return "; ".join(text for text in (copied, reason if which.status == "finished" else "") if text)


def table(found: Sequence[Trial], task: Task, best: Trial | None = None) -> Drawn:
    """All trials; the best one in bold."""
    drawn = Drawn()
    for name in COLUMNS:
        drawn.add_column(name, overflow="fold")
    for which in found:
        style = "bold green" if best and which.number == best.number else STEPS_OF_STATUS[which.status]
        drawn.add_row(*cells(which, task), style=style)
    return drawn
