"""How many runs of PPO fit beside each other: the trials of a sweep that run at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from conf.schema import Config
from orchestration.bundles import Bundle, bundles, unplaced
from orchestration.planner.machines import Node
from orchestration.planner.plan import USABLE, plan

MOST = 1024
"""Copies that are looked for at most."""


def trial_bundles(config: Config) -> list[Bundle]:
    """What the roles of one run of PPO reserve; with `runtime=local` they are in the driver's own process."""
    return bundles(config.placement, config.roles_of_ppo()) if config.runtime == "ray" else []


def copies(config: Config, nodes: Sequence[Node], driver: float, most: int = MOST) -> int:
    """Runs that fit at a time, by CPUs, GPUs and, as the planner has it, memory.

    Args:
        driver: CPUs of each run's driver.
    """
    wanted = [Bundle(driver, 0.0, ()), *trial_bundles(config)]
    room = [(node.cpus, node.gpus) for node in nodes]
    placed = 0
    while placed < most and not unplaced(wanted * (placed + 1), room):
        placed += 1
    return min(placed, _by_memory(config, nodes, most))


def _by_memory(config: Config, nodes: Sequence[Node], most: int) -> int:
    """Runs whose roles fit into the nodes' memory, and where runs share GPUs into that of those; all of them where memory is unknown."""
    if config.runtime == "local":
        return most
    part = plan(dataclasses.replace(config, stage="ppo"), nodes, timed=False).parts[0]
    there = max(sum(1 for placed in part.layout.placed if placed.bundles), 1)
    found = int(sum(node.host_memory for node in nodes) * USABLE) // max(part.host * there, 1)
    devices = sum(len(placed.devices) for placed in part.layout.placed)
    if part.device and devices:
        each = int(min(node.gpu_memory for node in nodes if node.gpus) * USABLE) // part.device
        found = min(found, int(sum(node.gpus for node in nodes)) * each // devices)
    return min(found, most)
