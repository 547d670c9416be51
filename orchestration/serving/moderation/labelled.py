"""Texts with their labels: JSON lines of a text (`text` or `prompt`) and, by category, 1, 0, or nothing where it is not known.

    {"text": "…", "hate": 1, "violence": 0}

`"any": 0` says that no category is true of a text. The short names of openai/moderation-api-release are understood: H, H2, HR, SH, S, S3, V, V2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestration.data.rows import BadRow, rows_of
from orchestration.errors import RequestError

NAMES = {
    "H": "hate", "H2": "hate/threatening", "HR": "harassment", "SH": "self-harm", "S": "sexual", "S3": "sexual/minors", "V": "violence",
    "V2": "violence/graphic",
}  # fmt: skip
ANY = "any"
"""The category of texts that any other category is true of."""
LONGEST = 1 << 20


@dataclass(frozen=True)
class Labelled:
    """Texts and what is known of them."""

    texts: tuple[str, ...]
    categories: tuple[str, ...]
    labels: np.ndarray
    """[N, C]: 1, 0, or NaN where it is not known."""

    def select(self, rows: Sequence[int] | np.ndarray) -> Labelled:
        return Labelled(tuple(self.texts[i] for i in rows), self.categories, self.labels[np.asarray(rows, dtype=int)])

    def flagged(self) -> np.ndarray:
        """[N]: 1 where any category is known to be true; what is not known counts as not true, as in the data's own evaluation."""
        return (np.nan_to_num(self.labels).max(axis=1) > 0).astype(float)

    def with_any(self) -> Labelled:
        """With `any` as a further category, the first."""
        labels = np.concatenate([self.flagged()[:, None], self.labels], axis=1)
        return Labelled(self.texts, (ANY, *self.categories), labels)


def read_labelled(path: Path) -> Labelled:
    """The rows of a file, or of all JSON files of a folder.

    Raises:
        RequestError: no such file, or a row of another form; names file and line.
    """
    files = sorted(f for f in path.rglob("*") if f.name.removesuffix(".gz").endswith((".jsonl", ".json"))) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise RequestError(f"data={path}: no such file, or no .jsonl or .json file in this folder")
    texts: list[str] = []
    known: list[dict[str, float]] = []
    for file in files:
        for row in rows_of(file, LONGEST):
            if isinstance(row, BadRow):
                raise RequestError(f"data: {row}")
            text, labels = _row(row.value, f"data: {row.file}, line {row.line}")
            texts.append(text)
            known.append(labels)
    categories = tuple(dict.fromkeys(name for labels in known for name in labels if name != ANY))
    if not categories:
        raise RequestError(f"data={path}: no text has a label; give some categories, with 1 or 0")
    found = [[labels.get(name, labels.get(ANY, np.nan)) for name in categories] for labels in known]
    return Labelled(tuple(texts), categories, np.array(found, dtype=float))


def _row(value: dict[str, object], where: str) -> tuple[str, dict[str, float]]:
    text = value.get("text", value.get("prompt"))
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{where}: there is no text in 'text' or 'prompt'")
    labels: dict[str, float] = {}
    for name, label in value.items():
        if name in ("text", "prompt") or label is None:
            continue
        if isinstance(label, bool | int | float) and label in (0, 1):
            labels[NAMES.get(name, name)] = float(label)
        else:
            raise RequestError(f"{where}: {name!r} is neither 1 nor 0; leave it out where it is not known")
    if any(label > labels.get(ANY, 1) for label in labels.values()) or labels.get(ANY) == 1:
        raise RequestError(f"{where}: {ANY!r} may only be 0, and then no category 1: say which category is true")
    return text, labels


def text_number(text: str) -> int:
    """A number that tells texts apart, for finding those that a model was trained on."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "replace"), digest_size=8).digest()) >> 1
