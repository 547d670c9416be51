"""Which ranks share a bundle of the placement group: the same answer for the plan and for the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conf.machines import Placement

SLACK = 1e-6
"""Ray counts resources in steps of 1e-4; sums of decimal fractions are a little off."""


@dataclass(frozen=True)
class Bundle:
    """What is reserved together on one node, and for whom."""

    cpus: float
    gpus: float
    ranks: tuple[tuple[str, int], ...]
    """(role, rank) of everyone in it. The first of a rollout engine's devices stands for the engine."""

    def resources(self) -> dict[str, float]:
        """As Ray's placement groups want it."""
        return {"CPU": round(self.cpus, 4)} | ({"GPU": round(self.gpus, 4)} if self.gpus else {})

    def fits(self, cpus: float, gpus: float) -> bool:
        return self.cpus <= cpus + SLACK and self.gpus <= gpus + SLACK


def bundles(placement: Placement, roles: Sequence[str]) -> list[Bundle]:
    """The bundles of these roles in order: ranks of a role one after another, so that neighbours in the list are placed as neighbours.

    With `placement.share` the ranks of the same number of all roles are in one bundle, which is one device; otherwise each has its own.
    An engine with tensor parallelism is one bundle, since its devices must be on one node; where devices are shared it has a part of as
    many bundles in a row, and stands in the first.
    """
    if not placement.share:
        return [_alone(placement, role, rank) for role in roles for rank in range(getattr(placement, role).ranks)]
    devices = max(devices_of(placement, role) for role in roles)
    return [_shared(placement, roles, device) for device in range(devices)]


def training_bundles(placement: Placement) -> list[Bundle]:
    """The bundles that Ray Train reserves for a training stage."""
    return [Bundle(placement.train.cpus, placement.train.gpus, (("train", rank),)) for rank in range(placement.train.ranks)]


def devices_of(placement: Placement, role: str) -> int:
    """Devices that a role is spread over, where it has any."""
    place = getattr(placement, role)
    return place.ranks * place.tensor_parallel


def _alone(placement: Placement, role: str, rank: int) -> Bundle:
    place = getattr(placement, role)
    return Bundle(place.cpus, place.gpus * place.tensor_parallel, ((role, rank),))


def _shared(placement: Placement, roles: Sequence[str], device: int) -> Bundle:
    there = [role for role in roles if device < devices_of(placement, role)]
    places = {role: getattr(placement, role) for role in there}
    ranks = [(role, device // places[role].tensor_parallel) for role in there if device % places[role].tensor_parallel == 0]
    return Bundle(sum(places[role].cpus for role, _ in ranks), sum(place.gpus for place in places.values()), tuple(ranks))


def unplaced(wanted: Sequence[Bundle], nodes: Sequence[tuple[float, float]]) -> list[Bundle]:
    """The bundles that find no room when each goes to the first node that still has some.

    Args:
        nodes: (CPUs, GPUs) of each node.
    """
    left, homeless = [list(node) for node in nodes], []
    for bundle in sorted(wanted, key=lambda bundle: (bundle.gpus, bundle.cpus), reverse=True):
        home = next((node for node in left if bundle.fits(*node)), None)
        if home is None:
            homeless.append(bundle)
        else:
            home[0], home[1] = home[0] - bundle.cpus, home[1] - bundle.gpus
    return homeless
