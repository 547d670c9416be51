"""Several ranks per role, on the real runtime, under ZeRO: the loop, PPO-ptx, a commit and an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Chatray
from safetensors.torch import load_file

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ppo_runs_with_two_ranks_per_role_under_zero(stage: int, smoke_run: Path, chatray: Chatray, tmp_path: Path) -> None:
    ranks = [f"placement.{role}.ranks=2" for role in ("policy", "critic", "reference", "rollout")]
    weights = f"policy_checkpoint={smoke_run}/round_01/sft/checkpoint", f"reward_checkpoint={smoke_run}/round_01/reward_model/checkpoint"
    more = ("ppo.ptx=0.5", f"engine.zero_stage={stage}", "ppo.steps=2", "commit.every=1", "ppo.lr=1e-3")
    done = chatray("run", "experiment=smoke", "stage=ppo", *ranks, *weights, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/smoke"
    records = [json.loads(line) for line in (run / "round_01/ppo/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2]
    assert abs(records[0]["kl"]) < 1e-4
    assert records[0]["first_clip_share"] == 0
    before = load_file(smoke_run / "round_01/sft/checkpoint/model.safetensors")
    after = load_file(run / "round_01/ppo/checkpoint/model.safetensors")
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
