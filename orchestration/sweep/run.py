"""`chatray sweep`: check everything, make what trials share, run them, choose, and write what was found.

The same command goes on after an interruption: trials that ended are not run again, others go on from their last commit.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conf.schema import Config
from conf.sweeps import Sweep
from orchestration import config as configuration
from orchestration import preflight, recipe
from orchestration.errors import RequestError, RunError
from orchestration.planner.copies import copies, driver_of, trial_bundles
from orchestration.runtime import facts
from orchestration.runtime.cluster import Connection
from orchestration.runtime.trials import Plan, fit
from orchestration.sweep import objective as objectives
from orchestration.sweep import preparing, records, results
from orchestration.sweep.search import Random
from orchestration.sweep.space import Space, parsed
from orchestration.sweep.table import Table
from orchestration.sweep.trial import Task, of_trials
from orchestration.sweep.trial import run as run_trial
from orchestration.sweep.watching import Sweeping

DECIDES = ("seed", "scale", "reward_scale", "model", "lora", "data", "labeler", "pretrain", "sft", "compare", "reward_model", "ppo",
           "policy_checkpoint", "reward_checkpoint")  # fmt: skip
"""Settings of its runs that make a sweep what it is."""
MAY_CHANGE = ("trials", "concurrency", "driver_cpus", "retry_failed")
"""Settings of the sweep that may change while it goes on."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A sweep that was checked."""

    words: list[str]
    """Of its runs, as they were given."""
    sweep: Sweep
    config: Config
    judge: Config
    space: Space

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    def identity(self) -> dict[str, Any]:
        """What a sweep that goes on must have in common with the one that was begun."""
        settings = configuration.as_dict(self.config)
        plain = {section: settings[section] for section in DECIDES}
        for section in plain.keys() & recipe.NO_PART.keys():
            plain[section] = {key: value for key, value in (plain[section] or {}).items() if key not in recipe.NO_PART[section]}
        plain["longest"] = self.config.engine.longest
        own = {key: value for key, value in dataclasses.asdict(self.sweep).items() if key not in MAY_CHANGE}
        return {"sweep": own | {"space": [dataclasses.asdict(dimension) for dimension in self.space.dimensions]}, "runs": plain}


def request(words: Sequence[str]) -> Request:
    """The sweep that the words ask for.

    Raises:
        RequestError: with every mistake in the words, the settings, the space and the judge.
    """
    mistakes: list[str] = []
    found: dict[str, Any] = {}

    def attempt(name: str, make: Any) -> None:
        try:
            found[name] = make()
        except RequestError as error:
            mistakes.extend(mistake for mistake in error.mistakes if mistake not in mistakes)

    attempt("sweep", lambda: configuration.load_sweep(words))
    sweep, own = found.get("sweep", (None, [word for word in words if not word.startswith("sweep")]))
    attempt("config", lambda: configuration.load(own))
    config = found.get("config")
    if config is not None and sweep is not None:
        if not any(word.startswith("run_dir=") for word in own):
            config = dataclasses.replace(config, run_dir=f"{config.run_dir}-sweep")
        mistakes += _contradictions(sweep, config) + preparing.judge_mistakes(sweep, config)
        attempt("space", lambda: parsed(sweep.space, config))
        attempt("judge", lambda: configuration.load(preparing.judge_words(own, sweep, config)))
    if config is not None and "space" in found and sweep.search == "random":
        mistakes += _impossible(sweep, config, found["space"])
    if mistakes or config is None:
        raise RequestError(mistakes)
    return Request(own, sweep, config, found["judge"], found["space"])


def _contradictions(sweep: Sweep, config: Config) -> list[str]:
    found = []
    if config.stage != "all" or config.rerun_from:
        found.append("stage, from: a sweep decides by itself which stages it runs; leave them out")
    if sweep.every > config.ppo.steps:
        found.append(
            f"sweep.every={sweep.every}: above ppo.steps={config.ppo.steps}, so that nothing would be measured on the way; lower it"
        )
    if config.runtime == "local" and config.placement.policy.gpus:
        found.append(
            f"placement.policy.gpus={config.placement.policy.gpus:g}: with runtime=local a trial is one process, for which no GPU is "
            "reserved; use runtime=ray, or placement=cpu"
        )
    chosen = sweep.scheduler
    if chosen.kind == "pbt":
        if sweep.search != "random":
            found.append(f"sweep.search={sweep.search}: PBT chooses values by itself; use sweep.search=random")
        if chosen.interval % sweep.every:
            found.append(f"sweep.scheduler.interval={chosen.interval}: no multiple of sweep.every={sweep.every}")
        if chosen.interval >= config.ppo.steps:
            found.append(
                f"sweep.scheduler.interval={chosen.interval}: nothing would be exchanged within ppo.steps={config.ppo.steps}; lower it"
            )
        if config.ppo.guard.action == "rollback":
            found.append("ppo.guard.action=rollback: its commits are PBT's own; use stop or off")
    if chosen.kind == "asha" and chosen.grace >= config.ppo.steps:
        found.append(f"sweep.scheduler.grace={chosen.grace}: no trial would end early within ppo.steps={config.ppo.steps}; lower it")
    return found


def _impossible(sweep: Sweep, config: Config, space: Space) -> list[str]:
    """Trials whose values contradict each other, or the experiment's settings, as far as they are known beforehand."""
    found: dict[str, int] = {}
    for number in range(1 if sweep.default_first else 0, sweep.trials):
        values = Random(space, config.seed).ask(number)
        try:
            configuration.with_settings(config, values)
        except RequestError as error:
            for mistake in error.mistakes:
                found.setdefault(mistake, number)
    return [f"sweep.space, trial {number}: {mistake}" for mistake, number in found.items()]


def run(words: Sequence[str]) -> None:
    """Run the sweep, or go on with it, and print what was found.

    Raises:
        RequestError: the request is wrong, or another sweep was begun in the folder.
        RunError: no trial can win.
    """
    asked = request(words)
    if mistakes := list(recipe.engine_mistakes(asked.config)):
        raise RequestError(mistakes)
    goes_on = records.check(asked.folder, asked.identity())
    over = records.is_over(asked.folder, asked.sweep)
    with ExitStack() as ending:
        connection = None if over else Connection(asked.config)
        if connection:
            ending.callback(connection.close)
            preflight.check(asked.config, (*preparing.base_stages(asked.config), "ppo"), lambda: connection, print)
        records.claim(asked.folder, asked.identity())
        print(f"sweep: {'going on in' if goes_on else 'in'} {asked.folder}", flush=True)
        models = preparing.base(asked.config, asked.folder / "base")
        judge = preparing.judge(asked.judge, asked.folder / "judge", models["policy_checkpoint"], asked.sweep)
        task = Task(
            asked.folder, asked.sweep, of_trials(asked.config, asked.sweep, models, judge, asked.folder.name),
            objectives.budget(asked.sweep, asked.config),
        )  # fmt: skip
        if over:
            print("sweep: every trial has ended")
        else:
            trials(asked, task, facts.survey(asked.config).nodes())
    found = results.write(asked.folder, asked.sweep, asked.space, task, asked.words)
    results.show(found, asked.folder)
    if found["best"] is None:
        raise RunError(f"no trial can win; {asked.folder}/trials.csv says why, trial by trial")


def trials(asked: Request, task: Task, nodes: Sequence[Any]) -> None:
    """Run the trials that have not ended."""
    sweep, config = asked.sweep, task.config
    fitting = copies(config, nodes, sweep.driver_cpus)
    if fitting == 0:
        raise RunError(
            "no trial fits on the cluster beside its driver: choose a smaller placement, or lower sweep.driver_cpus; see chatray plan"
        )
    concurrency = min(sweep.concurrency or fitting, fitting)
    with Table(asked.folder, sweep, task, draws=asked.config.logging.progress) as table:
        sweeping = Sweeping(task, asked.space, table, random.Random(asked.config.seed))
        table.say(f"sweep: {sweeping.count} of {sweep.trials} trials to run, {concurrency} at a time ({fitting} fit on the cluster)")
        fit(
            Plan(
                functools.partial(run_trial, task), asked.folder, sweeping.count + sweeping.replays, config.ppo.steps, concurrency,
                driver_of(config, sweep.driver_cpus), trial_bundles(config), sweep.scheduler,
            ),
            sweeping,
        )  # fmt: skip
