"""No setting of PPO that changes nothing: flip each one, run three steps, and see a figure or a weight change."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.ppo import PPO
from orchestration import config as configuration
from tests import tiny_ppo

BASE = {
    "steps": 3, "batch": 8, "minibatches": 2, "epochs": 1, "lr": 1e-2, "critic_lr": 1e-2, "warmup": 0,
    "kl.controller": "adaptive", "kl.beta": 0.1, "kl.target": 0.01, "kl.horizon": 100.0, "kl.budget": 1e6,
    "guard.action": "stop", "guard.beta_factor": 2.0, "guard.lr_factor": 0.5, "guard.times": 1, "judge.every": 0, "judge.prompts": 4,
    "gamma": 1.0, "lam": 0.95, "clip": 0.2, "value_clip": 0.2, "whiten": True, "reward_clip": 10.0, "missing_end_penalty": 1.0,
    "temperature": 1.0, "max_new_tokens": 8, "ptx": 0.5, "ptx_batch": 4, "weight_decay": 0.0, "adam_epsilon": 1e-5, "max_grad_norm": 1.0,
}  # fmt: skip
FLIPPED = {
    "steps": 2, "batch": 4, "minibatches": 1, "epochs": 2, "lr": 1e-3, "critic_lr": 1e-3, "warmup": 3,
    "kl.controller": "fixed", "kl.beta": 0.5, "kl.target": 100.0, "kl.horizon": 1000.0, "kl.budget": 1e-9,
    "guard.action": "rollback", "guard.beta_factor": 4.0, "guard.lr_factor": 0.1, "guard.times": 2, "judge.every": 2, "judge.prompts": 2,
    "gamma": 0.5, "lam": 0.1, "clip": 1e-3, "value_clip": 1e-3, "whiten": False, "reward_clip": 1e-3, "missing_end_penalty": 0.0,
    "temperature": 0.5, "max_new_tokens": 4, "ptx": 0.0, "ptx_batch": 2, "weight_decay": 0.5, "adam_epsilon": 1e-2, "max_grad_norm": 1e-3,
}  # fmt: skip

RUNAWAY = {"kl.budget": 1e-3, "guard.action": "rollback"}
ALONG = {"guard.action": {"kl.budget": 1e-3}, "judge.prompts": {"judge.every": 1}} | {
    f"guard.{name}": RUNAWAY for name in ("beta_factor", "lr_factor", "times")
}
"""What a setting needs beside it to count: the guard a KL above the budget, the judge's prompts a judge."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy and reward model to start from."""
    return tiny_ppo.prepared(tmp_path_factory.mktemp("start"))


def outcome(start: Path, folder: Path, changed: dict[str, Any]) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Figures of every step but the times, and the weights at the end."""
    words = [f"ppo.{name}={value}" for name, value in (BASE | changed).items()]
    _, figures, weights = tiny_ppo.run(tiny_ppo.context(start, folder, *words))
    return figures, weights


@pytest.fixture(scope="module")
def unchanged(start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    return outcome(start, tmp_path_factory.mktemp("base"), {})


def test_every_leaf_of_the_ppo_section_is_flipped() -> None:
    assert set(BASE) == set(FLIPPED) == set(configuration.leaves(PPO))


def same(one: tuple, other: tuple) -> bool:
    figures = all(a == b for a, b in itertools.zip_longest(one[0], other[0]))
    return figures and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_the_same_settings_give_the_same_result_bit_by_bit(start: Path, unchanged: tuple, tmp_path: Path) -> None:
    assert same(unchanged, outcome(start, tmp_path, {}))


@pytest.mark.parametrize("name", FLIPPED)
def test_flipping_changes_a_figure_or_a_weight(name: str, start: Path, unchanged: tuple, tmp_path: Path) -> None:
    along = ALONG.get(name, {})
    before = outcome(start, tmp_path / "before", along) if along else unchanged
    assert not same(before, outcome(start, tmp_path / "after", along | {name: FLIPPED[name]}))
