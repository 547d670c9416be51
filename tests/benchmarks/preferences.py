"""Reward models learned from people against TF-IDF and logistic regression: repeated 5-fold, differences paired by fold.

    python tests/benchmarks/preferences.py taskmaster ../shared/data/taskmaster-4
    python tests/benchmarks/preferences.py hh ../shared/data/hh-rlhf

Taskmaster: the run's own SFT model (stage `sft` of the experiment, run first when it is missing) and the experiment's reward model, AUC.
HH: the experiment's reward model from random weights, trained anew in each fold, pairwise accuracy.

Folds are made in two ways. `rows`: every row by itself, as the baseline's published figure was measured; a context with several judged
replies then stands on both sides, and what is remembered of it counts. `contexts`: all rows of a context in one fold.

The interval of the mean difference is Nadeau and Bengio's corrected resampled t (2003, Machine Learning 52): folds share training rows, so
the variance of J differences is taken times 1/J + n_test/n_train.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from actors.preference_task import PreferenceTask, fitted
from actors.reward_network import widths
from actors.trainer import train
from actors.worker import make_engine, process_group_of_one
from orchestration import cli, config
from orchestration.data import baselines, comparisons
from orchestration.data.chat import Chat, load_tokenizer
from orchestration.data.fitting import fitting_comparisons, fitting_judgements
from orchestration.data.source import open_source
from orchestration.stages.reward_model import of_groups, steps_of
from orchestration.stages.start import context_length, starting_chat, starting_model

FOLDS = 5
Fold = tuple[np.ndarray, np.ndarray]
"""Indices to learn from, and to measure on."""


def folds(groups: Sequence[Any], repeats: int) -> Iterator[Fold]:
    """5-fold splits, `repeats` times over; rows of one group stay together."""
    _, number = np.unique(np.array(groups), return_inverse=True)
    for repeat in range(repeats):
        yield from GroupKFold(FOLDS, shuffle=True, random_state=repeat).split(number, groups=number)


def interval(differences: Sequence[float], ratio: float = 1 / (FOLDS - 1)) -> tuple[float, float, float]:
    """(mean, low, high): the 95% interval of the mean of paired differences over repeated folds."""
    count, mean = len(differences), float(np.mean(differences))
    error = math.sqrt((1 / count + ratio) * float(np.var(differences, ddof=1)))
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return mean, mean - reach, mean + reach


class Nowhere:
    """A training session that keeps nothing."""

    rank, world_size = 0, 1

    def report(self, step: int, metrics: dict[str, float]) -> None: ...

    def commit(self, step: int, save: Callable[[Path], None], memory: dict[str, Any]) -> None: ...

    def resume(self) -> None:
        return None

    def stop_asked(self) -> bool:
        return False

    def export(self, save: Callable[[Path], None]) -> None:
        self.exported = True


def taskmaster(data: str, run_dir: str, overrides: list[str]) -> dict[str, tuple[list[Any], Callable[[Fold], tuple[float, float]]]]:
    """For each way to make folds: the groups, and the two AUCs of a fold."""
    given = ["experiment=taskmaster_coffee", f"data.path={data}", f"run_dir={run_dir}", *overrides]
    if cli.main(["run", *given, "stage=sft"]) != 0:
        raise SystemExit("stage sft failed")
    process_group_of_one()  # not before: the stage has its own processes
    settings = config.load(given)
    corpus = open_source(settings).load()
    folder = str(Path(run_dir) / "round_01/sft/checkpoint")
    chat = Chat(load_tokenizer(folder, "model.tokenizer"))
    judged = fitting_judgements([*corpus.judgements, *corpus.held_out_judgements], chat, settings.scale.context).kept
    rows = comparisons.encode_judgements(chat, judged)
    task = PreferenceTask(settings, folder, rows, rows, rows, rows, ranked=False)
    engine = make_engine(settings, task.module(), None)
    features = task.features_of(engine, rows)  # the language model stays as it is, whatever the fold
    groups = widths(engine.module.lm.config, settings.reward_model.features)
    good = np.array([j.good for j in judged])

    def measure(fold: Fold) -> tuple[float, float]:
        learn, test = fold
        seen = rows.select(learn.tolist())
        ours = fitted(features[learn], seen, groups, dataclasses.replace(task, rows=seen)).scores(features[test])
        theirs = baselines.tfidf_judgement_scores([judged[i] for i in learn], [judged[i] for i in test])
        return float(roc_auc_score(good[test], ours)), float(roc_auc_score(good[test], theirs))

    return {"rows": (list(range(len(judged))), measure), "contexts": ([baselines.text_of(j.context) for j in judged], measure)}


def hh(data: str, run_dir: str, overrides: list[str]) -> dict[str, tuple[list[Any], Callable[[Fold], tuple[float, float]]]]:
    """For each way to make folds: the groups, and the two pairwise accuracies of a fold."""
    given = ["experiment=hh_harmless", f"data.path={data}", f"run_dir={run_dir}", "runtime=local", "placement=cpu"]
    settings = config.load([*given, *overrides])
    process_group_of_one()
    corpus = open_source(settings).load()
    chat = starting_chat(settings, corpus)
    start = Path(run_dir) / "start"
    starting_model(settings, chat, 0.0).save_pretrained(start)
    chat.save(start)
    longest = context_length(settings)
    pairs = fitting_comparisons([*corpus.comparisons, *corpus.held_out_comparisons], chat, longest).kept
    rows = comparisons.encode_rankings(chat, pairs)
    zero = comparisons.demonstrated(corpus.demonstrations, chat, longest)

    def measure(fold: Fold) -> tuple[float, float]:
        learn, test = fold
        learning = settings.reward_model
        kept, apart = comparisons.kept_apart(len(learn), settings.reward_model.validation_share, settings.seed)
        steps = dataclasses.replace(learning, steps=steps_of(learning, len(kept)))
        parts = [of_groups(rows, learn[kept].tolist()), of_groups(rows, learn[apart].tolist()), of_groups(rows, test.tolist())]
        task = PreferenceTask(dataclasses.replace(settings, reward_model=steps), str(start), *parts, zero, ranked=True)
        ours = train(task.config, task, Nowhere())["heldout_pairwise_accuracy"]
        theirs = baselines.tfidf_pairwise_accuracy([pairs[i] for i in learn], [pairs[i] for i in test], settings.seed)
        return ours, theirs

    return {"rows": (list(range(len(pairs))), measure), "contexts": ([baselines.text_of(pair.context) for pair in pairs], measure)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=("taskmaster", "hh"))
    parser.add_argument("data", help="the folder of the set")
    parser.add_argument("overrides", nargs="*", help="settings, as for chatray run")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folds", choices=("rows", "contexts"), nargs="*", default=["rows", "contexts"], help="how folds are made")
    parser.add_argument("--run-dir", default=None)
    wanted = parser.parse_args()
    run_dir = wanted.run_dir or f"runs/bench-preferences-{wanted.set}"
    ways = {"taskmaster": taskmaster, "hh": hh}[wanted.set](wanted.data, run_dir, wanted.overrides)
    for way in wanted.folds:
        groups, measure = ways[way]
        began, found = time.perf_counter(), []
        for number, fold in enumerate(folds(groups, wanted.repeats)):
            found.append(measure(fold))
            print(f"{wanted.set}, folds of {way}, fold {number + 1}: ours {found[-1][0]:.4f}, TF-IDF {found[-1][1]:.4f}", flush=True)
        ours, theirs = np.array(found).T
        mean, low, high = interval((ours - theirs).tolist())
        result = {"ours": ours.mean(), "tfidf": theirs.mean(), "difference": mean, "low": low, "high": high, "folds": len(found)}
        rounded = {name: round(float(value), 4) for name, value in result.items()}
        print(json.dumps({"set": wanted.set, "folds_of": way} | rounded | {"seconds": round(time.perf_counter() - began)}), flush=True)


if __name__ == "__main__":
    main()
