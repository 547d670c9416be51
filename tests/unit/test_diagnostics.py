"""Each illness fires on figures made for it; a healthy run, the quickstart's own figures among them, raises nothing."""

from __future__ import annotations

import math

import pytest

from orchestration import diagnostics
from orchestration.diagnostics import NOT_FINITE, OVEROPTIMISED, RULES

HEALTHY = {
    "entropy": 0.3, "distinct_2": 0.2, "duplicate_share": 0.4, "reply_tokens": 12.0, "finished_share": 0.98, "explained_variance": 0.6,
    "clip_share": 0.02, "kl": 1.0, "kl_of_budget": 0.1, "kl_per_token": 0.1, "engine_gap_mean": 0.003, "engine_gap_max": 0.1,
    "score_std": 1.2,
}  # fmt: skip
STEPS = 20
QUICKSTART = {
    "entropy": [0.339, 0.338, 0.31, 0.269, 0.244, 0.215, 0.178, 0.179],
    "reply_tokens": [11.9, 11.7, 10.9, 10.1, 8.38, 7.49, 7.34, 7.29],
    "explained_variance": [0.119, 0.438, 0.662, 0.793, 0.896, 0.948, 0.905, 0.97],
    "kl_per_token": [0.0, -0.0006, 0.014, 0.055, 0.15, 0.215, 0.233, 0.274],
    "engine_gap_mean": [0.0028, 0.0027, 0.0027, 0.0023, 0.002, 0.0018, 0.0014, 0.0014],
    "clip_share": [0.0, 0.0, 0.0027, 0.002, 0.001, 0.002, 0.0, 0.0],
}
"""Every third step of a run that went well (README)."""


def rows(figure: str = "kl", value: float = 1.0, since: int = 8) -> list[dict[str, float]]:
    """A run in which one figure changes for good."""
    return [{"step": step + 1, **HEALTHY, figure: value if step >= since else HEALTHY[figure]} for step in range(STEPS)]


def test_a_healthy_run_raises_nothing_at_any_step() -> None:
    for count in range(STEPS + 1):
        assert diagnostics.illnesses(rows()[:count], []) == {}


def test_the_quickstart_raises_nothing() -> None:
    found = [HEALTHY | {name: values[step // 3] for name, values in QUICKSTART.items()} for step in range(24)]
    for count in range(len(found) + 1):
        assert diagnostics.illnesses(found[:count], []) == {}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_illness_fires_by_its_own_name_and_goes_away(rule: diagnostics.Rule) -> None:
    limit = rule.threshold * (HEALTHY[rule.figure] if rule.relative else 1)
    ill = limit + (0.5 if rule.above else -0.5) * (abs(limit) or 1.0)
    sick = rows(rule.figure, ill)
    found = diagnostics.illnesses(sick, [])
    assert rule.name in found and rule.name in found[rule.name] and "try" in found[rule.name]
    assert rule.why
    assert rule.name not in diagnostics.illnesses([*sick, *rows()], [])


def test_one_odd_step_is_no_illness_where_a_window_is_asked_for() -> None:
    for rule in RULES:
        if rule.window >= 5 and not rule.relative:
            odd = rows(rule.figure, rule.threshold + (0.1 if rule.above else -0.1), since=STEPS - 1)
            assert rule.name not in diagnostics.illnesses(odd, [])


def test_no_critic_no_illness_of_the_critic() -> None:
    without = [{name: value for name, value in row.items() if name != "explained_variance"} for row in rows()]
    assert diagnostics.illnesses(without, []) == {}


def test_a_figure_that_is_not_finite_is_named() -> None:
    found = diagnostics.illnesses([*rows(), HEALTHY | {"policy_loss": math.nan}], [])
    assert "policy_loss" in found[NOT_FINITE]


def curve(scores: list[float], golds: list[float]) -> list[dict[str, float]]:
    return [
        {"step": 10 * n, "score": score, "gold": gold, "gold_error": 0.02}
        for n, (score, gold) in enumerate(zip(scores, golds, strict=True))
    ]


def test_a_rising_score_with_a_falling_grade_is_over_optimisation() -> None:
    found = diagnostics.illnesses(rows(), curve([0.0, 1.0, 2.0, 3.0], [0.2, 0.5, 0.4, 0.3]))
    assert "from 1 to 3" in found[OVEROPTIMISED] and "since step 10" in found[OVEROPTIMISED]


@pytest.mark.parametrize(
    ("scores", "golds"),
    [
        ([0.0, 1.0, 2.0, 3.0], [0.2, 0.5, 0.6, 0.7]),  # both rise
        ([0.0, 1.0, 2.0, 3.0], [0.2, 0.5, 0.49, 0.48]),  # within the error
        ([0.0, 1.0, 2.0, 3.0], [0.2, 0.3, 0.5, 0.3]),  # once only
        ([0.0, 1.0, 0.9, 0.8], [0.2, 0.5, 0.4, 0.3]),  # both fall: an illness, but another one
        ([0.0, 1.0], [0.5, 0.3]),  # too little to say
    ],
)
def test_no_over_optimisation(scores: list[float], golds: list[float]) -> None:
    assert diagnostics.illnesses(rows(), curve(scores, golds)) == {}


def test_without_an_exact_grade_there_is_no_such_warning() -> None:
    points = [{"step": n, "score": float(n)} for n in range(5)]
    assert diagnostics.illnesses(rows(), points) == {}


def test_each_warning_is_said_when_it_begins_and_when_it_ends() -> None:
    news = diagnostics.change(["verbosity", "no_end"], {"no_end": "text", "kl_runaway": "more"})
    assert news.begun == {"kl_runaway": "more"} and news.ended == ["verbosity"]
