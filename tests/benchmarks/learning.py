"""A learning check that a wrong PPO fails: the true reward raises the exact grade, its opposite lowers it, a random one does neither.

    python -m tests.benchmarks.learning --run runs/quickstart --jobs 2      # makes what is missing, goes on where it was stopped
    python -m tests.benchmarks.learning --summary

From one SFT checkpoint and one reward model (stages sft, compare and reward_model of the quickstart, run first when they are missing) PPO
is run for each arm (ways to make advantages, samples of older weights, and adapters), kind of reward and seed. The exact grade of one
sampled reply to each of the same held-out prompts, with the same noise, is compared with the SFT model's. PPO never sees that grade; the
reward model knows of it only through a labeller's noisy ranks. A wrong sign or wrong credit fails `true` and `flipped`; what is learned
beside the reward fails `random`.

Intervals: bootstrap of seeds and prompts (`runs.interval`). Settings are the same for all arms and kinds, but for the advantages, the
adapters and adapters' learning rate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import runs

MARGIN = 0.05
"""Mean grade, of at most 1, within which a random reward must leave the model. It is the grade that one reply in twenty loses when it turns
from right to wrong, or of not quite two words per reply (0.03 each). What the true reward gives must be several times as much."""
PROMPTS, SEEDS, WORLD = 2048, (0, 1, 2), 77
SETTINGS = [
    "ppo.steps=14",
    "ppo.warmup=3",
    "ppo.kl.controller=fixed",
    "ppo.kl.beta=0.05",
    "ppo.lr=1.5e-4",
    "ppo.judge.every=0",
    "checks=strict",
]
"""Half as many steps as the quickstart, at its batch and half the policy's learning rate; a fixed beta, for the adaptive one would follow
the reward's kind. Smaller batches or larger steps let a random reward wander further (BENCHMARKS.md)."""
GROUPS = "ppo.samples_per_prompt=4"
ARMS = {
    "gae": [],
    "rloo": ["ppo.advantage=rloo", GROUPS],
    "grpo": ["ppo.advantage=grpo", GROUPS],
    "ahead": ["ppo.staleness=1", "ppo.importance_cap=2.0"],
    "lora": ["lora.rank=16", "lora.alpha=32", "lora.roles=[policy,critic]", "ppo.lr=1.0e-3", "ppo.critic_lr=1.0e-3"],
}
KINDS = {
    "true": [],
    "flipped": ["ppo.rewards=[{kind: model, weight: -1}]"],
    "random": ["ppo.rewards=[{kind: function, function: 'tests.benchmarks.learning:random_reward'}]"],
}
EXPECTED = {"true": "raised: low > 0", "flipped": "lowered: high < 0", "random": f"within ±{MARGIN}"}
SEED = "CHATRAY_RANDOM_REWARD_SEED"


def random_reward(conversations: Sequence[Sequence[dict[str, str]]], replies: Sequence[str]) -> list[float]:
    """A standard normal number for each reply in its conversation, the same whenever they are the same, and unlike any other reply's."""
    seed = os.environ.get(SEED, "0")
    keys = [json.dumps([seed, list(messages), reply]).encode() for messages, reply in zip(conversations, replies, strict=True)]
    return [float(np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:16])).standard_normal()) for key in keys]


def words_of(task: runs.Task, run: Path, folder: Path) -> list[str]:
    """The command of one run of PPO."""
    rewarded = [] if task["kind"] == "random" else [f"reward_checkpoint={runs.checkpoint(run, 'reward_model')}"]
    start = ["experiment=quickstart", "stage=ppo", f"run_dir={folder.resolve()}", f"policy_checkpoint={runs.checkpoint(run, 'sft')}"]
    return [*start, *rewarded, f"seed={task['seed']}", *runs.ONE_THREAD, *SETTINGS, *ARMS[task["arm"]], *KINDS[task["kind"]]]


def measured(out: Path, folder: str, name: str, seed: int) -> Path:
    """A file with the grade of a model's reply to each prompt."""
    file = out / "grades" / f"{name}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, runs.gold(folder, PROMPTS, seed, max_new_tokens=28, world=WORLD))
    return file


def one(out: Path, task: runs.Task, run: Path) -> dict[str, Any]:
    """PPO, then the grades of what it made; for kind `start` the grades of the SFT model."""
    began, name = time.perf_counter(), f"{task['arm']}-{task['kind']}-seed{task['seed']}"
    if task["kind"] == "start":
        return {"grades": measured(out, runs.checkpoint(run, "sft"), name, task["seed"]).name}
    folder = out / "runs" / name
    runs.chatray(words_of(task, run, folder), out / "logs" / f"{name}.log", {SEED: str(task["seed"])})
    ppo = runs.result_of(folder, "ppo")
    seconds = round(time.perf_counter() - began, 1)
    found = measured(out, runs.checkpoint(folder, "ppo"), name, task["seed"])
    figures = {"kl": round(ppo["kl"], 3), "score": round(ppo["score"], 3), "stopped_by": ppo["stopped_by"]}
    return {"grades": found.name, "seconds": seconds, "warnings": sorted(ppo.get("warnings", {}))} | figures


def passes(kind: str, low: float, high: float) -> bool:
    return {"true": low > 0, "flipped": high < 0, "random": low > -MARGIN and high < MARGIN}[kind]


def summary(out: Path) -> tuple[str, bool]:
    """(the table, whether everything that was run passes)."""
    lines, rows, fine = runs.read(out), [], True
    grades = {line["grades"]: np.load(out / "grades" / line["grades"]) for line in lines}
    start = {line["seed"]: grades[line["grades"]] for line in runs.of(lines, kind="start")}
    for arm in ARMS:
        for kind in KINDS:
            found = runs.of(lines, arm=arm, kind=kind)
            if not found:
                continue
            differences = np.stack([grades[line["grades"]] - start[line["seed"]] for line in found])
            mean, low, high = runs.interval(differences)
            verdict = passes(kind, low, high)
            fine &= verdict
            by_seed = ", ".join(f"{value:+.3f}" for value in differences.mean(axis=1))
            kl, seconds = (float(np.mean([line[name] for line in found])) for name in ("kl", "seconds"))
            row = [arm, kind, f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", by_seed, f"{kl:.2f}", f"{seconds:.0f}"]
            rows.append([*row, EXPECTED[kind], "pass" if verdict else "**fail**"])
    titles = ["arm", "reward", "grade − SFT's", "95% interval", "by seed", "KL", "seconds", "expected", ""]
    starting = ", ".join(f"{values.mean():.3f}" for values in start.values())
    return f"SFT: {starting} with the noise of each seed; {PROMPTS} prompts.\n\n{runs.markdown(titles, rows)}", fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run with the stages sft and reward_model")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-learning"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a core each")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--summary", action="store_true", help="print the table of what is finished, run nothing")
    wanted = parser.parse_args()
    if not wanted.summary:
        runs.make(wanted.run, ["sft", "compare", "reward_model"])
        tasks = [{"arm": "sft", "kind": "start", "seed": seed} for seed in wanted.seeds]
        tasks += [{"arm": a, "kind": k, "seed": s} for s in wanted.seeds for a in wanted.arms for k in wanted.kinds]
        runs.work(wanted.out, tasks, one, wanted.jobs, wanted.run)
    table, fine = summary(wanted.out)
    print(table)
    raise SystemExit(0 if fine else "PPO does not learn what it is told: see the rows that fail")


if __name__ == "__main__":
    main()
