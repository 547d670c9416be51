"""Simple models that a reward model must beat, refitted on the same rows: TF-IDF of character n-grams and logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from orchestration.data.preferences import Comparison, Judgement

NGRAMS = (1, 5)


def tfidf_pairwise_accuracy(train: Sequence[Comparison], test: Sequence[Comparison], seed: int, most_pairs: int = 20_000) -> float:
    """Pairwise accuracy on `test` of a logistic regression on differences of the answers' TF-IDF, learned from `train`.

    Contexts are the same within a pair and cancel out. At most `most_pairs` pairs are learned from.
    """
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=NGRAMS, sublinear_tf=True, min_df=2)
    vectorizer.fit([answer for comparison in train for answer in comparison.answers])
    differences, better = _pairs(train, vectorizer, seed, most_pairs)
    model = LogisticRegression(max_iter=300, fit_intercept=False).fit(differences, better)
    held_out, truth = _pairs(test, vectorizer, seed, None)
    return float(model.score(held_out, truth))


def _pairs(comparisons: Sequence[Comparison], vectorizer: TfidfVectorizer, seed: int, most: int | None):
    """Differences of answers' vectors, and whether the first was preferred; each pair in a random order."""
    rng = np.random.default_rng(seed)
    vectors = vectorizer.transform([answer for comparison in comparisons for answer in comparison.answers])
    first, second, better, start = [], [], [], 0
    for comparison in comparisons:
        for i, j in combinations(range(len(comparison.answers)), 2):
            if comparison.ranks[i] == comparison.ranks[j]:
                continue
            a, b = (i, j) if rng.random() < 0.5 else (j, i)
            first.append(start + a)
            second.append(start + b)
            better.append(comparison.ranks[a] < comparison.ranks[b])
        start += len(comparison.answers)
    chosen = np.arange(len(first)) if most is None else rng.permutation(len(first))[:most]
    return vectors[np.array(first)[chosen]] - vectors[np.array(second)[chosen]], np.array(better)[chosen]


def tfidf_judgement_scores(train: Sequence[Judgement], test: Sequence[Judgement]) -> np.ndarray:
    """Scores of `test` by a logistic regression on TF-IDF of context and reply, learned from `train`."""
    context = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    reply = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)

    def texts(rows: Sequence[Judgement]) -> list[str]:
        return ["\n".join(message.content for message in row.context.messages) for row in rows]

    seen = hstack([context.fit_transform(texts(train)), reply.fit_transform([row.reply for row in train])]).tocsr()
    new = hstack([context.transform(texts(test)), reply.transform([row.reply for row in test])]).tocsr()
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000).fit(seen, [row.good for row in train])
    return model.decision_function(new)


def tfidf_judgement_auc(train: Sequence[Judgement], test: Sequence[Judgement]) -> float:
    """AUC of `tfidf_judgement_scores` on `test`."""
    return float(roc_auc_score([row.good for row in test], tfidf_judgement_scores(train, test)))
