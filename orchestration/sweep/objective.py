"""What wins: the held-out judge's score at a KL budget. Nothing here, or anywhere in a sweep, reads the exact grade."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conf.schema import Config
from conf.sweeps import Sweep

JUDGE = "held_out_judge"
"""Name of the judge among the sources of `ppo.rewards`: its weight is 0, so that it is only logged."""


@dataclass(frozen=True)
class Point:
    """A measurement of a trial's weights on held-out prompts."""

    step: int
    """Updates made."""
    kl: float
    """To the SFT model, nats per reply."""
    score: float
    """The held-out judge's mean."""


def point(measured: dict[str, Any]) -> Point:
    """From PPO's measurement, of which nothing else is kept."""
    return Point(int(measured["step"]), measured["kl"], measured[f"score_{JUDGE}"])


def budget(sweep: Sweep, config: Config) -> float:
    """KL that a trial may have, nats per reply."""
    return sweep.objective.kl_budget or config.ppo.kl.budget


def objective(at: Point, kl_budget: float, penalty: float) -> float:
    """What searchers and schedulers compare: the score, less `penalty` for each nat above the budget."""
    return at.score - penalty * max(at.kl - kl_budget, 0.0)


def ineligible(status: str, points: Sequence[Point], steps: int, kl_budget: float) -> str | None:
    """Why a trial cannot win; None if it can."""
    if status != "finished":
        return {"stopped": "ended early", "failed": "failed", "running": "not done"}[status]
    if not points or points[-1].step < steps:
        return "stopped by PPO's guard at ppo.kl.budget"
    if points[-1].kl > kl_budget:
        return f"KL {points[-1].kl:.3g} above the budget of {kl_budget:.3g}"
    return None
