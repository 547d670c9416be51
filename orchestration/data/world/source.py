"""The embedded world as a source of data."""

from __future__ import annotations

import dataclasses

from conf.schema import WorldData
from orchestration.data.source import Corpus
from orchestration.data.world import scenarios
from orchestration.run_directory import digest

WORLD_VERSION = 1
"""Raised when the generator changes what it generates."""


@dataclasses.dataclass(frozen=True)
class WorldSource:
    """Generates a corpus from a seed; the four sets are drawn apart."""

    data: WorldData
    comparison_prompts: int
    judge_prompts: int
    seed: int

    def load(self) -> Corpus:
        flaws = scenarios.Flaws(**dataclasses.asdict(self.data.flaws))
        judging = scenarios.prompts(self.comparison_prompts + self.judge_prompts, self.seed, judging=True)
        return Corpus(
            demonstrations=scenarios.demonstrations(self.data.demonstrations, self.seed, flaws),
            held_out=scenarios.demonstrations(self.data.heldout, self.seed + 1_000_003, flaws),
            prompts=scenarios.prompts(self.data.prompts, self.seed, judging=False),
            comparison_prompts=judging[: self.comparison_prompts],
            judge_prompts=judging[self.comparison_prompts :],
        )

    def fingerprint(self) -> str:
        return digest({"version": WORLD_VERSION, "data": dataclasses.asdict(self.data), "seed": self.seed})
