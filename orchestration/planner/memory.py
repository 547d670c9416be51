"""Bytes that each rank of a role holds at its moment of most use, by kind.

The rules are those of DeepSpeed 0.19 as `actors/engine.py` sets it up, and were measured (`tests/benchmarks/planned_memory.py`). N ranks, t
numbers that are trained, low = 2 bytes for bf16 on CUDA and 4 otherwise (bf16 on a CPU is autocast over fp32 weights):

    ZeRO   parameters      gradients            optimizer                 communication
    0      low P           low t                8 t (+ 4 t if low is 2)   -
    1      low P           low t                12 t / N                  a reduce bucket
    2      low P           low t / N **         12 t / N                  a reduce bucket
    3      low P / N *     low t / N            12 t / N                  a reduce bucket

    *  and tensors of up to PERSISTENT numbers whole
    ** of whole tensors: one that is cut by a boundary between ranks is whole on both

ZeRO 1 adds up whole gradients over micro-batches, and shares them out when they are complete. An offloaded optimizer keeps gradients in
fp32, twice: as they are added up (ZeRO 2 and 3), and as they are handed over. "Workspace" is what comes and goes within a step: layers
gathered by ZeRO-3 and logits of one chunk in a pass, or, when passes are over, what the optimizer's step computes with.

While it loads, a rank holds other things: below ZeRO-3, in a rollout engine of one device, and where adapters are put into a model, the
whole model in fp32 in host memory. All roles of a node load at the same time, before any of them computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Literal

from actors.algorithms.logprobs import CHUNK_LOGITS
from actors.sharding import NVME_BUFFERS, PERSISTENT, buckets, stage_in_force
from conf.engines import VLLMRollout
from conf.schema import Config
from orchestration.planner.machines import GIB
from orchestration.planner.shapes import Shape, activations, language_model, longest, scalar_model

KINDS = ("parameters", "gradients", "optimizer", "activations", "kv_cache", "communication", "workspace", "runtime")
Where = Literal["device", "host", "nvme", "disk"]
PLACES: tuple[Where, ...] = ("device", "host", "nvme", "disk")

PROCESS = int(0.7 * GIB)
"""Private memory of a rank's process with torch, transformers and DeepSpeed loaded, in host memory."""
VLLM_PROCESS = int(1.2 * GIB)
"""The same of a process that has imported vLLM."""
CONTEXT = int(0.8 * GIB)
"""Device memory of a process before its first tensor: CUDA's context, kernels, NCCL's channels. An assumption, not measured."""


@dataclass(frozen=True)
class Held:
    """Bytes of one kind in one place."""

    kind: str
    where: Where
    bytes: int


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds. "device" is where it computes: a GPU, or the host's memory on a machine without one."""

    parts: tuple[Held, ...]
    loading: int = 0
    """Bytes of weights in host memory while the model is loaded, before what is in `parts` is there."""

    def of(self, kind: str) -> int:
        """Bytes of a kind, wherever they lie."""
        return sum(part.bytes for part in self.parts if part.kind == kind)

    def on(self, where: Where) -> int:
        return sum(part.bytes for part in self.parts if part.where == where)

    def by_kind(self) -> dict[str, int]:
        """Kinds on the device, and the totals of the other places."""
        on_device = {kind: sum(p.bytes for p in self.parts if (p.kind, p.where) == (kind, "device")) for kind in KINDS}
        return on_device | {where: self.on(where) for where in PLACES[1:]} | {"loading": self.loading}

    def by_place(self) -> dict[str, dict[str, int]]:
        """Each kind that is there, and its bytes in each place."""
        kinds = dict.fromkeys([*KINDS, *(part.kind for part in self.parts)])
        found: dict[str, dict[str, int]] = {
            kind: {where: sum(p.bytes for p in self.parts if (p.kind, p.where) == (kind, where)) for where in PLACES} for kind in kinds
        }
        return found | {"loading": {where: self.loading if where == "host" else 0 for where in PLACES}}

    def starting(self) -> int:
        """Bytes in host memory while it loads."""
        return self.loading + sum(p.bytes for p in self.parts if p.where == "host" and p.kind in ("process", "export"))

    def asleep(self) -> RankMemory:
        """The same rank while others work on its device: what it needs again lies in host memory, the rest is given back."""
        kept = ("parameters", "optimizer")
        moved = [replace(p, where="host") for p in self.parts if p.where == "device" and p.kind in kept]
        left = [p for p in self.parts if p.where != "device" or p.kind == "runtime"]
        return RankMemory((*left, *moved), self.loading)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass is over."""

    rows: int
    tokens: int
    """Of each row."""
    wanted: int
    """Tokens of each row that log-probs are computed of."""


def of_role(config: Config, role: str, cuda: bool) -> RankMemory:
    """One rank of a role (the one that holds most), with sequences as long as they may be."""
    scalar = role in ("critic", "reward")
    if role == "reward" and config.ppo.rewards and not any(source.kind == "model" for source in config.ppo.rewards):
        return RankMemory((Held("process", "host", PROCESS),))
    shape = scalar_model(config) if scalar else language_model(config)
    ranks = getattr(config.placement, role).ranks
    rows, tokens = config.engine.rows_of(longest(config)), longest(config)
    if role == "rollout":
        return rollout(config, shape, cuda)
    if role in ("reference", "reward"):
        return frozen(config, shape, ranks, rows, tokens, cuda)
    wanted = tokens if role == "train" or config.ppo.ptx > 0 else min(config.ppo.max_new_tokens, tokens)
    return training(config, shape, role, ranks, MicroBatch(rows, tokens, wanted), cuda)


def training(config: Config, shape: Shape, role: str, ranks: int, batch: MicroBatch, cuda: bool, rank: int | None = None) -> RankMemory:
    """A rank that learns; None: the one that holds most."""
    stage = stage_in_force(config.zero_stage(), config.dtype(), cuda)
    low = 2 if config.dtype() == "bf16" and cuda else 4
    tensors = trained_tensors(config, shape, role)
    share = _share(tensors, ranks) if stage else sum(tensors)
    offloaded = config.offload_optimizer() if stage else "none"
    away: Where = {"none": "device", "cpu": "host", "nvme": "nvme" if stage == 3 else "host"}[offloaded]  # type: ignore[assignment]
    sizes = buckets(shape.tensors, tensors, ranks)
    bucket = sizes.reduce * low if stage else 0
    masters = 12 * share if stage else 8 * share
    passes = _passes(config, shape, batch, cuda)
    parts = [
        *_parameters(config, shape, ranks, low),
        Held("optimizer", away, masters),
        *_gradients(tensors, ranks, stage, low, away if away != "nvme" else "host", rank),
        Held("communication", "device", bucket),
        *_in_turn(passes, _step(stage, share, offloaded, max(tensors, default=0), low, sizes.optimizer)),
        *_process(config, shape, ranks, cuda),
        *([Held("to go back to", "host", min(config.ppo.steps, 2) * 4 * share)] if role == "policy" else []),
        Held("state", "disk", (config.commit.keep + 1) * (masters + _ceil(shape.parameters, ranks) * low)),
    ]
    return RankMemory(tuple(parts), _loading(config, shape))


def _loading(config: Config, shape: Shape) -> int:
    """Under ZeRO-3 each rank reads its own part of each tensor (`actors/engine.py`); elsewhere transformers builds the whole model in
    fp32."""
    return 0 if config.zero_stage() == 3 else shape.parameters * 4


def _trained(config: Config, role: str, shape: Shape) -> str:
    """What `lora.roles` calls it; the ranks of training stages are planned for the stage that holds most."""
    if role != "train":
        return role
    return "reward_model" if shape.scalar else "pretrain" if config.pretrain.steps else "sft"


def _gradients(tensors: list[int], ranks: int, stage: int, low: int, away: Where, rank: int | None) -> list[Held]:
    """When they have been added up over micro-batches (None: of the rank that has most of them); and, where the optimizer is offloaded, as
    they are handed over to it."""
    share = _share(tensors, ranks)
    added_up = {0: sum(tensors), 1: sum(tensors), 2: _touched(tensors, ranks, rank), 3: share}[stage]
    if away == "device" or stage == 0:
        return [Held("gradients", "device", added_up * low)]
    where: Where = "device" if stage == 1 else away
    return [Held("gradients", where, added_up * (4 if stage == 2 else low)), Held("gradients", away, share * 4)]


def _step(stage: int, share: int, offloaded: str, largest: int, low: int, together: int) -> list[Held]:
    """Gradients in fp32 of what is updated at once (AdamW is fused and needs nothing besides); of an offloaded optimizer, buffers to hand
    it over, and of one in files those that a part of it is read into and written from (four, by DeepSpeed's default)."""
    at_once = min(share, together) if stage == 3 else share
    if offloaded == "none":
        return [Held("workspace", "device", 0 if stage == 0 else at_once * 4)]
    # ZeRO 1 and 2 pass gradients through two buffers of the largest tensor's size, and new weights back through one of the share's
    passing = [Held("communication", "host", (largest + share) * low), Held("communication", "device", largest * low)]
    buffers = passing if stage < 3 else []
    return [*buffers, Held("workspace", "host", at_once * 4 * 4 if stage == 3 and offloaded == "nvme" else 0)]


def _in_turn(passes: list[Held], step: list[Held]) -> list[Held]:
    """What passes hold and what the step after them does: their workspaces are not there at the same time."""
    first, then = (sum(p.bytes for p in parts if (p.kind, p.where) == ("workspace", "device")) for parts in (passes, step))
    rest = [part for part in (*passes, *step) if (part.kind, part.where) != ("workspace", "device")]
    return [*rest, Held("workspace", "device", max(first, then))]


def frozen(config: Config, shape: Shape, ranks: int, rows: int, tokens: int, cuda: bool) -> RankMemory:
    """A rank that only gives log-probs or scores: nothing is kept for a backward pass."""
    low = 2 if config.dtype() == "bf16" and cuda else 4
    kept = _kept(config, shape, rows, tokens, cuda)
    passing = Held("activations", "device", kept.block + kept.ends)
    spare = _logits(shape, rows * tokens, learns=False) + _gathered(config, shape, low)
    return RankMemory(
        (*_parameters(config, shape, ranks, low), passing, Held("workspace", "device", spare), *_process(config, shape, ranks, cuda)),
        _loading(config, shape),
    )


def rollout(config: Config, shape: Shape, cuda: bool) -> RankMemory:
    """One device of a rollout engine: its part of the weights, and of the keys and values of a batch of replies as long as they may be."""
    place = config.placement.rollout
    if isinstance(config.rollout, VLLMRollout):
        return _vllm(config, config.rollout, shape, cuda)
    low = 2 if config.dtype() == "bf16" and cuda else 4
    rows = min(config.engine.rollout_batch, max(config.ppo.batch // place.ranks, 1))
    cache = _ceil(shape.cache(rows * longest(config), low), place.tensor_parallel)
    sampling = rows * shape.vocabulary * (2 * 4 + 2 * 8)  # log-probs in fp32, their cumulative sum in fp64
    prefill = rows * max(longest(config) - config.ppo.max_new_tokens, 1) * 6 * shape.width * low
    growing = cache // shape.layers  # one layer's cache is copied when a token is added
    return RankMemory(
        (
            Held("parameters", "device", _ceil(shape.parameters, place.tensor_parallel) * low),
            Held("kv_cache", "device", cache),
            Held("workspace", "device", max(sampling, _ceil(prefill, place.tensor_parallel)) + growing),
            Held("process", "host", PROCESS),
            *([Held("runtime", "device", CONTEXT)] if cuda else []),
        ),
        shape.parameters * 4 if place.tensor_parallel == 1 else 0,  # an engine that splits its model reads each device's part
    )


def _vllm(config: Config, settings: VLLMRollout, shape: Shape, cuda: bool) -> RankMemory:
    """One device of a vLLM engine. On a GPU it fills the share it is given with cache, once the weights and a pass are in; the cache is at
    least what the longest sequence needs."""
    parts, low = config.placement.rollout.tensor_parallel, 2 if config.dtype() == "bf16" else 4
    weights = _ceil(shape.parameters, parts) * low
    workspace = settings.sequences * shape.vocabulary * 3 * 4  # logits and log-probs in fp32, beside noise to draw by
    least = _ceil(shape.cache(longest(config), low), parts)
    given = settings.gpu_memory * config.cluster.gpu_memory_gib if cuda else settings.cpu_cache_gib
    cache = int(given * GIB) - (weights + workspace if cuda else 0)
    return RankMemory(
        (
            Held("parameters", "device", weights),
            Held("kv_cache", "device", max(cache, least)),
            Held("workspace", "device", workspace),
            Held("process", "host", VLLM_PROCESS * (parts + 1 if parts > 1 else 1)),
            *([Held("runtime", "device", CONTEXT)] if cuda else []),
        )
    )


def trained_tensors(config: Config, shape: Shape, role: str) -> list[int]:
    """Numbers in each tensor that this role trains: all of the model's, or its adapters' and a scalar head."""
    if not config.lora.trains(_trained(config, role, shape)):
        return list(shape.tensors)
    chosen = [(a, b) for name, a, b in shape.linear if not config.lora.targets or name in config.lora.targets]
    found = [config.lora.rank * size for pair in chosen for size in pair]
    return [*found, shape.width, 1] if shape.scalar else found


def _parameters(config: Config, shape: Shape, ranks: int, low: int) -> list[Held]:
    if config.zero_stage() < 3:
        return [Held("parameters", "device", shape.parameters * low)]
    small = sum(size for size in shape.tensors if size <= PERSISTENT) * low
    share = _share(shape.tensors, ranks) * low
    rest: dict[str, Where] = {"none": "device", "cpu": "host", "nvme": "nvme"}
    whole = [Held("parameters", "device", small)] if ranks > 1 else []
    on_the_way = NVME_BUFFERS * _ceil(max(shape.tensors, default=0), ranks) * low
    passing = [Held("communication", "host", on_the_way)] if config.offload_parameters() == "nvme" else []
    return [Held("parameters", rest[config.offload_parameters()], share), *whole, *passing]


def _share(tensors: Iterable[int], ranks: int) -> int:
    """What a rank has of tensors that are each cut into equal parts."""
    return sum(_ceil(size, ranks) for size in tensors)


def _touched(tensors: list[int], ranks: int, rank: int | None) -> int:
    """Numbers in the tensors that a rank's part of them all, laid end to end, begins or ends in; None: of the rank with most."""
    edge = _ceil(sum(tensors), ranks)
    starts = [0]
    for size in tensors:
        starts.append(starts[-1] + size)
    held = [0] * ranks
    for start, stop in pairwise(starts):
        for owner in range(start // edge, min((stop - 1) // edge, ranks - 1) + 1):
            held[owner] += stop - start
    return max(held) if rank is None else held[rank]


def _kept(config: Config, shape: Shape, rows: int, tokens: int, cuda: bool):
    bf16 = config.dtype() == "bf16"
    return activations(shape, rows, tokens, bf16 and cuda, bf16 and not cuda, config.engine.remove_padding)


def _passes(config: Config, shape: Shape, batch: MicroBatch, cuda: bool) -> list[Held]:
    """What a forward and backward pass of one micro-batch keeps, and what it needs in passing."""
    number = 2 if config.dtype() == "bf16" else 4
    low = 2 if config.dtype() == "bf16" and cuda else 4
    kept = _kept(config, shape, batch.rows, batch.tokens, cuda)
    positions = batch.rows * batch.wanted
    head = 0 if shape.scalar else positions * (shape.width * number + 32)  # states of predicted tokens, targets, totals, entropies
    spare = (0 if shape.scalar else _logits(shape, positions, learns=True)) + _gathered(config, shape, low)
    if config.activation_checkpointing():
        inputs = shape.layers * batch.rows * batch.tokens * shape.width * number
        return [Held("activations", "device", kept.ends + head + inputs), Held("workspace", "device", kept.block + spare)]
    return [Held("activations", "device", kept.ends + head + shape.layers * kept.block), Held("workspace", "device", spare)]


def _logits(shape: Shape, positions: int, learns: bool) -> int:
    """One chunk of them in fp32, as often as they are there at once; with a backward pass also the output's gradient in fp32."""
    if shape.scalar:
        return 0
    chunk = min(positions * shape.vocabulary, max(CHUNK_LOGITS, shape.vocabulary))
    return chunk * 4 * 3 + (shape.vocabulary * shape.width * 4 if learns else 0)


def _gathered(config: Config, shape: Shape, low: int) -> int:
    """Whole layers that ZeRO-3 holds at once: the largest, and those at work or fetched ahead."""
    if config.zero_stage() < 3:
        return 0
    return min(shape.parameters, buckets(shape.tensors, shape.tensors, 1).live + shape.block) * low


def _process(config: Config, shape: Shape, ranks: int, cuda: bool) -> list[Held]:
    exported = Held("export", "disk", _ceil(shape.parameters, ranks) * 4)
    tensor = Held("export", "host", max(shape.tensors, default=0) * 4)  # gathered and written one by one (`actors/weights.py`)
    on_device = [Held("runtime", "device", CONTEXT)] if cuda else []
    return [Held("process", "host", PROCESS), tensor, exported, *on_device]


def _ceil(number: int, parts: int) -> int:
    return ceil(number / parts) if parts > 1 else number
