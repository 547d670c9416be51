"""Which way weights go, and its two ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

from actors.broadcast import Broadcast, Meeting
from actors.devices import own_device
from actors.rendezvous import open_store
from actors.ring import RingReceiver, RingSender, machine
from actors.stream import Endpoint, Route, Stream, Way

Wanted = Literal["auto", "object_store", "shared_memory", "collective"]


def endpoint(on_device: bool) -> Endpoint:
    """Of this process.

    Args:
        on_device: whether its weights stay on its CUDA device, if it has one.
    """
    device = str(torch.cuda.get_device_properties(0).uuid) if on_device and own_device().type == "cuda" else None
    return Endpoint(machine(), device)


def choose(wanted: Wanted, policy: Endpoint, engines: Sequence[Endpoint]) -> Way:
    """The way that `placement.weight_sync` means for ranks that are there.

    Raises:
        ValueError: shared memory was asked for, and an engine is on another machine.
    """
    elsewhere = [number for number, engine in enumerate(engines) if engine.machine != policy.machine]
    devices = [policy.device, *(engine.device for engine in engines)]
    if wanted == "object_store":
        return "object_store"
    if wanted == "shared_memory" and elsewhere:
        raise ValueError(
            f"placement.weight_sync=shared_memory: rollout rank {elsewhere[0]} is on another machine than policy rank 0; set it to auto, "
            "collective or object_store"
        )
    apart = None not in devices and len(set(devices)) == len(devices)  # NCCL refuses two ranks on one device
    if wanted == "collective":
        return "nccl" if apart else "gloo"
    together = policy.device is not None and set(devices) == {policy.device} and not elsewhere
    if together:
        return "cuda_ipc"
    if wanted == "auto" and apart:
        return "nccl"
    return "object_store" if elsewhere else "shared_memory"


class Ends:
    """This rank's end of the ways that need one; keeps what outlives a version."""

    def __init__(self) -> None:
        self.meeting: Meeting | None = None
        self.store: dist.TCPStore | None = None

    def open(self, host: str) -> str:
        """At policy rank 0: where engines find it. What is made here is used by broadcasts alone."""
        self.store = open_store(host)
        return f"{host}:{self.store.port}"

    def sender(self, route: Route, version: int, total: int) -> Stream:
        if route.way in ("shared_memory", "cuda_ipc"):
            return RingSender(route.address, route.engines, version, total, route.seconds, cuda=route.way == "cuda_ipc")
        return Broadcast(self._met(route, 0), version, total)

    def receiver(self, route: Route, number: int, version: int, total: int) -> Stream:
        """Args:
        number: of this engine among the rollout ranks.
        """
        if route.way in ("shared_memory", "cuda_ipc"):
            return RingReceiver(route.address, number, version, total, route.seconds)
        return Broadcast(self._met(route, number + 1), version, total)

    def _met(self, route: Route, rank: int) -> Meeting:
        if self.meeting is None or self.meeting.key != (route.way, route.address):
            self.meeting = Meeting(route.way, route.address, rank, route.engines, route.seconds, self.store)
        return self.meeting
