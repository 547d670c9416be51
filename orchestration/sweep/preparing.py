"""What all trials share, made once: the SFT model and the reward model that they start from, and the held-out judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from conf.schema import STAGES, Config
from conf.sweeps import Sweep
from orchestration import config as configuration
from orchestration import recipe
from orchestration.run_directory import ROUND

NAMED = {"sft": "policy_checkpoint", "reward_model": "reward_checkpoint"}
"""Stages whose weights may be named instead."""


def base_stages(config: Config) -> list[str]:
    """The stages that PPO starts from, in order, without those whose weights are named."""
    found: set[str] = set()

    def need(stage: str) -> None:
        for source in recipe.inputs_of(stage, config):
            if not getattr(config, NAMED.get(source, ""), None) and source not in found:
                found.add(source)
                need(source)

    need("ppo")
    return [stage for stage in STAGES if stage in found]


def judge_words(words: Sequence[str], sweep: Sweep, config: Config) -> list[str]:
    """The words of the judge's own run: the sweep's, with another seed, and what `sweep.judge.overrides` says."""
    kept = [word for word in words if word.partition("=")[0] not in ("seed", "run_dir", "stage")]
    return [*kept, *sweep.judge.overrides, f"seed={config.seed + sweep.judge.seed_offset}"]


def judge_mistakes(sweep: Sweep, config: Config) -> list[str]:
    """Why the held-out judge would be none."""
    judge = sweep.judge
    if judge.path is not None:
        here = (Path(judge.path) / "config.json").exists()
        return [] if here else [f"sweep.judge.path={judge.path}: no reward model there (it has no config.json)"]
    if config.labeler.kind == "recorded" and not judge.overrides:
        return [
            "sweep.judge: the preferences are recorded, and a judge trained on them would have seen what the reward model saw; name others "
            "with sweep.judge.overrides=['data.path=…'], or a reward model with sweep.judge.path="
        ]
    return []


def run_stages(config: Config, stages: Sequence[str]) -> None:
    """Run stages of one run directory that are not complete."""
    for stage in stages:
        recipe.run(dataclasses.replace(config, stage=stage))  # type: ignore[arg-type]  # one of STAGES


def made(folder: Path, stage: str) -> str:
    """Where a run's stage has left its result."""
    return str(folder / ROUND / stage / "checkpoint")


def base(config: Config, folder: Path) -> dict[str, str | None]:
    """Make the models that trials start from, in `folder`; returns `policy_checkpoint` and `reward_checkpoint`."""
    stages = base_stages(config)
    run_stages(configuration.with_settings(config, {"run_dir": str(folder)}), stages)
    return {setting: made(folder, stage) if stage in stages else getattr(config, setting) for stage, setting in NAMED.items()}


def judge(config: Config, folder: Path, sft: str | None, sweep: Sweep) -> str:
    """Train the held-out judge in `folder`, on comparisons of its own between answers of the same SFT model; returns where it is.

    Args:
        config: of the judge's run (`judge_words`).
        sft: the SFT model of the trials.
    """
    if sweep.judge.path is not None:
        return str(Path(sweep.judge.path).resolve())
    own = configuration.with_settings(config, {"run_dir": str(folder), "policy_checkpoint": sft, "reward_checkpoint": None})
    stages = ["compare", "reward_model"] if "compare" in recipe.inputs_of("reward_model", own) else ["reward_model"]
    run_stages(own, stages)
    return made(folder, "reward_model")
