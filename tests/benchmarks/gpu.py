"""`make bench-gpu`: one PPO iteration at 125m to 6.7b parameters on one GPU, beside TRL and a bare loop where they fit.

With it the share of the GPU's arithmetic that learning reaches (MFU) and the share of its memory bandwidth that decoding reaches.

    python -m tests.benchmarks.gpu --sizes 125m 1.3b --pairs 20

Shapes of the GPT-3 ladder with random weights, fixed-length replies, bf16, all roles on the one device in turns. From 2.7b on the reward
model and the critic are of 350m, as in DeepSpeed-Chat's runs, and at 6.7b the policy learns by adapters: its optimizer states would be
more than the device holds. Results are kept in runs/bench-gpu and written to BENCHMARKS.md.

Both shares count the least work that the iteration needs, so that they can only be too low: for MFU a forward pass and twice its arithmetic
backward (once where only adapters learn), no recomputing; for bandwidth the weights once for each token of the longest reply and keys and
values once for each token, over the whole time of the rollout, prompts included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from conf.schema import Config
from orchestration import config as configuration
from orchestration.planner.shapes import Shape, language_model, scalar_model
from tests.benchmarks import paired, report
from tests.benchmarks.step_time import pairs, tables
from tests.benchmarks.step_time.settings import SETTINGS, Setting, words

BF16 = 2
PEAKS = {"H200": (989e12, 4800e9), "H100 PCIe": (756e12, 2000e9), "H100": (989e12, 3350e9), "A100": (312e12, 2039e9)}
"""Part of a GPU's name -> (dense bf16 FLOP/s, bytes/s of its memory), as their makers state them; the first that is in the name counts."""
ARMS = ("theirs-bf16", "ours-bf16", "bare-bf16")
ALONE = {"2.7b": ("ours-bf16",), "6.7b": ("ours-bf16",)}
"""Sizes that TRL's four whole models in fp32 with one optimizer do not fit the device at."""


def sizes() -> dict[str, Setting]:
    """The rungs of the ladder, as settings of `step_time`."""
    base = replace(
        SETTINGS["fixed"], prompts=64, prompt_tokens=256, limit=256, epochs=1, minibatches=4, micro_batch=8, device="cuda",
        placement=("placement=one_gpu", "placement.sleep=true", "engine.zero_stage=1"), lr=1e-6,
    )  # fmt: skip
    small = {"reward_scale": "350m"}
    adapters = ("lora.rank=16", "lora.roles=[policy]", "engine.rollout_batch=32")
    return {
        "125m": replace(base, name="125m", scale=("scale=125m",)),
        "350m": replace(base, name="350m", scale=("scale=350m",)),
        "1.3b": replace(base, name="1.3b", scale=("scale=1.3b",)),
        "2.7b": replace(base, name="2.7b", scale=("scale=2.7b",), **small),
        "6.7b": replace(base, name="6.7b", scale=("scale=6.7b",), **small, micro_batch=2, placement=(*base.placement, *adapters)),
    }


@dataclass(frozen=True)
class Device:
    """A GPU, by its maker's figures."""

    name: str
    flops: float
    bandwidth: float


def device() -> Device:
    """The GPU of this machine.

    Raises:
        SystemExit: there is none, or nothing is known of it.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch sees no GPU here; run it on a machine with one, with a CUDA build of torch, or take make bench")
    return known(torch.cuda.get_device_name(0))


def known(name: str) -> Device:
    """Its figures.

    Raises:
        SystemExit: it is not in `PEAKS`.
    """
    for part, (flops, bandwidth) in PEAKS.items():
        if all(word in name for word in part.split()):
            return Device(name, flops, bandwidth)
    raise SystemExit(f"bench-gpu: nothing is known of a {name}; add its bf16 FLOP/s and bandwidth to PEAKS in tests/benchmarks/gpu.py")


def learning_flops(config: Config, tokens: float, length: float) -> float:
    """Of policy and critic over all epochs: 3 forward passes' worth each, 2 where only adapters learn.

    Args:
        tokens: of the batch, prompts and replies.
        length: of a sequence.
    """
    shapes: dict[str, Shape] = {"policy": language_model(config), "critic": scalar_model(config)}
    passes = {role: 2.0 if config.lora.trains(role) else 3.0 for role in shapes}
    return config.ppo.epochs * sum(passes[role] * shape.forward_flops(tokens, length) for role, shape in shapes.items())


def decoding_bytes(config: Config, rows: int, prompt: float, reply: float, low: int = BF16) -> float:
    """Read by an engine that answers `rows` prompts at once: weights for each token, keys and values of all tokens before it."""
    shape = language_model(config)
    return reply * (shape.active * low + rows * shape.cache(1, low) * (prompt + reply / 2))


def shares(out: Path, setting: Setting, config: Config, gpu: Device) -> list[object] | None:
    """A row of the table: seconds, MFU, share of bandwidth; None before anything was measured."""
    lines = pairs.read(out / "rounds.jsonl", setting.name, ["ours-bf16"])
    if not lines:
        return None
    figures = [line["figures"]["ours-bf16"] for line in lines]
    whole, learn, rollout = (paired.median([f[name] for f in figures]) for name in ("seconds", "seconds_learning", "seconds_rollout"))
    length = setting.prompt_tokens + setting.limit
    mfu = learning_flops(config, setting.prompts * length, length) / (learn * gpu.flops)
    reading = decoding_bytes(config, setting.prompts, setting.prompt_tokens, setting.limit) / (rollout * gpu.bandwidth)
    tokens = setting.prompts * setting.limit / rollout
    return [setting.name, f"{whole:.2f}", f"{learn:.2f}", f"{mfu:.1%}", f"{rollout:.2f}", f"{tokens:.0f}", f"{reading:.1%}", len(lines)]


TITLES = ["size", "seconds", "learning", "MFU", "rollout", "tokens/s", "of bandwidth", "iterations"]


def config_of(setting: Setting, folder: Path) -> Config:
    """chatray's configuration of a size."""
    return configuration.load(words(setting, folder, folder / "run", "bf16"), reads_data=False)


def measure(setting: Setting, count: int, out: Path, trl: str) -> str | None:
    """Rounds of one size; returns why not, if not."""
    arms = ALONE.get(setting.name, ARMS)
    try:
        left = pairs.run(setting.name, arms, count, 1e9, out, "", trl, [])
    except RuntimeError as failed:  # one size that does not fit must not cost the others
        return f"{setting.name}: {str(failed).splitlines()[-1][:200]}"
    return f"{setting.name}: {left} rounds left" if left else None


def section(out: Path, chosen: Sequence[str], gpu: Device, failed: Sequence[str]) -> str:
    """The tables."""
    settings = sizes()
    rows = [shares(out, settings[name], config_of(settings[name], (out / name).resolve()), gpu) for name in chosen if (out / name).is_dir()]
    parts = [
        "## On a GPU",
        f"`make bench-gpu`, {report.machine()}; peaks {gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e9:.0f} GB/s.",
        report.table(TITLES, [row for row in rows if row]),
        tables.ratios(out, chosen),
        tables.phases(out, chosen),
        tables.memory(out, chosen),
        *failed,
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=sizes(), default=list(sizes()))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"))
    parser.add_argument("--trl", default=".venv-trl/bin/python")
    wanted = parser.parse_args()
    gpu = device()
    out = wanted.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    SETTINGS.update(sizes())
    failed = [why for name in wanted.sizes if (why := measure(SETTINGS[name], wanted.pairs, out, wanted.trl))]
    report.write("gpu", section(out, wanted.sizes, gpu, failed))
    print("\n".join(failed), file=sys.stderr)


if __name__ == "__main__":
    main()
