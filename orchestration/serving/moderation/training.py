"""Learning the classifier from labelled texts.

For each category, and for `any` of them, three linear models on TF-IDF are learned from the rows where it is known:

    lr    logistic regression on character n-grams
    nb    logistic regression on character n-grams scaled by their log-count ratios (Wang and Manning 2012, "Baselines and Bigrams")
    lsa   logistic regression on the leading singular vectors of character and word n-grams (Deerwester et al. 1990)

Their scores outside their own training rows (`FOLDS` inner folds) are standardised and added up; in a category's sum that of `any` has a place
too, since most categories have few true rows. With which weights is chosen from `BLENDS` by average precision on these scores, once for `any` and
once for all categories together. Platt's (1999) scaling makes them probabilities. Everything is linear in TF-IDF, so the result is one
weight per n-gram and category. No row outside the training rows decides anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, diags
from scipy.sparse.linalg import svds
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from orchestration.errors import RequestError
from orchestration.serving.moderation.features import Features, normal
from orchestration.serving.moderation.labelled import ANY, Labelled, text_number
from orchestration.serving.moderation.linear import LinearModel

FOLDS = 5
FEWEST = 5
"""True rows that a category needs to be learned."""
SMOOTHING = 0.3
"""Count added to every n-gram before log-count ratios."""
DIRECTIONS = 100
"""Singular vectors at most."""
PRODUCTS = 4000
"""Rows up to which all products of two rows are held in memory."""
MODELS = ("lr", "nb", "lsa")
BLENDS = {
    ANY: ((0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1), (0, 2, 1), (0, 1, 2)),
    "categories": ((1, 0, 0, 0), (1, 0, 0, 0.5), (2, 1, 0, 0.5), (2, 1, 1, 0.5), (1, 0, 1, 0.5), (1, 1, 1, 1)),
}
"""Weights that are tried, of `lr`, `nb`, `lsa` and, for categories, of `any`."""


@dataclass(frozen=True)
class Fit:
    """What was learned from some rows: weights [F] and bias of every head and model."""

    features: Features
    heads: dict[str, tuple[np.ndarray, np.ndarray]]
    """By category: weights [F, 3] and biases [3], of `MODELS`."""

    def scores(self, x: csr_matrix) -> dict[str, np.ndarray]:
        """[N, 3] by category."""
        return {name: x @ weights + bias for name, (weights, bias) in self.heads.items()}


def train(data: Labelled, seed: int = 0, harmless: Sequence[str] = ()) -> LinearModel:
    """The classifier. `report` of the result holds its out-of-fold figures and thresholds.

    Args:
        harmless: further texts that no category is true of, such as everyday requests. They are learned from; figures, thresholds and
            probabilities are of `data` alone, and how often these texts reach a threshold is reported apart (`false_alarms`).

    Raises:
        RequestError: too few rows of some kind to learn from.
    """
    data, left_out = _learnable(data)
    rows = len(data.texts)
    everything = Labelled((*data.texts, *harmless), data.categories, np.pad(data.labels, ((0, len(harmless)), (0, 0))))
    texts = [normal(text) for text in everything.texts]
    apart = out_of_fold(everything, texts, seed)
    measured = {name: scores[:rows] for name, scores in apart.items()}
    centred = {name: _standard(scores) for name, scores in measured.items()}
    blends = {ANY: _best_blend(BLENDS[ANY], [ANY], data, centred)}
    blends["categories"] = _best_blend(BLENDS["categories"], [name for name in data.categories if name != ANY], data, centred)
    whole = _fit(everything, texts, seed)
    weights, biases = [], []
    report: dict[str, Any] = {"rows": rows, "harmless": len(harmless), "left_out": left_out, "seed": seed}
    report |= {"blends": {name: list(blend) for name, blend in blends.items()}, "measured": {}, "thresholds": {}, "false_alarms": {}}
    for column, name in enumerate(data.categories):
        known = np.flatnonzero(~np.isnan(data.labels[:, column]))
        w, b, scores = _combined(name, whole, apart, rows, blends)
        scale, shift = _platt(scores[known], data.labels[known, column])
        weights.append(w * scale)
        biases.append(b * scale + shift)
        p = 1 / (1 + np.exp(-(scores * scale + shift)))
        report["measured"][name], limits = chosen(data.labels[known, column], p[known])
        report["thresholds"][name] = limits
        if harmless:
            report["false_alarms"][name] = {n: round(float((p[rows:] >= limits[n]).mean()), 4) for n in ("warn", "block") if n in limits}
    seen = np.array(sorted({text_number(text) for text in everything.texts}), dtype=np.int64)
    return LinearModel(whole.features, data.categories, np.stack(weights, axis=1), np.array(biases), report, seen)


def out_of_fold(data: Labelled, texts: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """[N, 3] by category: scores of each row by models that were learned without it."""
    found = {name: np.zeros((len(texts), len(MODELS))) for name in data.categories}
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(texts, strata(data))
    for learn, test in folds:
        fit = _fit(data.select(learn), [texts[i] for i in learn], seed)
        for name, scores in fit.scores(fit.features.of([texts[i] for i in test])).items():
            found[name][test] = scores
    return found


def _learnable(data: Labelled) -> tuple[Labelled, list[str]]:
    """The data with `any`, and the categories that have too few rows of a kind to be learned."""
    data = data.with_any()
    true, false = np.nansum(data.labels, axis=0), np.nansum(1 - data.labels, axis=0)
    kept = [n for n in range(len(data.categories)) if min(true[n], false[n]) >= FEWEST]
    if 0 not in kept:
        raise RequestError(
            f"data: {int(true[0])} of {len(data.texts)} texts are true of any category; at least {FEWEST} that are and {FEWEST} that are "
            "not are needed, and some hundreds to learn something"
        )
    names = tuple(data.categories[n] for n in kept)
    return Labelled(data.texts, names, data.labels[:, kept]), [name for name in data.categories if name not in names]


def strata(data: Labelled) -> np.ndarray:
    """Rows of the rarest category that is true of them go evenly into the folds."""
    order = np.argsort(-np.nansum(data.labels, axis=0))  # rare ones last: they decide
    found = np.zeros(len(data.texts), dtype=int)
    for column in order:
        found[data.labels[:, column] == 1] = column + 1
    return found


def _fit(data: Labelled, texts: Sequence[str], seed: int) -> Fit:
    features, x = Features.learned(texts)
    spell = x[:, : features.characters]
    basis = _directions(x, seed)
    latent = x @ basis
    mean, deviation = latent.mean(axis=0), latent.std(axis=0) + 1e-9
    heads = {}
    for column, name in enumerate(data.categories):
        known = np.flatnonzero(~np.isnan(data.labels[:, column]))
        y = data.labels[known, column]
        if len(set(y)) < 2:  # a fold without a true row
            heads[name] = np.zeros((x.shape[1], len(MODELS))), np.zeros(len(MODELS))
            continue
        lr = _logistic(spell[known], y, 10.0)
        ratio = log_count_ratio(spell[known], y)
        nb = _logistic(spell[known] @ diags(ratio), y, 0.1)
        lsa = LogisticRegression(C=0.001, class_weight="balanced").fit((latent[known] - mean) / deviation, y)
        weights = np.zeros((x.shape[1], len(MODELS)), dtype=np.float32)
        weights[: spell.shape[1], 0], weights[: spell.shape[1], 1] = lr.coef_[0], nb.coef_[0] * ratio
        weights[:, 2] = basis @ (lsa.coef_[0] / deviation)
        bias = [lr.intercept_[0], nb.intercept_[0], lsa.intercept_[0] - lsa.coef_[0] @ (mean / deviation)]
        heads[name] = weights, np.array(bias)
    return Fit(features, heads)


def _directions(x: csr_matrix, seed: int) -> np.ndarray:
    """[F, D]: the leading right singular vectors, times any factor. From the [N, N] products where those are fewer: an exact answer, and a
    fast one."""
    most = min(DIRECTIONS, min(x.shape) - 1)
    if x.shape[0] > PRODUCTS:
        return np.asarray(svds(x.astype(np.float64), k=most, random_state=seed)[2].T)
    _, vectors = np.linalg.eigh((x @ x.T).toarray().astype(np.float64))
    return np.asarray(x.T @ vectors[:, -most:])


def _logistic(x: csr_matrix, y: np.ndarray, c: float) -> LogisticRegression:
    """Liblinear's dual is many times faster than L-BFGS where there are far more columns than rows."""
    model = LogisticRegression(C=c, class_weight="balanced", solver="liblinear", dual=True, max_iter=2000, random_state=0, tol=1e-3)
    return model.fit(x, y)


def log_count_ratio(x: csr_matrix, y: np.ndarray) -> np.ndarray:
    """[F]: log of how much more often an n-gram's texts are true than false, of its share among all n-grams."""
    there = (x > 0).astype(np.float32)
    true, false = (SMOOTHING + np.asarray(there[y == value].sum(axis=0)).ravel() for value in (1, 0))
    return np.log(true / true.sum()) - np.log(false / false.sum())


def _standard(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean(axis=0)) / (scores.std(axis=0) + 1e-9)


def _best_blend(blends: Sequence[Sequence[float]], names: Sequence[str], data: Labelled, centred: dict[str, np.ndarray]) -> Sequence[float]:
    """The blend with the highest mean average precision over these categories; the first of equals."""
    means = [np.mean([_precision(name, data, _sum(blend, name, centred)) for name in names]) if names else 0.0 for blend in blends]
    return blends[int(np.argmax(means))]


def _sum(blend: Sequence[float], name: str, centred: dict[str, np.ndarray]) -> np.ndarray:
    total = centred[name] @ np.array(blend[: len(MODELS)])
    return total + blend[len(MODELS)] * _any_of(centred) if len(blend) > len(MODELS) else total


def _any_of(centred: dict[str, np.ndarray]) -> np.ndarray:
    """How much a text looks as if any category were true of it, for the categories' own sums."""
    return centred[ANY][:, 1:].sum(axis=1) / 2


def _precision(name: str, data: Labelled, scores: np.ndarray) -> float:
    labels = data.labels[:, data.categories.index(name)]
    known = ~np.isnan(labels)
    return float(average_precision_score(labels[known], scores[known]))


def _combined(
    name: str, whole: Fit, apart: dict[str, np.ndarray], rows: int, blends: dict[str, Sequence[float]]
) -> tuple[np.ndarray, float, np.ndarray]:
    """Weights [F] and bias of a blend, and its out-of-fold scores [N]; standardised as those of the first `rows` are."""
    blend = blends[ANY if name == ANY else "categories"]
    parts = [(name, model, blend[model]) for model in range(len(MODELS))]
    if name != ANY:
        parts += [(ANY, model, blend[len(MODELS)] / 2) for model in (1, 2)]
    weights, bias, scores = np.zeros(whole.heads[name][0].shape[0]), 0.0, np.zeros(len(apart[name]))
    for head, model, share in parts:
        of = apart[head][:, model]
        middle, factor = of[:rows].mean(), share / (of[:rows].std() + 1e-9)
        weights += whole.heads[head][0][:, model] * factor
        bias += (whole.heads[head][1][model] - middle) * factor
        scores += (of - middle) * factor
    return weights, bias, scores


def _platt(scores: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(scale, shift) that make scores log odds."""
    fit = LogisticRegression(C=10.0).fit(scores[:, None], y)
    return max(float(fit.coef_[0, 0]), 1e-3), float(fit.intercept_[0])


FAIR, PRECISE, ENOUGH = 0.5, 0.8, 5
"""Precision from which a category may warn, and block, and texts over the threshold that must speak for either."""


def chosen(y: np.ndarray, p: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """(figures, thresholds with the precision and recall they were chosen at) of one category.

    `warn` is where F1 is highest among thresholds from which on at least half of the texts are true, `block` the lowest, not below it, from
    which on at least 80% are; at least five texts must reach either. Where there is none, a category does not warn, or not block.
    """
    figures = {"true": int(y.sum()), "known": len(y), "average_precision": round(float(average_precision_score(y, p)), 4)}
    rows = list(_curve(y, p))
    fair = [row for row in rows if row[1] >= FAIR and row[3] >= ENOUGH]
    if not fair:
        return figures, {}
    best = max(fair, key=lambda row: row[1] * row[2] / (row[1] + row[2]))
    limits = {"warn": _down(best[0]), "warn_precision": round(best[1], 3), "warn_recall": round(best[2], 3)}
    sure = [row for row in fair if row[1] >= PRECISE and row[0] >= best[0]]
    if sure:
        block = min(sure)
        limits |= {"block": _down(block[0]), "block_precision": round(block[1], 3), "block_recall": round(block[2], 3)}
    return figures, limits


def _curve(y: np.ndarray, p: np.ndarray) -> Iterator[tuple[float, float, float, int]]:
    """(threshold, precision, recall, texts over it) at every score."""
    order = np.argsort(-p, kind="stable")
    true = np.cumsum(y[order])
    for n, place in enumerate(order, start=1):
        if n == len(order) or p[order[n]] < p[place]:
            yield float(p[place]), float(true[n - 1] / n), float(true[n - 1] / y.sum()), n


def _down(value: float) -> float:
    """Rounded so that the score it was taken from still reaches it."""
    return float(np.floor(value * 1e4) / 1e4)
