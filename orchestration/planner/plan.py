"""The plan: what every role holds, where it stands, whether it fits, how long a step takes. Pure: nothing is started or connected to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import log
from typing import Any

from conf.machines import Cluster
from conf.schema import Config
from orchestration.bundles import Bundle
from orchestration.planner.layout import Layout, Placed, lay_out
from orchestration.planner.machines import GIB, Node
from orchestration.planner.memory import RankMemory, of_role
from orchestration.planner.shapes import language_model, longest, scalar_model
from orchestration.planner.timing import Step, known, ppo_step, speed_of
from orchestration.planner.waits import Wait, demonstrations_within, planned_waits, too_short

USABLE = 0.95
"""Share of a device's or a node's memory that is planned with; the rest is the allocator's fragmentation and the operating system."""

HOMELESS = 10.0
"""What it weighs in `Plan.excess` that no bundle has a home: more than any memory that lacks."""


@dataclass(frozen=True)
class RolePlan:
    """One role."""

    parameters: int
    ranks: int
    devices: int
    """Of each rank: more than one for an engine with tensor parallelism."""
    memory: RankMemory
    """Of each rank; of an engine with tensor parallelism, of each device."""


@dataclass(frozen=True)
class Part:
    """Ranks that are there at the same time: a training stage's, or PPO's."""

    name: str
    layout: Layout
    device: int
    """Bytes on the fullest device."""
    host: int
    """Bytes in the fullest node's memory."""
    nvme: int
    """Bytes in files of the node that has most."""


@dataclass(frozen=True)
class Plan:
    """The answer."""

    cluster: str
    nodes: list[Node]
    roles: dict[str, RolePlan]
    parts: list[Part]
    reasons: list[str]
    """Why it does not fit; empty if it does."""
    binds: str
    """The resource that is nearest to its limit."""
    excess: float
    """How far it is from fitting: logarithms of how often each resource is wanted that lacks, and the share of bundles without a home."""
    disk: int
    """Bytes of commits and exports below `run_dir`."""
    step: Step | None
    """One step of PPO."""
    waits: list[Wait]
    """What the stages wait for; empty where nothing is known of the GPUs' speed."""
    remedies: list[Any]
    """Smallest changes that make it fit, best first; filled in by `remedies.with_remedies`."""
    notes: list[str]
    """What a reader should know beside the verdict: what is idle, what was chosen for the plan, what a run would refuse."""

    @property
    def fits(self) -> bool:
        return not self.reasons


def plan(config: Config, nodes: Sequence[Node], cluster: Cluster | None = None, timed: bool = True) -> Plan:
    """Whether and how this configuration runs on these machines.

    Args:
        nodes: described (`machines.described`) or seen on a live cluster.
        cluster: speeds, for the time of a step; by default `config.cluster`.
        timed: whether times are wanted as well: of a step, and of all that is waited for.
    """
    cluster = known(cluster or config.cluster, nodes)
    kinds = groups(config)
    cuda = any(getattr(config.placement, role).gpus for roles in kinds.values() for role in roles)
    roles = {role: _role(config, role, cuda) for found in kinds.values() for role in found}
    parts = [_part(config, name, found, roles, nodes, cuda) for name, found in kinds.items()]
    disk = max((sum(roles[r].memory.on("disk") * roles[r].ranks for r in found) for found in kinds.values()), default=0)
    uses = [use for part in parts for use in _uses(config, part, nodes, cuda, disk)]
    lacking = [reason for part in parts for reason in _homeless(part, nodes)] + [u.reason for u in uses if u.wanted > u.limit]
    reasons = list(dict.fromkeys(lacking))  # the parts may lack the same
    homeless = sum(len(part.layout.homeless) / part.layout.wanted for part in parts)
    excess = HOMELESS * homeless + sum(log(use.wanted / max(use.limit, 1)) for use in uses if use.wanted > use.limit)
    nearest = max(uses, key=lambda use: use.wanted / max(use.limit, 1))
    told = cluster.gpu_tflops > 0 or not cuda
    step = ppo_step(config, cluster, nodes, cuda) if timed and "ppo" in kinds and told else None
    placed = {part.name: part.layout for part in parts}
    memory = {name: role.memory for name, role in roles.items()}
    speed = speed_of(config, cluster, nodes, cuda)
    waits = planned_waits(config, speed, memory, placed) if timed and told else []
    notes = [
        *_idle(parts, nodes),
        *_refused(config),
        f"sequences of at most {longest(config):,} tokens{'' if config.engine.longest else ', the context; engine.longest lowers it'}",
    ]
    if not told:
        notes.append(
            "no time is planned, no deadline checked: cluster.gpu_tflops=0 says nothing of the GPUs' speed; describe them with cluster="
        )
    if waits and cuda and (demonstrations := demonstrations_within(config, waits, speed)) is not None:
        notes.append(
            f"deadlines.step={config.deadlines.step:g} has room for {demonstrations:,} demonstrations of {longest(config):,} tokens, which "
            "set the reward model's zero; with more, raise it"
        )
    return Plan(cluster.name, list(nodes), roles, parts, reasons, nearest.says(), excess, disk, step, waits, [], notes)


def _idle(parts: Sequence[Part], nodes: Sequence[Node]) -> Iterator[str]:
    """GPUs that nothing stands on, by part."""
    have = int(sum(node.gpus for node in nodes))
    used = {part.name: sum(len(placed.devices) for placed in part.layout.placed) for part in parts}
    for busy in sorted(set(used.values())):
        names = [name for name, count in used.items() if count == busy]
        if busy < have:
            yield f"{have - busy} of {have} GPUs idle in {' and '.join(names)}"


def splits_engines(config: Config) -> bool:
    """Whether rollout engines can be split over devices (`placement.rollout.tensor_parallel`). The transformers engine cannot, and
    `orchestration/recipe.py` refuses to run it so."""
    return config.rollout.engine == "vllm"


def _refused(config: Config) -> Iterator[str]:
    parts = config.placement.rollout.tensor_parallel
    if parts > 1 and not splits_engines(config):
        yield f"placement.rollout.tensor_parallel={parts} needs rollout=vllm: a run with rollout=transformers refuses it"


def groups(config: Config) -> dict[str, list[str]]:
    """Roles that are there together, by what they are there for, as `stage` asks."""
    found = {"training stages": ["train"], "ppo": config.roles_of_ppo()}
    if config.stage in ("pretrain", "sft", "reward_model"):
        del found["ppo"]
    elif config.stage != "all":
        del found["training stages"]
    return found


def _role(config: Config, role: str, cuda: bool) -> RolePlan:
    place = getattr(config.placement, role)
    shape = scalar_model(config) if role in ("critic", "reward") else language_model(config)
    memory = of_role(config, role, cuda)
    return RolePlan(shape.parameters if memory.of("parameters") else 0, place.ranks, place.tensor_parallel, memory)


def _part(config: Config, name: str, found: list[str], roles: dict[str, RolePlan], nodes: Sequence[Node], cuda: bool) -> Part:
    layout = lay_out(config.placement, found, nodes)
    turns: list[str | None] = list(found) if config.placement.sleep and len(found) > 1 else [None]

    # (on the device, in host memory) of each role, at work and asleep: there are many ranks and few roles
    awake = {role: _sizes(roles[role].memory) for role in found}
    asleep = {role: _sizes(roles[role].memory.asleep()) for role in found}

    def sizes(role: str, turn: str | None) -> tuple[int, int]:
        return (awake if turn in (None, role) else asleep)[role]

    def on_device(there: list[tuple[str, int]]) -> int:
        return max(sum(sizes(role, turn)[0] for role, _ in there) for turn in turns)

    def on_host(placed: Placed) -> int:
        def turn_of(turn: str | None) -> int:
            there = [(*sizes(role, turn), roles[role].devices) for role, _ in placed.ranks]
            # a process for each device; without GPUs, what a rank computes with is in the same memory
            return sum(host * devices + (0 if cuda else device) for device, host, devices in there)

        loading = sum(roles[role].memory.starting() * roles[role].devices for role, _ in placed.ranks)  # all at the same time
        return max(loading, *map(turn_of, turns)) + (store(config) if placed.ranks else 0)

    return Part(
        name, layout,
        device=max((on_device(there) for placed in layout.placed for there in placed.devices), default=0),
        host=max(map(on_host, layout.placed), default=0),
        nvme=max((sum(roles[role].memory.on("nvme") for role, _ in placed.ranks) for placed in layout.placed), default=0),
    )  # fmt: skip


def _sizes(memory: RankMemory) -> tuple[int, int]:
    return memory.on("device"), memory.on("host")


def store(config: Config) -> int:
    """Bytes of Ray's object store on a node."""
    return config.ray.object_store_mb << 20


@dataclass(frozen=True)
class Use:
    """How much of something is wanted, beside how much there is."""

    what: str
    wanted: int
    limit: int
    remark: str = ""

    @property
    def reason(self) -> str:
        return f"{self.what}: {amount(self.wanted)} wanted, {amount(self.limit)} usable{self.remark}"

    def says(self) -> str:
        return f"{self.what}, {amount(self.wanted)} of {amount(self.limit)} usable ({self.wanted / max(self.limit, 1):.0%})"


def _uses(config: Config, part: Part, nodes: Sequence[Node], cuda: bool, disk: int) -> Iterator[Use]:
    in_use = [placed.node for placed in part.layout.placed if placed.bundles] or list(nodes)
    if cuda:
        yield Use(f"device memory in {part.name}", part.device, int(min(n.gpu_memory for n in in_use) * USABLE))
    yield Use(f"host memory in {part.name}", part.host, int(min(n.host_memory for n in in_use) * USABLE), " on one node")
    yield Use("/dev/shm", store(config), min(n.shm for n in in_use), "; lower ray.object_store_mb")
    here = disk if len(in_use) == 1 else 0
    what = f"local disk in {part.name}, files of engine.nvme_path {amount(part.nvme)} of it" if part.nvme else "local disk"
    commits = f"lower commit.keep={config.commit.keep}, or give run_dir a larger disk" if here else ""
    files = "use more nodes, or keep states in host memory (engine.offload_optimizer=cpu)" if part.nvme else ""
    yield Use(what, part.nvme + here, min(n.disk for n in in_use), "".join(f"; {word}" for word in (commits, files) if word))


def _homeless(part: Part, nodes: Sequence[Node]) -> Iterator[str]:
    left = part.layout.homeless
    if not left:
        return
    cpus, gpus = (sum(getattr(bundle, kind) for bundle in _all(part)) for kind in ("cpus", "gpus"))
    have = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    first = left[0]
    yield (
        f"{len(left)} of {part.layout.wanted} bundles of {part.name} find no room: the first one left over wants {first.cpus:g} CPUs and "
        f"{first.gpus:g} GPUs on one node for {', '.join(f'{role} rank {rank}' for role, rank in first.ranks)}; in all {cpus:g} CPUs and "
        f"{gpus:g} GPUs are wanted, and the cluster has {have[0]:g} and {have[1]:g} on {len(nodes)} nodes"
    )


def _all(part: Part) -> list[Bundle]:
    stand = [Bundle(placed.cpus, placed.gpus, ()) for placed in part.layout.placed]
    return [*stand, *part.layout.homeless]


def amount(size: float) -> str:
    """Bytes for people."""
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (1 << 20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:.0f} {name}"
    return f"{size / 1024:.0f} KiB" if size else "0"


def as_dict(found: Plan) -> dict[str, Any]:
    """For programs."""
    return {
        "fits": found.fits,
        "cluster": found.cluster,
        "nodes": len(found.nodes),
        "roles": {
            name: {"parameters": role.parameters, "ranks": role.ranks, "devices": role.devices,
                   "bytes_per_rank": role.memory.by_kind(), "by_place": role.memory.by_place()}
            for name, role in found.roles.items()
        },
        "placement": {
            part.name: [
                {"node": placed.node.name, "cpus": round(placed.cpus, 4), "gpus": round(placed.gpus, 4), "bundles": placed.bundles,
                 "devices": [[f"{role} {rank}" for role, rank in there] for there in placed.devices],
                 "ranks": [f"{role} {rank}" for role, rank in placed.ranks]}
                for placed in part.layout.placed
            ]
            for part in found.parts
        },
        "fullest": {part.name: {"device": part.device, "host": part.host, "nvme": part.nvme} for part in found.parts},
        "disk": found.disk,
        "binds": found.binds,
        "step": found.step.as_dict() if found.step else None,
        "waits": [asdict(wait) for wait in found.waits],
        "deadlines": too_short(found.waits),
        "reasons": found.reasons,
        "notes": found.notes,
        "remedies": [{"changes": list(remedy.changes), "binds": remedy.binds} for remedy in found.remedies],
    }  # fmt: skip
