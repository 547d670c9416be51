"""CPU seconds of one iteration of PPO by phase, in one process without Ray: generation, scoring, learning; variants beside each other.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.tokens --against ../before --only natural   # beside another checkout of this repository
    python -m tests.benchmarks.tokens --variant engine.micro_tokens=1024                     # beside other settings

Each variant is a process of its own that keeps its models; they take turns, one iteration each, so that what the machine does besides
hits all alike; and it is CPU time that is counted, for the same reason. Reported are medians, and the median of each pair's ratio to
the first variant with a 90% interval of the median.

`fixed`: a random model of 3.7M parameters whose replies have all 64 tokens. `natural`: 2.0M parameters that learned to end after about
16 of 64 tokens. 64 replies, 4 epochs of 4 minibatches, prompts of 16 to 48 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "fixed": ("scale.layers=4", "scale.width=256", "scale.heads=8", "scale.feed_forward=704", "scale.vocabulary=2048"),
    "natural": ("scale.layers=4", "scale.width=192", "scale.heads=6", "scale.feed_forward=512", "scale.vocabulary=1024"),
    "quickstart": ("scale=micro",),
}
PROMPTS, LIMIT, END, MEAN = 64, 64, 1, 16
"""Replies, longest reply, the token that ends one, and the mean reply that `natural` and `quickstart` are taught."""
VARIANTS: dict[str, tuple[str, ...]] = {"as it is": ()}
"""Settings of each variant."""


def prepare(shape: str, folder: Path) -> None:
    """`lm` and `rm` below `folder`."""
    import torch

    from actors.models import ScalarModel, load_causal_lm, new_causal_lm, save_model
    from orchestration import config as configuration

    if (folder / "rm").exists():
        return
    scale = configuration.load(["experiment=smoke", *SHAPES[shape]]).scale
    lm = new_causal_lm(scale, scale.vocabulary, 0, 0.0, END, 0)
    if shape != "fixed":
        optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
        for _ in range(60):  # random tokens of which one in `MEAN` ends the reply: it learns little more than how often that is
            tokens = torch.randint(2, scale.vocabulary, (16, 96))
            tokens[torch.rand(tokens.shape) < 1 / MEAN] = END
            loss = lm(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    lm.save_pretrained(folder / "lm")
    (folder / "rm").mkdir()
    reward = ScalarModel(load_causal_lm(str(folder / "lm")).base_model, seed=1)  # type: ignore[arg-type]
    save_model(reward, reward.state_dict(), folder / "rm")


class Iteration:
    """The roles of PPO in this process, and one iteration of them."""

    def __init__(self, shape: str, folder: Path, words: list[str]) -> None:
        import torch

        from actors.critic import Critic
        from actors.policy import Policy
        from actors.reference import Reference
        from actors.reward import Reward
        from actors.rollout import Rollout
        from actors.worker import RankSpec, process_group_of_one
        from orchestration import config as configuration

        process_group_of_one()
        common = [f"ppo.batch={PROMPTS}", f"ppo.max_new_tokens={LIMIT}", "ppo.epochs=4", "ppo.minibatches=4", "model.dtype=fp32"]
        common += ["ppo.lr=1e-6", "ppo.critic_lr=1e-6", "scale.context=256", "engine.micro_batch=16"]
        self.config = configuration.load(["experiment=smoke", "runtime=local", *SHAPES[shape], *common, *words])
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(16, 49, (PROMPTS,), generator=generator)
        self.tokens = torch.randint(2, self.config.scale.vocabulary, (PROMPTS, 48), generator=generator)
        self.tokens *= torch.arange(48)[None, :] < self.lengths[:, None]
        kinds = {"policy": Policy, "critic": Critic, "reference": Reference, "reward": Reward, "rollout": Rollout}
        self.roles: dict[str, Any] = {}
        for name, kind in kinds.items():
            model = folder / ("rm" if name in ("critic", "reward") else "lm")
            self.roles[name] = kind(self.config, str(model), RankSpec(name, 0, 1, torch.get_num_threads()))
            self.roles[name].load()

    def run(self, step: int) -> dict[str, float]:
        """Seconds by phase."""
        import torch

        from actors.batch import Prompts
        from actors.sampling import Sampling
        from orchestration.runtime.dispatch import cut

        seconds: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            began = time.process_time()
            found = work()
            seconds[name] = time.process_time() - began
            return found

        keys = torch.stack([torch.arange(PROMPTS), torch.zeros(PROMPTS, dtype=torch.long)], dim=1)
        pieces = cut(Prompts(self.tokens, self.lengths, keys), 1, self.config.engine.micro_batch)
        roles = self.roles
        rollouts = timed("generate", lambda: roles["rollout"].generate(pieces, Sampling(1.0, LIMIT, 0, step)))
        reference = timed("reference", lambda: roles["reference"].logprobs(rollouts, 1.0))
        scores = timed("reward", lambda: roles["reward"].score(rollouts))
        values = timed("values", lambda: roles["critic"].values(rollouts))
        made = timed("experience", lambda: roles["policy"].experience(rollouts, scores, reference, values, 0.02))
        timed("policy", lambda: roles["policy"].update(made, [], step))
        timed("critic", lambda: roles["critic"].update(made, step))
        tokens = sum(int(piece.mask.sum()) for piece in rollouts)
        total = sum(seconds.values())
        return seconds | {"total": total, "reply_tokens": tokens / PROMPTS, "generated_per_second": tokens / seconds["generate"]}


def work(shape: str, folder: Path, words: list[str]) -> None:
    """One variant: an iteration for each line that comes in, its figures as a line that goes out."""
    iteration = Iteration(shape, folder, words)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(iteration.run(int(line))), flush=True)


def compared(shape: str, variants: dict[str, tuple[Path, tuple[str, ...]]], pairs: int) -> dict[str, list[dict[str, float]]]:
    """Figures of each variant's iterations, in the same order; the first of each is left out."""
    folder = Path(tempfile.gettempdir()) / f"chatray-tokens-{shape}"
    prepare(shape, folder)
    running = {}
    for name, (checkout, words) in variants.items():
        command = [sys.executable, __file__, "--work", shape, str(folder), *words]
        surroundings = os.environ | {"PYTHONPATH": str(checkout)}
        running[name] = subprocess.Popen(
            command, cwd=checkout, env=surroundings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for process in running.values():
        while process.stdout.readline().strip() not in ("ready", ""):  # type: ignore[union-attr]
            pass
    for step in range(pairs + 1):
        for name in list(running) if step % 2 else reversed(list(running)):
            process = running[name]
            process.stdin.write(f"{step}\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            found[name].append(json.loads(process.stdout.readline()))  # type: ignore[union-attr]
    for process in running.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
    return {name: rows[1:] for name, rows in found.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """90% interval of the median, by the binomial distribution of how many values lie below it (the normal approximation)."""
    ordered, count = sorted(values), len(values)
    reach = 1.645 * count**0.5 / 2
    return ordered[max(int(count / 2 - reach), 0)], ordered[min(int(count / 2 + reach), count - 1)]


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: medians by phase, one column for each variant, and the ratio of each to the first."""
    names = list(found)
    lines = [
        "| | " + " | ".join(names) + " | " + " | ".join(f"ratio of {name}" for name in names[1:]) + " |",
        "|---" * (2 * len(names)) + "|",
    ]
    for phase in found[names[0]][0]:
        cells = [f"{statistics.median(row[phase] for row in found[name]):.3f}" for name in names]
        for name in names[1:]:
            ratios = [row[phase] / first[phase] for row, first in zip(found[name], found[names[0]], strict=True)]
            low, high = interval(ratios)
            cells.append(f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--against", type=Path, help="another checkout, whose code is the first variant")
    parser.add_argument("--only", choices=sorted(SHAPES), action="append")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], help="settings of all variants")
    parser.add_argument("--variant", nargs="*", action="append", default=[], help="another variant of this checkout, by its settings")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work[0], Path(args.work[1]), args.work[2:])
    for shape in args.only or ["fixed", "natural"]:
        variants: dict[str, tuple[Path, tuple[str, ...]]] = {}
        if args.against:
            variants["before"] = (args.against.resolve(), tuple(args.set))
        variants |= {name: (ROOT, (*args.set, *words)) for name, words in VARIANTS.items()}
        variants |= {" ".join(words): (ROOT, (*args.set, *words)) for words in args.variant}
        print(f"\n{shape}, {args.pairs} pairs\n\n{table(compared(shape, variants, args.pairs))}", flush=True)


if __name__ == "__main__":
    main()
