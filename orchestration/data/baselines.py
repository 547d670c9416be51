"""Simple models that a reward model must beat, refitted on the same rows: TF-IDF of character n-grams and logistic regression.

And how sure the difference is: percentile intervals over resampled contexts, paired, since both models are measured on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from orchestration.data.dialogues import Dialogue
from orchestration.data.preferences import Comparison, Judgement

PAIR_NGRAMS, JUDGEMENT_NGRAMS = (1, 5), (2, 5)
FEW = 50
"""Texts below which n-grams that occur once count as well."""


def _vectors(train: Sequence[str], test: Sequence[str], ngrams: tuple[int, int]) -> tuple[csr_matrix, csr_matrix]:
    """TF-IDF of both, learned from `train`; without columns where those texts are blank."""
    if not any(text.strip() for text in train):
        return csr_matrix((len(train), 0)), csr_matrix((len(test), 0))
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=ngrams, sublinear_tf=True, min_df=2 if len(train) > FEW else 1)
    return vectorizer.fit_transform(train), vectorizer.transform(test)


def tfidf_answer_scores(train: Sequence[Comparison], test: Sequence[Comparison], seed: int, most_pairs: int = 20_000) -> np.ndarray:
    """Scores of all answers of `test`, one comparison after the other, by a logistic regression on differences of the answers' TF-IDF
    learned from `train`. Contexts are the same within a pair and cancel out. At most `most_pairs` pairs are learned from."""
    answers = [answer for comparison in train for answer in comparison.answers]
    vectors, new = _vectors(answers, [answer for comparison in test for answer in comparison.answers], PAIR_NGRAMS)
    first, second = _chosen_pairs(train, seed, most_pairs)
    ranks = np.array([rank for comparison in train for rank in comparison.ranks])
    better = ranks[first] < ranks[second]
    if len(set(better)) < 2 or not new.shape[1]:  # a handful of pairs that all came in one order, or none, or no words
        return np.zeros(new.shape[0])
    model = LogisticRegression(max_iter=300, fit_intercept=False).fit(vectors[first] - vectors[second], better)
    return np.asarray(new @ model.coef_[0])


def _chosen_pairs(comparisons: Sequence[Comparison], seed: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Untied pairs of answers, each in a random order, as two lists of places among all answers; at most `most` of them."""
    rng = np.random.default_rng(seed)
    pairs = np.array([pair if rng.random() < 0.5 else pair[::-1] for pair in untied_pairs(comparisons)], dtype=int)
    chosen = pairs.reshape(-1, 2)[rng.permutation(len(pairs))[:most]]
    return chosen[:, 0], chosen[:, 1]


def untied_pairs(comparisons: Sequence[Comparison]) -> list[tuple[int, int]]:
    """(place of the better, place of the worse) among all answers, one comparison after the other."""
    found, start = [], 0
    for comparison in comparisons:
        for i, j in combinations(range(len(comparison.answers)), 2):
            if comparison.ranks[i] != comparison.ranks[j]:
                better, worse = (i, j) if comparison.ranks[i] < comparison.ranks[j] else (j, i)
                found.append((start + better, start + worse))
        start += len(comparison.answers)
    return found


def pairs_right(scores: np.ndarray, comparisons: Sequence[Comparison]) -> np.ndarray:
    """[P]: for each untied pair 1 where the scores order it as people did, one half where they are equal."""
    pairs = np.array(untied_pairs(comparisons), dtype=int).reshape(-1, 2)
    difference = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    return (difference > 0) + 0.5 * (difference == 0)


def tfidf_pairwise_accuracy(train: Sequence[Comparison], test: Sequence[Comparison], seed: int, most_pairs: int = 20_000) -> float:
    """Share of the untied pairs of `test` that `tfidf_answer_scores` orders as people did."""
    return float(pairs_right(tfidf_answer_scores(train, test, seed, most_pairs), test).mean())


def tfidf_judgement_scores(train: Sequence[Judgement], test: Sequence[Judgement]) -> np.ndarray:
    """Scores of `test` by a logistic regression on TF-IDF of context and reply, learned from `train`."""
    good = [row.good for row in train]
    if len(set(good)) < 2:
        return np.zeros(len(test))
    contexts = _vectors([text_of(row.context) for row in train], [text_of(row.context) for row in test], JUDGEMENT_NGRAMS)
    replies = _vectors([row.reply for row in train], [row.reply for row in test], JUDGEMENT_NGRAMS)
    seen, new = (hstack(both).tocsr() for both in zip(contexts, replies, strict=True))
    if not seen.shape[1]:
        return np.zeros(len(test))
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000).fit(seen, good)
    return np.asarray(model.decision_function(new))


def tfidf_judgement_auc(train: Sequence[Judgement], test: Sequence[Judgement]) -> float:
    """AUC of `tfidf_judgement_scores` on `test`."""
    return float(roc_auc_score([row.good for row in test], tfidf_judgement_scores(train, test)))


def text_of(context: Dialogue) -> str:
    return "\n".join(message.content for message in context.messages)


def difference_interval(
    measure: Callable[[np.ndarray], float], clusters: Sequence[Hashable], resamples: int, seed: int
) -> tuple[float, float]:
    """95% percentile interval of a figure under resampling of whole clusters of rows.

    Args:
        measure: from indices of rows to the figure; resamples on which it is not a number are left out.
        clusters: the cluster of each row, as its context: rows of one context are not independent.
    """
    members: dict[Hashable, list[int]] = {}
    for row, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(row)
    rows = [np.array(found) for found in members.values()]
    rng = np.random.default_rng(seed)
    found = [measure(np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])) for _ in range(resamples)]
    known = [value for value in found if not np.isnan(value)]
    low, high = np.percentile(known, [2.5, 97.5]) if known else (float("nan"), float("nan"))
    return float(low), float(high)
