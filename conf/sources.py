"""Where the data come from: the embedded world, or files and data sets in any mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from conf.settings import Count, Positive, Settings, Share, Whole


@dataclass(frozen=True)
class Flaws(Settings):
    """How often the embedded world's people write imperfect demonstrations; probabilities."""

    opener: Share
    """An empty phrase before the answer."""
    closer: Share
    """An empty phrase after the answer."""
    agrees_with_false_premise: Share
    """Goes along with a question whose premise is false."""
    contradicts_true_premise: Share
    """Denies a premise that is true."""
    guesses_unknown: Share
    """Invents an answer that it cannot know."""
    forgets: Share
    """Claims not to know what it was told."""
    helps_with_harm: Share
    """Answers a request that should be refused."""
    refuses_harmless: Share
    """Refuses a harmless request."""
    stonewalls: Share
    """Does not admit a mistake when corrected."""
    apologises_needlessly: Share
    """Admits a mistake that was not made."""
    wrong_fact: Share
    """Gets a fact wrong."""


@dataclass(frozen=True)
class WorldData(Settings):
    """The embedded world (no files needed)."""

    kind: Literal["world"]
    """Source of the dialogues."""
    demonstrations: Count
    """Conversations to learn from."""
    heldout: Count
    """Further conversations for the held-out loss."""
    prompts: Count
    """Conversations that prompts for comparisons and PPO are drawn from."""
    texts: Whole
    """Documents of plain text to pretrain on and to mix into PPO (`ppo.ptx`); a tenth as many more are held out."""
    flaws: Flaws
    """How people err."""


@dataclass(frozen=True)
class Part(Settings):
    """One set of rows of one format."""

    format: Literal["messages", "hh", "instructions", "taskmaster", "rankings", "text", "dataset"]
    """What the rows look like; README.md shows each format. `dataset`: a data set whose rows have the format that `columns` names."""
    path: str | None = None
    """A file, or a folder of files, plain or gzipped; null takes `data.path`, and a relative one is below it where that is set."""
    weight: Positive = 1.0
    """Share of this part among the dialogues to learn from, relative to the other parts; smaller parts are repeated to reach it."""
    best_as_demonstration: bool = True
    """The best answer of a comparison is also a dialogue to learn from (formats `hh` and `rankings`)."""
    name: str | None = None
    """Of a `dataset`: a name on the Hugging Face hub, or a local file or folder of parquet, arrow or JSON."""
    split: str = "train"
    """Of a `dataset` on the hub: its split. A local folder is read whole."""
    columns: Literal["messages", "hh", "instructions", "rankings", "text"] | None = None
    """Of a `dataset`: the format whose fields are its columns."""


@dataclass(frozen=True)
class FilesData(Settings):
    """Dialogues, comparisons, judgements and texts that people wrote, from files."""

    kind: Literal["files"]
    """Source of the dialogues."""
    path: str | None
    """A file or folder; shorthand for the parts of `mix` that name none of their own."""
    mix: tuple[Part, ...]
    """The sets to read; at least one."""
    heldout: Count
    """Dialogues kept for the held-out loss and as held-out contexts."""
    heldout_preferences: Whole
    """Comparisons or judgements kept to measure the reward model on; whole conversations are kept together."""
    on_bad_row: Literal["refuse", "skip"]
    """`refuse`: the first row that is not of its format ends the run. `skip`: such rows are left out, counted and listed."""
    longest_row_mb: Positive
    """Longest row in MiB; a longer one is a bad row."""
    near_duplicate: Share
    """Jaccard similarity of two rows' word 5-shingles from which they count as near duplicates of each other."""
    drop_duplicates: bool
    """Leave out rows to learn from that are duplicates of held-out ones, exact or near; otherwise they are only reported."""
    tool_response_chars: Annotated[int, Ge(16)]
    """Longest API response shown in a Taskmaster context, in characters; the rest of it is left out from its middle."""
    pretrain: Part | None = None
    """Plain text for language modelling without dialogue (format `text`)."""
