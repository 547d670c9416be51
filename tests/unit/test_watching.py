"""What is printed when: each check and each illness once, and an illness again when it returns."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.checks import Finding
from orchestration.errors import RunError
from orchestration.run_directory import StageDirectory
from orchestration.stages.watching import Watch
from tests.fakes import smoke

ILL = {"finished_share": 0.1}
WELL = {"finished_share": 0.9}


def watch(folder: Path, checks: str = "warn") -> tuple[Watch, list[str]]:
    said: list[str] = []
    context: Any = SimpleNamespace(
        config=smoke(f"checks={checks}"), directory=StageDirectory(folder, 1), metrics=SimpleNamespace(say=said.append)
    )
    return Watch(context), said


def live(found: Watch, figures: list[dict[str, float]], first: int = 1) -> list[dict[str, Any]]:
    """Record steps, as the loop does."""
    rows = [found.recorded({"step": first + number, "kl": 0.1, **row}) for number, row in enumerate(figures)]
    for row in rows:
        found.context.directory.append(row)
    return rows


def test_an_illness_is_said_once_and_again_when_it_returns(tmp_path: Path) -> None:
    found, said = watch(tmp_path)
    rows = live(found, [ILL] * 8 + [WELL] * 8 + [ILL] * 8)
    assert ["again" in line for line in said] == [False, False, True]
    assert "no_end" in said[0] and "is over" in said[1]
    assert rows[7]["warnings"] == ["no_end"] and "warnings" not in rows[14]
    assert found.result()["warnings"]["no_end"]["first"] == 5


def test_a_run_that_goes_on_knows_what_it_knew(tmp_path: Path) -> None:
    found, _ = watch(tmp_path)
    live(found, [ILL] * 8)
    again, said = watch(tmp_path)
    again.go_back(7)
    assert again.warned["no_end"] == {"first": 5, "last": 7, "steps": 3} and len(again.rows) == 7
    live(again, [ILL], first=8)
    assert said == [] and again.result() == found.result()


def finding(seen: float) -> Finding:
    return Finding("ratio", seen, 0.1, "the ratio is 1", "dropout")


def test_a_failed_check_is_said_once_and_kept_at_its_worst(tmp_path: Path) -> None:
    found, said = watch(tmp_path)
    for seen in (0.0, 0.5, 0.9, 0.2):
        json.dumps(found.check([finding(seen)]))
    assert len(said) == 1 and "look at dropout" in said[0]
    assert found.result()["checks"]["ratio"] == {"passed": False, "bound": 0.1, "seen": 0.9}


def test_strict_raises_with_everything_that_failed(tmp_path: Path) -> None:
    found, _ = watch(tmp_path, "strict")
    found.check([finding(0.05)])
    with pytest.raises(RunError, match=r"check ratio: the ratio is 1 \(within 0\.1\), seen 0\.5; look at dropout\n"):
        found.check([finding(0.5)])
