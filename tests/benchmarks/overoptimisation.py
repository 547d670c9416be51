"""What the KL penalty is for: PPO with beta 0, the quickstart's 0.1, one half and twice of it, from one SFT checkpoint and one reward
model.

    python -m tests.benchmarks.overoptimisation --run runs/quickstart --jobs 2
    python -m tests.benchmarks.overoptimisation --run runs/quickstart --jobs 2 --weak --out runs/bench-overoptimisation-weak
    python -m tests.benchmarks.overoptimisation --summary

During PPO the judge measures the reward model's score and the exact grade on held-out prompts (`ppo.curve`); their curves against the root
of the KL (Gao et al. 2210.10760) are printed and drawn, means over the seeds. At the end the exact grade of replies to further held-out
prompts tells the betas apart: without the penalty the score is higher and the grade lower.

The reward model is the run's own. With `--weak` it is one that has learned from the comparisons of `COMPARISONS` prompts, an eighth of the
quickstart's, and is fooled sooner: it takes a stronger penalty to hold the policy, so there is an arm with one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.curve import svg
from tests.benchmarks import runs

COMPARISONS, PROMPTS, SEEDS, WORLD = 400, 512, (0, 1, 2), 78
WEAK = [f"compare.prompts={COMPARISONS}", "compare.heldout_prompts=100", "reward_model.eval_every=10"]
SETTINGS = [
    "ppo.steps=36", "ppo.batch=128", "ppo.minibatches=4", "ppo.warmup=3", "ppo.lr=5.0e-4", "ppo.kl.controller=fixed",
    "ppo.guard.action=off", "ppo.judge.every=4", "ppo.judge.prompts=256",
]  # fmt: skip
"""The leash alone differs: a fixed beta, and no guard that would end the run."""
FREE = "beta 0"
ARMS = {name: [f"ppo.kl.beta={name.split()[1]}"] for name in (FREE, "beta 0.05", "beta 0.1", "beta 0.2", "beta 0.5")}
STRONG = "beta 0.5"
"""Only against the weak reward model."""


def one(out: Path, task: runs.Task, run: Path) -> dict[str, Any]:
    """PPO; its curve, and a file with the grades of what it made."""
    began, name = time.perf_counter(), f"{task['arm'].replace(' ', '-')}-seed{task['seed']}"
    folder, weak = out / "runs" / name, out / "weak"
    reward = runs.checkpoint(weak if weak.exists() else run, "reward_model")
    start = [f"policy_checkpoint={runs.checkpoint(run, 'sft')}", f"reward_checkpoint={reward}"]
    words = ["experiment=quickstart", "stage=ppo", f"run_dir={folder.resolve()}", *start, f"seed={task['seed']}", *runs.ONE_THREAD]
    runs.chatray([*words, *SETTINGS, *ARMS[task["arm"]]], out / "logs" / f"{name}.log")
    ppo, seconds = runs.result_of(folder, "ppo"), round(time.perf_counter() - began, 1)
    np.save(out / f"{name}.npy", runs.gold(runs.checkpoint(folder, "ppo"), PROMPTS, task["seed"], max_new_tokens=28, world=WORLD))
    return {"grades": f"{name}.npy", "curve": ppo["curve"], "warnings": ppo.get("warnings", {}), "seconds": seconds}


def mean_curve(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The mean of each point over the seeds."""
    curves = [line["curve"] for line in lines]
    return [{name: float(np.mean([point[name] for point in points])) for name in points[0]} for points in zip(*curves, strict=True)]


def summary(out: Path) -> str:
    lines = runs.read(out)
    found = {arm: runs.of(lines, arm=arm) for arm in ARMS if runs.of(lines, arm=arm)}
    parts = []
    for arm, own in found.items():
        curve = mean_curve(own)
        (out / f"{arm.replace(' ', '-')}.svg").write_text(svg(curve), encoding="utf-8")
        rows = [[f"{p['step']:.0f}", f"{p['sqrt_kl']:.2f}", f"{p['score']:.2f}", p["gold"], f"{p['reply_tokens']:.1f}"] for p in curve]
        warned = [f"seed {line['seed']}: {', '.join(sorted(line['warnings'])) or 'none'}" for line in own]
        told = f"{arm}, {len(own)} seeds, {np.mean([line['seconds'] for line in own]):.0f} s each; warnings: {'; '.join(warned)}"
        parts += [told, runs.markdown(["step", "root of KL", "reward model", "exact grade", "tokens"], rows)]
    parts += [
        against_free(out, arm, own, found[FREE]) for arm, own in found.items() if arm != FREE and len(own) == len(found.get(FREE, []))
    ]
    return "\n\n".join(parts)


def against_free(out: Path, arm: str, own: list[dict[str, Any]], free: list[dict[str, Any]]) -> str:
    """What a leash has changed at the end."""
    grades, without = (np.stack([np.load(out / line["grades"]) for line in lines]) for lines in (own, free))
    mean, low, high = runs.interval(grades - without)
    score = mean_curve(own)[-1]["score"] - mean_curve(free)[-1]["score"]
    return (
        f"At the end, {arm} less {FREE}: exact grade {mean:+.3f} ({low:+.3f} to {high:+.3f}, {PROMPTS} prompts), reward model {score:+.2f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run with the stage sft")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-overoptimisation"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a core each")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--weak", action="store_true", help="with a reward model of few comparisons")
    parser.add_argument("--summary", action="store_true", help="print the tables of what is finished, run nothing")
    wanted = parser.parse_args()
    if not wanted.summary:
        runs.make(wanted.run, ["sft"] if wanted.weak else ["sft", "compare", "reward_model"])
        if wanted.weak:
            sft = f"policy_checkpoint={runs.checkpoint(wanted.run, 'sft')}"
            runs.make(wanted.out / "weak", ["compare", "reward_model"], [*WEAK, sft, *runs.ONE_THREAD])
        tasks = [{"arm": arm, "seed": seed} for seed in wanted.seeds for arm in ARMS if wanted.weak or arm != STRONG]
        runs.work(wanted.out, tasks, one, wanted.jobs, wanted.run)
    print(summary(wanted.out))


if __name__ == "__main__":
    main()
