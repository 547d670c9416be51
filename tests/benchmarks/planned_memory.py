"""Bytes of tensors that each training rank really holds, beside what the plan says, by kind.

    python -m tests.benchmarks.planned_memory                        # tiny and 125m, every ZeRO stage, 1, 2 and 4 ranks
    python -m tests.benchmarks.planned_memory --scales tiny --ranks 1 2

Each cell starts its ranks as processes on gloo and trains two optimizer steps of the policy, of two micro-batches each. Each kind is
counted at its moment of most use: after a backward pass of the second step, when optimizer states are there. Every tensor of the process
is found (`gc`, the engine's own fields) and counted once by its storage. Activations are counted as autograd saves them in one
micro-batch.
Exits with 1 when a kind differs by more than 5% of itself, where it is at least `NOISE` of the whole.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

KINDS = ("parameters", "gradients", "optimizer", "activations", "communication")
TOLERANCE = 0.05
NOISE = 0.002
"""Of the bytes of all kinds together; a kind below it (a hundred scalars beside a model) is not judged."""
ROWS, TOKENS = 2, 64
"""Of the micro-batch that is trained on."""
OFFLOADS: dict[str, list[str]] = {"none": [], "optimizer": ["engine.offload_optimizer=cpu"],
                                  "both": ["engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"]}  # fmt: skip
CELLS = [(0, "none"), (1, "none"), (1, "optimizer"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "both")]


def overrides(scale: str, stage: int, offload: str, ranks: int, dtype: str) -> list[str]:
    """The configuration of a cell."""
    return [
        f"scale={scale}", f"engine.zero_stage={stage}", f"model.dtype={dtype}",
        f"engine.micro_batch={ROWS}", f"placement.policy.ranks={ranks}",
        f"ppo.batch={16 * ranks}", f"ppo.max_new_tokens={TOKENS // 2}", *OFFLOADS[offload],
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scales", nargs="+", default=["tiny", "125m"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    options = parser.parse_args()
    print(f"| scale | ZeRO | offloaded | ranks | {' | '.join(f'{kind}: MB held / planned' for kind in KINDS)} | worst ratio |")
    print(f"|---|---|---|---|{'---|' * (len(KINDS) + 1)}", flush=True)
    worst = 0.0
    for scale in options.scales:
        for stage, offload in CELLS:
            for ranks in options.ranks:
                held = measured(scale, stage, offload, ranks, options.dtype)
                worst = max(worst, _row(scale, stage, offload, ranks, held, planned(scale, stage, offload, ranks, options.dtype)))
    print(f"\nfurthest from 1: {worst:.1%}; allowed: {TOLERANCE:.0%}")
    return int(worst > TOLERANCE)


def _row(scale: str, stage: int, offload: str, ranks: int, held: list[dict[str, int]], plans: list[dict[str, int]]) -> float:
    """Print the rank that is furthest from the plan; returns by how much."""
    found = []
    for one, said in zip(held, plans, strict=True):
        floor = NOISE * sum(one.values())
        off = {kind: abs(one[kind] / said[kind] - 1) if said[kind] else float(one[kind] > 0) for kind in KINDS}
        judged = [off[kind] for kind in KINDS if max(one[kind], said[kind]) > floor]
        found.append((max(judged, default=0.0), one, said))
    worst, one, said = max(found, key=lambda row: row[0])
    cells = " | ".join(f"{one[kind] / 1e6:.2f} / {said[kind] / 1e6:.2f}" for kind in KINDS)
    print(f"| {scale} | {stage} | {offload} | {ranks} | {cells} | {1 + worst:.3f} |", flush=True)
    return worst


def planned(scale: str, stage: int, offload: str, ranks: int, dtype: str) -> list[dict[str, int]]:
    """What the plan says of each policy rank, wherever its bytes lie."""
    from orchestration import config as configuration
    from orchestration.planner.memory import MicroBatch, training
    from orchestration.planner.shapes import language_model

    config = configuration.load(overrides(scale, stage, offload, ranks, dtype))
    batch = MicroBatch(ROWS, TOKENS, TOKENS // 2)
    found = [training(config, language_model(config), "policy", ranks, batch, False, rank) for rank in range(ranks)]
    return [{kind: one.of(kind) for kind in KINDS} for one in found]


def measured(scale: str, stage: int, offload: str, ranks: int, dtype: str) -> list[dict[str, int]]:
    """What each rank found itself to hold. A cell's processes are its own: DeepSpeed keeps things of an engine that is gone."""
    cell = overrides(scale, stage, offload, ranks, dtype)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["actors.worker", "orchestration.config"])  # imported once, for all ranks of all cells
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(rank, ranks, cell, folder)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"a rank failed: {' '.join(cell)}, {ranks} ranks")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, cell: list[str], folder: str) -> None:
    """Train two steps, count, write."""
    import torch
    import torch.distributed as dist

    from actors.engine import Optimizer
    from actors.models import LanguageModel, new_causal_lm
    from actors.worker import make_engine, start_process_group
    from orchestration import config as configuration

    torch.set_num_threads(1)
    config = configuration.load(cell)
    limit = datetime.timedelta(seconds=300)
    start_process_group(rank, ranks, dist.FileStore(f"{folder}/store", ranks), limit)
    module = LanguageModel(new_causal_lm(config.scale, config.scale.vocabulary, seed=0, dropout=0.0, end=0, pad=0))
    engine = make_engine(config, module, Optimizer(1e-4, 0.0, 1.0))
    engine.train(config.activation_checkpointing())
    tokens = torch.randint(0, config.scale.vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(rank))
    mask = torch.arange(TOKENS).expand(ROWS, TOKENS) >= TOKENS // 2

    buckets: list[int] = []
    last_to_get_one = module.lm.get_input_embeddings().weight  # the first layer's gradient is computed last
    last_to_get_one.register_hook(lambda grad: buckets.append(_counted(_bucket_tensors(engine), set())))

    def backward(last: bool) -> int:
        saved: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: _noted(x, saved, engine), lambda x: x):
            logprobs, _ = engine(tokens, mask)
        engine.backward(-logprobs.sum() / mask.sum(), last=last)
        return sum(saved.values())

    for _ in range(2):  # two steps of two micro-batches; what counts is the second
        activations = backward(last=False)
        adding = held(engine)
        backward(last=True)
        added = held(engine)
        engine.step(1e-4)
    found = {kind: max(adding[kind], added[kind]) for kind in added}
    found["communication"] += max(buckets)  # given back at the end of a step's last backward pass
    Path(folder, f"{rank}.json").write_text(json.dumps(found | {"activations": activations}))
    dist.destroy_process_group()


def held(engine: Any) -> dict[str, int]:
    """Bytes by kind, each storage once: what is a parameter is not counted again as anything else."""
    seen: set[int] = set()
    parts: dict[str, Iterable[Any]] = {
        "parameters": _parameters(engine),
        "gradients": _gradients(engine),
        "optimizer": _optimizer(engine),
        "buckets": _bucket_tensors(engine),  # not to be taken for something else; they are measured at their largest
        "communication": _everything(),
    }
    found = {kind: _counted(tensors, seen) for kind, tensors in parts.items()}
    del found["buckets"]
    return found


def _parameters(engine: Any) -> Iterator[Any]:
    for parameter in engine.module.parameters():
        yield parameter.data
        yield getattr(parameter, "ds_tensor", None)
    yield from getattr(engine.deepspeed.optimizer, "bit16_groups_flat", [])


def _gradients(engine: Any) -> Iterator[Any]:
    optimizer = engine.deepspeed.optimizer
    for parameter in engine.module.parameters():
        yield parameter.grad
    yield from _tensors_in(getattr(optimizer, "averaged_gradients", {}))
    yield getattr(optimizer, "grad_partitions_flat_buffer", None)
    yield from _tensors_in(getattr(optimizer, "accumulated_grads_in_cpu", {}))
    yield from _tensors_in(getattr(optimizer, "all_grad_tensors", {}))
    for master in _masters(optimizer):
        yield master.grad


def _bucket_tensors(engine: Any) -> Iterator[Any]:
    """Of ZeRO 1 and 2, in which gradients are gathered before they are reduced; ZeRO-3's own is never given back."""
    buckets = getattr(engine.deepspeed.optimizer, "ipg_buckets", {}) if engine.zero_stage in (1, 2) else {}
    for bucket in buckets.values():
        yield from bucket.buffer


def _optimizer(engine: Any) -> Iterator[Any]:
    optimizer = engine.deepspeed.optimizer
    yield from _masters(optimizer)
    yield from _tensors_in(getattr(optimizer, "optimizer", optimizer).state)


def _masters(optimizer: Any) -> list[Any]:
    return [*getattr(optimizer, "single_partition_of_fp32_groups", []), *getattr(optimizer, "fp32_partitioned_groups_flat", [])]


def _everything() -> Iterator[Any]:
    import torch

    gc.collect()
    for thing in gc.get_objects():  # by `type`: to ask a lazy module's proxy for its class would import what it stands for
        if issubclass(type(thing), torch.Tensor):
            yield thing
        elif type(thing) is dict:
            yield from (value for value in list(thing.values()) if issubclass(type(value), torch.Tensor))


def _tensors_in(thing: Any) -> Iterator[Any]:
    import torch

    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors_in(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors_in(value)


def _counted(tensors: Iterable[Any], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if tensor is None or tensor.device.type == "meta" or not tensor.untyped_storage().nbytes():
            continue
        address = _address(tensor)
        if address not in seen:
            seen.add(address)
            total += tensor.untyped_storage().nbytes()
    return total


def _address(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _noted(tensor: Any, saved: dict[int, int], engine: Any) -> Any:
    """Note what autograd keeps, weights left out: under ZeRO-3 those are whole at this moment and gone by the end of the pass."""
    weights = {_address(x) for x in _parameters(engine) if x is not None}
    if _address(tensor) not in weights:
        saved[_address(tensor)] = tensor.untyped_storage().nbytes()
    return tensor


if __name__ == "__main__":
    sys.exit(main())
