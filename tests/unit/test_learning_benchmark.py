"""The parts of the learning benchmarks that decide: random rewards, intervals, verdicts, and what is run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestration import config as configuration
from tests.benchmarks import learning, overoptimisation, ptx, runs

CONTEXTS = [[{"role": "user", "content": f"my number is {n}"}] for n in range(4000)]


def test_a_random_reward_is_standard_normal_and_keyed_by_seed_conversation_and_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    found = np.array(learning.random_reward(CONTEXTS, ["noted."] * 4000))
    assert abs(found.mean()) < 0.05
    assert abs(found.std() - 1) < 0.05
    assert learning.random_reward(CONTEXTS[7:8], ["noted."]) == [found[7]]
    assert learning.random_reward(CONTEXTS[7:8], ["noted"]) != [found[7]]
    monkeypatch.setenv(learning.SEED, "1")
    assert learning.random_reward(CONTEXTS[7:8], ["noted."]) != [found[7]]


def test_the_interval_widens_with_what_seeds_and_prompts_disagree_on() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((3, 400))
    mean, low, high = runs.interval(noise)
    assert mean == pytest.approx(noise.mean())
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * noise.std() / np.sqrt(1200), rel=0.6)
    _, apart_low, apart_high = runs.interval(noise + np.array([[-1.0], [0.0], [1.0]]))
    assert apart_high - apart_low > 5 * (high - low)
    _, same_low, same_high = runs.interval(noise[:1].repeat(3, axis=0))  # three runs of the same replies are one
    assert same_high - same_low == pytest.approx(2 * 1.96 * noise[0].std() / 20, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "low", "high", "wanted"),
    [
        ("true", 0.01, 0.2, True), ("true", -0.01, 0.2, False), ("flipped", -0.2, -0.01, True), ("flipped", 0.1, 0.2, False),
        ("random", -0.04, 0.04, True), ("random", -0.06, 0.04, False), ("random", -0.04, 0.06, False),
    ],
)  # fmt: skip
def test_what_passes(kind: str, low: float, high: float, wanted: bool) -> None:
    assert learning.passes(kind, low, high) is wanted


def write(out: Path, task: runs.Task, said: str) -> dict[str, Any]:
    if task["seed"] == 2 and not (out / "mended").exists():
        raise ValueError("not yet")
    return {"said": said}


def test_finished_runs_are_not_made_again_and_failed_ones_are(tmp_path: Path) -> None:
    tasks = [{"arm": "a", "seed": seed} for seed in (0, 1, 2)]
    with pytest.raises(SystemExit, match="1 runs failed"):
        runs.work(tmp_path, tasks, write, 1, "first")
    (tmp_path / "mended").touch()
    lines = runs.work(tmp_path, tasks, write, 1, "second")
    assert [(line["seed"], line["said"]) for line in lines] == [(0, "first"), (1, "first"), (2, "second")]


def settings_of(*words: Sequence[str]) -> list[str]:
    return ["experiment=quickstart", "stage=ppo", *runs.ONE_THREAD, *(word for part in words for word in part)]


LEARNING = {
    f"learning {arm} {kind}": (learning.SETTINGS, settings, rewards)
    for arm, settings in learning.ARMS.items()
    for kind, rewards in learning.KINDS.items()
}
COMMANDS = LEARNING | {
    **{f"overoptimisation {arm}": (overoptimisation.SETTINGS, words) for arm, words in overoptimisation.ARMS.items()},
    **{f"ptx {weight:g}": (ptx.SETTINGS, [f"ppo.ptx={weight}"]) for weight in ptx.WEIGHTS},
}
STARTS = {"overoptimisation": overoptimisation.WEAK, "ptx": ptx.START}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_can_be_met_and_sample_as_many_replies(name: str, tmp_path: Path) -> None:
    config = configuration.load(settings_of(*COMMANDS[name]), tmp_path)
    assert (config.ppo.batch, config.ppo.minibatches, config.ppo.kl.controller) == (256 if name.startswith("learning") else 128, 4, "fixed")


@pytest.mark.parametrize("name", STARTS)
def test_what_they_start_from_can_be_made(name: str, tmp_path: Path) -> None:
    wanted = dict(word.split("=", 1) for word in STARTS[name])
    config = configuration.load(["experiment=quickstart", *STARTS[name]], tmp_path)
    usual = configuration.load(["experiment=quickstart"], tmp_path)
    changed = {"overoptimisation": lambda c: c.compare.prompts, "ptx": lambda c: c.pretrain.steps}[name]
    assert wanted and changed(config) != changed(usual)
