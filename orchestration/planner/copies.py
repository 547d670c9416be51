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
DRIVER_BYTES = 800 << 20
"""Memory of a driver's process: torch and transformers, and the corpus."""


def trial_bundles(config: Config) -> list[Bundle]:
    """What the roles of one run of PPO reserve; with `runtime=local` they are in the driver's own process."""
    return bundles(config.placement, config.roles_of_ppo()) if config.runtime == "ray" else []


def driver_of(config: Config, cpus: float) -> float:
    """CPUs of a run's driver: with `runtime=local` it computes as well, and has one at least."""
    return cpus if config.runtime == "ray" else max(cpus, 1.0)


def copies(config: Config, nodes: Sequence[Node], driver: float, most: int = MOST) -> int:
    """Runs that fit at a time, by CPUs, GPUs and, as the planner has it, memory.

    Args:
        driver: CPUs of each run's driver, where it only coordinates.
    """
    wanted = [Bundle(driver_of(config, driver), 0.0, ()), *trial_bundles(config)]
    room = [(node.cpus, node.gpus) for node in nodes]
    placed = 0
    while placed < most and not unplaced(wanted * (placed + 1), room):
        placed += 1
    return min(placed, _by_memory(config, nodes, most))


def _by_memory(config: Config, nodes: Sequence[Node], most: int) -> int:
    """Runs that fit into the nodes' memory, and where they share GPUs into that of those; one at least, since whether a single one fits is
    for preflight to say."""
    if config.runtime == "local":  # one process, for small models
        return max(int(sum(node.host_memory for node in nodes) * USABLE) // (2 * DRIVER_BYTES), 1)
    part = plan(dataclasses.replace(config, stage="ppo"), nodes, timed=False).parts[0]
    there = max(sum(1 for placed in part.layout.placed if placed.bundles), 1)
    found = int(sum(node.host_memory for node in nodes) * USABLE) // (part.host * there + DRIVER_BYTES)
    devices = sum(len(placed.devices) for placed in part.layout.placed)
    if part.device and devices:
        each = int(min(node.gpu_memory for node in nodes if node.gpus) * USABLE) // part.device
        found = min(found, int(sum(node.gpus for node in nodes)) * each // devices)
    return max(min(found, most), 1)
