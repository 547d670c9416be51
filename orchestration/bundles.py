"""Which ranks share a bundle of the placement group: the same answer for the plan and for the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conf.machines import Placement


@dataclass(frozen=True)
class Bundle:
    """What is reserved together on one node, and for whom."""

    cpus: float
    gpus: float
    ranks: tuple[tuple[str, int], ...]
    """(role, rank) of everyone in it. The first of a rollout engine's devices stands for the engine."""


def bundles(placement: Placement, roles: Sequence[str]) -> list[Bundle]:
    """The bundles of these roles in order: ranks of a role one after another, so that neighbours in the list are placed as neighbours.

    With `placement.share` the ranks of the same number of all roles are in one bundle; otherwise each has its own. An engine with tensor
    parallelism is one bundle, since its devices must be on one node.
    """
    if not placement.share:
        return [_of(placement, [(role, rank)]) for role in roles for rank in range(getattr(placement, role).ranks)]
    most = max(getattr(placement, role).ranks for role in roles)
    return [_of(placement, [(role, rank) for role in roles if rank < getattr(placement, role).ranks]) for rank in range(most)]


def _of(placement: Placement, ranks: Sequence[tuple[str, int]]) -> Bundle:
    places = [getattr(placement, role) for role, _ in ranks]
    return Bundle(sum(p.cpus for p in places), sum(p.gpus * p.tensor_parallel for p in places), tuple(ranks))
