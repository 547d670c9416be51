"""A reward model beside TF-IDF on the same rows: the figures, their difference and its interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from orchestration.data import versus
from orchestration.data.baselines import (
    difference_interval,
    pairs_right,
    tfidf_answer_scores,
    tfidf_judgement_auc,
    tfidf_judgement_scores,
    tfidf_pairwise_accuracy,
    untied_pairs,
)
from orchestration.data.dialogues import Dialogue, Message
from orchestration.data.preferences import Comparison, Judgement
from tests.unit.test_baselines import comparisons, judgements


def asked(text: str) -> Dialogue:
    return Dialogue("x", (Message("user", text),))


def ranked(*ranks: float, context: str = "hello", answers: tuple[str, ...] = ()) -> Comparison:
    said = answers or tuple(f"answer {n}" for n in range(len(ranks)))
    return Comparison(asked(context), said, (True,) * len(ranks), ranks)


@pytest.mark.parametrize("seed", range(4))
def test_auc_is_scikit_learns_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    good = rng.random(40) < 0.3
    scores = np.round(rng.normal(size=40) + good)
    assert versus.auc(scores, good) == pytest.approx(roc_auc_score(good, scores))
    assert math.isnan(versus.auc(scores, good | True)) and math.isnan(versus.auc(scores, good & False))


def test_whole_clusters_are_resampled() -> None:
    values = np.array([0.0, 1.0, 1.0, 1.0])

    def mean(rows: np.ndarray) -> float:
        return float(values[rows].mean())

    assert difference_interval(mean, ["a", "b", "b", "b"], 200, 0) == (0.0, 1.0)  # aa, ab or bb
    assert difference_interval(mean, ["a", "a", "a", "a"], 200, 0) == (0.75, 0.75)
    seen: list[list[int]] = []
    difference_interval(lambda rows: float(seen.append(sorted(rows.tolist())) or 0), ["a", "b", "a"], 60, 0)  # type: ignore[func-returns-value]
    assert {tuple(rows) for rows in seen} == {(0, 0, 2, 2), (0, 1, 2), (1, 1)}


def test_the_interval_is_of_percentiles_and_follows_from_the_seed() -> None:
    values = np.random.default_rng(0).normal(size=400)

    def mean(rows: np.ndarray) -> float:
        return float(values[rows].mean())

    low, high = difference_interval(mean, list(range(400)), 1000, 0)
    error = float(values.std() / 20)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)
    assert (low, high) == difference_interval(mean, list(range(400)), 1000, 0) != difference_interval(mean, list(range(400)), 1000, 1)


def test_resamples_without_a_figure_are_left_out() -> None:
    def sometimes(rows: np.ndarray) -> float:
        return 0.5 if 0 in rows and 1 in rows else float("nan")

    assert difference_interval(sometimes, [0, 1], 100, 0) == (0.5, 0.5)
    assert all(math.isnan(end) for end in difference_interval(lambda rows: float("nan"), [0, 1], 10, 0))


def test_pairs_are_counted_by_place_and_ties_are_left_out() -> None:
    rows = [ranked(1.0, 0.0, 1.0), ranked(0.0, 0.0), ranked(0.0, 2.0)]
    assert untied_pairs(rows) == [(1, 0), (1, 2), (5, 6)]
    assert pairs_right(np.array([1.0, 3.0, 3.0, 9.0, 9.0, 1.0, 2.0]), rows).tolist() == [1.0, 0.5, 0.0]
    assert pairs_right(np.zeros(2), [ranked(0.0, 0.0)]).tolist() == []


def test_a_model_as_good_as_tf_idf_differs_by_nothing_and_a_perfect_one_by_all_that_is_left() -> None:
    train, test = comparisons(0, 60, False), comparisons(1, 40, False)
    same = versus.on_rankings(tfidf_answer_scores(train, test, 0).tolist(), train, test, 0)
    baseline = tfidf_pairwise_accuracy(train, test, 0)
    assert same == {
        "baseline_pairwise_accuracy": baseline, "pairwise_accuracy_difference": 0.0,
        "pairwise_accuracy_difference_low": 0.0, "pairwise_accuracy_difference_high": 0.0,
    }  # fmt: skip
    best = versus.on_rankings([-rank for row in test for rank in row.ranks], train, test, 0)
    assert best["pairwise_accuracy_difference"] == pytest.approx(1 - baseline)
    assert best["pairwise_accuracy_difference_low"] == best["pairwise_accuracy_difference_high"]  # all rows have one context: one cluster


def test_pairs_are_resampled_by_the_context_that_they_answer() -> None:
    train = [ranked(0.0, 0.0)]  # the baseline knows nothing: one half of every pair
    test = [ranked(0.0, 1.0, 2.0, context="a"), ranked(0.0, 1.0, context="b"), ranked(0.0, 0.0, context="c"), ranked(1.0, 0.0, context="b")]
    found = versus.on_rankings([2.0, 1.0, 0.0, 1.0, 2.0, 0.0, 0.0, 2.0, 1.0], train, test, 0)  # right on all of a, wrong on all of b
    assert found["pairwise_accuracy_difference"] == pytest.approx(3 / 5 - 0.5)
    assert (found["pairwise_accuracy_difference_low"], found["pairwise_accuracy_difference_high"]) == (-0.5, 0.5)
    mixed = versus.on_rankings([2.0, 1.0, 0.0, 1.0, 2.0, 0.0, 0.0, 1.0, 2.0], train, test, 0)  # b: one wrong, one right
    assert (mixed["pairwise_accuracy_difference_low"], mixed["pairwise_accuracy_difference_high"]) == (0.0, 0.5)


def test_judgements_are_compared_on_the_same_rows_and_resampled_by_context() -> None:
    train, test = judgements(0, 120, "nowhere"), judgements(1, 60, "nowhere")
    theirs = tfidf_judgement_scores(train, test)
    same = versus.on_judgements(theirs.tolist(), train, test, 0)
    assert [same[f"auc_difference{end}"] for end in ("", "_low", "_high")] == [0.0, 0.0, 0.0]
    assert same["baseline_auc"] == pytest.approx(tfidf_judgement_auc(train, test))
    best = versus.on_judgements([float(row.good) for row in test], train, test, 0)
    assert best["auc_difference"] == pytest.approx(1 - same["baseline_auc"])
    assert best["auc_difference_low"] < best["auc_difference"] < best["auc_difference_high"]
    (context,) = {asked("the same for all")}
    together = versus.on_judgements(
        [float(row.good) for row in test], train, [Judgement(context, row.reply, row.good) for row in test], 0
    )  # fmt: skip
    assert together["auc_difference_low"] == together["auc_difference_high"] == together["auc_difference"]


def test_where_nothing_can_be_compared_there_is_no_figure_and_no_error() -> None:
    tied, plain = [ranked(0.0, 0.0)], [ranked(0.0, 1.0), ranked(1.0, 0.0, 0.0)]
    assert versus.on_rankings([1.0, 2.0], plain, tied, 0) == {}
    assert versus.on_rankings([2.0, 1.0], tied, plain[:1], 0)["baseline_pairwise_accuracy"] == 0.5
    good, bad = Judgement(asked("a"), "yes", True), Judgement(asked("b"), "no", False)
    assert versus.on_judgements([1.0], [good, bad], [good], 0) == {} == versus.on_judgements([1.0], [good, bad], [bad], 0)
    found = versus.on_judgements([2.0, 1.0], [good], [good, bad], 0)  # one kind to learn from
    assert (found["baseline_auc"], found["auc_difference"]) == (0.5, 0.5)


def test_texts_without_a_word_are_no_error() -> None:
    blank = [Judgement(Dialogue("x", ()), "", n % 2 == 0) for n in range(4)]
    assert versus.on_judgements([2.0, 1.0, 2.0, 1.0], blank, blank, 0)["baseline_auc"] == 0.5
    replies = [Judgement(Dialogue("x", ()), "yes" if n % 2 == 0 else "no", n % 2 == 0) for n in range(4)]
    assert versus.on_judgements([0.0] * 4, replies, replies, 0)["baseline_auc"] == 1.0
    silent = [ranked(0.0, 1.0, answers=("", "")), ranked(1.0, 0.0, answers=("", " "))] * 3
    assert versus.on_rankings([0.0] * 12, silent, silent, 0)["baseline_pairwise_accuracy"] == 0.5
