"""vLLM as the rollout engine: its own tests in a process of their own, and a run of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from actors.models import new_causal_lm
from orchestration import config as configuration
from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.world import scenarios
from tests.conftest import ROOT, Chatray
from tests.intruder import watched

pytestmark = pytest.mark.usefixtures("vllm")


def test_the_engine_beside_the_transformers_one_in_a_process_of_its_own() -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/integration/vllm_engine.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout


@pytest.mark.slow  # a minute
def test_ppo_on_ray_with_vllm(chatray: Chatray, tmp_path: Path) -> None:
    shape = ["scale.width=64", "scale.heads=2"]
    config = configuration.load(["experiment=smoke", *shape], tmp_path)
    assert config.data.kind == "world"
    chat = Chat(learn_tokenizer(scenarios.demonstrations(200, 0, config.data.flaws), config.scale.vocabulary))
    new_causal_lm(config.scale, len(chat.tokenizer), 0, 0.0, chat.end, chat.pad).save_pretrained(tmp_path / "sft")
    chat.save(tmp_path / "sft")
    (tmp_path / "rewarding.py").write_text("def brief(conversations, replies):\n    return [-len(reply) / 10 for reply in replies]\n")
    with watched() as listening:
        done = chatray(
            "run", "experiment=smoke", "run_dir=run", "stage=ppo", "rollout=vllm", "rollout.cpu_cache_gib=0.1", "ppo.advantage=rloo",
            "ppo.samples_per_prompt=2", "ppo.steps=2", f"policy_checkpoint={tmp_path / 'sft'}",
            "ppo.rewards=[{kind: function, function: 'rewarding:brief'}]", "model.dtype=fp32", *shape, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert listening.open_to_others() == []
    ppo = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]["ppo"]
    assert all(check["passed"] for check in ppo["checks"].values())  # that the engine agrees with the trainer, and has the step's weights
    assert {"engine", "weights"} <= ppo["checks"].keys()
