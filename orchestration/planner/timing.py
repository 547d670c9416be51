"""How long a step of PPO takes: work in each phase, divided by what the machine does of it in a second.

Each phase is arithmetic, bytes read from memory, bytes that come from other ranks, and kernels that wait for each other; they are added,
not overlapped. What a phase works on:

    generate   prompts are read once (arithmetic); then each token of all replies of a batch reads the weights and the cache (bandwidth)
    score      a forward pass of reference, reward model, critic (values) and policy (old log-probs)
    learn      policy and critic: 3 forward passes' worth, 4 with activation checkpointing, for each epoch; text for PPO-ptx besides; AdamW
    sync       the policy's weights, in fp32, through the object store of each node

Under ZeRO-3 each pass of a micro-batch brings all weights from the other ranks, and the backward pass again, and sends gradients.
Roles with devices of their own that work at once take as long as the slowest; roles that share devices take their sum. Replies are taken
to be as long as `ppo.max_new_tokens`, and prompts as long as replies where the context has room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from actors.sharding import stage_in_force
from conf.engines import VLLMRollout
from conf.machines import Cluster
from conf.schema import Config
from orchestration.planner.machines import Node
from orchestration.planner.shapes import Shape, language_model, longest, scalar_model

STORE_GB = 2.0
"""GB/s in which weights go through a node's object store: one copy in, one out. An assumption."""
HOST_GB = 20.0
"""GB/s between a GPU and host memory, for offloaded states: PCIe 4.0 x16 as it is reached. An assumption."""
SAMPLING_PASSES = 12
"""Numbers of four bytes that are read or written for each logit to draw a token: float32 log-softmax, its exponential and running sum in
double (`actors/rollout_transformers.py`)."""
CACHE_PASSES = 3
"""transformers' cache grows by being copied: read and written anew for each token, and read once more by attention."""
HOST_ADAM_GB = 10.0
"""GB/s of each rank's AdamW in host memory. An assumption."""


@dataclass(frozen=True)
class Speed:
    """What one device does in a second, and the share of it that is reached."""

    flops: float
    bandwidth: float
    """Bytes from its own memory."""
    network: float
    """Bytes from other ranks."""
    arithmetic: float
    """Share of `flops` that is reached."""
    reading: float
    """Share of `bandwidth` that is reached in decoding."""
    exchange: float
    """Share of `network` that is reached."""
    layer: float
    """Seconds that a layer takes at least, forward: its kernels wait for each other and for Python."""


@dataclass(frozen=True)
class Work:
    """Of one device in one phase."""

    flops: float = 0.0
    read: float = 0.0
    exchanged: float = 0.0
    layers: float = 0.0
    """Layers run one after the other, whatever is in them."""
    fixed: float = 0.0
    """Seconds that no setting of the device changes."""

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.parts(), other.parts(), strict=True)))

    def times(self, factor: float) -> Work:
        return Work(*(factor * part for part in self.parts()))

    def parts(self) -> tuple[float, ...]:
        return self.flops, self.read, self.exchanged, self.layers, self.fixed

    def seconds(self, speed: Speed) -> float:
        return (
            self.flops / (speed.flops * speed.arithmetic) + self.read / (speed.bandwidth * speed.reading)
            + self.exchanged / (speed.network * speed.exchange) + self.layers * speed.layer + self.fixed
        )  # fmt: skip


ARITHMETIC, LAYER = 0.18, 1.05e-3
"""Fitted to DeepSpeed-Chat's published step-3 times (`tests/benchmarks/planning.py`)."""
READING, EXCHANGE = 0.7, 0.5
"""Assumptions; those times do not tell them apart from arithmetic."""
CPU_FLOPS, CPU_BYTES, CPU_LAYER = 50e9, 8e9, 1e-3
"""Of a rank on a machine without GPUs: arithmetic of each thread in fp32, bytes of memory read, seconds of a layer at least. Assumptions:
such machines differ by several times; `tests/benchmarks/planning.py measured` takes this machine's own."""

KNOWN = {"A100": (312.0, 2039.0, 300.0), "H100": (989.0, 3350.0, 450.0), "H200": (989.0, 4800.0, 450.0)}
"""Peak dense bf16 TFLOP/s, GB/s of memory and GB/s of links, by what stands in a GPU's name: the maker's figures, of the fastest form."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a step's samples."""

    prompt: float
    reply: float
    """Means."""
    longest_prompt: float
    """Of those that an engine takes at once."""
    longest_reply: float
    """Decoding goes on until it has ended."""


@dataclass(frozen=True)
class Step:
    """One step of PPO."""

    phases: dict[str, float]
    """Seconds."""
    tokens: int
    """Prompts and replies."""
    dollars: float | None
    """None: the cluster states no price."""
    assumptions: list[str]

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def as_dict(self) -> dict[str, object]:
        return {
            "seconds": self.seconds,
            "phases": self.phases,
            "tokens": self.tokens,
            "dollars": self.dollars,
            "assumptions": self.assumptions,
        }


def ppo_step(config: Config, cluster: Cluster, nodes: Sequence[Node], cuda: bool = True) -> Step:
    """Tokens, seconds and cost of a step.

    Args:
        cuda: whether roles stand on GPUs; otherwise speeds are those of an assumed CPU.
    """
    speed, tokens = speed_of(config, cluster, nodes, cuda), lengths(config)
    phases = {name: work.seconds(speed) for name, work in work_of(config, tokens).items()}
    gpus = sum(node.gpus for node in nodes)
    dollars = cluster.price * gpus * sum(phases.values()) / 3600 if cluster.price and gpus else None
    speeds = [
        f"{ARITHMETIC:.0%} of {cluster.gpu_tflops:g} TFLOP/s, {READING:.0%} of {cluster.gpu_bandwidth_gb:g} GB/s in decoding, "
        f"{LAYER * 1e6:.0f} us a layer at least: fitted to DeepSpeed-Chat's published times",
        f"{EXCHANGE:.0%} of the {'network' if len(nodes) > 1 else 'links'}, {STORE_GB:g} GB/s through the object store, {HOST_GB:g} GB/s "
        "to host memory: assumed",
    ] if cuda else [
        f"{CPU_FLOPS / 1e9:g} GFLOP/s a thread, {CPU_BYTES / 1e9:g} GB/s, {CPU_LAYER * 1e6:.0f} us a layer at least: assumed of any CPU"
    ]  # fmt: skip
    paid = f"${cluster.price:g} for each GPU and hour (cluster.price), an assumption; every GPU of the cluster is paid for, in use or not"
    free = "no cost is planned: cluster.price=0" if gpus else "no cost is planned: there is no GPU to pay for"
    replies = f"prompts of {tokens.prompt:g} and replies of {tokens.reply:g} tokens, none shorter"
    found = [replies, *speeds, free if dollars is None else paid]
    return Step(phases, config.ppo.batch * int(tokens.prompt + tokens.reply), dollars, found)


def speed_of(config: Config, cluster: Cluster, nodes: Sequence[Node], cuda: bool) -> Speed:
    return of_cluster(cluster, len(nodes)) if cuda else of_cpu(config)


def known(cluster: Cluster, nodes: Sequence[Node]) -> Cluster:
    """With the speeds of the nodes' GPUs, where the description says none (`cluster=live`) and they are of one known kind. The network
    between nodes is then taken to be as fast as their links: less cannot be planned."""
    kinds = {next((kind for kind in KNOWN if kind in node.gpu_name), None) for node in nodes if node.gpus}
    (kind,) = kinds if len(kinds) == 1 else (None,)
    if cluster.gpu_tflops > 0 or kind is None:
        return cluster
    tflops, bandwidth, link = KNOWN[kind]
    return replace(cluster, gpu_tflops=tflops, gpu_bandwidth_gb=bandwidth, link_gb=link, network_gb=link)


def of_cpu(config: Config) -> Speed:
    """A rank without a GPU; all are taken to be as fast as the policy's."""
    return Speed(CPU_FLOPS * config.placement.policy.threads, CPU_BYTES, CPU_BYTES, 1.0, 1.0, 1.0, CPU_LAYER)


def of_cluster(cluster: Cluster, nodes: int) -> Speed:
    network = cluster.network_gb if nodes > 1 else cluster.link_gb
    return Speed(cluster.gpu_tflops * 1e12, cluster.gpu_bandwidth_gb * 1e9, network * 1e9, ARITHMETIC, READING, EXCHANGE, LAYER)


def lengths(config: Config, reply: int | None = None) -> Lengths:
    """The longest that they may be: prompts as long as replies where the context has room.

    Args:
        reply: tokens of the longest reply; by default PPO's.
    """
    context, reply = longest(config), reply or config.ppo.max_new_tokens
    prompt = max(min(reply, context - reply), 1)
    return Lengths(prompt, reply, prompt, reply)


def work_of(config: Config, tokens: Lengths, cache_passes: int = CACHE_PASSES) -> dict[str, Work]:
    """Work of the busiest device in each phase; where roles share devices, of all of them together.

    Args:
        cache_passes: how often each token moves the keys and values of all before it; 1 where they stay in place.
    """
    return {phase: _together(config, works) for phase, works in by_role(config, tokens, cache_passes).items()}


def by_role(config: Config, tokens: Lengths, cache_passes: int = CACHE_PASSES) -> dict[str, dict[str, Work]]:
    """Work of one device of each role that has some, in each phase."""
    policy, scorer = language_model(config), scalar_model(config)
    place, ppo, length = config.placement, config.ppo, tokens.prompt + tokens.reply
    low = number_bytes(config)
    passes = {"reference": policy, "reward": scorer, "critic": scorer, "policy": policy}
    present = {role: shape for role, shape in passes.items() if role in config.roles_of_ppo() or role == "reference"}
    score = {
        role: forward(config, shape, ppo.batch, length, getattr(place, role if role in config.roles_of_ppo() else "policy").ranks)
        for role, shape in present.items()
    }
    learn = {role: _learn(config, role, shape, length, low) for role, shape in present.items() if role in ("policy", "critic")}
    sync = Work(fixed=through_store(policy.parameters * 4))
    generate = sampling(config, tokens, ppo.batch, cache_passes)
    return {"generate": {"rollout": generate}, "score": score, "learn": learn, "sync": {"policy": sync}}


def number_bytes(config: Config) -> int:
    return 2 if config.dtype() == "bf16" else 4


def through_store(size: float) -> float:
    """Seconds that so many bytes of weights take: one copy in, one out."""
    return 2 * size / (STORE_GB * 1e9)


def _together(config: Config, works: dict[str, Work]) -> Work:
    """Of roles that share devices the sum, of others the one with most arithmetic."""
    if config.placement.share or not config.placement.devices:
        return sum(works.values(), Work())
    return max(works.values(), key=lambda work: work.flops)


def sampling(config: Config, tokens: Lengths, replies: float, cache_passes: int = CACHE_PASSES) -> Work:
    """Of one device of a rollout engine, when all engines together are asked for so many replies."""
    shape, place, low = language_model(config), config.placement.rollout, number_bytes(config)
    mine = replies / place.ranks
    rounds = ceil(mine / (config.rollout.sequences if isinstance(config.rollout, VLLMRollout) else config.engine.rollout_batch))
    rows = mine / rounds
    prompt, reply = tokens.longest_prompt, tokens.reply  # an engine's batch is padded to its longest prompt
    prefill = shape.forward_flops(mine * prompt, prompt) / place.tensor_parallel
    decode = shape.forward_flops(mine * reply, 2 * prompt + reply) / place.tensor_parallel
    weights = shape.active * low / place.tensor_parallel
    cache = shape.cache(int(rows * (prompt + reply / 2)), low) / place.tensor_parallel
    drawing = 4 * SAMPLING_PASSES * mine * reply * shape.vocabulary
    read = rounds * (tokens.longest_reply * weights + reply * cache_passes * cache) + drawing
    return Work(prefill + decode, read, 0.0, rounds * (tokens.longest_reply + 1) * shape.layers)


def forward(config: Config, shape: Shape, rows: float, length: float, ranks: int) -> Work:
    """Of one rank, when all ranks together pass so many rows."""
    mine = rows / ranks
    pieces = ceil(mine / config.engine.rows_of(ceil(length)))
    traffic = pieces * shape.parameters * number_bytes(config) if config.zero_stage() == 3 and ranks > 1 else 0.0
    return Work(shape.forward_flops(mine * length, length), 0.0, traffic, pieces * shape.layers)


def training_step(config: Config, shape: Shape, rows: float, length: float) -> Work:
    """Of one rank of a training stage: forward and backward passes over its part of a batch, and the optimizer's step."""
    ranks = config.placement.train.ranks
    recomputed = 1 if config.activation_checkpointing() else 0
    return forward(config, shape, rows, length, ranks).times(3 + recomputed) + _adam(config, shape, ranks, number_bytes(config))


def _learn(config: Config, role: str, shape: Shape, length: float, low: int) -> Work:
    ppo, ranks = config.ppo, getattr(config.placement, role).ranks
    recomputed = 1 if config.activation_checkpointing() else 0
    once = forward(config, shape, ppo.batch, length, ranks)
    total = once.times((3 + recomputed) * ppo.epochs)
    if role == "policy" and ppo.ptx > 0:
        steps = ppo.epochs * ppo.minibatches
        total += forward(config, shape, ppo.ptx_batch * steps, longest(config), ranks).times(3 + recomputed)
    return total + _adam(config, shape, ranks, low).times(ppo.epochs * ppo.minibatches)


def _adam(config: Config, shape: Shape, ranks: int, low: int) -> Work:
    """One optimizer step: reduced gradients, states read and written, new weights for everybody."""
    cuda = config.placement.policy.gpus > 0
    stage = stage_in_force(config.zero_stage(), config.dtype(), cuda)
    share = shape.parameters / (ranks if stage else 1)
    exchanged = shape.parameters * low * 2.0 if ranks > 1 and stage < 3 else 0.0
    if config.offload_optimizer() != "none" and config.zero_stage():
        return Work(exchanged=exchanged, fixed=share * (2 * low / (HOST_GB * 1e9) + 28 / (HOST_ADAM_GB * 1e9)))
    return Work(exchanged=exchanged, read=share * 28)
