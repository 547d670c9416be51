"""Illnesses of PPO and the figures that give them away: a table of rules, and who is ill now.

A rule looks at the mean of one figure over the last steps, as it is or beside its mean over the run's first steps; that mean, and not one
step, must be beyond the threshold, so a single odd batch is no illness. Pure: from the rows of metrics.jsonl to names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, float]
FIRST_STEPS = 3
"""Steps whose mean is what later figures are compared with."""
SURE = 2.0
"""Standard errors by which the grade must have fallen to count as falling."""


@dataclass(frozen=True)
class Rule:
    """When a figure means an illness."""

    name: str
    figure: str
    above: bool
    """True: ill above the threshold. False: below."""
    threshold: float
    why: str
    """The reason for the threshold."""
    illness: str
    remedy: str
    relative: bool = False
    """The figure is divided by its mean over the first steps."""
    window: int = 3
    """Steps whose mean is judged."""
    after: int = 0
    """Steps at the beginning that are not judged."""

    def seen(self, rows: Sequence[Row]) -> float | None:
        """The number that is compared with the threshold; None while there are too few steps, or without the figure."""
        values = [row[self.figure] for row in rows if self.figure in row]
        judged = values[max(self.after, FIRST_STEPS if self.relative else 0) :]
        if len(judged) < self.window:
            return None
        mean = sum(judged[-self.window :]) / self.window
        if not self.relative:
            return mean
        first = sum(values[:FIRST_STEPS]) / FIRST_STEPS
        return mean / first if first else None

    def is_ill(self, rows: Sequence[Row]) -> bool:
        found = self.seen(rows)
        return found is not None and (found > self.threshold if self.above else found < self.threshold)

    def sentence(self, rows: Sequence[Row]) -> str:
        """For the terminal."""
        figure = f"{self.figure}, as a share of the first steps'," if self.relative else self.figure
        side = "above" if self.above else "below"
        return f"{self.illness}: {figure} is {self.seen(rows):.3g}, {side} {self.threshold:g} ({self.name}); try {self.remedy}"


RULES = (
    Rule("entropy_collapse", "entropy", False, 0.2, "runs here kept 0.3 and more", "the policy is nearly certain of every token",
         "a higher ppo.kl.beta, a lower ppo.lr", relative=True, window=5),
    Rule("entropy_rise", "entropy", True, 2.0, "learning sharpens; healthy runs stayed below 1.3", "the policy drifts into noise",
         "a lower ppo.lr, a higher ppo.kl.beta", relative=True, window=5),
    Rule("mode_collapse", "distinct_2", False, 0.33, "runs here kept 0.9", "replies use the same few phrases",
         "a higher ppo.kl.beta; look at the replies that the reward model likes", relative=True, window=5),
    Rule("same_reply", "duplicate_share", True, 0.9, "one reply in ten is its own", "most prompts get the same reply",
         "a higher ppo.kl.beta, more and other prompts", window=3),
    Rule("verbosity", "reply_tokens", True, 1.5, "half as long again is a change of style",
         "replies grow longer: the reward may pay for length",
         "a look at heldout_accuracy_shorter_preferred of the reward model; a lower ppo.max_new_tokens", relative=True, window=5),
    Rule("terseness", "reply_tokens", False, 0.4, "the quickstart's wordy replies shrank to 0.6, rightly", "replies shrink to little",
         "a look at heldout_accuracy_longer_preferred of the reward model; a higher ppo.kl.beta", relative=True, window=5),
    Rule("no_end", "finished_share", False, 0.5, "half of the replies would be cut in use", "replies do not end by themselves",
         "more SFT steps, a higher ppo.max_new_tokens, a higher ppo.missing_end_penalty", window=5),
    Rule("useless_critic", "explained_variance", False, 0.0, "a constant would explain as much",
         "the critic explains nothing of the returns",
         "a higher ppo.critic_lr, more ppo.warmup, a larger ppo.value_clip", window=5, after=10),
    Rule("large_steps", "clip_share", True, 0.3, "healthy runs clipped less than 0.05", "updates go too far: much of the batch is clipped",
         "a lower ppo.lr, fewer ppo.epochs, a larger ppo.batch"),
    Rule("kl_runaway", "kl_of_budget", True, 0.8, "a fifth of ppo.kl.budget is left", "the policy runs away from the reference",
         "ppo.kl.controller=adaptive, a higher ppo.kl.beta, ppo.guard.action=rollback", window=1),
    Rule("negative_kl", "kl_per_token", False, -0.05, "KL cannot be negative, and its estimate only by chance",
         "the samples are not the policy's: KL is negative", "a look at ppo.temperature and at the engine's gap", window=5),
    Rule("engine_drift", "engine_gap_mean", True, 0.03, "rounding in bf16 gave 0.004", "engine and trainer disagree on what was sampled",
         "model.dtype=fp32, or a look at the engine's precision"),
    Rule("engine_outliers", "engine_gap_max", True, 3.0, "one token, 20 times likelier in one than in the other",
         "engine and trainer disagree strongly on single tokens", "model.dtype=fp32, or a look at the engine's precision"),
    Rule("flat_reward", "score_std", False, 1e-3, "no reply is better than another",
         "all replies score the same: there is nothing to learn",
         "a look at the reward model's held-out accuracy, and at ppo.reward_clip"),
)  # fmt: skip
NOT_FINITE, OVEROPTIMISED = "not_finite", "overoptimised"


def illnesses(rows: Sequence[Row], curve: Sequence[Row]) -> dict[str, str]:
    """Name -> sentence of everything that is ill after the last row.

    Args:
        rows: figures of every step so far.
        curve: measurements of the held-out judge so far: `score`, and `gold` with `gold_error` where there is an exact grade.
    """
    found = {rule.name: rule.sentence(rows) for rule in RULES if rule.is_ill(rows)}
    broken = [name for name, value in (rows[-1] if rows else {}).items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        found[NOT_FINITE] = f"figures are not finite: {', '.join(broken)} ({NOT_FINITE}); try a lower ppo.lr, model.dtype=fp32"
    if overoptimised(curve):
        best, last = max(curve, key=lambda row: row["gold"]), curve[-1]
        found[OVEROPTIMISED] = (
            f"over-optimised: since step {best['step']:g} the reward model's score went from {best['score']:.3g} to {last['score']:.3g} "
            f"and the exact grade from {best['gold']:.3g} to {last['gold']:.3g} ({OVEROPTIMISED}); try a lower ppo.kl.target or budget, a "
            "higher ppo.kl.beta, fewer ppo.steps"
        )
    return found


def overoptimised(curve: Sequence[Row]) -> bool:
    """Whether the score rose while the exact grade fell, in each of the last two measurements beside the best grade so far.

    The reward model is a stand-in; past some KL its score goes on rising while what it stands for falls (Gao et al. 2210.10760).
    """
    if len(curve) < 3 or not all("gold" in row for row in curve):
        return False
    best = max(curve, key=lambda row: row["gold"])
    since = [row for row in curve if row["step"] > best["step"]][-2:]

    def worse(row: Row) -> bool:
        return row["gold"] < best["gold"] - SURE * max(row["gold_error"], best["gold_error"]) and row["score"] > best["score"]

    return len(since) == 2 and all(worse(row) for row in since)


@dataclass(frozen=True)
class Change:
    """What is new after a step, as lines for the terminal."""

    begun: dict[str, str]
    ended: list[str]


def change(before: Sequence[str], now: Mapping[str, str]) -> Change:
    """What began and what ended."""
    return Change({name: text for name, text in now.items() if name not in before}, [name for name in before if name not in now])
