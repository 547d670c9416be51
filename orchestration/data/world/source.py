"""The embedded world as a source of data."""

from __future__ import annotations

import dataclasses

from conf.sources import WorldData
from orchestration.data.source import Corpus
from orchestration.data.world import scenarios, texts
from orchestration.run_directory import digest

HELD_OUT_TEXTS = 10
"""One document is held out for this many to learn from."""


@dataclasses.dataclass(frozen=True)
class WorldSource:
    """Generates a corpus from a seed; the sets are drawn apart."""

    data: WorldData
    comparison_prompts: int
    judge_prompts: int
    seed: int

    def load(self) -> Corpus:
        flaws = self.data.flaws
        judging = scenarios.prompts(self.comparison_prompts + self.judge_prompts, self.seed, flaws, judging=True)
        articles = texts.documents(self.data.texts + -(-self.data.texts // HELD_OUT_TEXTS), self.seed)
        return Corpus(
            demonstrations=scenarios.demonstrations(self.data.demonstrations, self.seed, flaws),
            held_out=scenarios.demonstrations(self.data.heldout, self.seed + 1_000_003, flaws),
            prompts=scenarios.prompts(self.data.prompts, self.seed, flaws, judging=False),
            comparison_prompts=judging[: self.comparison_prompts],
            judge_prompts=judging[self.comparison_prompts :],
            texts=articles[: self.data.texts],
            held_out_texts=articles[self.data.texts :],
        )

    def fingerprint(self) -> str:
        """Of the settings, and of a sample of what the generator makes of them: a changed generator is another source."""
        flaws = self.data.flaws
        sample = scenarios.demonstrations(64, self.seed, flaws) + scenarios.prompts(64, self.seed, flaws, judging=True)
        shown = [dialogue.as_list() for dialogue in sample], texts.documents(16, self.seed)
        return digest({"data": dataclasses.asdict(self.data), "seed": self.seed, "sample": shown})
