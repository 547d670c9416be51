"""Batches that are sampled before their step: by weights as old as `ppo.staleness` says, no older; resume and rollback change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.algorithms.importance import importance_weights
from actors.rollout import Rollout
from orchestration.errors import RunError
from orchestration.stages import ppo
from tests import tiny_ppo

WORDS = ("ppo.steps=5", "ppo.batch=8", "ppo.lr=1e-2", "ppo.warmup=0", "ppo.max_new_tokens=8", "ppo.importance_cap=2", "commit.every=2",
         "checks=strict", "model.dtype=fp32", "ppo.kl.budget=1e6")  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ppo.prepared(tmp_path_factory.mktemp("start"))


def versions(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(row["weight_version_min"], row["weight_version_max"]) for row in rows]


def without_checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A run that goes on checks its first update once more."""
    return [{name: value for name, value in row.items() if name != "checks"} for row in rows]


@pytest.mark.parametrize("staleness", [1, 2])
def test_samples_are_as_stale_as_was_said_and_a_resumed_run_ends_bit_by_bit_alike(staleness: int, start: Path, tmp_path: Path) -> None:
    words = (*WORDS, f"ppo.staleness={staleness}")
    result, rows, weights = tiny_ppo.run(tiny_ppo.context(start, tmp_path, *words))
    expected = [max(step - staleness, 0) for step in range(5)]
    assert versions(rows) == [(version, version) for version in expected]
    assert [row["stale_replies"] for row in rows] == [8.0 * (version < step) for step, version in enumerate(expected)]
    assert all(row["importance_mean"] != 1.0 for row in rows[1:])  # older weights gave other log-probs, and that was corrected for
    assert result["checks"]["weights"]["passed"] and result["checks"]["ratio"]["passed"]
    again, rows_again, weights_again = tiny_ppo.run(tiny_ppo.context(start, tmp_path, *words))  # goes on from the commit of step 4
    assert without_checks(rows_again) == without_checks(rows) and again["kl"] == result["kl"]
    assert all(torch.equal(weights_again[name], tensor) for name, tensor in weights.items())


def test_a_run_that_fails_between_commits_goes_on_as_if_it_had_not(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*WORDS, "ppo.staleness=1")
    _, whole, weights = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "whole", *words))
    learn = ppo.Loop.learn

    def failing(self: ppo.Loop, experience: Any, step: int) -> dict[str, float]:
        if step == 3:
            raise RunError("a rank died")
        return learn(self, experience, step)

    monkeypatch.setattr(ppo.Loop, "learn", failing)
    with pytest.raises(RunError, match="a rank died"):
        ppo.run(tiny_ppo.context(start, tmp_path / "broken", *words))
    monkeypatch.setattr(ppo.Loop, "learn", learn)
    _, rows, found = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "broken", *words))  # from the commit of step 2
    assert without_checks(rows) == without_checks(whole)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_after_a_rollback_samples_are_as_stale_as_before(start: Path, tmp_path: Path) -> None:
    words = (*WORDS, "ppo.staleness=1", "commit.every=1", "ppo.guard.action=rollback", "ppo.guard.times=2", "ppo.kl.budget=1e-3")
    result, rows, _ = tiny_ppo.run(tiny_ppo.context(start, tmp_path, *words))
    assert result["rollbacks"]
    assert versions(rows) == [(max(step - 1, 0),) * 2 for step in range(len(rows))]
    assert result["checks"]["weights"]["passed"]


def test_an_engine_older_than_the_bound_fails_the_check(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Rollout.load_weights
    monkeypatch.setattr(Rollout, "load_weights", lambda self, update: whole(self, update) if update.version != 2 else 1)
    with pytest.raises(RunError, match=r"check weights: all replies were sampled by weights of version 2 .*versions 1 to 1 were seen"):
        ppo.run(tiny_ppo.context(start, tmp_path, *WORDS, "ppo.staleness=1"))


def test_the_correction_is_the_ratio_of_trainer_to_engine_up_to_the_cap() -> None:
    old, behaviour = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -3.0]])
    weights, cut = importance_weights(old, behaviour, torch.ones(1, 2, dtype=torch.bool), 2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 2.0]]).exp().clamp(max=2.0))
    assert cut.tolist() == [[False, True]]
