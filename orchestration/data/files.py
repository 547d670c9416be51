"""Dialogues, comparisons, judgements and texts from files and data sets, in any mixture.

Every row goes somewhere: it is used, held out, skipped as a bad row, or left out because a held-out row repeats it. Rows are held out by
whole conversations; a row that is held out for any purpose is learned from in no stage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.sources import FilesData, Part
from orchestration.contradictions import part_files
from orchestration.data import duplicates
from orchestration.data.account import Account
from orchestration.data.dialogues import Dialogue
from orchestration.data.formats.reading import sample_of
from orchestration.data.formats.sample import Sample
from orchestration.data.hub import hub_rows
from orchestration.data.mixture import mixed
from orchestration.data.rows import BadRow, Row, rows_of
from orchestration.data.source import Corpus
from orchestration.errors import RequestError
from orchestration.run_directory import digest

PROMPTS_PER_DIALOGUE = 2
TEXTS_HELD_OUT = 0.05
"""Share of the plain texts that is held out."""
SHOWN = 20
"""Duplicates that are listed one by one; all are counted."""


@dataclass(frozen=True)
class Entry:
    """One usable row."""

    account: Account
    where: str
    sample: Sample

    @property
    def conversation(self) -> str:
        """Rows of several parts that name the same conversation are held out together: an answer that one part demonstrates may be what
        another compares."""
        return self.sample.conversation

    @property
    def prefers(self) -> bool:
        return self.sample.comparison is not None or self.sample.judgement is not None


@dataclass(frozen=True)
class FilesSource:
    """The parts of `data.mix` and the texts of `data.pretrain`."""

    data: FilesData
    judge_prompts: int
    seed: int

    def load(self) -> Corpus:
        accounts = {name: Account(name, self.data.on_bad_row) for name in self._parts}
        entries = [entry for name, part in self._parts.items() for entry in self._entries(part, accounts[name])]
        train, apart = self._apart(entries)
        found = duplicates.find((_words(e.sample) for e in train), [_words(e.sample) for e in apart], self.data.near_duplicate)
        report = {"duplicates": self._duplicates(found, train, apart)}
        if self.data.drop_duplicates:
            twice = {duplicate.train for duplicate in found}
            for number in twice:
                train[number].account.duplicates += 1
            train = [entry for number, entry in enumerate(train) if number not in twice]
        for entry in train:
            entry.account.used += 1
        for entry in apart:
            entry.account.held_out += 1
        for account in accounts.values():
            account.balance()
        self._check(accounts, train, apart)
        return self._corpus(train, apart, {"sources": [a.as_dict() for a in accounts.values()]} | report, [*map(str, accounts.values())])

    def fingerprint(self) -> str:
        """Of the settings without paths, and of every file's content. A data set on the hub counts by its name and split."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        local = {name for name, part in self._parts.items() if Path(part.name or "").exists()}
        parts = [(n, dataclasses.asdict(p) | {"path": None, "name": None if n in local else p.name}) for n, p in self._parts.items()]
        files = [
            (part.format, folder, file.name, _hash(file))
            for part in self._parts.values()
            for folder, found in part_files(part).items()
            for file in found
        ]
        settings = dataclasses.asdict(self.data) | {"path": None, "mix": parts, "pretrain": self.data.pretrain is not None}
        return digest({"settings": settings, "files": files})

    @cached_property
    def _parts(self) -> dict[str, Part]:
        """Parts by name: their format, with a number where several have the same."""
        parts = [*self.data.mix, *([self.data.pretrain] if self.data.pretrain else [])]
        names = [part.columns or part.format for part in parts]
        return {
            name if names.count(name) == 1 else f"{name} {names[: number + 1].count(name)}": part
            for number, (name, part) in enumerate(zip(names, parts, strict=True))
        }

    def _entries(self, part: Part, account: Account) -> Iterator[Entry]:
        """Usable rows of a part; the others are skipped or refused, as the settings say."""
        for row in self._rows(part):
            identifier = f"{account.source} {Path(row.file).name}:{row.line}"
            sample = row if isinstance(row, BadRow) else sample_of(row, part, identifier, self.data.tool_response_chars)
            if isinstance(sample, BadRow):
                account.skip(sample)
                continue
            account.read += 1
            owned = tuple(dataclasses.replace(d, source=account.source) for d in sample.demonstrations)
            yield Entry(account, f"{row.file}, line {row.line}", dataclasses.replace(sample, demonstrations=owned))

    def _rows(self, part: Part) -> Iterator[Row | BadRow]:
        if part.format == "dataset" and not Path(part.name or "").exists():
            yield from hub_rows(str(part.name), part.split)
            return
        for files in part_files(part).values():
            for file in files:
                yield from rows_of(file, int(self.data.longest_row_mb * 2**20), plain_text=(part.columns or part.format) == "text")

    def _apart(self, entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
        """Entries to learn from and held-out ones, shuffled: preferences first, then dialogues where those gave too few, and texts."""
        rng = random.Random(f"held out {self.seed}")
        shuffled = rng.sample(entries, len(entries))
        conversations: dict[str, list[Entry]] = {}
        for entry in shuffled:
            conversations.setdefault(entry.conversation, []).append(entry)
        apart: set[str] = set()
        preferences = dialogues = 0
        for name, members in conversations.items():
            if preferences < self.data.heldout_preferences and any(e.prefers for e in members):
                apart.add(name)
                preferences += sum(e.prefers for e in members)
                dialogues += sum(len(e.sample.demonstrations) for e in members)
        for name, members in conversations.items():
            count = sum(len(e.sample.demonstrations) for e in members)
            if dialogues < self.data.heldout and count and name not in apart:
                apart.add(name)
                dialogues += count
        texts = [name for name, members in conversations.items() if members[0].sample.text]
        apart |= set(texts[: max(round(TEXTS_HELD_OUT * len(texts)), 1)])
        return [e for e in shuffled if e.conversation not in apart], [e for e in shuffled if e.conversation in apart]

    def _duplicates(self, found: Sequence[duplicates.Duplicate], train: Sequence[Entry], apart: Sequence[Entry]) -> dict[str, Any]:
        listed = [
            {"row": train[d.train].where, "held_out_row": apart[d.held_out].where, "similarity": round(d.similarity, 3)}
            for d in sorted(found, key=lambda d: -d.similarity)[:SHOWN]
        ]
        exact = sum(d.exact for d in found)
        return {"exact": exact, "near": len(found) - exact, "left_out": self.data.drop_duplicates, "listed": listed}

    def _check(self, accounts: dict[str, Account], train: Sequence[Entry], apart: Sequence[Entry]) -> None:
        """Raises:
        RequestError: nothing is left to learn from, or to measure on.
        """
        counts = f"{sum(a.read for a in accounts.values())} rows leave {len(train)} to learn from and {len(apart)} held out"
        talk = any((part.columns or part.format) != "text" for part in self.data.mix)
        if talk and not any(e.sample.demonstrations for e in train):
            raise RequestError(f"data: {counts}, and no dialogue to learn from; lower data.heldout, or give more data")
        asked = self.data.heldout_preferences > 0 and any(e.prefers for e in [*train, *apart])
        if asked and not any(e.prefers for e in train):
            raise RequestError(f"data: {counts}, and no comparison or judgement to learn from; lower data.heldout_preferences")

    def _corpus(self, train: Sequence[Entry], apart: Sequence[Entry], report: dict[str, Any], notes: list[str]) -> Corpus:
        demonstrations = [d for e in train for d in e.sample.demonstrations]
        held_out = [d for e in apart for d in e.sample.demonstrations][: self.data.heldout]
        weights = {name: self._parts[name].weight for name in {d.source for d in demonstrations}}
        mixture, shares = mixed(demonstrations, weights, self.seed)
        rng = random.Random(f"contexts {self.seed}")
        judge = [_context(held_out[number % len(held_out)], rng) for number in range(self.judge_prompts if held_out else 0)]
        duplicate = report["duplicates"]
        what = "left out" if duplicate["left_out"] else "only reported, data.drop_duplicates=true leaves them out"
        notes = [
            *notes,
            f"rows like a held-out row: {duplicate['exact']} the same, {duplicate['near']} nearly ({what})",
            *(f"mixture: {name} {s['share']:.1%}, {s['dialogues']} dialogues in {s['passes']} passes" for name, s in shares.items()),
        ]
        return Corpus(
            demonstrations=demonstrations, held_out=held_out,
            prompts=[_context(dialogue, rng) for dialogue in mixture for _ in range(PROMPTS_PER_DIALOGUE)],
            comparison_prompts=[], judge_prompts=judge,
            judgements=[e.sample.judgement for e in train if e.sample.judgement],
            held_out_judgements=[e.sample.judgement for e in apart if e.sample.judgement],
            comparisons=[e.sample.comparison for e in train if e.sample.comparison],
            held_out_comparisons=[e.sample.comparison for e in apart if e.sample.comparison],
            texts=[e.sample.text for e in train if e.sample.text],
            held_out_texts=[e.sample.text for e in apart if e.sample.text],
            weights=weights, report=report | ({"mixture": shares} if shares else {}), notes=notes,
        )  # fmt: skip


def _context(dialogue: Dialogue, rng: random.Random) -> Dialogue:
    """The context of one of its assistant turns, picked at random (InstructGPT's recipe), API calls included."""
    return dialogue.before(rng.choice(dialogue.assistant_turns()))


def _words(sample: Sample) -> str:
    """All text of a row, for finding duplicates."""
    if sample.comparison is not None:
        said, replies = sample.comparison.context.messages, sample.comparison.answers
    elif sample.judgement is not None:
        said, replies = sample.judgement.context.messages, (sample.judgement.reply,)
    else:
        said, replies = tuple(m for d in sample.demonstrations for m in d.messages), (sample.text,)
    return "\n".join([*(message.content for message in said), *replies])


def _hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
