"""The recipe on one GPU: bf16, NCCL, all roles sharing the device. Skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Chatray

pytestmark = [pytest.mark.ray, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_smoke_run_on_one_gpu(chatray: Chatray, tmp_path: Path) -> None:
    done = chatray("run", "experiment=smoke", "placement=one_gpu", "model.dtype=bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/smoke/summary.json").read_text())
    assert summary["stages"]["evaluate"]["prompts"] == 16


def test_engines_agree_between_fp32_and_bf16(tmp_path: Path, chatray: Chatray) -> None:
    for dtype in ("fp32", "bf16"):
        words = ("stage=sft", f"model.dtype={dtype}", f"run_dir={dtype}", "placement=one_gpu")
        done = chatray("run", "experiment=smoke", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    losses = [json.loads((tmp_path / d / "summary.json").read_text())["stages"]["sft"]["heldout_nats_per_token"] for d in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("way", ["auto", "shared_memory", "object_store", "collective"])  # CUDA IPC, twice; Ray's; gloo: one device
def test_new_weights_reach_the_engine_on_every_way(way: str, tmp_path: Path, chatray: Chatray) -> None:
    words = ("placement=one_gpu", "model.dtype=bf16", "checks=strict", f"placement.weight_sync={way}")
    done = chatray("run", "experiment=smoke", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/smoke/round_01/ppo/metrics.jsonl").read_text().splitlines()]
    assert all(row["sync_bytes"] > 0 and row["checks"]["weights"]["passed"] and row["checks"]["engine"]["passed"] for row in rows)
