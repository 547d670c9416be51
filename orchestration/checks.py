"""What must hold in every run of PPO, whatever it learns: pure functions from figures to findings.

    ratio          the first update starts from the policy that gave the old log-probs: the ratio is 1
    clip           so nothing is clipped in its first minibatch
    reference      before the first update the policy is the reference: their log-probs are the same
    engine         engine and trainer give a sampled token the same log-prob, where both have the same weights
    weights        every reply was sampled by the weights of its step, or by those that `ppo.staleness` says
    demonstrations the reward model gives demonstrations 0 on average, as its stage has set it (rankings only)

Bounds are rounding, measured on CPUs (BENCHMARKS.md): the same sums in another order where the shapes of batches differ. With fp32 and
the update's own micro-batches the ratio is exactly 1, and the bound is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NAMES = ("ratio", "clip", "reference", "engine", "weights", "demonstrations")


@dataclass(frozen=True)
class Bounds:
    """What rounding may do, in nats unless a line says otherwise."""

    log_ratio: float
    """Largest |log ratio| of a token of the first minibatch."""
    reference: float
    """Mean |log pi - log ref| per token."""
    engine: float
    """Mean |log pi - log engine| per token."""
    demonstrations: float
    """Mean score of demonstrations, in the reward model's own unit."""


BOUNDS = {"fp32": Bounds(1e-4, 1e-5, 1e-4, 1e-3), "bf16": Bounds(0.1, 0.01, 0.03, 0.02)}
"""By `model.dtype`, several times what was seen: in fp32 engine and trainer 5e-7 apart on average, beside a trainer in bf16 0.004.

The log ratio in bf16 may be half of the usual ppo.clip, 0.2: rounding alone then clips nothing."""


@dataclass(frozen=True)
class Finding:
    """One check's outcome."""

    name: str
    seen: float
    bound: float
    expected: str
    look_at: str

    @property
    def passed(self) -> bool:
        """Within the bound; what is not a number is not."""
        return abs(self.seen) <= self.bound

    def sentence(self) -> str:
        """For the terminal: expected, seen, and what to look at."""
        return f"check {self.name}: {self.expected} (within {self.bound:g}), seen {self.seen:.4g}; look at {self.look_at}"

    def as_dict(self) -> dict[str, float | bool]:
        return {"passed": self.passed, "bound": self.bound, "seen": self.seen}


def before_learning(figures: Mapping[str, float], dtype: str) -> list[Finding]:
    """On samples of the very first weights."""
    expected = "before the first update the policy's log-probs are the reference's: 0 nats between them per token"
    look_at = "the reference's weights and temperature (ppo.temperature is for both), and dropout, which must be off"
    return [Finding("reference", figures["reference_gap"], BOUNDS[dtype].reference, expected, look_at)]


def first_update(figures: Mapping[str, float], dtype: str, own_micro_batches: bool) -> list[Finding]:
    """On the figures of a run's first update.

    Args:
        own_micro_batches: the old log-probs were computed on the very micro-batches that the update learns from.
    """
    bound = 0.0 if dtype == "fp32" and own_micro_batches else BOUNDS[dtype].log_ratio
    look_at = "dropout (off in PPO), ppo.temperature in both passes, and weights that changed between experience and update"
    return [
        Finding("ratio", figures["first_log_ratio_max"], bound, "in the first minibatch every log ratio is 0", look_at),
        Finding("clip", figures["first_clip_share"], 0.0, "nothing is clipped in the first minibatch", f"{look_at}; ppo.clip"),
    ]


def every_step(figures: Mapping[str, float], dtype: str, version: int, current: int) -> list[Finding]:
    """On the samples of any step.

    Args:
        version: of the weights that must have sampled.
        current: version of the policy's weights; where it is another, the engine's log-probs are not the trainer's, and must not be.
    """
    far = abs(figures["weight_version_min"] - version) + abs(figures["weight_version_max"] - version)
    sampled_by = Finding(
        "weights", far, 0.0,
        f"all replies were sampled by weights of version {version}",
        f"engines that missed a sync (versions {figures['weight_version_min']:g} to {figures['weight_version_max']:g} were seen)",
    )  # fmt: skip
    if version != current:
        return [sampled_by]
    return [
        sampled_by,
        Finding(
            "engine", figures["engine_gap_mean"], BOUNDS[dtype].engine,
            "engine and trainer give sampled tokens the same log-probs: 0 nats between them on average",
            "weights that did not reach an engine (weight_sync.py), ppo.temperature in both, and the engine's precision",
        ),
    ]  # fmt: skip


def zero_point(mean_score: float, dtype: str) -> Finding:
    """On the mean score of the demonstrations that set the reward model's zero."""
    return Finding(
        "demonstrations", mean_score, BOUNDS[dtype].demonstrations, "the reward model gives demonstrations 0 on average",
        "the bias of its head (*_head.safetensors), and whether its weights are those that stage reward_model left",
    )  # fmt: skip
