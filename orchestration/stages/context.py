"""What a stage is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from conf.schema import Config
from orchestration.data.chat import Chat, load_tokenizer
from orchestration.data.dialogues import Dialogue
from orchestration.data.source import Corpus, Source
from orchestration.errors import RequestError
from orchestration.metrics import Metrics
from orchestration.run_directory import ROUND, RunDirectory, StageDirectory, sealed
from orchestration.runtime.group import Runtime

Grades = Callable[[Sequence[Dialogue], Sequence[str], Sequence[bool]], list[float]]
"""(contexts, replies, whether each ended) -> a grade for each. Only measured by, never learned from or selected on."""


Measured = Callable[[dict[str, float]], None]
"""Told each point of the held-out judge's curve (stages/judging.py), once the weights that it is of are committed, if they are to be."""


class Shared:
    """What the stages of one run share: the data, loaded once, and the runtime, started when first needed."""

    def __init__(self, config: Config, source: Source, connect: Callable[[Config], Runtime], grades: Grades | None = None) -> None:
        """Args:
        grades: the exact grade, where the data have one; `recipe.py` hands it in, so that no training stage imports it.
        """
        self.config, self.source, self.connect, self.grades = config, source, connect, grades
        self.say: Callable[[str], None] = print
        self.measured: Measured = lambda point: None

    @cached_property
    def corpus(self) -> Corpus:
        corpus = self.source.load()
        for note in corpus.notes:
            self.say(f"data: {note}")
        return corpus

    @property
    def report(self) -> dict[str, Any]:
        """Where the rows of the data went; empty while no stage has asked for them."""
        return self.corpus.report if "corpus" in self.__dict__ else {}

    @cached_property
    def runtime(self) -> Runtime:
        return self.connect(self.config)

    def close(self) -> None:
        if "runtime" in self.__dict__:
            self.runtime.close()


@dataclass(frozen=True)
class StageContext:
    """One stage's surroundings."""

    name: str
    config: Config
    run: RunDirectory
    metrics: Metrics
    shared: Shared

    @property
    def directory(self) -> StageDirectory:
        return self.run.stage(self.name)

    @property
    def corpus(self) -> Corpus:
        return self.shared.corpus

    @property
    def runtime(self) -> Runtime:
        return self.shared.runtime

    def start_runtime(self) -> None:
        """Connect, where training starts its ranks by itself."""
        _ = self.shared.runtime

    def input(self, stage: str) -> Path:
        """Folder of an earlier stage's result, or of the weights the configuration names in its place.

        Raises:
            RequestError: there is neither; says how to get it.
        """
        return input_of(self.config, self.run, self.name, stage)

    @cached_property
    def longest(self) -> int:
        """Longest sequence that the SFT model takes, or fewer tokens if `engine.longest` says so."""
        context = int(AutoConfig.from_pretrained(self.input("sft")).max_position_embeddings)
        return min(context, self.config.engine.longest or context)

    @cached_property
    def chat(self) -> Chat:
        """The chat format that the SFT stage saved with its model."""
        return Chat(load_tokenizer(str(self.input("sft")), "policy_checkpoint"))


def input_of(config: Config, run: RunDirectory, name: str, stage: str) -> Path:
    """See `StageContext.input`."""
    setting = {"sft": "policy_checkpoint", "reward_model": "reward_checkpoint"}.get(stage)
    named = getattr(config, setting) if setting else None
    if named:
        return Path(named)
    folder = run.path / ROUND / stage / "checkpoint"  # only looked at: asking must not make folders
    if sealed(folder) is None:
        how = f"run stage={stage} first" + (f", or name its weights with {setting}=<folder>" if setting else "")
        raise RequestError(f"stage={name}: it starts from the result of stage {stage!r}, which is not in {run.path}; {how}")
    return folder
