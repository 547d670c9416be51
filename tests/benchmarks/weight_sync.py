"""GB/s of weight sync, from the policy's tensors to the engine's parameters, beside a plain copy of as many bytes in memory.

    python -m tests.benchmarks.weight_sync --sizes 2m 13m 125m 350m --pairs 20
    python -m tests.benchmarks.weight_sync --sizes 125m --ranks 2 --ways shared_memory object_store gloo

The real runtime and roles: Ray, a policy under ZeRO (stage 3 with `--ranks 2`), one rollout engine, and the stage's own `WeightSync`. The
copy is torch's `copy_` in a process of its own that has nothing else to do, on as many threads as the policy rank has. One sync of each way
and one copy make a round; the table holds medians over rounds, and the 95% interval of the median ratio by resampling rounds. The models
have random weights; the policy is frozen (no optimizer state, so that 350M fits), which changes nothing of what is sent.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.models import new_causal_lm
from actors.policy import Policy
from actors.rollout import Rollout
from actors.worker import language_model
from conf.schema import Config
from conf.sizes import Scale
from orchestration import config as configuration
from orchestration.roles import PolicyGroup, Roles, RolloutGroup
from orchestration.runtime.cluster import RayRuntime
from orchestration.runtime.group import RoleRequest
from orchestration.stages.syncing import WeightSync

SHAPES = {"2m": ("tiny", 4, 168), "13m": ("tiny", 8, 320), "125m": ("125m", 12, 768), "350m": ("350m", 24, 1024)}
"""Name -> (scale, layers, width); the last two are the scales themselves."""
WAYS = ("shared_memory", "object_store", "gloo")
RESAMPLES = 2000


class FrozenPolicy(Policy):
    """The policy as far as it sends weights."""

    def load(self) -> None:
        from actors.worker import make_engine

        self.engine = make_engine(self.config, language_model(self.config, self.checkpoint), None)
        self._describe_weights()


def settings(size: str, ranks: int, way: str, folder: Path) -> Config:
    scale, layers, width = SHAPES[size]
    wanted = "collective" if way == "gloo" else way
    shape = [f"scale.layers={layers}", f"scale.width={width}"] if scale == "tiny" else []
    if scale == "tiny":
        shape += ["scale.heads=4", f"scale.feed_forward={4 * width}"]
    words = [
        f"scale={scale}", *shape, f"run_dir={folder / 'run'}", "placement=cpu", "model.dtype=fp32",
        f"placement.policy.ranks={ranks}", f"placement.weight_sync={wanted}", f"placement.policy.threads={2 // ranks}",
        f"engine.zero_stage={3 if ranks > 1 else 0}", "ray.object_store_mb=1024", "preflight=off", "lora.rank=0",
    ]  # fmt: skip
    return configuration.load(words)


def prepare(scale: Scale, folder: Path) -> str:
    new_causal_lm(scale, scale.vocabulary, 0, 0.0, 1, 0).save_pretrained(folder / "lm")
    return str(folder / "lm")


def measure(size: str, ranks: int, ways: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row for each way."""
    with tempfile.TemporaryDirectory(prefix="chatray-bench-") as name:
        folder = Path(name)
        configs = {way: settings(size, ranks, way, folder) for way in ways}
        config = configs[ways[0]]
        checkpoint = prepare(config.scale, folder)
        runtime = RayRuntime(config)
        try:
            requests = [
                RoleRequest("policy", FrozenPolicy, checkpoint, config.placement.policy),
                RoleRequest("rollout", Rollout, checkpoint, config.placement.rollout),
            ]
            groups = runtime.start(requests)
            roles = Roles(PolicyGroup(groups["policy"]), None, None, None, RolloutGroup(groups["rollout"]))  # type: ignore[arg-type]
            syncs = {way: WeightSync(runtime, of, roles) for way, of in configs.items()}
            return rows(size, ranks, syncs, rounds)
        finally:
            runtime.close()


def rows(size: str, ranks: int, syncs: dict[str, WeightSync], rounds: int) -> list[dict[str, Any]]:
    version, seconds = 0, {name: [] for name in (*syncs, "copy")}  # type: ignore[var-annotated]
    for sync in syncs.values():  # the first of each makes connections
        version += 1
        moved = sync.send(version)
    copy = plain_copy(moved, threads=2)
    copy()
    for _ in range(rounds):
        for way, sync in syncs.items():
            version += 1
            seconds[way].append(timed(lambda sync=sync, version=version: sync.send(version)))
        seconds["copy"].append(timed(copy))
    return [row(size, ranks, way, moved, np.array(seconds[way]), np.array(seconds["copy"])) for way in syncs]


def plain_copy(size: int, threads: int) -> Callable[[], object]:
    torch.set_num_threads(threads)
    here, there = torch.ones(size // 4), torch.zeros(size // 4)
    return lambda: there.copy_(here)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row(size: str, ranks: int, way: str, moved: int, seconds: np.ndarray, copying: np.ndarray) -> dict[str, Any]:
    ratio = copying / seconds  # of bandwidths, for the same bytes
    draws = np.random.default_rng(0).integers(0, len(ratio), (RESAMPLES, len(ratio)))
    low, high = np.percentile(np.median(ratio[draws], axis=1), [2.5, 97.5])
    return {
        "size": size, "ranks": ranks, "way": way, "mb": moved / 1e6, "ms": 1e3 * float(np.median(seconds)),
        "gb_per_s": moved / 1e9 / float(np.median(seconds)), "copy_gb_per_s": moved / 1e9 / float(np.median(copying)),
        "ratio": float(np.median(ratio)), "low": float(low), "high": float(high), "rounds": len(ratio),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS[:2]), choices=WAYS)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=20)
    wanted = parser.parse_args()
    print("| parameters | policy ranks | way | MB | ms | GB/s | copy, GB/s | ratio | its 95% interval |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in wanted.sizes:
        for found in measure(size, wanted.ranks, wanted.ways, wanted.pairs):
            figures = f"{found['mb']:.0f} | {found['ms']:.1f} | {found['gb_per_s']:.2f} | {found['copy_gb_per_s']:.2f}"
            interval = f"{found['low']:.3f} to {found['high']:.3f}"
            print(f"| {size} | {wanted.ranks} | {found['way']} | {figures} | {found['ratio']:.3f} | {interval} |", flush=True)
            print(json.dumps(found), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
