"""`chatray data show`: a sample of the data as the model sees it, token by token, with the tokens that are learned from marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text

from conf.schema import Config
from orchestration.data import comparisons
from orchestration.data.chat import Chat, load_tokenizer
from orchestration.data.dialogues import Dialogue
from orchestration.data.preferences import Comparison
from orchestration.data.source import Corpus, open_source
from orchestration.errors import RequestError
from orchestration.run_directory import RunDirectory, sealed
from orchestration.stages.start import context_length, starting_chat

SETS = ("demonstrations", "held_out", "prompts", "comparisons", "texts")
LEARNED, CONTEXT, SPECIAL = "black on green", "cyan", "bold magenta"


@dataclass(frozen=True)
class Sample:
    """One sample as tokens."""

    title: str
    ids: list[int]
    mask: list[bool]
    """Tokens that are learned from; of comparisons, those that are judged."""


def show(config: Config, which: str, index: int, console: Console | None = None) -> None:
    """Print one sample of a set, with its token counts.

    Args:
        which: one of `SETS`.

    Raises:
        RequestError: there is no such set, or it has no sample of that number.
    """
    if which not in SETS:
        raise RequestError(f"set={which}: no such set; choose from {', '.join(SETS)}")
    corpus = open_source(config).load()
    chat = chat_of(config, corpus)
    samples = samples_of(config, corpus, chat, which, index)
    out = console or Console(highlight=False)
    for sample in samples:
        out.print(Text(sample.title, style="bold"))
        out.print(coloured(chat, sample.ids, sample.mask))
        out.print(counted(sample, context_length(config)), style="dim", markup=False)


def chat_of(config: Config, corpus: Corpus) -> Chat:
    """The chat format of the run's finished SFT stage, or the one that it would start from."""
    folder = RunDirectory(Path(config.run_dir), 1).path / "round_01" / "sft" / "checkpoint"
    if sealed(folder) is not None:
        return Chat(load_tokenizer(str(folder), "run_dir"))
    return starting_chat(config, corpus)


def samples_of(config: Config, corpus: Corpus, chat: Chat, which: str, index: int) -> list[Sample]:
    """The named sample; of a comparison each of its answers.

    Raises:
        RequestError: the set has no sample of that number.
    """
    if which == "comparisons":
        return _comparison(config, corpus, chat, index)
    rows: Sequence[Dialogue | str] = getattr(corpus, which)
    row = _at(rows, which, index)
    if isinstance(row, str):
        ids = [*chat.text(row), chat.end]
        return [Sample(f"texts {index} of {len(rows)}", ids, [True] * len(ids))]
    if which == "prompts":
        ids = chat.prompt(row)
        return [Sample(f"prompts {index} of {len(rows)}: {row.id}", ids, [False] * len(ids))]
    return [Sample(f"{which} {index} of {len(rows)}: {row.id}", *chat.encode(row))]


def _comparison(config: Config, corpus: Corpus, chat: Chat, index: int) -> list[Sample]:
    """A recorded judgement or ranking, or one from the run's compare stage."""
    if corpus.judgements:
        judged = _at(corpus.judgements, "comparisons", index)
        rows = comparisons.encode_judgements(chat, [judged])
        verdicts = ["good" if judged.good else "bad"]
    else:
        ranked = _at(corpus.comparisons or _ranked_in(config), "comparisons", index)
        rows = comparisons.encode_rankings(chat, [ranked])
        verdicts = [f"rank {rank} of {len(ranked.ranks)} (0 is best)" for rank in ranked.ranks]
    return [
        Sample(f"comparisons {index}: {verdict}", tokens[:length].tolist(), mask[:length].tolist())
        for tokens, length, mask, verdict in zip(rows.tokens, rows.lengths.tolist(), rows.mask, verdicts, strict=True)
    ]


def _ranked_in(config: Config) -> list[Comparison]:
    file = RunDirectory(Path(config.run_dir), 1).path / "round_01" / "compare" / "checkpoint" / comparisons.TRAIN_FILE
    if not file.exists():
        raise RequestError(f"set=comparisons: none were ranked in run_dir={config.run_dir} yet; run stage=compare first")
    return comparisons.read(file)


def _at(rows: Sequence, which: str, index: int):
    if index >= len(rows):
        raise RequestError(f"index={index}: set={which} has {len(rows)} samples{f', 0 to {len(rows) - 1}' if rows else ''}")
    return rows[index]


def coloured(chat: Chat, ids: Sequence[int], mask: Sequence[bool]) -> Text:
    """The tokens' text: what is learned from in one colour, context in another, special tokens visible in a third.

    Neighbours of one kind are decoded together, since a character may span tokens. In plain text, learned runs stand in «guillemets».
    """
    special = set(chat.tokenizer.all_special_ids) | set(chat.role_ids.values() if chat.own else ())
    text, start = Text(), 0
    while start < len(ids):
        stop = start + 1
        while stop < len(ids) and mask[stop] == mask[start]:
            stop += 1
        learned = mask[start]
        text.append("«" if learned else "", LEARNED)
        _append_run(text, chat, ids[start:stop], special, LEARNED if learned else CONTEXT)
        text.append("»" if learned else "", LEARNED)
        start = stop
    return text


def _append_run(text: Text, chat: Chat, ids: Sequence[int], special: set[int], style: str) -> None:
    for is_special, run in groupby(ids, key=special.__contains__):
        group = list(run)
        if is_special:
            names = "".join(map(str, chat.tokenizer.convert_ids_to_tokens(group)))
            text.append(names, f"bold {style}" if style == LEARNED else SPECIAL)
        else:
            text.append(str(chat.tokenizer.decode(group)), style)


def counted(sample: Sample, longest: int) -> str:
    """Token counts, and whether the sample fits the context."""
    note = "" if len(sample.ids) <= longest else f"; longer than the context of {longest}: it is left out or shortened"
    return f"{len(sample.ids)} tokens, {sum(sample.mask)} learned from «», {len(sample.ids) - sum(sample.mask)} context{note}"
