"""What PPO-ptx is for: the loss on held-out pretraining text after PPO with and without `ppo.ptx`, and what it costs in exact grade.

    python -m tests.benchmarks.ptx --jobs 2
    python -m tests.benchmarks.ptx --summary

The model is pretrained on the world's own text first, then fine-tuned and given a reward model, shorter than the quickstart; all runs of
PPO start from that one checkpoint. Fine-tuning forgets text before PPO does: `start` is that model, and PPO-ptx may end below it. A seed of
PPO draws texts of its own; the held-out ones were learned from by no stage, except articles that the generator happens to write twice.

Intervals: of the loss, paired t over the seeds (a run has one loss); of the grade, bootstrap of seeds and prompts (`runs.interval`).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from tests.benchmarks import runs

MARGIN = 0.05
"""Mean grade that PPO-ptx may cost; as in `learning.py`."""
PROMPTS, SEEDS, WORLD = 512, (0, 1, 2), 79
START = ["pretrain.steps=300", "sft.steps=600", "compare.prompts=1600", "compare.heldout_prompts=200"]
SETTINGS = [
    "ppo.steps=20", "ppo.batch=128", "ppo.minibatches=4", "ppo.warmup=3", "ppo.kl.controller=fixed", "ppo.judge.every=0", "ppo.ptx_batch=4",
]  # fmt: skip
WEIGHTS = (0.0, 1.0)


def one(out: Path, task: runs.Task) -> dict[str, Any]:
    """PPO; both losses, and a file with the grades of what it made."""
    began, name, run = time.perf_counter(), f"ptx{task['ptx']:g}-seed{task['seed']}", out / "start"
    folder = out / "runs" / name
    start = [f"policy_checkpoint={runs.checkpoint(run, 'sft')}", f"reward_checkpoint={runs.checkpoint(run, 'reward_model')}"]
    words = ["experiment=quickstart", "stage=ppo", f"run_dir={folder.resolve()}", *start, f"seed={task['seed']}", *runs.ONE_THREAD]
    runs.chatray([*words, *SETTINGS, f"ppo.ptx={task['ptx']}"], out / "logs" / f"{name}.log")
    ppo, seconds = runs.result_of(folder, "ppo"), round(time.perf_counter() - began, 1)
    np.save(out / f"{name}.npy", runs.gold(runs.checkpoint(folder, "ppo"), PROMPTS, task["seed"], max_new_tokens=28, world=WORLD))
    losses = {"loss": ppo["pretraining_loss"], "loss_start": ppo["pretraining_loss_sft"]}
    return {"grades": f"{name}.npy", "kl": ppo["kl"], "seconds": seconds} | losses


def paired(differences: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95% by t."""
    mean, count = float(np.mean(differences)), len(differences)
    reach = float(stats.t.ppf(0.975, count - 1)) * float(np.std(differences, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return mean, mean - reach, mean + reach


def summary(out: Path) -> tuple[str, bool]:
    """(the table, whether PPO-ptx keeps the text at a comparable grade)."""
    lines, rows, fine = runs.read(out), [], True
    grades = {line["grades"]: np.load(out / line["grades"]) for line in lines}
    without = runs.of(lines, ptx=WEIGHTS[0])
    for weight in sorted({line["ptx"] for line in lines}):
        own = runs.of(lines, ptx=weight)
        means = [float(np.mean([line[name] for line in own])) for name in ("loss_start", "loss", "kl", "seconds")]
        row = [f"{weight:g}", *means[:2], float(np.mean([grades[line["grades"]] for line in own])), f"{means[2]:.2f}", f"{means[3]:.0f}"]
        pairs = [(a, b) for a in own for b in without if a["seed"] == b["seed"] and weight > 0]
        if pairs:
            mean, low, high = paired([a["loss"] - b["loss"] for a, b in pairs])
            gold, worst, best = runs.interval(np.stack([grades[a["grades"]] - grades[b["grades"]] for a, b in pairs]))
            fine &= high < 0 and worst > -MARGIN
            row += [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", f"{gold:+.3f} ({worst:+.3f} to {best:+.3f})"]
        rows.append([*row, *[""] * (8 - len(row))])
    titles = [
        "ppo.ptx",
        "loss at the start",
        "loss after PPO",
        "exact grade",
        "KL",
        "seconds",
        "loss less that of 0",
        "grade less that of 0",
    ]
    return runs.markdown(titles, rows), fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-ptx"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a core each")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--weights", nargs="*", type=float, default=list(WEIGHTS))
    parser.add_argument("--summary", action="store_true", help="print the table of what is finished, run nothing")
    wanted = parser.parse_args()
    if not wanted.summary:
        runs.make(wanted.out / "start", ["pretrain", "sft", "compare", "reward_model"], [*START, *runs.ONE_THREAD])
        tasks = [{"ptx": weight, "seed": seed} for seed in wanted.seeds for weight in wanted.weights]
        runs.work(wanted.out, tasks, one, wanted.jobs)
    table, fine = summary(wanted.out)
    print(table)
    raise SystemExit(0 if fine else "PPO-ptx: the loss on held-out text is not lower, or the grade falls by more than the margin")


if __name__ == "__main__":
    main()
