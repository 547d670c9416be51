"""Where a trial's values come from: drawn at random, or suggested by Optuna from the trials that ended."""

from __future__ import annotations

import random
from typing import Any, Protocol

from conf.sweeps import Sweep
from orchestration.sweep.space import Dimension, Space, Values


class Search(Protocol):
    """Gives each new trial its values."""

    def ask(self, number: int) -> Values:
        """Values of trial `number`."""

    def known(self, number: int, values: Values) -> None:
        """A trial that has its values already: the experiment's own, or one that goes on."""

    def tell(self, number: int, objective: float | None) -> None:
        """A trial ended with this objective, or failed."""


class Random:
    """Draws keyed by seed and trial: a trial has the same values whenever it is asked for."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed

    def ask(self, number: int) -> Values:
        return self.space.sample(random.Random(f"sweep {self.seed} {number}"))

    def known(self, number: int, values: Values) -> None:
        """Nothing is learned from other trials."""

    def tell(self, number: int, objective: float | None) -> None:
        """Nothing is learned from other trials."""


class Optuna:
    """Tree-structured Parzen estimators (Bergstra et al. 2011), one dimension at a time, so that conditions may hold."""

    def __init__(self, space: Space, seed: int, startup: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.space, self.seed, self.startup = optuna, space, seed, startup
        self.study = optuna.create_study(direction="maximize", sampler=self._sampler(0))
        self.open: dict[int, Any] = {}

    def _sampler(self, number: int) -> Any:
        """Keyed by seed and trial: with one sampler for all, a sweep that goes on would draw what it has drawn before."""
        seed = random.Random(f"sweep {self.seed} {number}").randrange(2**32)
        return self.optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup)

    def ask(self, number: int) -> Values:
        self.study.sampler = self._sampler(number)
        trial = self.open[number] = self.study.ask()
        return self.space.chosen(lambda dimension: self._suggested(trial, dimension))

    def _suggested(self, trial: Any, dimension: Dimension) -> Any:
        if dimension.kind == "choice":  # by number, since Optuna takes no lists
            return dimension.of[trial.suggest_categorical(dimension.key, tuple(range(len(dimension.of))))]
        low, high, *step = dimension.of
        log = dimension.kind in ("loguniform", "logint")
        if dimension.kind in ("int", "logint", "qint"):
            return trial.suggest_int(dimension.key, low, high, log=log, step=step[0] if step else 1)
        return dimension.fitted(trial.suggest_float(dimension.key, low, high, log=log, step=step[0] if step else None))

    def known(self, number: int, values: Values) -> None:
        """Values outside the space, as the experiment's own may be, teach Optuna nothing."""
        if all(dimension.holds(values[dimension.key]) for dimension in self.space.dimensions if dimension.key in values):
            of = {dimension.key: dimension for dimension in self.space.dimensions}
            fixed = {key: of[key].of.index(value) if of[key].kind == "choice" else value for key, value in values.items()}
            self.study.enqueue_trial(fixed)
            self.ask(number)

    def tell(self, number: int, objective: float | None) -> None:
        if number in self.open:
            trial = self.open.pop(number)
            failed = self.optuna.trial.TrialState.FAIL
            self.study.tell(trial, objective) if objective is not None else self.study.tell(trial, state=failed)


def search_of(sweep: Sweep, space: Space, seed: int) -> Search:
    """The one that the settings name."""
    return Optuna(space, seed, sweep.startup) if sweep.search == "optuna" else Random(space, seed)
