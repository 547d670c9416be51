"""Bundles on nodes and ranks on devices: packed in order, so that neighbours in the list of bundles are neighbours in the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

from conf.machines import Placement
from orchestration.bundles import Bundle, bundles
from orchestration.planner.machines import Node

SLACK = 1e-6
"""Sums of decimal fractions are a little off."""


@dataclass
class Placed:
    """A node and what stands on it."""

    node: Node
    cpus: float = 0.0
    gpus: float = 0.0
    bundles: int = 0
    devices: list[list[tuple[str, int]]] = field(default_factory=list)
    """(role, rank) of everyone on each GPU in use; an engine with tensor parallelism stands on several."""
    ranks: list[tuple[str, int]] = field(default_factory=list)
    """Everyone whose process is here."""
    room: list[float] = field(default_factory=list)
    """Left of each GPU in use."""

    def has_room(self, bundle: Bundle) -> bool:
        return self.cpus + bundle.cpus <= self.node.cpus + SLACK and self.gpus + bundle.gpus <= self.node.gpus + SLACK


@dataclass(frozen=True)
class Layout:
    """Where everything stands."""

    placed: list[Placed]
    homeless: list[Bundle]
    """Bundles that no node has room for."""
    wanted: int
    """Bundles in all."""


def lay_out(placement: Placement, roles: Sequence[str], nodes: Sequence[Node]) -> Layout:
    """Each bundle on the first node that has room, looking on from the last one used."""
    placed = [Placed(node) for node in nodes]
    wanted, homeless, at = bundles(placement, roles), [], 0
    for number, bundle in enumerate(wanted):
        home = next((n for n in (*range(at, len(placed)), *range(at)) if placed[n].has_room(bundle)), None)
        if home is None:
            homeless.append(bundle)
            continue
        at = home
        _put(placed[home], bundle, _occupants(placement, roles, number, bundle))
    return Layout(placed, homeless, len(wanted))


def _occupants(placement: Placement, roles: Sequence[str], number: int, bundle: Bundle) -> list[tuple[str, int]]:
    """Who computes on each of a bundle's devices; where devices are shared, a bundle is one, and an engine has a part of several."""
    if not placement.share:
        return list(bundle.ranks)
    places = {role: getattr(placement, role) for role in roles}
    return [(role, number // p.tensor_parallel) for role, p in places.items() if number < p.ranks * p.tensor_parallel]


def _put(on: Placed, bundle: Bundle, occupants: list[tuple[str, int]]) -> None:
    on.cpus, on.gpus, on.bundles = on.cpus + bundle.cpus, on.gpus + bundle.gpus, on.bundles + 1
    on.ranks += bundle.ranks
    if not bundle.gpus:
        return
    if bundle.gpus < 1 - SLACK:
        shared = next((n for n, left in enumerate(on.room) if left + SLACK >= bundle.gpus), None)
        if shared is not None:
            on.devices[shared] += occupants
            on.room[shared] -= bundle.gpus
            return
    for _ in range(ceil(bundle.gpus - SLACK)):
        on.devices.append(list(occupants))
        on.room.append(max(1 - bundle.gpus, 0.0))
