"""One trial, in its own process: a whole run of PPO in a run directory of its own, that tells the scheduler what the judge measures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config
from conf.sweeps import Sweep
from orchestration.config import setting, with_settings
from orchestration.errors import RunError
from orchestration.run_directory import RunDirectory
from orchestration.runtime.trials import METRIC, TIME, Channel, Handed, Point
from orchestration.sweep import objective as objectives
from orchestration.sweep.objective import JUDGE
from orchestration.sweep.records import ENDED, Trial, trial

SEEN = 1 << 20


@dataclass(frozen=True)
class Task:
    """What all trials of a sweep have in common."""

    folder: Path
    """The sweep's."""
    sweep: Sweep
    config: Config
    """Of a run of PPO without a trial's own values: from the shared models, judged by the held-out judge."""
    kl_budget: float

    def settings(self, of: Trial, values: dict[str, Any]) -> Config:
        """A trial's own configuration.

        Raises:
            RequestError: the values contradict each other.
        """
        return with_settings(self.config, {**values, "run_dir": str(of.folder)})

    def is_done(self, of: Trial) -> bool:
        """Whether a trial's PPO came to its end, or to that which its guard made."""
        return "ppo" in RunDirectory(of.folder, self.config.commit.keep).results()


def of_trials(config: Config, sweep: Sweep, models: dict[str, str | None], judge: str, group: str) -> Config:
    """The configuration that trials start from.

    Args:
        models: `policy_checkpoint` and `reward_checkpoint`.
        judge: folder of the judge's reward model.
        group: what wandb shows the trials together as.
    """
    own = setting(config, "ppo.rewards") or [{"kind": "model", "name": "model", "weight": 1.0, "path": None}]
    return with_settings(config, {
        **models, "stage": "ppo", "preflight": "off", "logging.progress": False, "logging.wandb_group": group,
        "ppo.rewards": [*own, {"kind": "model", "name": JUDGE, "weight": 0.0, "path": judge}],
        "ppo.judge.every": sweep.every, "ppo.judge.prompts": sweep.prompts, "commit.every": sweep.every,
    })  # fmt: skip


def run(task: Task, point: Point, channel: Channel) -> None:
    """From where the trial's folder, or what Tune hands over, says it is, to the end of its PPO."""
    mine = trial(task.folder, point.number)
    tell = _Teller(task, mine, channel)
    if mine.status in ENDED:
        tell.replay()
        return
    from orchestration import recipe  # a trial that only replays needs no torch

    if (handed := channel.handed()) is not None and handed.origin["trial"] != point.number:
        _take_over(task, mine, handed, point.values)
    elif handed is None:
        tell.replay()
    recipe.run(task.settings(mine, mine.values), tell.measured)
    tell.last()


@dataclass
class _Teller:
    """Notes what is measured, and tells the scheduler."""

    task: Task
    trial: Trial
    channel: Channel
    told: int = 0
    """Step of the last report."""

    def replay(self) -> None:
        """What was measured before an interruption, for schedulers that compare trials at the same step (ASHA)."""
        if self.task.sweep.scheduler.kind == "asha":
            for at in self.trial.points():
                if 0 < at.step < self.task.config.ppo.steps:
                    self._report(at)

    def measured(self, found: dict[str, float]) -> None:
        at = objectives.point(found)
        self.trial.measured(at)
        if self.told < at.step < self.task.config.ppo.steps:  # the last comes when all is done; the first is the SFT model's
            self._report(at, state=self.task.sweep.scheduler.kind == "pbt")

    def last(self) -> None:
        points = self.trial.points()
        if not points:
            raise RunError("PPO ended before the judge measured anything")
        self._report(points[-1], last=True)

    def _report(self, at: objectives.Point, state: bool = False, last: bool = False) -> None:
        self.told = at.step
        value = objectives.objective(at, self.task.kl_budget, self.task.sweep.objective.penalty)
        commit = RunDirectory(self.trial.folder, self.task.config.commit.keep).stage("ppo").last() if state else None
        origin = {"trial": self.trial.number, "step": at.step, "values": self.trial.values}
        origin |= {"state": state_digest(commit.folder)} if commit else {}
        self.channel.report({METRIC: value, TIME: at.step}, commit.folder if commit else None, origin, last)


def _take_over(task: Task, mine: Trial, handed: Handed, values: dict[str, Any]) -> None:
    """Go on from another trial's weights, optimizers and step, with other values. The values are noted last: killed in between, the trial
    goes on from the new weights with its old values."""
    directory = RunDirectory(mine.folder, task.config.commit.keep)
    key, before = "ppo.kl.beta", handed.origin["values"]
    old, new = (values_of.get(key, setting(task.config, key)) for values_of in (before, values))
    point = directory.take_over("ppo", handed.folder, lambda memory: memory | {"beta": memory["beta"] * new / old if old else new})
    copied = state_digest(point.folder)
    if copied != handed.origin["state"]:
        raise RunError(
            f"the weights of trial {handed.origin['trial']:03d} did not arrive whole: their hash is {copied}, not {handed.origin['state']}"
        )
    record = {"step": point.step, "from": handed.origin["trial"], "its_values": before, "its_state": handed.origin["state"]}
    mine.took_over(record | {"values": values, "state": copied})


def state_digest(folder: Path) -> str:
    """Hash of a commit's files that ranks wrote: names, sizes, and the first and last `SEEN` bytes, since a commit may be large."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.parent != folder:
            size = path.stat().st_size
            total.update(f"{path.relative_to(folder).as_posix()} {size}".encode())
            with open(path, "rb") as file:
                total.update(file.read(SEEN))
                file.seek(max(size - SEEN, 0))
                total.update(file.read(SEEN))
    return total.hexdigest()[:16]
