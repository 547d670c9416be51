"""From a text to TF-IDF of its character and word n-grams, after undoing common disguises.

Disguises that are undone: full-width and styled letters, invisible characters, accents, letters written apart (`k i l l`), digits and signs
inside words (`k1ll`, `h@te`), letters held long (`diiiie`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn import config_context
from sklearn.feature_extraction.text import TfidfVectorizer

CHARACTERS: dict[str, Any] = {"analyzer": "char_wb", "ngram_range": (2, 5), "sublinear_tf": True, "dtype": np.float32}
WORDS: dict[str, Any] = {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w[\w']*\b", "sublinear_tf": True, "dtype": np.float32}
RARE = 2
"""Texts that an n-gram must occur in."""

INVISIBLE = re.compile("[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")
APART = re.compile(r"\b\w(?:[ .\-_*]\w){2,}\b")
HELD = re.compile(r"(\w)\1{2,}")
SIGNS = str.maketrans("013457@$", "oieastas")
DISGUISED = re.compile(r"(?<=[a-z])[013457@$]+(?=[a-z])")


def normal(text: str) -> str:
    """The text without disguises, in lower case."""
    text = unicodedata.normalize("NFKD", INVISIBLE.sub("", text)).casefold()
    text = "".join(character for character in text if not unicodedata.combining(character))
    text = APART.sub(lambda found: re.sub(r"[ .\-_*]", "", found.group()), text)
    text = DISGUISED.sub(lambda found: found.group().translate(SIGNS), text)
    return HELD.sub(r"\1\1", text)


class Features:
    """Vectorizers with their vocabulary. Rows of characters and rows of words have length 1 each."""

    def __init__(self, parts: Sequence[TfidfVectorizer]) -> None:
        self.parts = parts

    @classmethod
    def learned(cls, texts: Sequence[str]) -> tuple[Features, csr_matrix]:
        """Features, and those [N, F] of the texts they were learned from, which went through `normal`."""
        parts = [TfidfVectorizer(min_df=RARE, **part) for part in (CHARACTERS, WORDS)]
        found = [part.fit_transform(texts) for part in parts]
        return cls(parts), hstack(found).tocsr()

    @classmethod
    def restored(cls, vocabularies: Sequence[Sequence[str]], idf: np.ndarray) -> Features:
        """From what `vocabularies` and `idf` of an earlier one gave."""
        found, start = [], 0
        for part, words in zip((CHARACTERS, WORDS), vocabularies, strict=True):
            vectorizer = TfidfVectorizer(vocabulary={word: i for i, word in enumerate(words)}, **part)
            vectorizer.idf_ = idf[start : start + len(words)]
            found.append(vectorizer)
            start += len(words)
        return cls(found)

    def vocabularies(self) -> list[list[str]]:
        return [[str(word) for word in part.get_feature_names_out()] for part in self.parts]

    def idf(self) -> np.ndarray:
        return np.concatenate([part.idf_ for part in self.parts]).astype(np.float32)

    def of(self, texts: Sequence[str]) -> csr_matrix:
        """[N, F] of texts that went through `normal`."""
        with config_context(assume_finite=True, skip_parameter_validation=True):  # of a single text they took a quarter of the time
            return hstack([part.transform(texts) for part in self.parts]).tocsr()

    @cached_property
    def _readers(self) -> list[tuple[Callable[[str], Iterable[str]], dict[str, int], np.ndarray, int]]:
        """Of each part: what cuts a text into n-grams, their columns, their idf, and the part's first column."""
        starts = [0, self.characters]
        return [(p.build_analyzer(), p.vocabulary_, p.idf_, start) for p, start in zip(self.parts, starts, strict=True)]

    def row(self, text: str) -> tuple[np.ndarray, np.ndarray, int]:
        """What `of` gives for one text, without its matrices, which take ten times as long as a short text itself.

        Returns:
            Columns [n] that are not 0, their values [n], and how many of these are of characters; they come first.
        """
        columns, values, ends = [], [], []
        for ngrams, vocabulary, idf, start in self._readers:
            counts = Counter(column for ngram in ngrams(text) if (column := vocabulary.get(ngram)) is not None)
            found = np.fromiter(counts.keys(), np.intp, len(counts))
            value = (np.log(np.fromiter(counts.values(), np.float32, len(counts))) + 1.0) * idf[found]
            columns.append(found + start)
            values.append(value / max(float(np.sqrt(value @ value)), 1e-30))
            ends.append(len(counts))
        return np.concatenate(columns), np.concatenate(values), ends[0]

    @property
    def characters(self) -> int:
        """How many of the columns are of characters; they come first."""
        return len(self.parts[0].vocabulary_)
