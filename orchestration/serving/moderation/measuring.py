"""`chatray moderation train` and `chatray moderation evaluate`: what they print."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import average_precision_score

from orchestration.errors import RequestError
from orchestration.serving.moderation.harmless import read_harmless
from orchestration.serving.moderation.labelled import Labelled, read_labelled, text_number
from orchestration.serving.moderation.linear import LinearModel
from orchestration.serving.moderation.trained import DEFAULT
from orchestration.serving.moderation.training import train

WARM, TIMED = 3, 50


def train_and_show(data: str, out: str, harmless: str, seed: int) -> None:
    """Train on labelled texts, write the classifier, and show its out-of-fold figures.

    Raises:
        RequestError: the data are missing or not of their form, or `out` cannot be written.
    """
    file = Path(out).resolve()
    if file.is_dir() or not out.endswith(".safetensors"):
        raise RequestError(f"out={out}: give a file that ends in .safetensors")
    model = train(read_labelled(Path(data)), seed, read_harmless(harmless, seed))
    try:
        model.save(file)
    except OSError as cause:
        raise RequestError(f"out={out}: cannot be written ({cause})") from cause
    report = model.report
    if report["left_out"]:
        print(f"not learned, too few texts of one kind: {', '.join(report['left_out'])}")
    rows = {name: report["measured"][name] | report["thresholds"][name] for name in model.categories}
    _show(rows, f"{report['rows']} labelled texts, each scored by models learned without it")
    if report["harmless"]:
        alarms = ", ".join(f"{name} {limits['warn']:.1%}" for name, limits in report["false_alarms"].items() if limits)
        print(f"of {report['harmless']} harmless texts, so many reach `warn`: {alarms}")
    print(f"written: {out} ({file.stat().st_size / 2**10:.0f} KiB)")


def evaluate_and_show(model: str, data: str) -> None:
    """Measure a classifier on labelled texts that it was not trained on.

    Args:
        model: a file, or `default` for the one that chatray comes with.

    Raises:
        RequestError: files are missing or not of their form, or every text was trained on.
    """
    classifier = LinearModel.load(DEFAULT if model == "default" else Path(model))
    texts = read_labelled(Path(data)).with_any()
    seen = set(classifier.seen.tolist())
    new = [i for i, text in enumerate(texts.texts) if text_number(text) not in seen]
    if len(new) < len(texts.texts):
        print(f"{len(texts.texts) - len(new)} of {len(texts.texts)} texts are left out: the classifier was trained on them")
    if not new:
        raise RequestError(f"data={data}: the classifier was trained on every text of it; its figures are what `moderation train` printed")
    rows, milliseconds = measure(classifier, texts.select(new))
    _show(rows, f"{len(new)} texts, thresholds of the classifier")
    print(f"{milliseconds:.1f} ms for a text by itself, median of {min(TIMED, len(new))}")


def measure(model: LinearModel, data: Labelled) -> tuple[dict[str, dict[str, Any]], float]:
    """(figures by category, median milliseconds for one text)."""
    p = model.probabilities(data.texts)
    rows: dict[str, dict[str, Any]] = {}
    for column, name in enumerate(model.categories):
        if name not in data.categories:
            continue
        labels = data.labels[:, data.categories.index(name)]
        known = ~np.isnan(labels)
        y, scores = labels[known], p[known, column]
        rows[name] = {"true": int(y.sum()), "known": len(y)}
        if y.sum():
            rows[name]["average_precision"] = float(average_precision_score(y, scores))
        for action, limit in model.thresholds()[name].items():
            over = scores >= limit
            rows[name] |= {action: limit, f"{action}_precision": float(y[over].mean()) if over.any() else float("nan")}
            rows[name][f"{action}_recall"] = float(y[over].sum() / y.sum()) if y.sum() else float("nan")
    times = []
    for text in data.texts[:TIMED]:
        for _ in range(WARM):
            began = time.perf_counter()
            model.probabilities([text])
        times.append((time.perf_counter() - began) * 1000)
    return rows, float(np.median(times))


def _show(rows: dict[str, dict[str, Any]], title: str) -> None:
    table = Table("category", "true / known", "average precision", "warn from", "precision, recall", "block from", "precision, recall", title=title)
    for name, row in rows.items():
        cells = [name, f"{row['true']} / {row['known']}", f"{row['average_precision']:.3f}" if "average_precision" in row else "–"]
        for action in ("warn", "block"):
            there = action in row
            cells += [f"{row[action]:.3f}", f"{row[f'{action}_precision']:.2f}, {row[f'{action}_recall']:.2f}"] if there else ["never", "–"]
        table.add_row(*cells)
    Console(width=120).print(table)
