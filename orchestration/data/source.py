"""What a source of data must supply to the stages, and which source a configuration names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from conf.schema import Config
from conf.sources import FilesData, WorldData
from orchestration.data.dialogues import Dialogue
from orchestration.data.preferences import Comparison, Judgement


@dataclass(frozen=True)
class Corpus:
    """Everything the recipe needs of its data."""

    demonstrations: list[Dialogue]
    """Dialogues to learn from."""
    held_out: list[Dialogue]
    """Dialogues for the held-out loss."""
    prompts: list[Dialogue]
    """Contexts that end where an assistant's turn begins, for comparisons and PPO."""
    comparison_prompts: list[Dialogue]
    """Unseen contexts for held-out comparisons."""
    judge_prompts: list[Dialogue]
    """Unseen contexts for evaluation; apart from all others."""
    judgements: list[Judgement] = field(default_factory=list)
    """Human judgements to learn from."""
    held_out_judgements: list[Judgement] = field(default_factory=list)
    """Human judgements to measure on."""
    comparisons: list[Comparison] = field(default_factory=list)
    """Recorded rankings to learn from."""
    held_out_comparisons: list[Comparison] = field(default_factory=list)
    """Recorded rankings to measure on."""
    texts: list[str] = field(default_factory=list)
    """Plain texts for language modelling without dialogue."""
    held_out_texts: list[str] = field(default_factory=list)
    """Plain texts to measure on."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each `Dialogue.source` in a mixture; empty where there is none."""
    report: dict[str, Any] = field(default_factory=dict)
    """Where every row went, what is in the mixture and what is twice there, for summary.json."""
    notes: list[str] = field(default_factory=list)
    """The same as lines for the log."""


class Source(Protocol):
    """Where a corpus comes from."""

    def load(self) -> Corpus:
        """Raises:
        RequestError: a file is missing, unreadable or empty; names file and setting.
        """

    def fingerprint(self) -> str:
        """Changes when the data do: an input of every stage."""


def open_source(config: Config) -> Source:
    """The configured source."""
    if isinstance(config.data, WorldData):
        from orchestration.data.world.source import WorldSource

        return WorldSource(config.data, config.compare.heldout_prompts, config.evaluate.prompts, config.seed)
    assert isinstance(config.data, FilesData)
    from orchestration.data.files import FilesSource

    return FilesSource(config.data, config.evaluate.prompts, config.seed)
