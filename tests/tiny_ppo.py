"""A tiny policy and reward model, and stage `ppo` run on them in this process: seconds a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from actors.models import ScalarModel, load_causal_lm, new_causal_lm, save_model
from orchestration import config as configuration
from orchestration.data.chat import Chat, learn_tokenizer
from orchestration.data.source import open_source
from orchestration.data.world import scenarios
from orchestration.metrics import Metrics
from orchestration.roles import connect
from orchestration.run_directory import RunDirectory, read_records
from orchestration.stages import evaluate, ppo
from orchestration.stages.context import Shared, StageContext


def prepared(folder: Path) -> Path:
    """Folders `lm` and `rm` to start from."""
    config = configuration.load(["experiment=smoke", f"run_dir={folder}"])
    chat = Chat(learn_tokenizer(scenarios.demonstrations(200, 0, config.data.flaws), config.scale.vocabulary))  # type: ignore[union-attr]
    new_causal_lm(config.scale, len(chat.tokenizer), 0, 0.0, chat.end, chat.pad).save_pretrained(folder / "lm")
    chat.save(folder / "lm")
    (folder / "rm").mkdir()
    reward = ScalarModel(load_causal_lm(str(folder / "lm")).base_model, seed=1)  # type: ignore[arg-type]
    save_model(reward, reward.state_dict(), folder / "rm")
    return folder


def context(start: Path, folder: Path, *words: str, own_reward_model: bool = False) -> StageContext:
    """Stage `ppo` of a run in `folder`.

    Args:
        own_reward_model: the run has trained it, by its own account.
    """
    weights = [f"policy_checkpoint={start / 'lm'}", *([] if own_reward_model else [f"reward_checkpoint={start / 'rm'}"])]
    common = ["experiment=smoke", "runtime=local", "stage=ppo", "data.demonstrations=64", "data.prompts=64", "logging.progress=false"]
    config = configuration.load([*common, f"run_dir={folder}", *weights, *words])
    run = RunDirectory(folder, 1)
    if own_reward_model:
        run.stage("reward_model").export(lambda to: shutil.copytree(start / "rm", to, dirs_exist_ok=True))
        run.complete("reward_model", {}, {"demonstrations_up_to": 64})
    return StageContext("ppo", config, run, Metrics(config), Shared(config, open_source(config), connect, evaluate.exact_grades(config)))


def run(given: StageContext) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, torch.Tensor]]:
    """(result, rows without the times, exported weights)."""
    result = ppo.run(given)
    return result, rows(given), load_file(given.directory.checkpoint / "model.safetensors")


def rows(given: StageContext) -> list[dict[str, Any]]:
    """Every step's row of metrics.jsonl, without the times."""
    records = read_records(given.directory.metrics)
    return [{k: v for k, v in record.items() if "seconds" not in k and "per_second" not in k} for record in records]
