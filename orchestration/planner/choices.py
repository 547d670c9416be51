"""What a plan chooses by itself where the words of the command line leave it open, and says so.

A bare `scale=175b cluster=a100x64` names machines and a model, and the defaults are those of the quickstart on two cores. So roles share
all GPUs of the cluster unless a placement was chosen; a model from elsewhere is sharded as the rung nearest in size is; and batches become
multiples of the ranks. What was chosen is in the plan's notes, as the words that a run would need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log

from conf.schema import PPO_ROLES, Config
from orchestration import config as configuration
from orchestration.contradictions import divisors, multiple_from
from orchestration.planner.machines import Node, described
from orchestration.planner.shapes import ladder, language_model


def settled(words: Sequence[str], live: Callable[[Config], list[Node]]) -> tuple[Config, list[Node], list[str]]:
    """(settings to plan with, machines, what was chosen).

    Args:
        live: the nodes that `cluster=live` stands for.

    Raises:
        RequestError: the words are wrong, or contradict each other.
    """
    config = _loaded(words, consistent=False)
    notes: list[str] = []
    named = {word.partition("=")[0] for word in words}
    if sized := _sized(config, named):
        words, notes = [*words, sized[0]], [sized[1]]
    nodes = live(config) if config.cluster.name == "live" else described(config.cluster)
    placed = _placed(config, nodes, named)
    if placed:
        words = [*words, *placed]
        notes.append(f"no placement was chosen: planned on all GPUs; a run needs {' '.join(placed)}")
    if placed or sized or "experiment" not in named:
        raised = _raised(_loaded(words, consistent=False), named)
        words = [*words, *raised]
        if raised:
            notes.append(f"batches were raised to multiples of the ranks; a run needs {' '.join(raised)}")
    return _loaded(words), nodes, notes


def _loaded(words: Sequence[str], consistent: bool = True) -> Config:
    return configuration.load(words, reads_data=False, consistent=consistent)


def _sized(config: Config, named: set[str]) -> tuple[str, str] | None:
    """For a model from elsewhere: the word for the rung nearest in size, whose ZeRO stage, offload, arithmetic and batches suit it."""
    if not config.model.path or "scale" in named:
        return None
    shape = language_model(config)
    rung = min(ladder(), key=lambda name: abs(log(ladder()[name] / shape.parameters)))
    if rung == config.scale.name:
        return None
    return f"scale={rung}", (
        f"model.path has {shape.parameters:,} parameters: ZeRO stage, offload, arithmetic and batches are those of the nearest rung; a run "
        f"needs scale={rung}, and takes those of scale={config.scale.name} without it"
    )


def _placed(config: Config, nodes: Sequence[Node], named: set[str]) -> list[str]:
    """The words that put the roles on all GPUs, if there are some and no placement was chosen that uses any."""
    gpus = int(sum(node.gpus for node in nodes))
    used = any(getattr(config.placement, role).gpus for role in ("train", *PPO_ROLES))
    if not gpus or "placement" in named or used:
        return []
    return ["placement=colocated", *([] if "placement.devices" in named else [f"placement.devices={gpus}"])]


def _raised(config: Config, named: set[str]) -> list[str]:
    """The words for batches that are no multiple of what they must be, unless they were given."""
    found = []
    for name, divisor in divisors(config).items():
        section, _, field = name.partition(".")
        value = getattr(getattr(config, section), field)
        if value % divisor and name not in named:
            found.append(f"{name}={multiple_from(value, divisor)}")
    return found
