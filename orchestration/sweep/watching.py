"""The sweep's side of its trials: which come next, and what becomes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from orchestration.runtime.trials import Point
from orchestration.sweep import objective as objectives
from orchestration.sweep.records import ENDED, Trial, trial, trials
from orchestration.sweep.search import search_of
from orchestration.sweep.space import Space
from orchestration.sweep.table import Table
from orchestration.sweep.trial import Task


class Sweeping:
    """What runtime/trials.py asks and tells (`Watcher`)."""

    def __init__(self, task: Task, space: Space, table: Table, rng: random.Random) -> None:
        self.task, self.space, self.table, self.rng = task, space, table, rng
        sweep = task.sweep
        begun = {each.number: each for each in trials(task.folder)}
        if sweep.retry_failed:
            for each in begun.values():
                if each.status == "failed":
                    each.begin(each.values)
        self.ended_before = [each for each in begun.values() if each.status in ENDED]
        self.going_on = [each for each in begun.values() if each.status not in ENDED]
        self.new = [number for number in range(sweep.trials) if number not in begun]
        self.search = search_of(sweep, space, task.config.seed)
        replayed = self.ended_before if sweep.scheduler.kind == "asha" and (self.going_on or self.new) else []
        self.replays = len(replayed)
        self.count = len(self.going_on) + len(self.new)
        """Trials to run."""
        for each in self.ended_before:
            self.search.known(each.number, each.values)
            self.search.tell(each.number, self._objective(each))
        self.points = self._points(replayed)

    def _points(self, replayed: list[Trial]) -> Iterator[Point]:
        for each in replayed:
            yield Point(each.number, each.values, replay=True)
        for each in self.going_on:
            self.search.known(each.number, each.values)
            yield Point(each.number, each.values)
        for number in self.new:
            if number == 0 and self.task.sweep.default_first:
                values = self.space.of(self.task.config)
                self.search.known(number, values)
            else:
                values = self.search.ask(number)
            trial(self.task.folder, number).begin(values)
            yield Point(number, values)

    def _objective(self, of: Trial) -> float | None:
        points = of.points()
        if of.status == "failed" or not points:
            return None
        return objectives.objective(points[-1], self.task.kl_budget, self.task.sweep.objective.penalty)

    def next(self) -> Point | None:
        return next(self.points, None)

    def started(self, number: int) -> None:
        self.table.show()

    def reported(self, number: int, figures: dict[str, float]) -> None:
        self.table.show()

    def ended(self, number: int, failure: str | None, trace: str = "") -> None:
        """Note how, once: trials that only replay have ended before."""
        which = trial(self.task.folder, number)
        if which.status in ENDED:
            return
        points = which.points()
        if failure is not None:
            which.end("failed", failure, trace)
        elif self.task.is_done(which):
            which.end("finished")
        else:
            at = points[-1].step if points else 0
            which.end("stopped", f"by {self.task.sweep.scheduler.kind} after {at} of {self.task.config.ppo.steps} steps")
        self.search.tell(number, self._objective(which))
        self.table.ended(which)

    def explored(self, values: dict[str, Any]) -> dict[str, Any]:
        chosen = self.task.sweep.scheduler
        assert chosen.kind == "pbt"
        return self.space.explored(values, chosen.resample, chosen.factor, self.rng)
