"""What a source of data must supply to the stages, and which source a configuration names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from conf.schema import Config
from conf.sources import FilesData, WorldData
from orchestration.data.dialogues import Dialogue
from orchestration.data.preferences import Comparison, Judgement
from orchestration.errors import RequestError


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
    """Documents of plain text to pretrain on; what PPO-ptx mixes in."""
    held_out_texts: list[str] = field(default_factory=list)
    """Documents of plain text to measure on."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each `Dialogue.source` in a mixture; empty where there is none."""
    report: dict[str, Any] = field(default_factory=dict)
    """Where every row went, what is in the mixture and what is twice there, for summary.json."""
    notes: list[str] = field(default_factory=list)
    """The same as lines for the log."""

    def ranked(self) -> bool:
        """Whether the recorded preferences are rankings; if not, they are judgements.

        Raises:
            RequestError: there are none, both kinds, none to measure on, or none that prefers anything.
        """
        rankings, judged = (len(self.comparisons), len(self.held_out_comparisons)), (len(self.judgements), len(self.held_out_judgements))
        if any(rankings) and any(judged):
            raise RequestError(
                f"data.mix: it holds {sum(rankings)} comparisons and {sum(judged)} judgements, and one reward model learns from one kind; "
                "leave out the parts with the other"
            )
        if not all(rankings) and not all(judged):
            train, test = max(rankings, judged)
            raise RequestError(
                f"data: {train} comparisons or judgements to learn from and {test} held out; some of both are needed: give more data, or "
                "change data.heldout_preferences"
            )
        learn, measure = (self.comparisons, self.judgements), (self.held_out_comparisons, self.held_out_judgements)
        for name, (ranks, verdicts) in (("learn from", learn), ("measure on", measure)):
            if all(rankings) and not any(len(set(c.ranks)) > 1 for c in ranks):
                raise RequestError(f"data: all {len(ranks)} comparisons to {name} are ties; give some in which one answer is better")
            if all(judged) and len({j.good for j in verdicts}) < 2:
                raise RequestError(f"data: all {len(verdicts)} judgements to {name} are the same; give good and bad ones")
        return all(rankings)


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
