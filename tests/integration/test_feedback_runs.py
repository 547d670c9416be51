"""A run that learns from exported feedback: the next round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serving.test_feedback_rows import filled

TINY = ("scale.layers=1", "scale.width=16", "scale.heads=2", "scale.feed_forward=32", "scale.vocabulary=400", "scale.context=96")
QUICK = ("runtime=local", "placement=cpu", "model.dtype=fp32", "data.heldout=8", "data.heldout_preferences=16", "sft.steps=3", "reward_model.steps=3")
PPO = ("ppo.steps=2", "ppo.batch=8", "ppo.minibatches=1", "ppo.max_new_tokens=8", "evaluate.prompts=8", "evaluate.max_new_tokens=8")


@pytest.mark.slow
def test_a_small_run_trains_on_the_export(chatray: Callable[..., Any], tmp_path: Path) -> None:
    filled(str(tmp_path / "store.db"), 60)
    assert chatray("feedback", "export", "store=store.db", "out=said", cwd=tmp_path).returncode == 0
    done = chatray("run", "experiment=feedback", "run_dir=run", "data.path=said", *TINY, *QUICK, *PPO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert set(found["stages"]) >= {"sft", "reward_model", "ppo"}
    assert 0 <= found["stages"]["reward_model"]["heldout_pairwise_accuracy"] <= 1
    assert {source["source"] for source in found["data"]["sources"]} == {"messages", "rankings"}
