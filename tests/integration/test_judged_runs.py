"""Whole runs on judgements that people made: a head fitted to them, PPO against it, and the report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from actors.reward_network import FEATURE_HEAD_FILE
from orchestration import config as configuration
from orchestration import recipe, report

TINY = ("runtime=local", "placement=cpu", "checks=strict", "logging.progress=false", "model.dtype=fp32", "scale.layers=1", "scale.width=16",
        "scale.heads=2", "scale.feed_forward=32", "scale.vocabulary=400", "scale.context=96", "data.heldout=6",
        "data.heldout_preferences=20", "sft.steps=3", "sft.batch=8", "sft.eval_every=2", "ppo.batch=12", "ppo.steps=2",
        "ppo.max_new_tokens=8", "evaluate.prompts=4", "evaluate.max_new_tokens=8")  # fmt: skip
WORDS = "sun moon tree river stone bird cloud lamp".split()


def written(folder: Path) -> Path:
    """Dialogues, and judgements that are good where the reply is polite."""
    rng = random.Random(0)
    dialogues: list[dict[str, Any]] = []
    judgements: list[dict[str, Any]] = []
    for number in range(60):
        turns = [("user", f"a {rng.choice(WORDS)} and a {rng.choice(WORDS)} please"), ("assistant", f"gladly, one {rng.choice(WORDS)}")]
        dialogues.append({"conversation_id": f"d{number}", "utterances": [{"speaker": who, "text": text} for who, text in turns]})
    for number in range(100):
        good = rng.random() < 0.5
        said = f"{'thank you' if good else 'go away'} {rng.choice(WORDS)} {number}"
        context = json.dumps([{"role": "user", "text": f"a {rng.choice(WORDS)} and {number}"}])
        row = {"conversation_id": f"c{number}", "context": context, "generation": json.dumps({"role": "agent", "text": said})}
        judgements.append(row | {"reward": int(good)})
    for part, rows in (("data", dialogues), ("reward", judgements)):
        (folder / part).mkdir(parents=True)
        (folder / part / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def run(folder: Path, data: Path, *words: str) -> dict[str, Any]:
    fitted = ("reward_model.train=head", "reward_model.features=[tokens,likelihood]")
    given = ["experiment=taskmaster_coffee", *TINY, *fitted, f"data.path={data}", f"run_dir={folder}", *words]
    return recipe.run(configuration.load(given))["stages"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ppo_learns_from_a_head_fitted_to_judgements(dtype: str, tmp_path: Path) -> None:
    found = run(tmp_path / "run", written(tmp_path / "data"), f"model.dtype={dtype}", "ppo.judge.every=2")
    learned = found["reward_model"]
    assert learned["heldout_auc"] > 0.95 and learned["steps"] == 0 and learned["penalty"] > 0
    assert learned["auc_difference"] == pytest.approx(learned["heldout_auc"] - learned["baseline_auc"], abs=1e-3)
    assert learned["auc_difference_low"] <= learned["auc_difference"] <= learned["auc_difference_high"]
    assert (tmp_path / "run/round_01/reward_model/checkpoint" / FEATURE_HEAD_FILE).exists()
    assert found["ppo"]["checks"]["demonstrations"]["passed"]
    assert all(check["passed"] for check in found["ppo"]["checks"].values())
    assert len(found["ppo"]["curve"]) == 2 and found["evaluate"]["prompts"] == 4
    report.show(tmp_path / "run", 1, 0)
    page = (tmp_path / "run/report.html").read_text()
    shown = f"{learned['auc_difference']:.3f} ({learned['auc_difference_low']:.3f} to {learned['auc_difference_high']:.3f})"
    assert shown in page and "difference, with 95% interval" in page
    again = run(tmp_path / "run", tmp_path / "data", f"model.dtype={dtype}", "ppo.judge.every=2")
    assert again == found, "nothing is left to do"
