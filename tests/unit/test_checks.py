"""Each check passes on sound figures and is found, by name, on broken ones."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestration import checks

SOUND = {
    "reference_gap": 0.0, "first_log_ratio_max": 0.0, "first_clip_share": 0.0, "engine_gap_mean": 1e-7, "weight_version_min": 3,
    "weight_version_max": 3,
}  # fmt: skip
BROKEN = {
    "reference": {"reference_gap": 0.3},
    "ratio": {"first_log_ratio_max": 0.5},
    "clip": {"first_clip_share": 0.1},
    "engine": {"engine_gap_mean": 0.2},
    "weights": {"weight_version_min": 2},
}


def findings(dtype: str = "fp32", own: bool = False, **changed: Any) -> dict[str, checks.Finding]:
    figures = SOUND | changed
    found = [*checks.before_learning(figures, dtype), *checks.first_update(figures, dtype, own), *checks.every_step(figures, dtype, 3, 3)]
    return {finding.name: finding for finding in [*found, checks.zero_point(changed.get("zero", 0.0), dtype)]}


def test_sound_figures_pass_every_check() -> None:
    assert set(findings()) == set(checks.NAMES)
    assert all(finding.passed for finding in findings(own=True).values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_figure_fails_its_check_and_no_other(name: str, dtype: str) -> None:
    failed = {found: finding for found, finding in findings(dtype, **BROKEN[name]).items() if not finding.passed}
    assert list(failed) == [name]
    text = failed[name].sentence()
    assert f"check {name}" in text and "seen" in text and "look at" in text


def test_demonstrations_away_from_zero_fail() -> None:
    assert not findings(zero=0.4)["demonstrations"].passed and not findings(zero=-0.4)["demonstrations"].passed


def test_with_the_updates_own_micro_batches_in_fp32_the_ratio_is_exactly_one() -> None:
    tiny = {"first_log_ratio_max": 1e-9}
    assert findings(**tiny)["ratio"].passed and not findings(own=True, **tiny)["ratio"].passed
    assert findings("bf16", own=True, **tiny)["ratio"].passed


@pytest.mark.parametrize("figure", SOUND)
def test_what_is_not_a_number_passes_nothing(figure: str) -> None:
    assert not all(finding.passed for finding in findings(**{figure: math.nan}).values())
