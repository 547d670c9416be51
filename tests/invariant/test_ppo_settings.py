"""No setting of PPO that changes nothing: flip each one, run three steps, and see a figure or a weight change."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.batch import Prompts, Rollouts
from actors.rollout import Rollout
from actors.sampling import Sampling
from conf.ppo import PPO
from orchestration import config as configuration
from orchestration.runtime.local import LocalRuntime
from tests import tiny_ppo

REWARDS = "[{kind: model}, {kind: function, function: 'tests.fakes:brief', weight: 0.1}]"
BASE = {
    "steps": 3, "batch": 8, "staleness": 0, "advantage": "gae", "samples_per_prompt": 1, "minibatches": 2,
    "epochs": 1, "lr": 1e-2, "critic_lr": 1e-2, "warmup": 0,
    "kl.controller": "adaptive", "kl.beta": 0.1, "kl.target": 0.01, "kl.horizon": 100.0, "kl.budget": 1e6,
    "dual_clip": "null", "entropy": 0.0, "old_logprobs": "behaviour", "engine_gap_limit": 0.01, "importance_cap": "null",
    "guard.action": "stop", "guard.beta_factor": 2.0, "guard.lr_factor": 0.5, "guard.times": 1, "judge.every": 0, "judge.prompts": 4,
    "gamma": 1.0, "lam": 0.95, "clip": 0.2, "value_clip": 0.2, "whiten": True, "rewards": "[]", "reward_normalise": "none",
    "reward_clip": 10.0, "missing_end_penalty": 1.0,
    "temperature": 1.0, "max_new_tokens": 8, "ptx": 0.5, "ptx_batch": 4, "weight_decay": 0.0, "adam_epsilon": 1e-5, "max_grad_norm": 1.0,
}  # fmt: skip
FLIPPED = {
    "steps": 2, "batch": 4, "staleness": 1, "advantage": "reinforce", "samples_per_prompt": 2, "minibatches": 1,
    "epochs": 2, "lr": 1e-3, "critic_lr": 1e-3, "warmup": 3,
    "kl.controller": "fixed", "kl.beta": 0.5, "kl.target": 100.0, "kl.horizon": 1000.0, "kl.budget": 1e-9,
    "dual_clip": 1.21, "entropy": 0.1, "old_logprobs": "trainer", "engine_gap_limit": 1e-12, "importance_cap": 0.5,
    "guard.action": "rollback", "guard.beta_factor": 4.0, "guard.lr_factor": 0.1, "guard.times": 2, "judge.every": 2, "judge.prompts": 2,
    "gamma": 0.5, "lam": 0.1, "clip": 1e-3, "value_clip": 1e-3, "whiten": False, "rewards": REWARDS, "reward_normalise": "running",
    "reward_clip": 1e-3, "missing_end_penalty": 0.0,
    "temperature": 0.5, "max_new_tokens": 4, "ptx": 0.0, "ptx_batch": 2, "weight_decay": 0.5, "adam_epsilon": 1e-2, "max_grad_norm": 1e-3,
}  # fmt: skip

RUNAWAY = {"kl.budget": 1e-3, "guard.action": "rollback"}
ALONG = {"guard.action": {"kl.budget": 1e-3}, "judge.prompts": {"judge.every": 1}, "staleness": {"importance_cap": 2.0}} | {
    f"guard.{name}": RUNAWAY for name in ("beta_factor", "lr_factor", "times")
}
"""What a setting needs beside it to count: the guard a KL above the budget, the judge's prompts a judge, stale samples a correction."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy and reward model to start from."""
    return tiny_ppo.prepared(tmp_path_factory.mktemp("start"))


Outcome = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def outcome(start: Path, folder: Path, changed: dict[str, Any], *more: str) -> Outcome:
    """Figures of every step but the times and the checks (of which a run that goes on makes more), and the weights at the end."""
    words = [f"ppo.{name}={value}" for name, value in (BASE | changed).items()]
    _, figures, weights = tiny_ppo.run(tiny_ppo.context(start, folder, *words, *more))
    return [{name: value for name, value in row.items() if name != "checks"} for row in figures], weights


@pytest.fixture(scope="module")
def unchanged(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome(start, tmp_path_factory.mktemp("base"), {})


def test_every_leaf_of_the_ppo_section_is_flipped() -> None:
    unseen = {"waves"}  # changes no result: test_waves.py
    assert set(BASE) == set(FLIPPED) == set(configuration.leaves(PPO)) - unseen


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


WITHOUT_CRITIC = {
    "rloo": {"advantage": "rloo", "samples_per_prompt": 2},
    "grpo": {"advantage": "grpo", "samples_per_prompt": 4},
    "reinforce": {"advantage": "reinforce"},
}


@pytest.mark.parametrize("advantage", WITHOUT_CRITIC)
def test_without_a_critic_none_is_started_saved_or_loaded_and_a_resumed_run_ends_bit_by_bit_alike(
    advantage: str, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    begin = LocalRuntime.start
    monkeypatch.setattr(LocalRuntime, "start", lambda self, requests: asked.append([r.name for r in requests]) or begin(self, requests))
    whole = outcome(start, tmp_path, WITHOUT_CRITIC[advantage], "commit.every=2")
    assert asked == [["policy", "reference", "reward", "rollout"]]
    state = next((tmp_path / "round_01/ppo/state").iterdir())
    assert [folder.name for folder in state.iterdir() if folder.is_dir()] == ["policy"]
    assert not any("critic" in name or "value" in name or "variance" in name for name in whole[0][0])
    assert all(record["policy_grad_norm"] > 0 for record in whole[0])
    again = outcome(start, tmp_path, WITHOUT_CRITIC[advantage], "commit.every=2")  # goes on from the commit of step 2
    assert [record["step"] for record in again[0]] == [1, 2, 3]
    assert same(whole, again)


def test_each_kind_of_advantage_learns_something_else(start: Path, unchanged: tuple, tmp_path: Path) -> None:
    four = {"samples_per_prompt": 4}
    found = [outcome(start, tmp_path / name, more | four)[1] for name, more in ({"gae": {"advantage": "gae"}} | WITHOUT_CRITIC).items()]
    for n, one in enumerate(found):
        for other in found[n + 1 :]:
            assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_samples_of_a_prompt_differ_and_come_next_to_each_other(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Rollouts] = []
    sample = Rollout.generate

    def generate(self: Rollout, pieces: list[Prompts], coming: list[Prompts], sampling: Sampling, first: bool) -> list[Rollouts]:
        found = sample(self, pieces, coming, sampling, first)
        seen.extend(found)
        return found

    monkeypatch.setattr(Rollout, "generate", generate)
    outcome(start, tmp_path, {"steps": 1, "batch": 8, **WITHOUT_CRITIC["grpo"]})
    step = Rollouts.join(seen).select(slice(0, 8))
    assert step.keys[:, 1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert len(step.keys[:4, 0].unique()) == len(step.keys[4:, 0].unique()) == 1
    assert step.keys[0, 0] != step.keys[4, 0]
    prompt = int(step.mask[0].nonzero()[0])
    assert torch.equal(step.tokens[0, :prompt], step.tokens[1, :prompt])
    assert len({tuple(row) for row in step.tokens[:4].tolist()}) == 4
