"""Settings of `chatray sweep`, in the style of schema.py; the files of the group are in `conf/sweep`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from conf.settings import Count, NotNegative, Positive, Settings


@dataclass(frozen=True)
class FIFO(Settings):
    """Every trial runs to its end."""

    kind: Literal["fifo"]
    """Which scheduler this is."""


@dataclass(frozen=True)
class ASHA(Settings):
    """Successive halving without waiting (Li et al. 1810.05934): at each rung, the trials that are not among the best end early."""

    kind: Literal["asha"]
    """Which scheduler this is."""
    grace: Count
    """Steps of PPO that each trial gets; the first rung."""
    reduction: Annotated[int, Ge(2)]
    """One of so many goes on at each rung, and rungs are so many times further apart."""


@dataclass(frozen=True)
class PBT(Settings):
    """Population-based training (Jaderberg et al. 1711.09846): the worst trials take over weights and optimizer of the best, and go on
    with values a little off theirs."""

    kind: Literal["pbt"]
    """Which scheduler this is."""
    interval: Count
    """Steps of PPO between two looks at a trial; a multiple of `sweep.every`."""
    quantile: Annotated[float, Gt(0), Le(0.5)]
    """Share of the trials that is bad enough to be replaced, and that is good enough to be copied."""
    resample: Annotated[float, Ge(0), Le(1)]
    """Probability of drawing a value anew; otherwise those of ranges are multiplied or divided by `factor`, and choices move by one."""
    factor: Annotated[float, Gt(1)]
    """How far a value of a range is moved."""
    synchronous: bool
    """Whether trials wait for each other at each interval: all are compared at the same step, but each stops and starts again. If not, a
    trial is compared with what the others have reported so far."""


@dataclass(frozen=True)
class Objective(Settings):
    """What trials are compared by: the held-out judge's score, at a KL budget. The exact grade is never read."""

    kl_budget: Positive | None
    """KL to the SFT model, nats per reply on held-out prompts, up to which a trial may win; null: `ppo.kl.budget`."""
    penalty: NotNegative
    """What searchers and schedulers take from the score for each nat above the budget, so that they turn round before they lose a trial.
    A trial that ends above the budget, or that PPO's guard stopped, cannot win whatever its score."""


@dataclass(frozen=True)
class JudgeModel(Settings):
    """The held-out judge: a reward model trained on comparisons that the trials' own reward model never saw."""

    path: str | None
    """A reward model to judge by, as stage `reward_model` writes it; null trains one, once."""
    seed_offset: Count
    """Added to `seed` for the judge's comparisons: other prompts, answers and labels."""
    overrides: tuple[str, ...]
    """Settings in which the judge's two stages differ, as on the command line (`compare.prompts=4000`). Where preferences are recorded,
    another seed has the same ones: name others here (`data.path=…`), or give `path`."""


@dataclass(frozen=True)
class Sweep(Settings):
    """Many runs of PPO, from one SFT model and one reward model."""

    trials: Annotated[int, Ge(2)]
    """Runs of PPO, that of the experiment's own settings included. May be raised later: the sweep goes on."""
    search: Literal["random", "optuna"]
    """Where values come from. `random`: the space. `optuna`: tree-structured Parzen estimators (TPE), which learn from earlier trials."""
    startup: Count
    """Trials that `search=optuna` draws at random before it learns from them."""
    default_first: bool
    """Whether the first trial runs the experiment's own settings, so that the winner is at least as good by the judge."""
    scheduler: Annotated[FIFO | ASHA | PBT, Field(discriminator="kind")]
    """Which trials go on."""
    space: dict[str, Any]
    """Settings of PPO that are varied, each with one of: `choice: [values]`, `uniform: [low, high]`, `loguniform: [low, high]`,
    `quniform: [low, high, step]`, `int: [low, high]`, `logint: [low, high]`, `qint: [low, high, step]` (ends included), and
    perhaps `when: {other setting of the space: value or [values]}`: where that does not hold, the setting stays the experiment's."""
    every: Count
    """Steps of PPO between two measurements by the judge, and between commits (`ppo.judge.every` and `commit.every` of the trials)."""
    prompts: Count
    """Held-out prompts that the judge scores replies to."""
    objective: Objective
    """What wins."""
    judge: JudgeModel
    """Who scores."""
    concurrency: Count | None
    """Trials at a time at most; null: as many as the planner fits on the cluster. With PBT all take turns."""
    driver_cpus: Annotated[float, Gt(0), Lt(64)]
    """CPUs that Tune reserves for a trial's driver, beside those of its roles; with `runtime=local` it is all there is, and has 1."""
    retry_failed: bool
    """Whether trials that failed are run again when the sweep goes on; if not, they stay with their reason."""
