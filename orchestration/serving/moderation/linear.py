"""The trained classifier, and how it is kept in a file.

The log odds of each category are linear in TF-IDF and in the categories' naive-Bayes scores: character n-grams scaled by their log-count
ratios, brought to length 1, and weighed.

The file is in safetensors form: numbers and text, nothing that is run when it is read. Its header says of which format it is; another one
is refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix
from scipy.special import expit

from orchestration.errors import RequestError
from orchestration.serving.moderation.features import Features, normal

FORMAT = "chatray moderation 1"
PARTS = ("characters", "words")
NUMBERS = ("weights", "bias", "idf", "mix", "bayes_weights", "bayes_bias")
LONGEST = 1 << 28
"""Bytes of a compressed part that are read at most."""


@dataclass(frozen=True)
class NaiveBayes:
    """Logistic regressions on character n-grams scaled by their log-count ratios; one for each category."""

    ratio: np.ndarray
    """[Fc, C], of `Fc` character n-grams."""
    weights: np.ndarray
    """[Fc, C]."""
    bias: np.ndarray
    """[C]."""

    @cached_property
    def _factors(self) -> tuple[np.ndarray, np.ndarray]:
        """[Fc, C] twice: the squares of `ratio`, and `ratio` times `weights`."""
        return np.square(self.ratio), self.ratio * self.weights

    def scores(self, spell: csr_matrix) -> np.ndarray:
        """[N, C] from TF-IDF of character n-grams [N, Fc]; each text's scaled n-grams have length 1 together."""
        squares, weighed = self._factors
        return spell @ weighed / np.maximum(np.sqrt(spell.power(2) @ squares), 1e-9) + self.bias

    def score(self, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
        """[C]: the same for one text, given by its columns [n] that are not 0 and their values [n]."""
        squares, weighed = self._factors
        return values @ weighed[columns] / np.maximum(np.sqrt(np.square(values) @ squares[columns]), 1e-9) + self.bias


@dataclass(frozen=True)
class LinearModel:
    """A classifier of texts by category."""

    features: Features
    categories: tuple[str, ...]
    weights: np.ndarray
    """[F, C], on TF-IDF."""
    bias: np.ndarray
    """[C]."""
    bayes: NaiveBayes
    mix: np.ndarray
    """[C, C]: how much each score of `bayes` adds to each category's log odds."""
    report: dict[str, Any]
    """How it was trained: `thresholds` by category, `measured` and more; kept in the file."""
    seen: np.ndarray
    """`text_number` of each text it was trained on."""

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[N, C], calibrated to how frequent each category was in training."""
        if not texts:
            return np.zeros((0, len(self.categories)))
        return expit(np.stack([self._log_odds(normal(text)) for text in texts]))

    def _log_odds(self, text: str) -> np.ndarray:
        """[C]."""
        columns, values, characters = self.features.row(text)
        bayes = self.bayes.score(columns[:characters], values[:characters])
        return values @ self.weights[columns] + bayes @ self.mix + self.bias

    def thresholds(self) -> dict[str, dict[str, float]]:
        """Those that training chose."""
        named = {category: self.report.get("thresholds", {}).get(category, {}) for category in self.categories}
        return {category: {n: float(limits[n]) for n in ("warn", "block") if n in limits} for category, limits in named.items()}

    def save(self, path: Path) -> None:
        words: dict[str, Any] = {name: _packed(vocabulary) for name, vocabulary in zip(PARTS, self.features.vocabularies(), strict=True)}
        numbers = {
            "weights": self.weights.astype(np.float16), "bias": self.bias.astype(np.float32),
            "idf": self.features.idf().astype(np.float16), "seen": self.seen.astype(np.int64), "mix": self.mix.astype(np.float32),
            "bayes_ratio": _compressed(self.bayes.ratio.astype(np.float16).tobytes()),
            "bayes_weights": self.bayes.weights.astype(np.float16),
            "bayes_bias": self.bayes.bias.astype(np.float32),
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
                    raise RequestError(
                        f"{wrong} in this version (its format is {header.get('format')!r:.60}, not {FORMAT!r}); train it again"
                    )
                numbers = {name: file.get_tensor(name) for name in (*PARTS, *NUMBERS, "seen", "bayes_ratio")}
            vocabularies = [_unpacked(numbers[name]) for name in PARTS]
            weights, bias, idf, mix, nb_weights, nb_bias = (numbers[name].astype(np.float32) for name in NUMBERS)
            ratio = np.frombuffer(_opened(numbers["bayes_ratio"]), dtype=np.float16).astype(np.float32).reshape(nb_weights.shape)
            categories, report = tuple(json.loads(header["categories"])), json.loads(header["report"])
        except (SafetensorError, OSError, KeyError, ValueError, zlib.error, RecursionError) as cause:
            raise RequestError(f"{wrong} ({cause!r:.200})") from cause
        columns, count = sum(len(words) for words in vocabularies), len(categories)
        shapes = [(columns, count), (count,), (columns,), (count, count), (len(vocabularies[0]), count), (count,), nb_weights.shape]
        parts = [weights, bias, idf, mix, nb_weights, nb_bias, ratio]
        fits = all(part.shape == shape and np.isfinite(part).all() for part, shape in zip(parts, shapes, strict=True))
        if not fits or not isinstance(report, dict):
            raise RequestError(f"{wrong}: its parts do not fit together")
        bayes = NaiveBayes(ratio, nb_weights, nb_bias)
        return cls(Features.restored(vocabularies, idf), categories, weights, bias, bayes, mix, report, numbers["seen"])


def _compressed(content: bytes) -> np.ndarray:
    return np.frombuffer(zlib.compress(content, 9), dtype=np.uint8)


def _opened(packed: np.ndarray) -> bytes:
    """Raises:
    ValueError: it breaks off, or is longer than any classifier's.
    """
    opener = zlib.decompressobj()
    content = opener.decompress(packed.tobytes(), LONGEST)
    if opener.unconsumed_tail or not opener.eof:
        raise ValueError("a part breaks off, or is far too long")
    return content


def _packed(words: Sequence[str]) -> np.ndarray:
    """N-grams hold no line breaks: they are made of words."""
    return _compressed("\n".join(words).encode())


def _unpacked(packed: np.ndarray) -> list[str]:
    return _opened(packed).decode().split("\n")
