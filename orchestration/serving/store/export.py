"""Feedback as rows to train on, in the formats `messages` and `rankings` that `data=` reads; `conf/data/feedback.yaml` names both folders, and `experiment=feedback` trains on them.

    thumbs up on an answer           a demonstration
    thumbs up and down, same prompt  one comparison of all these answers, the liked ones before the others
    a choice                         a comparison of the chosen answer with each other one
    an edit                          a demonstration (the edited text), and a comparison: edited before original

Only feedback given with consent is written. Rows that say the same are one row; answers on which people disagree evenly are left out.
Identifiers are digests of what a row says, so they are the same in every export, and tell nothing about who said it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.errors import RequestError
from orchestration.run_directory import read_json, write_json
from orchestration.serving.store.database import url_of
from orchestration.serving.store.records import Learned
from orchestration.serving.store.store import Store

DEMONSTRATIONS, COMPARISONS = "demonstrations/feedback.jsonl", "comparisons/feedback.jsonl"
FILES = (DEMONSTRATIONS, COMPARISONS)
PARTS = {
    DEMONSTRATIONS: "{format: messages, path: demonstrations}",
    COMPARISONS: "{format: rankings, path: comparisons, best_as_demonstration: false}",
}
"""How `data.mix` names each file."""
MANIFEST = "feedback.json"
"""Written last: what an export holds, and which rows were taken out of it later."""


@dataclass
class Line:
    """One row of a file, and the feedback it came from."""

    file: str
    content: dict[str, Any]
    sources: set[str] = field(default_factory=set)

    @property
    def id(self) -> str:
        return self.content["id"]


def export(store: Store, folder: Path) -> dict[str, int]:
    """Write all feedback that may be learned from to a folder, in place of what an earlier export wrote there; rows per file.

    Raises:
        RequestError: the folder holds something else, or cannot be written.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).exists())):
        raise RequestError(f"out={folder}: holds something that is no export of feedback; give a new folder")
    lines = rows_of(store.learnable())
    # First noted, then written: a deletion that comes in between finds what it has to take out.
    store.note_export(str(folder), {f"{line.file}:{line.id}": sorted(line.sources) for line in lines})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            _write(folder / file, [line.content for line in lines if line.file == file])
        counts = {file: sum(line.file == file for line in lines) for file in FILES}
        write_json(folder / MANIFEST, {"rows": counts, "withdrawn": []})
    except OSError as cause:
        raise RequestError(f"out={folder}: cannot be written ({cause})") from cause
    tell(store)
    return counts


def export_and_show(url: str, folder: Path) -> None:
    """`chatray feedback export`.

    Raises:
        RequestError: as `Store.open` and `export`; or there is no store at that place yet.
    """
    place = url_of(url)
    if place.get_backend_name() == "sqlite" and not Path(str(place.database)).is_file():
        raise RequestError(f"store={url}: no such file; give the store of the service (its setting is serving.store)")
    store = Store.open(url)
    try:
        counts = export(store, folder)
        missed = sorted(store.exports_to_tell())
    finally:
        store.close()
    print(f"{folder}: {counts[FILES[0]]} demonstrations, {counts[FILES[1]]} comparisons, of feedback given with consent")
    there = [PARTS[file] for file in FILES if counts[file]]
    if len(there) == len(FILES):
        print(f"To train on them: chatray run experiment=feedback data.path={folder} model.path=<the model that was served>")
    elif there:
        print(f"To train on them, give the experiment: data=feedback data.path={folder} \"data.mix=[{there[0]}]\"")
    for name in missed:
        print(f"{name}: holds rows that were withdrawn since, and is not on this machine or cannot be written; delete it there")


def tell(store: Store) -> list[str]:
    """Take rows that may no longer be learned from out of the exported folders of this machine, and name them in their manifests.

    Returns:
        The folders that could not be told: not on this machine, or not to be written. They are tried again next time.
    """
    missed = []
    for name, rows in store.exports_to_tell().items():
        folder, gone = Path(name), {tuple(row.split(":", 1)) for row in rows}
        try:
            manifest = read_json(folder / MANIFEST)
            if not manifest:
                missed.append(name)
                continue
            for file in FILES:
                kept = [row for row in _read(folder / file) if (file, row["id"]) not in gone]
                _write(folder / file, kept)
                manifest["rows"][file] = len(kept)
            withdrawn = sorted({*manifest["withdrawn"], *(identifier for _, identifier in gone)})
            write_json(folder / MANIFEST, manifest | {"withdrawn": withdrawn})
        except (OSError, RequestError):
            missed.append(name)
            continue
        store.told(name, rows)
    return missed


def rows_of(feedback: Sequence[Learned]) -> list[Line]:
    """The rows, in an order that does not depend on when they were said."""
    found: dict[tuple[str, str], Line] = {}
    for line in (*_thumbs(feedback), *_choices(feedback), *_edits(feedback)):
        found.setdefault((line.file, line.id), line).sources.update(line.sources)
    return sorted(found.values(), key=lambda line: (line.file, line.id))


def _thumbs(feedback: Sequence[Learned]) -> Iterator[Line]:
    prompts: dict[str, list[Learned]] = {}
    for item in feedback:
        if item.feedback.kind == "thumbs":
            prompts.setdefault(item.digest, []).append(item)
    for items in prompts.values():
        votes: Counter[str] = Counter()
        for item in items:
            votes[item.texts[0].strip()] += 1 if item.feedback.value == "up" else -1
        liked = sorted(text for text, count in votes.items() if count > 0 and text)
        others = sorted(text for text, count in votes.items() if count < 0 and text)
        for text in liked:
            yield _demonstration(items[0], text, {item.feedback.id for item in items if item.texts[0].strip() == text})
        if liked and others:
            ranked = {*liked, *others}
            sources = {item.feedback.id for item in items if item.texts[0].strip() in ranked}
            yield _comparison(items[0], [*liked, *others], [0] * len(liked) + [1] * len(others), sources)


def _choices(feedback: Sequence[Learned]) -> Iterator[Line]:
    votes: dict[tuple[str, str, str], list[tuple[int, Learned]]] = {}
    for item in feedback:
        if item.feedback.kind != "choice" or item.feedback.value == "tie":
            continue
        texts = dict(zip(item.feedback.answers, (text.strip() for text in item.texts), strict=True))
        best = texts.pop(item.feedback.value)
        for other in {text for text in texts.values() if text and best and text != best}:
            first, second = sorted((best, other))
            votes.setdefault((item.digest, first, second), []).append((1 if best == first else -1, item))
    for (_, first, second), cast in votes.items():
        if lead := sum(vote for vote, _ in cast):
            answers = [first, second] if lead > 0 else [second, first]
            yield _comparison(cast[0][1], answers, [0, 1], {item.feedback.id for _, item in cast})


def _edits(feedback: Sequence[Learned]) -> Iterator[Line]:
    for item in feedback:
        if item.feedback.kind != "edit":
            continue
        edited, original = item.feedback.value.strip(), item.texts[0].strip()
        yield _demonstration(item, edited, {item.feedback.id})
        if original and edited != original:
            yield _comparison(item, [edited, original], [0, 1], {item.feedback.id})


def _demonstration(item: Learned, answer: str, sources: set[str]) -> Line:
    return _line(DEMONSTRATIONS, item, {"messages": [*_prompt(item), {"role": "assistant", "content": answer}]}, sources)


def _comparison(item: Learned, answers: list[str], ranks: list[int], sources: set[str]) -> Line:
    return _line(COMPARISONS, item, {"messages": _prompt(item), "answers": answers, "ranks": ranks}, sources)


def _prompt(item: Learned) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in item.prompt if message["content"].strip()]


def _line(file: str, item: Learned, content: dict[str, Any], sources: set[str]) -> Line:
    """Rows on the same opening share a `conversation_id`, so that what is held out is held out with all that resembles it."""
    opening = next((message["content"] for message in item.prompt if message["role"] == "user"), "")
    named = {"id": f"feedback-{_digest(content)}", "conversation_id": f"opening-{_digest(' '.join(opening.casefold().split()))}"}
    return Line(file, named | content, set(sources))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Path) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        yield from (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace a file of rows as a whole; none are no file."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    if not rows:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(exist_ok=True)
    with open(aside, "w", encoding="utf-8") as opened:
        opened.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(aside, file)
