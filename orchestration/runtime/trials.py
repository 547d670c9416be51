"""Ray Tune, for sweeps: the only file that imports `ray.tune`.

Tune schedules trials, reserves a placement group for each, stops those that fall behind (ASHA), and hands the state of one to another
(PBT). It remembers nothing from one start to the next: what a sweep goes on from is in the trials' own folders (sweep/records.py).

A trial's placement group has its driver in the first bundle; its roles find the others by `ray.util.get_current_placement_group()`
(runtime/reservation.py). A trial that made a group of its own inside Tune's would wait for ever.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from actors.devices import hide_gpus
from conf.sweeps import ASHA, FIFO, PBT
from orchestration.bundles import Bundle

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # its CSV, JSON and TensorBoard files
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its own table, which `verbose=0` does not wholly silence
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the sweep as it ends a run
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # paths are absolute, and processes start where the driver did

TUNE = "tune"
"""Folder of Tune's own files below the sweep's."""
KEPT = 3
"""Checkpoints of a trial that Tune keeps: one may be on its way to another trial while the next are made."""
METRIC, TIME = "objective", "step"


@dataclass(frozen=True)
class Point:
    """A trial as Tune knows it."""

    number: int
    values: dict[str, Any]
    replay: bool = False
    """It has ended already and only tells the scheduler what it measured: it needs no ranks."""


@dataclass(frozen=True)
class Handed:
    """State that Tune hands to a trial: its own, or with PBT another's."""

    folder: Path
    origin: dict[str, Any]
    """What the trial that it is of said of it."""


class Channel:
    """A trial's side, in its own process."""

    def handed(self) -> Handed | None:
        """What to go on from; None to go on by itself. The folder is below the sweep's, which every node sees."""
        checkpoint = tune.get_checkpoint()
        return Handed(Path(checkpoint.path), checkpoint.get_metadata()) if checkpoint else None

    def report(
        self, figures: dict[str, float], state: Path | None = None, origin: dict[str, Any] | None = None, last: bool = False
    ) -> None:
        """Tell Tune, and wait until it wants the trial to go on; a trial that it ends does not come back from here.

        Args:
            figures: `objective` and `step` among them.
            state: a folder that another trial could go on from; Tune copies it.
            last: the trial is done.
        """
        checkpoint = None
        if state is not None:
            checkpoint = tune.Checkpoint.from_directory(str(state))
            checkpoint.set_metadata(origin or {})  # a file beside the commit's own; its manifest does not name it
        tune.report({**figures, "done": last}, checkpoint=checkpoint)


Run = Callable[[Point, Channel], None]
"""What a trial does, in a process of its own."""


class Watcher(Protocol):
    """The sweep's side, in the driver."""

    def next(self) -> Point | None:
        """The next trial; None if there is none."""

    def started(self, number: int) -> None:
        """A trial's process starts."""

    def reported(self, number: int, figures: dict[str, float]) -> None:
        """A trial has reported."""

    def ended(self, number: int, failure: str | None, trace: str = "") -> None:
        """A trial is done, was stopped, or failed; `failure` is the reason in a sentence."""

    def explored(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values for a trial that takes over the weights of one with these (PBT)."""


@dataclass(frozen=True)
class Plan:
    """What Tune is asked for."""

    run: Run
    folder: Path
    """The sweep's."""
    count: int
    """Trials to start at most."""
    steps: int
    """Of PPO, in each."""
    concurrency: int
    driver: float
    """CPUs of a trial's driver."""
    bundles: Sequence[Bundle]
    """Of its roles."""
    scheduler: FIFO | ASHA | PBT


def fit(plan: Plan, watcher: Watcher) -> None:
    """Run the trials that the watcher gives, to their end. The cluster must be connected."""
    warnings.filterwarnings("ignore", message="Consider boosting PBT")  # an actor that ran PPO is not one to use again
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # why a trial failed is in its folder
    shutil.rmtree(plan.folder / TUNE, ignore_errors=True)
    population = isinstance(plan.scheduler, PBT)
    space, asked = {}, None
    if population:  # it must know all its members, and takes no searcher
        points = [_plain(point) for _ in range(plan.count) if (point := watcher.next()) is not None]
        space = {"point": tune.grid_search(points)}
    else:
        asked = _Asked(watcher)
    tuner = tune.Tuner(
        tune.with_resources(_trainable(plan.run), lambda config: _resources(plan, _point(config))),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=METRIC, mode="max", search_alg=asked, scheduler=_scheduler(plan, watcher), num_samples=1 if population else plan.count,
            max_concurrent_trials=None if population else plan.concurrency, reuse_actors=False,
            trial_name_creator=_name, trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE, storage_path=str(plan.folder), verbose=0, callbacks=[_Told(watcher)],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT), failure_config=tune.FailureConfig(max_failures=0),
        ),
    )  # fmt: skip
    tuner.fit()
    shutil.rmtree(plan.folder / TUNE, ignore_errors=True)


def _name(trial: Any) -> str:
    """A trial's number, for good: with PBT its values become those of another."""
    return f"{_point(trial.config).number:03d}"


def _plain(point: Point) -> dict[str, Any]:
    """For a trial's configuration: Tune keeps anything but plain values aside while it makes the trial."""
    return {"number": point.number, "values": point.values, "replay": point.replay}


def _point(config: dict[str, Any]) -> Point:
    return Point(**config["point"])


def _trainable(run: Run) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        hide_gpus()  # those are for its ranks, which have processes of their own
        point = _point(config)
        run(Point(int(tune.get_context().get_trial_name()), point.values, point.replay), Channel())

    return trial


def _resources(plan: Plan, point: Point) -> tune.PlacementGroupFactory:
    ranks = [] if point.replay else [bundle.resources() for bundle in plan.bundles]
    return tune.PlacementGroupFactory([{"CPU": plan.driver}, *ranks], strategy="PACK")


def _scheduler(plan: Plan, watcher: Watcher) -> TrialScheduler:
    chosen = plan.scheduler
    if isinstance(chosen, ASHA):
        return AsyncHyperBandScheduler(
            time_attr=TIME, max_t=plan.steps, grace_period=min(chosen.grace, plan.steps), reduction_factor=chosen.reduction
        )
    if isinstance(chosen, PBT):
        held = _Held(watcher)

        def explore(config: dict[str, Any]) -> dict[str, Any]:
            point = _point(config)
            return {**config, "point": _plain(Point(point.number, held().explored(point.values)))}

        return PopulationBasedTraining(
            time_attr=TIME, perturbation_interval=chosen.interval, quantile_fraction=chosen.quantile, custom_explore_fn=explore,
            synch=chosen.synchronous, log_config=False, require_attrs=False,
        )  # fmt: skip
    return FIFOScheduler()


class _Held:
    """The watcher where Tune pickles and copies what it is given: a copy is the same one, and on disk there is none."""

    def __init__(self, watcher: Watcher | None = None) -> None:
        self._watcher = watcher

    def __reduce__(self) -> Any:
        return _Held, ()

    def __deepcopy__(self, memo: Any) -> _Held:
        return self

    def __call__(self) -> Watcher:
        assert self._watcher is not None
        return self._watcher


class _Asked(Searcher):
    """The watcher as one of Tune's searchers."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self.watcher = _Held(watcher)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        point = self.watcher().next()
        return {"point": _plain(point)} if point is not None else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The watcher is told by `_Told`."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from the trials' folders."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called."""


class _Told(tune.Callback):
    """Passes on what happens to trials."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = _Held(watcher)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watcher().started(int(str(trial)))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.watcher().reported(int(str(trial)), {name: result[name] for name in (METRIC, TIME) if name in result})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watcher().ended(int(str(trial)), None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trace = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        self.watcher().ended(int(str(trial)), _reason(trial), trace)


def _reason(trial: Any) -> str:
    """What a trial failed with, in a sentence."""
    # Tune's own `get_pickled_error` looks where the file is copied to, which may be later.
    file = trial.pickled_error_file
    error = ray.cloudpickle.loads(Path(file).read_bytes()) if file and Path(file).exists() else None
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ray.exceptions.RayActorError):
        return f"its process died ({' '.join(str(cause).split())[:300]}); if it ran out of memory, lower sweep.concurrency"
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}" if cause else "no reason is known"
