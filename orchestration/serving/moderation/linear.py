"""The trained classifier: one weight per n-gram and category, and how it is kept in a file.

The file is in safetensors form: numbers and text, nothing that is run when it is read. Its header says of which format it is; another one is
refused.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.special import expit

from orchestration.errors import RequestError
from orchestration.serving.moderation.features import Features, normal

FORMAT = "chatray moderation 1"
PARTS = ("characters", "words")
LONGEST_VOCABULARY = 1 << 26
"""Bytes of a vocabulary that is read at most."""


@dataclass(frozen=True)
class LinearModel:
    """A classifier of texts by category."""

    features: Features
    categories: tuple[str, ...]
    weights: np.ndarray
    """[F, C], on TF-IDF."""
    bias: np.ndarray
    """[C]."""
    report: dict[str, Any]
    """How it was trained: `thresholds` by category, `measured` and more; kept in the file."""
    seen: np.ndarray
    """`text_number` of each text it was trained on."""

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[N, C], calibrated to how frequent each category was in training."""
        if not texts:
            return np.zeros((0, len(self.categories)))
        return expit(self.features.of([normal(text) for text in texts]) @ self.weights + self.bias)

    def thresholds(self) -> dict[str, dict[str, float]]:
        """Those that training chose."""
        named = {category: self.report.get("thresholds", {}).get(category, {}) for category in self.categories}
        return {category: {n: float(limits[n]) for n in ("warn", "block") if n in limits} for category, limits in named.items()}

    def save(self, path: Path) -> None:
        words = {name: _packed(vocabulary) for name, vocabulary in zip(PARTS, self.features.vocabularies(), strict=True)}
        numbers = {
            "weights": self.weights.astype(np.float16), "bias": self.bias.astype(np.float32),
            "idf": self.features.idf().astype(np.float16), "seen": self.seen.astype(np.int64),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "categories": json.dumps(self.categories), "report": json.dumps(self.report)}
        save_file(words | numbers, path, header)

    @classmethod
    def load(cls, path: Path) -> LinearModel:
        """Raises:
        RequestError: no such file, or one of another form; names the file.
        """
        wrong = f"moderation.path={path}: not a classifier that `chatray moderation train` wrote"
        if not path.is_file():
            raise RequestError(f"moderation.path={path}: no such file; `chatray moderation train` writes one")
        try:
            with safe_open(path, "numpy") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise RequestError(f"{wrong} in this version (its format is {header.get('format')!r:.60}, not {FORMAT!r}); train it again")
                numbers = {name: file.get_tensor(name) for name in (*PARTS, "weights", "bias", "idf", "seen")}
            vocabularies = [_unpacked(numbers[name]) for name in PARTS]
            weights, bias, idf = (numbers[name].astype(np.float32) for name in ("weights", "bias", "idf"))
            categories, report = tuple(json.loads(header["categories"])), json.loads(header["report"])
        except (SafetensorError, OSError, KeyError, ValueError, zlib.error, RecursionError) as cause:
            raise RequestError(f"{wrong} ({cause!r:.200})") from cause
        columns = sum(len(words) for words in vocabularies)
        fits = weights.shape == (columns, len(categories)) and bias.shape == (len(categories),) and idf.shape == (columns,)
        if not fits or not all(np.isfinite(part).all() for part in (weights, bias, idf)) or not isinstance(report, dict):
            raise RequestError(f"{wrong}: its parts do not fit together")
        return cls(Features.restored(vocabularies, idf), categories, weights, bias, report, numbers["seen"])


def _packed(words: Sequence[str]) -> np.ndarray:
    """N-grams hold no line breaks: they are made of words."""
    return np.frombuffer(zlib.compress("\n".join(words).encode(), 9), dtype=np.uint8)


def _unpacked(packed: np.ndarray) -> list[str]:
    opened = zlib.decompressobj()
    text = opened.decompress(packed.tobytes(), LONGEST_VOCABULARY)
    if opened.unconsumed_tail or not opened.eof:
        raise ValueError("a vocabulary breaks off, or is far too long")
    return text.decode().split("\n")
