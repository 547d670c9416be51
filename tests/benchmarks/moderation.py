"""The moderation classifier against TF-IDF and logistic regression: repeated 5-fold, differences paired by fold, and its time per request.

    python -m tests.benchmarks.moderation ../shared/data/moderation

Both are refitted in each fold on the same rows, and see nothing else. `fixed` is logistic regression on character n-grams with the settings
of the project's other baselines (C = 10); `tuned` chooses C in each fold by inner folds. Everything that our training chooses, it chooses by
inner folds of the training rows. Figures are average precision: `any` of the categories; each category on the rows where it is known; their
mean (`macro`); and all rows and categories in one list (`micro`).

The interval is that of tests/benchmarks/preferences.py (Nadeau and Bengio 2003). A repeat that is in the file of results is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from orchestration.serving.moderation.labelled import ANY, Labelled, read_labelled
from orchestration.serving.moderation.training import strata, train
from tests.benchmarks.preferences import FOLDS, interval

Scores = dict[str, np.ndarray]
FIXED = 10.0
GRID = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def baseline(learn: Labelled, test: Labelled, names: list[str], tune: bool) -> Scores:
    """Log odds of each category by its own logistic regression on the rows where it is known."""
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    x, new = vectorizer.fit_transform(learn.texts), vectorizer.transform(test.texts)
    found = {}
    for name in names:
        column = learn.categories.index(name)
        known = np.flatnonzero(~np.isnan(learn.labels[:, column]))
        y = learn.labels[known, column]
        model = LogisticRegression(C=FIXED, class_weight="balanced", max_iter=1000)
        if tune:  # liblinear's dual for the search only: it is the same model but for a penalty on the intercept, and many times faster
            fast = LogisticRegression(class_weight="balanced", solver="liblinear", dual=True, max_iter=1000)
            folds = StratifiedKFold(min(5, int(y.sum())), shuffle=True, random_state=0)
            model.C = GridSearchCV(fast, {"C": GRID}, scoring="average_precision", cv=folds).fit(x[known], y).best_params_["C"]
        found[name] = model.fit(x[known], y).decision_function(new)
    return found


def ours(learn: Labelled, test: Labelled) -> tuple[Scores, float]:
    """Log odds, and the median milliseconds for a text by itself."""
    plain = Labelled(learn.texts, learn.categories[1:], learn.labels[:, 1:])  # training makes `any` itself
    model = train(plain)
    times = []
    for text in test.texts:
        began = time.perf_counter()
        model.probabilities([text])
        times.append((time.perf_counter() - began) * 1000)
    p = np.clip(model.probabilities(test.texts).astype(float), 1e-9, 1 - 1e-9)
    return {name: np.log(p[:, i] / (1 - p[:, i])) for i, name in enumerate(model.categories)}, float(np.median(times))


def precisions(scores: Scores, test: Labelled, names: list[str]) -> dict[str, float]:
    """Average precision of each category, of `any`, and over the categories."""
    found, all_labels, all_scores = {}, [], []
    for name in names:
        labels = test.labels[:, test.categories.index(name)]
        known = ~np.isnan(labels)
        if labels[known].sum():  # a fold may have no true row of a rare category
            found[name] = float(average_precision_score(labels[known], scores[name][known]))
            if name != ANY:
                all_labels.append(labels[known])
                all_scores.append(scores[name][known])
    found["macro"] = float(np.mean([value for name, value in found.items() if name != ANY]))
    found["micro"] = float(average_precision_score(np.concatenate(all_labels), np.concatenate(all_scores)))
    return found


def repeat(data: Labelled, number: int) -> list[dict[str, dict[str, float]]]:
    """Figures of the five folds of one repeat."""
    names = [name for i, name in enumerate(data.categories) if np.nansum(data.labels[:, i]) >= FOLDS]
    found = []
    for learn, test in StratifiedKFold(FOLDS, shuffle=True, random_state=number).split(data.texts, strata(data)):
        seen, new = data.select(learn), data.select(test)
        scores, milliseconds = ours(seen, new)
        by = {"ours": scores, "fixed": baseline(seen, new, names, False), "tuned": baseline(seen, new, names, True)}
        found.append({who: precisions(given, new, names) for who, given in by.items()} | {"time": {"milliseconds": milliseconds}})
        print(number, {who: round(figures[ANY], 4) for who, figures in found[-1].items() if who != "time"}, flush=True)
    return found


def table(folds: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: each figure, ours and the baselines', and the paired differences."""
    lines = ["| average precision | ours | TF-IDF, fixed | ours − fixed | TF-IDF, tuned | ours − tuned |", "|---|---|---|---|---|---|"]
    names = list(dict.fromkeys(name for fold in folds for name in fold["ours"]))
    for name in [ANY, "micro", "macro", *[n for n in names if n not in (ANY, "micro", "macro")]]:
        there = [fold for fold in folds if name in fold["ours"]]
        mean = {who: float(np.mean([fold[who][name] for fold in there])) for who in ("ours", "fixed", "tuned")}
        cells = [f"{mean['ours']:.3f}"]
        for who in ("fixed", "tuned"):
            middle, low, high = interval([fold["ours"][name] - fold[who][name] for fold in there])
            cells += [f"{mean[who]:.3f}", f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled texts: a file or a folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="number of the first repeat, which seeds its folds")
    parser.add_argument("--out", default="runs/bench-moderation.json", help="results so far")
    parser.add_argument("--at-most", type=int, default=0, help="repeats to run now; 0: all that are missing")
    wanted = parser.parse_args()
    data, file, run = read_labelled(Path(wanted.data)).with_any(), Path(wanted.out), 0
    results = json.loads(file.read_text()) if file.exists() else {}
    for number in range(wanted.first, wanted.first + wanted.repeats):
        if str(number) in results or (wanted.at_most and run >= wanted.at_most):
            continue
        results[str(number)], run = repeat(data, number), run + 1
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results))
    folds = [fold for number in range(wanted.first, wanted.first + wanted.repeats) for fold in results.get(str(number), [])]
    print(f"{len(data.texts)} texts, {len(folds)} folds, our median time {np.median([f['time']['milliseconds'] for f in folds]):.1f} ms a text")
    print(table(folds))


if __name__ == "__main__":
    main()
