"""What is checked against the live cluster before anything starts (`preflight`): can it hold this run, and will its nodes work together?

First what is known at once (room for the bundles), then what every node is asked. A finding says the value, its cause, and the setting to
change. With `preflight=strict` a grave one refuses the request: exit code 2, nothing was started or written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from conf.schema import PPO_ROLES, Config
from orchestration.bundles import Bundle, bundles, training_bundles, unplaced
from orchestration.errors import RequestError
from orchestration.planner.machines import GIB, Node
from orchestration.planner.plan import plan
from orchestration.planner.remedies import with_remedies
from orchestration.planner.waits import too_short
from orchestration.runtime.facts import Survey, in_gib, named, offered, survey

TRAINED = ("pretrain", "sft", "reward_model")
"""Stages whose ranks Ray Train places."""
MIB = 1 << 20
LEAST_DISK, LITTLE_DISK = 256 * MIB, 5 * GIB
"""Free disk below which nothing can be written, and below which it is said."""
SKEW_SECONDS = 30.0
"""Difference between two nodes' clocks that is said: the times in metrics and logs then do not line up."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as a run needs it."""

    text: str
    """Value, cause, and the setting to change."""
    grave: bool
    """The run cannot work; otherwise it may be slower, or nothing is known."""


Planned = Callable[[Config, Sequence[Node], Sequence[str]], list[Finding]]
"""(settings, nodes, stages to run) -> what does not fit into these nodes, or not into the deadlines."""


def planned(config: Config, nodes: Sequence[Node], stages: Sequence[str]) -> list[Finding]:
    """The planner's verdict on memory and disk, with the smallest changes that would make it fit, and on deadlines; nothing of a single
    process, whose roles share more than the planner knows, and wait for nobody. A CPU's speed is assumed: a deadline that is too short by
    it is said, and refuses nothing."""
    if config.runtime == "local" or not nodes:
        return []
    wanted = dataclasses.replace(config, stage=stages[0]) if len(stages) == 1 else config  # type: ignore[arg-type]  # one of STAGES
    roomy = [dataclasses.replace(node, shm=max(node.shm, config.ray.object_store_mb * MIB)) for node in nodes]  # `_object_store` judges it
    found = with_remedies(wanted, plan(wanted, roomy))
    remedies = "; or ".join(" ".join(remedy.changes) for remedy in found.remedies[:3])
    advice = f"; what would fit: {remedies}" if remedies else "; see chatray plan with the same settings"
    assumed = not any(getattr(config.placement, role).gpus for role in ("train", *PPO_ROLES))
    late = [Finding(reason, grave=not assumed) for reason in too_short(found.waits, stages)]
    return [Finding(f"{reason}{advice}", grave=True) for reason in found.reasons] + late


def check(
    config: Config, stages: Sequence[str], connect: Callable[[], object], say: Callable[[str], None], memory: Planned = planned
) -> None:
    """Check as `preflight` says; `warn` prints what was found.

    Args:
        stages: those that are going to run.
        connect: connects to the cluster of `ray.address`.

    Raises:
        RequestError: `strict`, and something grave was found.
        RunError: there is no cluster at `ray.address`.
    """
    if config.preflight == "off" or not stages:
        return
    if config.runtime == "ray" and config.ray.address:
        connect()
    found = room(config, stages)
    if not any(finding.grave for finding in found):  # no node need be asked when the run has no room anyway
        seen = survey(config)
        found += [*machines(config, seen), *memory(config, seen.nodes(), stages)]
    grave = [finding.text for finding in found if finding.grave]
    for finding in found:
        if config.preflight == "warn" or not finding.grave:
            say(f"preflight: {finding.text}")
    if grave and config.preflight == "strict":
        raise RequestError(
            [*(f"preflight: {text}" for text in grave), "preflight=strict: nothing was started; preflight=warn tries all the same"]
        )


def wanted_bundles(config: Config, stages: Sequence[str]) -> dict[str, list[Bundle]]:
    """Stage -> the bundles that it reserves; those of different stages are not reserved at the same time."""
    roles = {"ppo": config.roles_of_ppo(), "evaluate": ["rollout", "reference", "reward"], "compare": ["rollout"]}
    trained = {stage: training_bundles(config.placement) for stage in stages if stage in TRAINED}
    return trained | {stage: bundles(config.placement, roles[stage]) for stage in stages if stage in roles}


def room(config: Config, stages: Sequence[str]) -> list[Finding]:
    """Whether every bundle fits some node, and all of a stage together fit the nodes, whatever runs on them now."""
    if config.runtime == "local":
        return []
    nodes, found, seen = offered(config), [], set()
    for stage, wanted in wanted_bundles(config, stages).items():
        shape = tuple(wanted)
        if shape in seen:
            continue
        seen.add(shape)
        homeless = unplaced(wanted, [(cpus, gpus) for _, cpus, gpus in nodes])
        if homeless:
            found.append(Finding(_no_room(config, stage, wanted, homeless, nodes), grave=True))
    return found


def _no_room(
    config: Config, stage: str, wanted: Sequence[Bundle], homeless: Sequence[Bundle], nodes: Sequence[tuple[str, float, float]]
) -> str:
    """Which bundles find no room, how much is missing, and what to do."""
    roles = sorted({role for bundle in homeless for role, _ in bundle.ranks})
    largest = max(homeless, key=lambda bundle: (bundle.gpus, bundle.cpus))
    settings = ", ".join(f"placement.{role}.ranks={getattr(config.placement, role).ranks}" for role in roles)
    have = f"{len(nodes)} node(s) with {sum(n[1] for n in nodes):g} CPUs and {sum(n[2] for n in nodes):g} GPUs in all"
    needed = f"{sum(b.cpus for b in wanted):g} CPUs and {sum(b.gpus for b in wanted):g} GPUs in {len(wanted)} bundles"
    missing = [f"{amount:g} {kind}" for kind, amount in _missing(homeless).items() if amount]
    if not any(largest.fits(cpus, gpus) for _, cpus, gpus in nodes):
        cause = f"a bundle of {largest.cpus:g} CPUs and {largest.gpus:g} GPUs is more than any node has"
    else:
        cause = (
            f"after all others are placed {len(homeless)} bundle(s) find no node with {largest.cpus:g} CPUs and {largest.gpus:g} GPUs free"
        )
    kind = "GPUs" if any(b.gpus for b in homeless) else "CPUs"
    lower = "placement.devices" if config.placement.devices > 1 else f"placement.{roles[0]}.ranks"
    sharing = "" if config.placement.share else ", or share devices with placement=colocated"
    remedy = f"Lower {lower} (now {settings}), add nodes{sharing}" if kind == "GPUs" else (
        f"Lower {settings} or placement.{roles[0]}.cpus, or add nodes"
    )  # fmt: skip
    return f"stage {stage} needs {needed}, the cluster has {have}: {' and '.join(missing)} missing; {cause}. {remedy}."


def _missing(homeless: Sequence[Bundle]) -> dict[str, float]:
    return {"CPUs": sum(b.cpus for b in homeless) if not any(b.gpus for b in homeless) else 0.0, "GPUs": sum(b.gpus for b in homeless)}


def machines(config: Config, seen: Survey) -> Iterator[Finding]:
    """What the nodes said of themselves, and the ones that said nothing."""
    for name, why in seen.silent:
        yield Finding(f"{name}: {why}; look at that node's raylet, install chatray there, or remove it from the cluster", grave=True)
    yield from _disks(config, seen)
    yield from _object_store(config, seen)
    yield from _devices(seen)
    if "nvme" in (config.offload_optimizer(), config.offload_parameters()):
        yield from _async_io(config, seen)
    if config.ray.address:
        yield from _exposure(config, seen)
    if len(seen.machines) > 1:
        yield from _storage(config, seen)
        yield from _differences(seen)
        yield from _clocks(seen)


BUILD = "python -c 'from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()'"


def _async_io(config: Config, seen: Survey) -> Iterator[Finding]:
    """DeepSpeed's extension for files, which it builds when it is first used."""
    for machine in seen.machines:
        name, tools = machine.node.name, machine.tools
        missing = [tool for tool in ("c++", "libaio.h") if not tools.get(tool)]
        if lock := tools.get("unfinished build"):
            yield Finding(f"{name}: the build of {lock} was ended half way, ranks would wait for async_io for ever; delete it", grave=True)
        elif not tools.get("async_io") and missing:
            yield Finding(
                f"{name}: engine.offload_optimizer or engine.offload_parameters is nvme, and {' and '.join(missing)} is not there to build "
                "DeepSpeed's async_io with (Debian: apt-get install g++ libaio-dev); install it, or offload to cpu",
                grave=True,
            )
        elif not tools.get("async_io"):
            yield Finding(
                f"{name}: DeepSpeed's async_io is not built yet, which takes minutes at the first start (deadlines.start="
                f"{config.deadlines.start:g}); build it beforehand: {BUILD}",
                grave=False,
            )


def _disks(config: Config, seen: Survey) -> Iterator[Finding]:
    for machine in seen.machines:
        for folder, space, setting in (
            (config.run_dir, machine.run_disk, "run_dir"), ("temporary files", machine.temp_disk, "TMPDIR"),
        ):  # fmt: skip
            if space < LITTLE_DISK:
                yield Finding(
                    f"{machine.node.name}: {in_gib(space)} free for {folder}: commits and exports may not find room; free some, lower "
                    f"commit.keep={config.commit.keep}, or set {setting} to another disk",
                    grave=space < LEAST_DISK,
                )


def _object_store(config: Config, seen: Survey) -> Iterator[Finding]:
    """Ray takes the disk when /dev/shm is too small: slow, not wrong."""
    store = config.ray.object_store_mb * MIB
    for machine in seen.machines:
        if not config.ray.address and config.runtime == "ray" and machine.node.shm < store:
            yield Finding(
                f"{machine.node.name}: /dev/shm has {in_gib(machine.node.shm)}, less than "
                f"ray.object_store_mb={config.ray.object_store_mb}: Ray will keep objects on disk, which is slow; lower it, or start the "
                "container with a larger --shm-size",
                grave=False,
            )


def _devices(seen: Survey) -> Iterator[Finding]:
    for machine in seen.machines:
        if machine.node.gpus > len(machine.gpus):
            yield Finding(
                f"{machine.node.name}: Ray offers {machine.node.gpus:g} GPUs, the driver shows {len(machine.gpus)}: nothing is known "
                "of their memory; see `nvidia-smi` there",
                grave=False,
            )


CLOSE = (
    "start Ray with RAY_AUTH_MODE=token, and with RAY_USE_TLS=1 and its certificates where others see the network; or keep others out with "
    "a firewall (cluster/README.md, Who reaches a cluster)"
)


def _exposure(config: Config, seen: Survey) -> Iterator[Finding]:
    """Nodes whose Ray runs what anybody sends it."""
    open_to_all = [machine for machine in seen.machines if machine.exposure.ports and not (machine.exposure.token or machine.exposure.tls)]
    if not open_to_all:
        return
    example = f"{open_to_all[0].node.name}: {named(open_to_all[0].exposure.ports)}"
    yield Finding(
        f"ray.address={config.ray.address}: the Ray of {len(open_to_all)} of {len(seen.machines)} nodes asks nobody for a token: whoever "
        f"reaches it runs code there and reads what the run computes ({example}); {CLOSE}",
        grave=False,
    )


def _storage(config: Config, seen: Survey) -> Iterator[Finding]:
    apart = [machine.node.name for machine in seen.machines if machine.token != seen.token]
    if apart:
        yield Finding(
            f"run_dir={config.run_dir}: {len(apart)} of {len(seen.machines)} nodes do not see what the driver writes there "
            f"({named(apart)}); set run_dir to storage that all nodes share",
            grave=True,
        )


def _differences(seen: Survey) -> Iterator[Finding]:
    """Versions and code that are not the same on all nodes; the most common one counts as right."""
    facts = {name: [machine.versions.get(name, "missing") for machine in seen.machines] for name in seen.machines[0].versions}
    facts |= {"CUDA of torch": [machine.cuda for machine in seen.machines], "chatray's source": [machine.code for machine in seen.machines]}
    for what, values in facts.items():
        if different := _odd_ones(seen, values):
            yield Finding(f"{what} differs: {different}; install the same on every node", grave=True)
    drivers = [machine.gpus[0].driver if machine.gpus else "" for machine in seen.machines]
    if len({driver for driver in drivers if driver}) > 1:  # nodes without GPUs have none
        yield Finding(f"GPU driver differs: {_odd_ones(seen, drivers)}; collectives between them may fail", grave=False)


def _odd_ones(seen: Survey, values: Sequence[str]) -> str:
    """Which nodes have another value than most; "" if none."""
    usual = max(sorted(set(values)), key=values.count)
    other = [f"{machine.node.name} has {value or 'none'}" for machine, value in zip(seen.machines, values, strict=True) if value != usual]
    return f"most nodes have {usual or 'none'}, {named(other)}" if other else ""


def _clocks(seen: Survey) -> Iterator[Finding]:
    for machine in seen.machines:
        ahead = max(machine.clock - (seen.asked + seen.took), 0) - max(seen.asked - machine.clock, 0)
        if abs(ahead) > SKEW_SECONDS:
            yield Finding(f"{machine.node.name}: its clock is {ahead:+.0f} s from the driver's; start a time service there", grave=False)
