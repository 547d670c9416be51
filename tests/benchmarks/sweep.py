"""A sweep over `ppo.lr`, `ppo.kl.beta` and `ppo.epochs` on the embedded world, killed in the middle; its winner beside the defaults.

    python -m tests.benchmarks.sweep --out runs/bench-sweep
    python -m tests.benchmarks.sweep --out runs/bench-sweep --summary

1. The default settings (`BASE`, a shorter quickstart) run once, whole. `BUDGET` of the KL that they end at, on held-out prompts, is the
   sweep's budget: a winner must do better at no more KL.
2. The sweep starts from that run's SFT model and reward model, and makes a judge of its own. It is killed (SIGKILL) once `KILLED_AFTER`
   trials have ended and another is under way, and continued by the same command. That no finished trial was touched again is checked.
3. Winner and default run again from the same two models on `SEEDS`: other prompts, other samples. What is compared is the exact grade of
   their replies to the held-out prompts of each seed, which neither the trials nor their choice have seen, and the KL of those replies.

It goes on where it was stopped. Nothing is chosen after step 3.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from orchestration.sweep import records
from tests.benchmarks import runs

BASE = [
    "experiment=quickstart", *runs.ONE_THREAD, "sft.steps=500", "compare.prompts=800", "compare.heldout_prompts=200", "ppo.steps=28",
    "ppo.batch=128", "ppo.minibatches=4", "ppo.warmup=5", "evaluate.prompts=384", "commit.every=50",
]  # fmt: skip
JUDGED = ["ppo.judge.every=7", "ppo.judge.prompts=256"]
SWEEP = ["sweep=ppo_optuna", "sweep.trials=24", "sweep.startup=5", "sweep.concurrency=2", "sweep.every=7", "sweep.prompts=256",
         "sweep.objective.penalty=2",
         "sweep.space.ppo.lr={loguniform: [1e-4, 2e-3]}",
         "sweep.space.ppo.kl.beta={loguniform: [0.05, 2.0]}"]  # fmt: skip
BUDGET = 0.9
"""Of the KL that the default settings end at: a run on another seed ends at another KL."""
KILLED_AFTER = 3
SEEDS = (401, 402, 403)
AT_ONCE = 2
FIGURES = ("gold_sft", "gold_ppo", "kl", "rm_score_ppo", "reply_tokens_ppo")


def default(out: Path) -> Path:
    """The default settings' whole run."""
    folder = out / "default"
    runs.chatray([*BASE, *JUDGED, f"run_dir={folder.resolve()}"], out / "logs" / "default.log")
    return folder


def start(folder: Path) -> list[str]:
    """Words for the models that all else starts from."""
    return [f"policy_checkpoint={runs.checkpoint(folder, 'sft')}", f"reward_checkpoint={runs.checkpoint(folder, 'reward_model')}"]


def budget(folder: Path) -> float:
    """In nats, from the KL at the end of the default run, on held-out prompts."""
    return BUDGET * float(runs.result_of(folder, "ppo")["curve"][-1]["kl"])


def ended(folder: Path) -> dict[str, int]:
    """Trials that came to an end, and when their runs were last written."""
    found = [each for each in records.trials(folder) if each.status in records.ENDED]
    return {each.name: (each.folder / "manifest.json").stat().st_mtime_ns for each in found}


def sweep(out: Path, base: Path) -> Path:
    """The sweep, killed in the middle and continued."""
    folder, note = out / "sweep", out / "killed.json"
    words = ["sweep", *BASE, *start(base), f"run_dir={folder.resolve()}", *SWEEP, f"sweep.objective.kl_budget={budget(base)}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(runs.ROOT), os.environ.get("PYTHONPATH", "")])}
    command, log = [sys.executable, "-m", "orchestration.cli", *words], out / "logs" / "sweep.log"
    if not note.exists():
        with open(log, "a", encoding="utf-8") as file:
            process = subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None and not _under_way(folder):
                    time.sleep(1)
                if process.poll() is not None:
                    raise RuntimeError(f"the sweep ended before it was killed: see {log}")
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
        running = [each for each in records.trials(folder) if each.status not in records.ENDED]
        note.write_text(
            json.dumps({"ended": ended(folder), "under_way": {each.name: each.points()[-1].step for each in running if each.points()}})
        )
    with open(log, "a", encoding="utf-8") as file:
        subprocess.run(command, cwd=runs.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True)
    before, after = json.loads(note.read_text())["ended"], ended(folder)
    assert all(after[name] == written for name, written in before.items()), "a finished trial was run again"
    return folder


def _under_way(folder: Path) -> bool:
    found = records.trials(folder)
    done = sum(each.status in records.ENDED for each in found)
    return done >= KILLED_AFTER and any(each.status not in records.ENDED and len(each.points()) >= 2 for each in found)


def again(out: Path, base: Path, arm: str, words: list[str], seed: int) -> dict[str, Any]:
    """One run of PPO on a new seed, and its evaluation."""
    folder = out / "again" / f"{arm}-seed{seed}"
    for stage in ("ppo", "evaluate"):
        given = [*words, *start(base), f"seed={seed}", f"stage={stage}", f"run_dir={folder.resolve()}"]
        runs.chatray(given, out / "logs" / f"{arm}-{seed}-{stage}.log")
    found = runs.result_of(folder, "evaluate")
    stopped = runs.result_of(folder, "ppo")["stopped_by"]
    return {name: found[name] for name in FIGURES} | {"stopped_by": stopped}


def summary(out: Path) -> str:
    lines = runs.read(out)
    lines.sort(key=lambda line: (line["seed"], line["arm"]))
    rows = [[line["seed"], line["arm"], *(line[name] for name in FIGURES)] for line in lines]
    for arm in ("default", "winner"):
        if found := [line for line in lines if line["arm"] == arm]:
            rows.append(["mean", arm, *(sum(line[name] for line in found) / len(found) for name in FIGURES)])
    killed = json.loads((out / "killed.json").read_text())
    told = f"killed when {', '.join(killed['ended'])} had ended and {killed['under_way']} was under way; continued, none of those run again"
    titles = ["seed", "settings", "exact grade, SFT", "exact grade, PPO", "KL", "reward model's score", "reply tokens"]
    best = (out / "sweep" / "best.yaml").read_text(encoding="utf-8")
    return f"{told}\n\n{best}\n{runs.markdown(titles, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-sweep"))
    parser.add_argument("--summary", action="store_true", help="print what there is, run nothing")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    if not given.summary:
        base = default(out)
        folder = sweep(out, base)
        winner = [word for word in yaml.safe_load((folder / "best.yaml").read_text(encoding="utf-8")) if not word.startswith("seed=")]
        known = {(line["arm"], line["seed"]) for line in runs.read(out)}
        wanted = [
            (arm, words, seed) for seed in SEEDS for arm, words in (("default", BASE), ("winner", winner)) if (arm, seed) not in known
        ]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            going = {pool.submit(again, out, base, arm, words, seed): {"arm": arm, "seed": seed} for arm, words, seed in wanted}
            for done in as_completed(going):
                with open(out / "results.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(going[done] | done.result()) + "\n")
    print(summary(out))


if __name__ == "__main__":
    main()
