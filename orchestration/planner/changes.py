"""Single things to change in a plan, by family: each family's are ordered from the mildest to the strongest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from conf.schema import PPO_ROLES, Config
from orchestration import config as configuration
from orchestration.contradictions import divisors, multiple_from
from orchestration.planner.machines import Node
from orchestration.planner.shapes import ladder, language_model, longest

TIME = (
    "micro_batch", "micro_tokens", "rollout_batch", "checkpointing", "sleep", "commits", "zero", "engines", "offload_optimizer",
    "offload_parameters",
)  # fmt: skip
"""Families that cost nothing but time, the cheapest first."""
MACHINES = ("nodes", "devices", "ranks")
METHOD = ("dtype", "reward_scale", "advantage")
"""Families that change what is learned, but not the policy's size."""
MOST_NODES = 64
SHORTEST = 256
"""Tokens; no shorter sequences are offered."""
NVME = "/local/nvme"


@dataclass(frozen=True)
class Change:
    """One thing to do, as overrides, and the configuration and machines that it leads to."""

    family: str
    """Changes of one family exclude each other."""
    words: tuple[str, ...]
    values: dict[str, Any]
    nodes: int = 0
    """More nodes than there are."""


def changes(config: Config, nodes: Sequence[Node]) -> dict[str, list[Change]]:
    """The changes of each family; families that have none are absent."""
    found: dict[str, list[Change]] = {}
    for change in _all(config, nodes):
        found.setdefault(change.family, []).append(change)
    return found


def _all(config: Config, nodes: Sequence[Node]) -> Iterator[Change]:
    yield from _less_at_once(config)
    if config.commit.keep > 1:
        yield _set("commits", {"commit.keep": 1})
    yield from (_set("zero", {"engine.zero_stage": stage}) for stage in range(config.zero_stage() + 1, 4))
    yield from _engines(config, nodes)
    yield from _offloaded(config)
    yield from _ranks(config, nodes)
    yield from _machines(config, nodes)
    yield from _method(config, nodes)
    length = longest(config) // 2
    while length >= max(SHORTEST, 2 * config.ppo.max_new_tokens):
        yield _set("longest", {"engine.longest": length})
        length //= 2
    if not config.lora.rank and (config.model.path or config.pretrain.steps):  # of random weights adapters make nothing
        yield _set("adapters", {"lora.rank": 16})
    elif not config.lora.rank:
        yield _set("adapters", {"lora.rank": 16, "lora.roles": ("policy", "critic")})


def _set(family: str, values: dict[str, Any], nodes: int = 0) -> Change:
    return Change(family, tuple(f"{name}={_word(value)}" for name, value in values.items()), values, nodes)


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(value)}]"
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


def _engines(config: Config, nodes: Sequence[Node]) -> Iterator[Change]:
    """A rollout engine's weights on more devices of a node."""
    rollout, per_node = config.placement.rollout, int(min(node.gpus for node in nodes))
    devices = rollout.ranks * rollout.tensor_parallel
    size = 2 * rollout.tensor_parallel
    while rollout.gpus and size <= per_node:
        if devices % size == 0 and per_node % size == 0:
            yield _set("engines", {"placement.rollout.tensor_parallel": size, "placement.rollout.ranks": devices // size})
        size *= 2


def _offloaded(config: Config) -> Iterator[Change]:
    for what in ("offload_optimizer", "offload_parameters"):
        for where in ("cpu", "nvme"):
            values: dict[str, Any] = {f"engine.{what}": where}
            if config.zero_stage() < 3:
                values["engine.zero_stage"] = 3
            if where == "nvme" and config.engine.nvme_path is None:
                values["engine.nvme_path"] = NVME
            if what == "offload_parameters" and config.placement.sleep:  # the two contradict each other
                values["placement.sleep"] = False
            if getattr(config, what)() not in (where, "nvme"):
                yield _set(what, values)


def _method(config: Config, nodes: Sequence[Node]) -> Iterator[Change]:
    if config.dtype() == "fp32" and any(node.gpus for node in nodes):
        yield _set("dtype", {"model.dtype": "bf16"})
    yield from _reward_sizes(config)
    if config.ppo.has_critic():
        samples = max(config.ppo.samples_per_prompt, 2)
        yield _set("advantage", {"ppo.advantage": "rloo", "ppo.samples_per_prompt": samples})


def _reward_sizes(config: Config) -> Iterator[Change]:
    """A reward model and critic of a third of the policy's parameters, or far fewer."""
    if config.reward_model.start == "own" or config.lora.trains("reward_model") or config.reward_checkpoint:
        return
    size, context = language_model(config).parameters, longest(config)
    smaller = [name for name, parameters in ladder().items() if parameters < size / 3]
    for name in dict.fromkeys((*smaller[-1:], *smaller[-3:-2])):
        scale = configuration.rung(name)
        if scale.context >= context:
            words = (f"scale@reward_scale={name}", "reward_model.start=own")
            yield Change("reward_scale", words, {"reward_scale": scale, "reward_model.start": "own"})


def _ranks(config: Config, nodes: Sequence[Node]) -> Iterator[Change]:
    """As many ranks as there are devices; or more of one role where each has its own."""
    devices = int(sum(node.gpus for node in nodes))
    if config.placement.share and devices and devices != config.placement.devices:
        yield _devices(config, devices)
    if not config.placement.share:
        for role in PPO_ROLES:
            for factor in (2, 4):
                yield _set("ranks", {f"placement.{role}.ranks": factor * getattr(config.placement, role).ranks})


def _machines(config: Config, nodes: Sequence[Node]) -> Iterator[Change]:
    """More machines of the last node's kind: for the devices that are asked for, or with all roles spread over all of them."""
    per_node, have, place = int(nodes[-1].gpus), len(nodes), config.placement
    if not per_node:
        return
    totals = sorted({*range(have + 1, have + 8), *(n * 8 for n in range(1, MOST_NODES // 8 + 1)), -(-place.devices // per_node)})
    for total in (n for n in totals if n > have):
        if not place.share or place.devices == total * per_node:
            yield Change("nodes", (f"cluster.nodes={total}",), {"cluster.nodes": total}, total - have)
        if place.share and place.devices != total * per_node:
            more = _devices(config, total * per_node)
            yield replace(more, words=(f"cluster.nodes={total}", *more.words), nodes=total - have)


def _devices(config: Config, count: int) -> Change:
    """All roles on so many devices, and batches that are multiples of them."""
    place = config.placement
    follow = {f"placement.{role}.ranks": count for role in ("train", *PPO_ROLES) if getattr(place, role).ranks == place.devices}
    values: dict[str, Any] = {"placement.devices": count}
    if place.rollout.tensor_parallel > 1:
        values["placement.rollout.ranks"] = max(count // place.rollout.tensor_parallel, 1)
    alone = place.devices == 1  # a placement of one GPU, whose ranks do not follow from `placement.devices`
    words = (*(("placement=colocated",) if alone else ()), *(f"{name}={value}" for name, value in values.items()))
    return Change("devices", words, follow | values | ({"placement.sleep": True} if alone else {}))


def combined(config: Config, chosen: Iterable[Change]) -> tuple[Config, tuple[str, ...]]:
    """(the configuration with all of these changes, their overrides), with rollout engines on all devices and whole rows on all ranks."""
    chosen = sorted(chosen, key=lambda change: change.family != "devices")  # split engines have less of the devices there are then
    words = {word.partition("=")[0]: word for change in chosen for word in change.words}  # the last that names a setting counts
    for change in chosen:
        config = changed(config, change.values)
    families = {change.family for change in chosen}
    follow: dict[str, Any] = {}
    if families >= {"devices", "engines"}:
        follow["placement.rollout.ranks"] = max(config.placement.devices // config.placement.rollout.tensor_parallel, 1)
    if families & {"devices", "engines", "ranks", "advantage"}:
        follow |= raised(changed(config, follow))
    return changed(config, follow), tuple((words | {name: f"{name}={value}" for name, value in follow.items()}).values())


def raised(config: Config) -> dict[str, int]:
    """Batches that are no multiple of what they must be -> the next one that is."""
    found = {}
    for name, divisor in divisors(config).items():
        section, _, field = name.partition(".")
        value = getattr(getattr(config, section), field)
        if value % divisor:
            found[name] = multiple_from(value, divisor)
    return found


def smaller_models(config: Config) -> Iterator[Change]:
    """The rungs below, the largest first."""
    if config.model.path or config.scale.name not in ladder():
        return
    names = list(ladder())
    for name in reversed(names[: names.index(config.scale.name)]):
        scale = configuration.rung(name)
        if max(config.ppo.max_new_tokens, config.compare.max_new_tokens, config.evaluate.max_new_tokens) < scale.context:
            batches = ("micro_batch", "rollout_batch")  # the scale's own where they were
            follow = {f"engine.{b}": getattr(scale, b) for b in batches if getattr(config.engine, b) == getattr(config.scale, b)}
            yield Change("scale", (f"scale={name}",), {"scale": scale} | follow)


def changed(config: Config, values: dict[str, Any]) -> Config:
    """The configuration with other values at dotted names."""
    for name, value in values.items():
        config = _replaced(config, name.split("."), value)
    return config


def _replaced(section: Any, path: list[str], value: Any) -> Any:
    assert is_dataclass(section) and path[0] in {field.name for field in fields(section)}, path
    inner = value if len(path) == 1 else _replaced(getattr(section, path[0]), path[1:], value)
    return replace(section, **{path[0]: inner})  # type: ignore[type-var]
