"""The plan's time model beside what was published, and beside what this machine takes.

    python -m tests.benchmarks.planning published                 # DeepSpeed-Chat's step-3 times, leave-one-out; seconds
    python -m tests.benchmarks.planning measured runs/quickstart  # the phases of a finished run's PPO on this machine's CPU

`published`: each row is predicted by constants that were fitted to the other ten, of the plan's model (arithmetic reached, seconds a layer
takes at least) and of the baseline "a constant x parameters per GPU", both by least squares of the relative error.
`measured`: two numbers of this CPU (a matrix product of the model's own size, a copy) and the seconds of one layer, alone and
while decoding, go into the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from conf.schema import Config
from orchestration import config as configuration
from orchestration.planner.shapes import language_model
from orchestration.planner.timing import EXCHANGE, READING, Lengths, Speed, of_cluster, work_of

QUERIES, BATCH, PROMPT, REPLY = 131_900, 1024, 256, 256
HOURS = {
    ("1.3b", 8): 1.4, ("6.7b", 8): 4.1, ("13b", 8): 9.0, ("30b", 8): 18.0, ("66b", 8): 50.4,
    ("1.3b", 64): 31 / 60, ("6.7b", 64): 51 / 60, ("13b", 64): 1.25, ("30b", 64): 4.0, ("66b", 64): 7.5, ("175b", 64): 20.0,
}  # fmt: skip
"""DeepSpeed-Chat's README: step 3, one epoch, OPT actor, 350M reward model, A100-80G. FACTS of the project hold the same rows."""
TENSOR_PARALLEL = {"30b": 2, "66b": 4, "175b": 8}
"""So that an engine's weights take at most half of its devices; not published."""
WITHIN = 1.5


@dataclass(frozen=True)
class Row:
    """One published time, and what the model makes of it: hours = known + arithmetic x a + layers x b."""

    scale: str
    gpus: int
    hours: float
    known: float
    arithmetic: float
    layers: float
    per_gpu: float
    """Billions of parameters."""


@cache
def rows() -> tuple[Row, ...]:
    return tuple(_row(scale, gpus, hours) for (scale, gpus), hours in HOURS.items())


def _row(scale: str, gpus: int, hours: float) -> Row:
    parallel = TENSOR_PARALLEL.get(scale, 1)
    config = configuration.load([
        f"scale={scale}", "placement=colocated", f"placement.devices={gpus}", f"placement.rollout.tensor_parallel={parallel}",
        f"placement.rollout.ranks={gpus // parallel}", f"cluster=a100x{gpus}", "engine.zero_stage=3", "engine.offload_optimizer=none",
        f"ppo.batch={BATCH}", f"ppo.max_new_tokens={REPLY}", "engine.micro_batch=16", f"engine.rollout_batch={BATCH}",
        "ppo.ptx_batch=64", "sft.batch=64", "reward_model.batch=64", "pretrain.batch=64",
    ])  # fmt: skip
    config = replace(config, reward_scale=configuration.load(["scale=350m"]).scale)
    phases = work_of(config, Lengths(PROMPT, REPLY, PROMPT, REPLY), cache_passes=1)  # theirs has room for the longest from the start
    total = phases["generate"] + phases["score"] + phases["learn"]  # their engine shares its weights with the trainer: no sync
    peak = of_cluster(config.cluster, config.cluster.nodes)
    runs = QUERIES / BATCH / 3600
    known = total.read / (peak.bandwidth * READING) + total.exchanged / (peak.network * EXCHANGE)
    parameters = language_model(config).parameters / 1e9
    return Row(scale, gpus, hours, known * runs, total.flops / peak.flops * runs, total.layers * runs, parameters / gpus)


def fitted(found: Sequence[Row]) -> np.ndarray:
    """(1 / share of peak arithmetic reached, seconds of a layer at least)."""
    sides = np.array([[row.arithmetic / row.hours, row.layers / row.hours] for row in found])
    return nnls(sides, np.array([1 - row.known / row.hours for row in found]))[0]


def baseline(found: Sequence[Row]) -> float:
    """Hours for a billion parameters per GPU."""
    return float(nnls(np.array([[row.per_gpu / row.hours] for row in found]), np.ones(len(found)))[0][0])


@dataclass(frozen=True)
class Prediction:
    """A row predicted from the ten others."""

    row: Row
    ours: float
    theirs: float
    """The baseline's."""


def left_out() -> list[Prediction]:
    predictions = []
    for row in rows():
        others = [other for other in rows() if other is not row]
        a, b = fitted(others)
        predictions.append(Prediction(row, row.known + a * row.arithmetic + b * row.layers, baseline(others) * row.per_gpu))
    return predictions


def mean_error(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean of |log(predicted / published)|."""
    return statistics.fmean(abs(math.log(predicted / seen)) for predicted, seen in pairs)


def published() -> int:
    found = left_out()
    print("| actor | A100-80G | published, h | plan, h | ratio | constant x parameters per GPU, h | ratio |\n|---|---|---|---|---|---|---|")
    for p in found:
        name, hours = p.row.scale, p.row.hours
        print(f"| {name} | {p.row.gpus} | {hours:.2f} | {p.ours:.2f} | {p.ours / hours:.2f} | {p.theirs:.2f} | {p.theirs / hours:.2f} |")
    ours, theirs = (mean_error([(getattr(p, who), p.row.hours) for p in found]) for who in ("ours", "theirs"))
    a, b = fitted(rows())
    print(f"\nmean |log ratio|: plan {ours:.3f}, constant {theirs:.3f}")
    print(f"fitted to all rows: {1 / a:.3f} of peak arithmetic, {b * 1e3:.3f} ms a layer")
    return int(ours >= theirs)


def measured(run: Path) -> int:
    """The median step's phases beside the plan's. Returns 1 when one is off by more than `WITHIN`."""
    config = _of_run(run)
    steps = [row for row in map(json.loads, (run / "round_01/ppo/metrics.jsonl").read_text().splitlines()) if "seconds_rollout" in row]
    seen = {name: statistics.median(row[f"seconds_{name}"] for row in steps) for name in ("rollout", "reward", "scoring", "learning")}
    tokens = statistics.median(row["tokens"] for row in steps) / config.ppo.batch
    reply = statistics.median(row["reply_tokens"] for row in steps)
    work = work_of(config, Lengths(tokens - reply, reply, longest_prompt(run, config), config.ppo.max_new_tokens))
    speed = this_cpu(config, int(tokens))
    said = {"generate": work["generate"], "score": work["score"], "learn": work["learn"]}
    took = {"generate": seen["rollout"], "score": seen["reward"] + seen["scoring"], "learn": seen["learning"]}
    print("| phase | measured, s | plan, s | ratio |\n|---|---|---|---|")
    worst = 1.0
    for name, one in said.items():
        seconds = one.seconds(replace(speed, layer=a_decoded_layer(config)) if name == "generate" else speed)
        worst = max(worst, seconds / took[name], took[name] / seconds)
        print(f"| {name} | {took[name]:.3f} | {seconds:.3f} | {seconds / took[name]:.2f} |")
    print(
        f"\n{speed.flops / 1e9:.1f} GFLOP/s, {speed.bandwidth / 1e9:.1f} GB/s, {speed.layer * 1e3:.2f} ms a layer; furthest: x{worst:.2f}"
    )
    return int(worst > WITHIN)


def longest_prompt(run: Path, config: Config) -> float:
    """Tokens of the longest prompt that an engine takes at once, on average: batches of the embedded world's prompts, as PPO draws them."""
    from orchestration.data.chat import Chat, load_tokenizer
    from orchestration.data.world import scenarios

    chat = Chat(load_tokenizer(str(run / "round_01/sft/checkpoint"), "model.tokenizer"))
    at_once = min(config.ppo.batch // config.placement.rollout.ranks, config.engine.rollout_batch)
    drawn = chat.prompt_all(scenarios.prompts(8 * at_once, config.seed, config.data.flaws, judging=True))  # type: ignore[union-attr]
    sizes = [len(prompt) for prompt in drawn]
    return statistics.fmean(max(sizes[start : start + at_once]) for start in range(0, len(sizes), at_once))


def _of_run(run: Path) -> Config:
    """The settings of a run that time depends on, from its own record."""
    import yaml

    text = yaml.safe_load((run / "config.yaml").read_text())
    ppo, engine = text["ppo"], text["engine"]
    ranks = {role: text["placement"][role]["ranks"] for role in ("policy", "critic", "reference", "reward", "rollout")}
    return configuration.load([
        f"scale={text['scale']['name']}", f"ppo.batch={ppo['batch']}", f"ppo.minibatches={ppo['minibatches']}",
        f"ppo.epochs={ppo['epochs']}",
        f"ppo.max_new_tokens={ppo['max_new_tokens']}", f"engine.micro_batch={engine['micro_batch']}", "model.dtype=fp32",
        f"engine.rollout_batch={engine.get('rollout_batch', 256)}", *[f"placement.{role}.ranks={n}" for role, n in ranks.items()],
    ])  # fmt: skip


def this_cpu(config: Config, length: int) -> Speed:
    """What a rank of the policy reaches on this machine while nothing else runs: arithmetic in a forward pass of one micro-batch, norms,
    attention and the rest of a layer included, and bandwidth in a copy, each with the rank's threads; a layer of one row of one token."""
    from actors.models import new_causal_lm

    torch.set_num_threads(config.placement.policy.threads)
    scale, rows = config.scale, config.engine.micro_batch
    lm: Any = new_causal_lm(scale, scale.vocabulary, 0, 0.0, 0, 0).eval()
    batch, token = torch.zeros(rows, length, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    source, target = torch.randn(1 << 24), torch.empty(1 << 24)
    bandwidth = 2 * 4 * source.numel() / fastest(lambda: target.copy_(source))
    with torch.no_grad():
        layer = fastest(lambda: lm(token)) / scale.layers
        flops = language_model(config).forward_flops(rows * length, length) / (fastest(lambda: lm(batch)) - scale.layers * layer)
    return Speed(flops, bandwidth, bandwidth, 1.0, 1.0, 1.0, layer)


def a_decoded_layer(config: Config) -> float:
    """Seconds of one layer while one reply to one token is decoded: kernels on next to nothing, Python, the draw of a token."""
    from actors.batch import Prompts
    from actors.models import new_causal_lm
    from actors.rollout_transformers import TransformersEngine
    from actors.sampling import Sampling

    lm = new_causal_lm(config.scale, config.scale.vocabulary, 0, 0.0, 0, 0)
    engine = TransformersEngine(lm, -1, torch.device("cpu"))  # no token ends it
    asked = Prompts(torch.ones(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long))
    sampling = Sampling(1.0, 16, 0, 0)
    return fastest(lambda: engine.generate(asked, sampling)) / sampling.max_new_tokens / config.scale.layers


def fastest(call: Any, times: int = 20) -> float:
    """Seconds of the median call."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["published", "measured"])
    parser.add_argument("run", nargs="?", type=Path)
    options = parser.parse_args()
    return published() if options.what == "published" else measured(options.run)


if __name__ == "__main__":
    sys.exit(main())
