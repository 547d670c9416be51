"""Pretraining is where SFT starts from, and PPO-ptx keeps what it taught. Whole stages in this process, tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestration import config as configuration
from orchestration import recipe
from orchestration.errors import RequestError

TINY = ("experiment=smoke", "runtime=local", "logging.progress=false", "data.texts=120", "evaluate.prompts=4")
PRETRAINED = ("pretrain.steps=60", "pretrain.batch=8", "pretrain.lr=1e-2", "pretrain.eval_every=20")


def run(folder: Path, *words: str) -> dict[str, Any]:
    """Figures by stage."""
    recipe.run(configuration.load([*TINY, *words, f"run_dir={folder}"]))
    return json.loads((folder / "summary.json").read_text())["stages"]


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"round_01/{stage}/checkpoint/model.safetensors")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to the reward model, after pretraining."""
    folder = tmp_path_factory.mktemp("run")
    for stage in ("pretrain", "sft", "compare", "reward_model"):
        run(folder, *PRETRAINED, f"stage={stage}")
    return folder


def test_pretraining_learns_the_text_and_reports_it_per_token_and_per_byte(pretrained: Path) -> None:
    found = json.loads((pretrained / "summary.json").read_text())["stages"]["pretrain"]
    records = [json.loads(line) for line in (pretrained / "round_01/pretrain/metrics.jsonl").read_text().splitlines()]
    assert found["documents"] == 120
    assert found["heldout_nats_per_token"] < 0.7 * records[0]["loss"]
    assert found["heldout_nats_per_byte"] < found["heldout_nats_per_token"]


def test_sft_starts_from_the_pretrained_weights_and_tokenizer(pretrained: Path, tmp_path: Path) -> None:
    run(tmp_path, *PRETRAINED, "stage=pretrain")
    run(tmp_path, *PRETRAINED, "stage=sft", "sft.steps=1", "sft.lr=1e-9", "sft.eval_every=1")
    before, after = weights(tmp_path, "pretrain"), weights(tmp_path, "sft")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    one, other = (tmp_path / f"round_01/{stage}/checkpoint/tokenizer.json" for stage in ("pretrain", "sft"))
    assert one.read_text() == other.read_text()


def test_sft_after_pretraining_is_not_taken_for_sft_without(pretrained: Path) -> None:
    with pytest.raises(RequestError, match=r"stage 'sft' .* was run with other settings or inputs:\n    inputs.pretrain: was"):
        run(pretrained, "stage=sft")


def test_ptx_lowers_the_loss_on_held_out_text_against_gamma_0(pretrained: Path, tmp_path: Path) -> None:
    start = (
        "stage=ppo", f"policy_checkpoint={pretrained / 'round_01/sft/checkpoint'}",
        f"reward_checkpoint={pretrained / 'round_01/reward_model/checkpoint'}", "ppo.lr=3e-3", "ppo.steps=6", "ppo.kl.budget=1e6",
    )  # fmt: skip
    plain = run(tmp_path / "plain", *start, "ppo.ptx=0")["ppo"]
    mixed = run(tmp_path / "mixed", *start, "ppo.ptx=5", "ppo.ptx_batch=4")["ppo"]
    assert mixed["pretraining_loss"] < plain["pretraining_loss"] - 0.05
    assert mixed["pretraining_loss_sft"] == plain["pretraining_loss_sft"]
