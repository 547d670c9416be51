"""What a source of data must supply to the stages, and which source a configuration names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from conf.schema import Config, TaskmasterData, WorldData
from orchestration.data.dialogues import Dialogue


@dataclass(frozen=True)
class Judgement:
    """One reply that a person judged."""

    context: Dialogue
    reply: str
    good: bool


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
    texts: list[str] = field(default_factory=list)
    """Documents of plain text to pretrain on; what PPO-ptx mixes in."""
    held_out_texts: list[str] = field(default_factory=list)
    """Documents of plain text to measure on."""


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
    assert isinstance(config.data, TaskmasterData)
    from orchestration.data.taskmaster import TaskmasterSource

    return TaskmasterSource(config.data, config.evaluate.prompts, config.seed)
