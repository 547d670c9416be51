"""Bundles of a placement group, and which rank goes into which.

Ray puts bundles wherever there is room. Those of one shape can stand in for each other, so they are dealt out in the order of their
nodes: ranks of a role then sit together, and so do the nodes of a role.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from orchestration.bundles import Bundle, unplaced
from orchestration.errors import RunError

OWN = 1
"""Bundles of an injected placement group that come before those for ranks: the first is the driver's own."""


@dataclass(frozen=True)
class Slot:
    """A rank's place in the placement group."""

    bundle: int
    node: int
    """Number of its node in the order of nodes."""


@dataclass(frozen=True)
class Reservation:
    """Bundles that are ours until they are given back."""

    group: PlacementGroup
    injected: bool
    slots: dict[tuple[str, int], Slot]
    """Of each (role, rank)."""

    def give_back(self) -> None:
        """Remove the placement group, unless whoever started this driver made it."""
        if not self.injected:
            remove_placement_group(self.group)


def reserve(wanted: Sequence[Bundle], seconds: float, may_grow: bool) -> Reservation:
    """Reserve the bundles: in the placement group that this driver runs in, if it runs in one, otherwise in one of its own.

    Args:
        seconds: how long to wait for them, `deadlines.start`.
        may_grow: nodes may yet join the cluster, so what it has now decides nothing.

    Raises:
        RunError: they cannot be had.
    """
    current = ray.util.get_current_placement_group()
    if current is not None:
        given = [(spec.get("CPU", 0.0), spec.get("GPU", 0.0)) for spec in current.bundle_specs]
        found = deal(wanted, given, nodes_of(current), first=OWN)
        return Reservation(current, True, found)
    if not may_grow and unplaced(wanted, node_resources()):
        raise RunError(_refusal(wanted, seconds))
    group = placement_group([bundle.resources() for bundle in wanted], strategy="PACK")
    if not group.wait(seconds):
        remove_placement_group(group)
        raise RunError(_refusal(wanted, seconds))
    given = [(bundle.cpus, bundle.gpus) for bundle in wanted]
    return Reservation(group, False, deal(wanted, given, nodes_of(group)))


def deal(
    wanted: Sequence[Bundle], given: Sequence[tuple[float, float]], nodes: Sequence[int], first: int = 0
) -> dict[tuple[str, int], Slot]:
    """A bundle that was given for each that is wanted: in order, the first left on the first node that is large enough and no larger than
    it must be.

    Args:
        given: (CPUs, GPUs) of each bundle.
        nodes: number of each bundle's node.
        first: the bundles before this one are not for ranks.

    Raises:
        RunError: there is none left for some bundle.
    """
    left = sorted(range(first, len(given)), key=lambda number: (nodes[number], number))
    slots: dict[tuple[str, int], Slot] = {}
    for bundle in wanted:
        fitting = [number for number in left if bundle.fits(*given[number])]
        if not fitting:
            raise RunError(_too_few(bundle, wanted, given, first))
        chosen = min(fitting, key=lambda number: (given[number][1], given[number][0], nodes[number], number))
        left.remove(chosen)
        slots |= {who: Slot(chosen, nodes[chosen]) for who in bundle.ranks}
    return slots


def nodes_of(group: PlacementGroup) -> list[int]:
    """For each bundle the number of its node, nodes being ordered by address (and by id, where they share one)."""
    found: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    order = sorted(set(found.values()), key=lambda node: (_sortable(addresses.get(node, "")), node))
    return [order.index(found[bundle]) for bundle in range(len(found))]


def _sortable(address: str) -> tuple[int, int, str]:
    """Addresses in the order of their numbers: 10.0.0.9 comes before 10.0.0.10."""
    try:
        parsed = ipaddress.ip_address(address)
        return parsed.version, int(parsed), ""
    except ValueError:
        return 9, 0, address


def node_resources() -> list[tuple[float, float]]:
    """(CPUs, GPUs) of each node that is alive, in use or not."""
    alive: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def _refusal(wanted: Sequence[Bundle], seconds: float) -> str:
    cpus, gpus = sum(bundle.cpus for bundle in wanted), sum(bundle.gpus for bundle in wanted)
    have, free = ray.cluster_resources(), ray.available_resources()
    return (
        f"the cluster could not reserve {cpus:g} CPUs and {gpus:g} GPUs in {len(wanted)} bundles within deadlines.start={seconds:g} s; "
        f"it has {have.get('CPU', 0):g} CPUs ({free.get('CPU', 0):g} free) and {have.get('GPU', 0):g} GPUs ({free.get('GPU', 0):g} free). "
        "Choose a smaller `placement`, or free resources."
    )


def _too_few(bundle: Bundle, wanted: Sequence[Bundle], given: Sequence[tuple[float, float]], first: int) -> str:
    names = ", ".join(f"{role} rank {rank}" for role, rank in bundle.ranks)
    shapes = [f"{cpus:g} CPU {gpus:g} GPU" for cpus, gpus in given[first:]]
    return (
        f"the placement group that this run was started in has {len(shapes)} bundles beside the driver's own "
        f"({'; '.join(shapes) or 'none'}), and none is left for {names}, which needs {bundle.cpus:g} CPU and {bundle.gpus:g} GPU. "
        f"Give it {len(wanted)} bundles after the driver's, as orchestration/bundles.py lists them, or choose a smaller `placement`."
    )
