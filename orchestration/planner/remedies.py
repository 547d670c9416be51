"""What to change so that a plan fits: single changes are tried, then pairs, then triples, each by planning again. The smallest are first.

Small is what changes least of what is learned and asked for: first what costs time alone, then what moves states off the devices, then
other ranks or more machines, last another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import combinations, islice
from typing import Any

from conf.schema import PPO_ROLES, Config
from orchestration import config as configuration
from orchestration.planner.machines import Node
from orchestration.planner.plan import Plan, plan

MOST = 5
"""Remedies that are given at most."""
LADDER = ("175b", "66b", "30b", "13b", "6.7b", "2.7b", "1.3b", "350m", "125m", "tiny", "micro")
MOST_NODES = 4
"""Times as many nodes as there are that are tried at most."""
TRIES = {1: 100, 2: 120, 3: 120}
"""Plans that are made for single changes, pairs and triples at most: an answer is wanted in seconds."""


@dataclass(frozen=True)
class Change:
    """One thing to do, as overrides, and the configuration and machines that it leads to."""

    family: str
    """Changes of one family exclude each other."""
    words: tuple[str, ...]
    values: dict[str, Any]
    nodes: int = 0
    """More nodes than there are."""


@dataclass(frozen=True)
class Remedy:
    """Changes that make it fit, planned and found to."""

    changes: tuple[str, ...]
    """Overrides."""
    binds: str
    """What is nearest to its limit then."""


def with_remedies(config: Config, found: Plan) -> Plan:
    """The plan with the changes that would make it fit, if it does not."""
    return found if found.fits else replace(found, remedies=remedies(config, found.nodes))


def remedies(config: Config, nodes: Sequence[Node]) -> list[Remedy]:
    """Single changes that fit; where none does, pairs, then triples; then a smaller model. Of a family only the smallest is given."""
    choices = list(changes(config, nodes))
    known = set(configuration.contradictions(config, reads_data=False))
    for size, tries in TRIES.items():
        fitting: list[Remedy] = []
        solved: set[tuple[str, ...]] = set()
        for chosen in islice(_combined(choices, size), tries):
            names = tuple(change.family for change in chosen)
            if names in solved:
                continue
            remedy = _tried(config, nodes, chosen, known)
            if remedy:
                fitting.append(remedy)
                solved.add(names)
                if len(fitting) == MOST:
                    break
        if fitting:
            return fitting
    return _smaller(config, nodes, known)


def _combined(choices: list[Change], size: int) -> Iterator[tuple[Change, ...]]:
    """Changes of different families. In pairs and triples the strongest of each family stand for it, which bounds the search."""
    if size > 1:
        last = {change.family: change for change in choices}
        choices = [change for change in choices if last[change.family] is change or change.family == "devices"]
    for chosen in combinations(choices, size):
        if len({change.family for change in chosen}) == size:
            yield chosen


def _tried(config: Config, nodes: Sequence[Node], chosen: Sequence[Change], known: set[str]) -> Remedy | None:
    more = [*nodes, *[replace(nodes[-1], name=f"node {len(nodes) + n}") for n in range(max((c.nodes for c in chosen), default=0))]]
    tried = config
    for change in chosen:
        tried = changed(tried, change.values)
    if set(configuration.contradictions(tried, reads_data=False)) - known:
        return None
    found = plan(tried, more, timed=False)
    return Remedy(tuple(word for change in chosen for word in change.words), found.binds) if found.fits else None


def _smaller(config: Config, nodes: Sequence[Node], known: set[str]) -> list[Remedy]:
    """A smaller model, where nothing else helps."""
    if config.model.path or config.scale.name not in LADDER:
        return []
    for name in LADDER[LADDER.index(config.scale.name) + 1 :]:
        scale = configuration.load([f"scale={name}"]).scale
        if max(config.ppo.max_new_tokens, config.compare.max_new_tokens) >= scale.context:
            continue
        found = _tried(config, nodes, [Change("scale", (f"scale={name}",), {"scale": scale})], known)
        if found:
            return [found]
    return []


def changes(config: Config, nodes: Sequence[Node]) -> Iterator[Change]:
    """Single changes, the smallest first."""
    yield from _less_at_once(config)
    yield from _sharded(config)
    yield from _engines(config)
    yield from _offloaded(config)
    yield from _ranks(config, nodes)
    yield from _machines(config, nodes)
    if not config.lora.rank:
        yield _set("adapters", {"lora.rank": 16})


def _set(family: str, values: dict[str, Any], nodes: int = 0) -> Change:
    return Change(family, tuple(f"{name}={_word(value)}" for name, value in values.items()), values, nodes)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _less_at_once(config: Config) -> Iterator[Change]:
    for name in ("micro_batch" if config.engine.micro_tokens is None else "micro_tokens", "rollout_batch"):
        size = getattr(config.engine, name)
        while size > 1:
            size //= 2
            yield _set(name, {f"engine.{name}": size})
    if not config.activation_checkpointing():
        yield _set("checkpointing", {"engine.activation_checkpointing": True})
    if config.placement.share and not config.placement.sleep:
        yield _set("sleep", {"placement.sleep": True})


def _sharded(config: Config) -> Iterator[Change]:
    for stage in range(config.zero_stage() + 1, 4):
        yield _set("zero", {"engine.zero_stage": stage})


def _engines(config: Config) -> Iterator[Change]:
    rollout = config.placement.rollout
    devices = rollout.ranks * rollout.tensor_parallel
    for size in (2, 4, 8):
        if rollout.gpus and rollout.tensor_parallel < size and devices % size == 0:
            yield _set("engines", {"placement.rollout.tensor_parallel": size, "placement.rollout.ranks": devices // size})


def _offloaded(config: Config) -> Iterator[Change]:
    for what in ("offload_optimizer", "offload_parameters"):
        for where in ("cpu", "nvme"):
            values: dict[str, Any] = {f"engine.{what}": where}
            if what == "offload_parameters" or where == "nvme":
                values |= {"engine.zero_stage": 3} if config.zero_stage() < 3 else {}
            if where == "nvme" and config.engine.nvme_path is None:
                values["engine.nvme_path"] = "/local/nvme"
            if getattr(config, what)() not in (where, "nvme") and (config.zero_stage() or "engine.zero_stage" in values):
                yield _set(what, values)


def _ranks(config: Config, nodes: Sequence[Node]) -> Iterator[Change]:
    """As many ranks as there are devices, or more of one role where each has its own."""
    devices = int(sum(node.gpus for node in nodes))
    if config.placement.share:
        fitting = [n for n in range(devices, 0, -1) if n != config.placement.devices and _divides(config, n)]
        for count in fitting[:2]:
            yield _devices(config, count)
        return
    for role in PPO_ROLES:
        for factor in (2, 4):
            ranks = factor * getattr(config.placement, role).ranks
            yield _set("ranks", {f"placement.{role}.ranks": ranks})


def _devices(config: Config, count: int, nodes: int = 0) -> Change:
    place, values = config.placement, {"placement.devices": count}
    follow = {role: count for role in ("train", *PPO_ROLES) if getattr(place, role).ranks == place.devices}
    words = [f"placement.devices={count}"]
    if place.rollout.tensor_parallel > 1 and count % place.rollout.tensor_parallel == 0:
        follow["rollout"] = count // place.rollout.tensor_parallel
        words.append(f"placement.rollout.ranks={follow['rollout']}")
    return Change("devices", tuple(words), values | {f"placement.{role}.ranks": ranks for role, ranks in follow.items()}, nodes)


def _divides(config: Config, count: int) -> bool:
    return config.ppo.batch % (count * config.ppo.minibatches) == 0 and config.sft.batch % count == 0


def _machines(config: Config, nodes: Sequence[Node]) -> Iterator[Change]:
    """More machines of the last node's kind."""
    per_node = int(nodes[-1].gpus)
    for total in range(len(nodes) + 1, MOST_NODES * len(nodes) + 1):
        if not per_node:
            return
        if config.placement.devices == total * per_node or not config.placement.share:
            change = Change("devices", (f"cluster.nodes={total}",), {"cluster.nodes": total}, total - len(nodes))
        elif _divides(config, total * per_node):
            more = _devices(config, total * per_node)
            change = replace(more, words=(f"cluster.nodes={total}", *more.words), nodes=total - len(nodes))
        else:
            continue
        yield change


def changed(config: Config, values: dict[str, Any]) -> Config:
    """The configuration with other values at dotted names."""
    for name, value in values.items():
        config = _replaced(config, name.split("."), value)
    return config


def _replaced(section: Any, path: list[str], value: Any) -> Any:
    assert is_dataclass(section) and path[0] in {field.name for field in fields(section)}, path
    inner = value if len(path) == 1 else _replaced(getattr(section, path[0]), path[1:], value)
    return replace(section, **{path[0]: inner})  # type: ignore[type-var]
