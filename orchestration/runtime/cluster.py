"""Ranks as Ray actors in a placement group. Nothing outside `runtime` imports Ray."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import actors
from actors.rank import RankSpec
from actors.stream import WeightSyncError
from actors.worker import Worker
from conf.schema import Config
from orchestration.bundles import bundles
from orchestration.errors import RunError
from orchestration.runtime.connection import connect, disconnect
from orchestration.runtime.dispatch import Pieces, shares
from orchestration.runtime.group import Group, RoleRequest
from orchestration.runtime.rank import Asked, Device, RankActor, device_order, rank_environment
from orchestration.runtime.reservation import Reservation, Slot, reserve
from orchestration.runtime.turns import in_turns, load_in_turns

STATE_SECONDS = 2.0
"""How long a rank may take to say what it is doing, before it counts as not answering."""


@dataclass(frozen=True)
class Call:
    """One call to one rank that somebody may wait for."""

    done: Any
    group: RayGroup
    rank: int
    method: str


class RayGroup:
    """The actors of one role."""

    def __init__(self, name: str, ranks: list[Any]) -> None:
        self.name, self.ranks, self.size = name, ranks, len(ranks)
        self.devices: list[tuple[Device, ...]] = []
        """Of each rank, as its node names them."""
        self.nodes: list[int] = []
        """Number of each rank's node, in the order of nodes."""

    def map(self, method: Callable[..., Any], *pieces: Pieces[Any], **common: Any) -> Pieces[Any]:
        split = [shares(p.items, self.size) for p in pieces]
        return self._call(method, split, [len(part) for part in split[0]], common)

    def each(self, method: Callable[..., Any], *pieces: Pieces[Any], **common: Any) -> Pieces[Any]:
        return self._call(method, [shares(p.items, self.size) for p in pieces], [1] * self.size, common)

    def where(self) -> Pieces[Any]:
        """Ask every process where it is."""
        asked = [actor.where.remote() for actor in self.ranks]
        return Pieces(asked, [Call(done, self, number, "where") for number, done in enumerate(asked)])

    def _call(self, method: Callable[..., Any], split: list[list[list[Any]]], results: list[int], common: dict[str, Any]) -> Pieces[Any]:
        plain = {name: value for name, value in common.items() if not isinstance(value, Pieces)}
        held = {name: value.items[0] for name, value in common.items() if isinstance(value, Pieces)}
        items, calls = [], []
        for rank, actor in enumerate(self.ranks):
            mine = [argument[rank] for argument in split]
            flat = [item for argument in mine for item in argument]
            asked = Asked(method.__name__, tuple(map(len, mine)), plain, tuple(held))
            done, *found = actor.call.options(num_returns=1 + results[rank]).remote(asked, *flat, *held.values())
            items += found
            calls.append(Call(done, self, rank, method.__name__))
        return Pieces(items, calls)


class RayRuntime:
    """A connection to a cluster, or a cluster of this machine for the time of the run."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.scratch = tempfile.mkdtemp(prefix="chatray-")  # Ray's sockets and logs; a short path, since sockets' names are limited
        self.own_cluster = connect(config, self.scratch)
        self.reserved: Reservation | None = None
        self.groups: dict[str, RayGroup] = {}

    def start(self, requests: Sequence[RoleRequest]) -> dict[str, Group]:
        deadline = time.monotonic() + self.config.deadlines.start
        self._reserve(requests)
        self._place(requests, deadline)
        built = [self._build(request) for request in requests]
        # Every rank must exist before any joins: one that died while it was built would leave the others waiting for it.
        self._wait(built, "all ranks to start", "deadlines.start", deadline)
        for group in self.groups.values():
            self._join(group, deadline)
        if self.config.placement.sleep:
            load_in_turns(list(self.groups.values()), lambda *pieces, what: self._wait(pieces, what, "deadlines.start", deadline))
            return in_turns(self.groups, self.wait)
        loading = [group.each(Worker.load) for group in self.groups.values()]
        self._wait(loading, "all roles to load their weights", "deadlines.start", deadline)
        return dict(self.groups)

    def _reserve(self, requests: Sequence[RoleRequest]) -> None:
        wanted = bundles(self.config.placement, [request.name for request in requests])
        try:
            self.reserved = reserve(wanted, self.config.deadlines.start, may_grow=not self.own_cluster)
        except RunError:
            self.stop()
            raise

    def _place(self, requests: Sequence[RoleRequest], deadline: float) -> None:
        """Start an empty process for each rank, and number those of a role by node and device."""
        assert self.reserved is not None
        slots = self.reserved.slots
        for request in requests:
            started = [self._actor(request, slots[request.name, rank]) for rank in range(request.place.ranks)]
            self.groups[request.name] = RayGroup(request.name, started)
        located = {name: group.where() for name, group in self.groups.items()}
        self._wait(list(located.values()), "all ranks' processes to start", "deadlines.start", deadline)
        mine = str(Path(actors.__file__).resolve().parent)
        for name, group in self.groups.items():
            found = ray.get(located[name].items)
            for number, (code, _, _) in enumerate(found):
                check_same_code(f"{name} rank {number}", code, mine, self.own_cluster)
            at = [slots[name, rank] for rank in range(group.size)]
            order = sorted(range(group.size), key=lambda n: (at[n].node, [*map(device_order, found[n][1])], at[n].bundle))
            group.ranks = [group.ranks[n] for n in order]
            group.devices = [found[n][1] for n in order]
            group.nodes = [at[n].node for n in order]

    def _actor(self, request: RoleRequest, slot: Slot) -> Any:
        place, placement = request.place, self.config.placement
        assert self.reserved is not None
        options = {
            "num_cpus": place.cpus, "num_gpus": place.gpus * (1 if placement.share else place.tensor_parallel),
            "max_restarts": 0, "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.reserved.group, placement_group_bundle_index=slot.bundle),
        }  # fmt: skip
        return RankActor.options(**options).remote(rank_environment(place, placement.interface))

    def _build(self, request: RoleRequest) -> Pieces[None]:
        """Tell each process which rank it is."""
        group = self.groups[request.name]
        calls = []
        for rank, actor in enumerate(group.ranks):
            spec = RankSpec(request.name, rank, group.size, request.place.threads)
            done = actor.build.remote(request.role, self.config, request.checkpoint, spec, self._devices(request, rank))
            calls.append(Call(done, group, rank, "build"))
        return Pieces([], calls)

    def _devices(self, request: RoleRequest, rank: int) -> list[Device]:
        """The devices of an engine that has a part of several shared ones: those that its neighbours in other roles sit on. Otherwise none.

        Raises:
            RunError: they are on two nodes.
        """
        parallel = request.place.tensor_parallel
        if not self.config.placement.share or parallel == 1 or not request.place.gpus:
            return []
        widest = max(self.groups.values(), key=lambda group: group.size)
        mine = slice(rank * parallel, (rank + 1) * parallel)
        devices = [device for each in widest.devices[mine] for device in each]
        if len(set(widest.nodes[mine])) > 1 or len(set(devices)) < parallel:
            raise RunError(
                f"placement.{request.name}.tensor_parallel={parallel}: engine {rank} would have the devices {devices} of nodes "
                f"{sorted(set(widest.nodes[mine]))}; choose a number that divides the GPUs of every node, and as many ranks of some other "
                "role as there are devices"
            )
        return devices

    def _join(self, group: RayGroup, deadline: float) -> None:
        host, port = ray.get(group.ranks[0].open_store.remote())
        timeout = max(deadline - time.monotonic(), 1.0)
        joined = group.each(Worker.join, host=host, port=port, timeout=timeout)
        self._wait([joined], f"the ranks of {group.name} to join their process group", "deadlines.start", deadline)

    def put(self, items: Sequence[Any]) -> Pieces[Any]:
        return Pieces([ray.put(item) for item in items], [])

    def wait(self, *pieces: Pieces[Any], what: str) -> None:
        self._wait(pieces, what, "deadlines.step", time.monotonic() + self.config.deadlines.step)

    def get(self, pieces: Pieces[Any], what: str) -> list[Any]:
        self.wait(pieces, what=what)
        return ray.get(pieces.items)

    def _wait(self, pieces: Sequence[Pieces[Any]], what: str, setting: str, deadline: float) -> None:
        """Until the first is done, so that a dead rank ends the wait at once even when its peers now hang in a collective; all that are
        done by then are looked at together."""
        waiting = {call.done: call for piece in pieces for call in piece.calls}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=max(deadline - time.monotonic(), 0), fetch_local=False)
            if not ready:
                raise RunError(self._diagnosis(waiting, what, setting))
            if len(waiting) > 1:
                ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False)
            try:
                ray.get(ready)
            except ray.exceptions.RayError:
                call, cause = self._origin(waiting, ready)
                raise RunError(self._failure(call, what, cause)) from cause
            for done in ready:
                del waiting[done]

    def _origin(self, waiting: dict[Any, Call], ready: list[Any]) -> tuple[Call, Exception]:
        """The first call that failed and its error. A stream of weights breaks off at one end when the other end has failed: then it is
        the other's error, if that comes within a moment."""
        found = [(waiting[done], error) for done in ready if (error := _error(done))]
        if all(_of_sync(error) for _, error in found):
            others = [done for done in waiting if done not in ready]
            more, _ = ray.wait(others, num_returns=1, timeout=STATE_SECONDS, fetch_local=False) if others else ([], [])
            found += [(waiting[done], error) for done in more if (error := _error(done))]
        return next((one for one in found if not _of_sync(one[1])), found[0])

    def _failure(self, call: Call, what: str, cause: Exception) -> str:
        if isinstance(cause, ray.exceptions.RayTaskError):
            origin = f"{type(cause.cause).__name__}: {cause.cause}" if cause.cause else str(cause).strip().splitlines()[-1]
            failed = f"while waiting for {what}: {call.group.name} rank {call.rank} failed in {call.method}: {origin}"
            return "\n".join([f"{failed}. State of each rank:", *self._states()]) if _of_sync(cause) else failed
        reason = " ".join(str(cause).split())[:300]
        return (
            f"while waiting for {what}: {call.group.name} rank {call.rank} died in {call.method} ({reason}); "
            "if it ran out of memory, lower engine.micro_batch or choose another placement. The same command goes on from the last commit."
        )

    def _diagnosis(self, waiting: dict[Any, Call], what: str, setting: str) -> str:
        seconds = getattr(self.config.deadlines, setting.removeprefix("deadlines."))
        missing = ", ".join(f"{call.group.name} rank {call.rank} ({call.method})" for call in waiting.values())
        return "\n".join([f"waited {seconds:g} s ({setting}) for {what}; not done: {missing}. State of each rank:", *self._states()])

    def _states(self) -> list[str]:
        """A line for each rank: what it is doing."""
        asked = {(group.name, n): rank.state.remote() for group in self.groups.values() for n, rank in enumerate(group.ranks)}
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=STATE_SECONDS)
        silent = "does not answer (stopped, or starved of CPU)"
        return [f"  {name} rank {rank}: {_answer(ref) if ref in answered else silent}" for (name, rank), ref in asked.items()]

    def stop(self) -> None:
        for group in self.groups.values():
            for rank in group.ranks:
                ray.kill(rank)
        self.groups = {}
        if self.reserved is not None:
            self.reserved.give_back()
            self.reserved = None

    def close(self) -> None:
        if ray.is_initialized():
            self.stop()
        if self.own_cluster:
            disconnect()
        shutil.rmtree(self.scratch, ignore_errors=True)


class Connection:
    """A cluster that is held for several runs after each other: they find it connected, and do not end it."""

    def __init__(self, config: Config) -> None:
        self.scratch = tempfile.mkdtemp(prefix="chatray-")
        self.own_cluster = connect(config, self.scratch)

    def close(self) -> None:
        if self.own_cluster:
            disconnect()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _of_sync(error: Exception) -> bool:
    return isinstance(getattr(error, "cause", None), WeightSyncError)


def _error(done: Any) -> Exception | None:
    """What a call that is done failed with."""
    try:
        ray.get(done)
    except ray.exceptions.RayError as cause:
        return cause
    return None


def _answer(ref: Any) -> str:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as dead:
        return f"dead ({type(dead).__name__})"


def check_same_code(who: str, folder: str, mine: str, own_cluster: bool) -> None:
    """A rank on this machine must run the driver's own code (other machines have it in another place).

    Raises:
        RunError: it does not.
    """
    if own_cluster and folder != mine:
        raise RunError(
            f"{who} runs the package `actors` of {folder}, not chatray's own in {mine}: another folder of that name stands first on its "
            "path; start chatray from another folder, or clear PYTHONPATH"
        )
