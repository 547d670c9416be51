"""The machines a plan is made for: described by `conf/cluster`, or those that are connected."""

from __future__ import annotations

from dataclasses import dataclass

from conf.machines import Cluster

GIB = 1 << 30


@dataclass(frozen=True)
class Node:
    """One machine. Sizes in bytes."""

    name: str
    cpus: float
    gpus: float
    gpu_name: str
    gpu_memory: int
    """Of one GPU."""
    host_memory: int
    shm: int
    """Of /dev/shm, where Ray's object store lies."""
    disk: int
    """Free, on the local disk."""


def described(cluster: Cluster) -> list[Node]:
    """The nodes of a described cluster."""
    return [
        Node(
            f"node {number}", cluster.cpus, cluster.gpus, cluster.gpu_name, int(cluster.gpu_memory_gib * GIB),
            int(cluster.host_memory_gib * GIB), int(cluster.shm_gib * GIB), int(cluster.disk_gib * GIB),
        )
        for number in range(cluster.nodes)
    ]  # fmt: skip
