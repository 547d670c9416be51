"""Ranks as Ray actors in a placement group. Nothing outside `runtime` imports Ray."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import actors
from actors.worker import RankSpec, Worker
from conf.schema import Config
from orchestration.errors import RunError
from orchestration.runtime.dispatch import Pieces, shares
from orchestration.runtime.group import Group, RoleRequest

STATE_SECONDS = 2.0
"""How long a rank may take to say what it is doing, before it counts as not answering."""


class RayRank:
    """The actor around one role object. Its state can be asked for while a call is running, through a thread of its own."""

    def __init__(self, role: type[Worker], config: Config, checkpoint: str, spec: RankSpec) -> None:
        self.doing = ("__init__", time.time())
        self.role = role(config, checkpoint, spec)
        self.doing = ("", time.time())

    def call(self, method: str, counts: Sequence[int], common: dict[str, Any], held: Sequence[str], *items: Any) -> Any:
        """Run one method of the role. The first returned value only says that the call went well; the rest are its results.

        Args:
            counts: how many of `items` belong to each list argument, in order.
            held: names of the common arguments that follow in `items` (references, resolved by Ray).
        """
        self.doing = (method, time.time())
        try:
            arguments, rest = [], list(items)
            for count in counts:
                arguments.append(rest[:count])
                rest = rest[count:]
            result = getattr(self.role, method)(*arguments, **common, **dict(zip(held, rest, strict=True)))
            return (None, *result) if isinstance(result, list) else (None, result)
        finally:
            self.doing = ("", time.time())

    def open_store(self) -> tuple[str, int]:
        """Rank 0's rendezvous, at this node's address."""
        return self.role.open_store(ray.util.get_node_ip_address())

    @ray.method(concurrency_group="health")
    def state(self) -> str:
        """What this rank is doing, and for how long."""
        method, since = self.doing
        return f"in {method} for {time.time() - since:.0f} s" if method else f"idle for {time.time() - since:.0f} s"


_Actor: Any = ray.remote(concurrency_groups={"health": 1})(RayRank)  # type: ignore[call-overload]


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

    def map(self, method: Callable[..., Any], *pieces: Pieces[Any], **common: Any) -> Pieces[Any]:
        split = [shares(p.items, self.size) for p in pieces]
        return self._call(method, split, [len(part) for part in split[0]], common)

    def each(self, method: Callable[..., Any], *pieces: Pieces[Any], **common: Any) -> Pieces[Any]:
        return self._call(method, [shares(p.items, self.size) for p in pieces], [1] * self.size, common)

    def _call(self, method: Callable[..., Any], split: list[list[list[Any]]], results: list[int], common: dict[str, Any]) -> Pieces[Any]:
        plain = {name: value for name, value in common.items() if not isinstance(value, Pieces)}
        held = {name: value.items[0] for name, value in common.items() if isinstance(value, Pieces)}
        items, calls = [], []
        for rank, actor in enumerate(self.ranks):
            mine = [argument[rank] for argument in split]
            flat = [item for argument in mine for item in argument]
            done, *found = actor.call.options(num_returns=1 + results[rank]).remote(
                method.__name__, [len(argument) for argument in mine], plain, list(held), *flat, *held.values()
            )
            items += found
            calls.append(Call(done, self, rank, method.__name__))
        return Pieces(items, calls)


class RayRuntime:
    """A connection to a cluster, or a cluster of this machine for the time of the run."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.scratch = tempfile.mkdtemp(prefix="chatray-")  # Ray's sockets and logs; a short path, since sockets' names are limited
        self.own_cluster = connect(config, self.scratch)
        self.reserved: PlacementGroup | None = None
        self.groups: dict[str, RayGroup] = {}

    def start(self, requests: Sequence[RoleRequest]) -> dict[str, Group]:
        deadline = time.monotonic() + self.config.deadlines.start
        self._reserve(requests)
        bundle = 0
        for request in requests:
            self.groups[request.name] = RayGroup(
                request.name, [self._actor(request, rank, bundle + rank) for rank in range(request.place.ranks)]
            )
            bundle += request.place.ranks
        # Every rank must exist before any joins: one that died in its constructor would leave the others waiting for it.
        self._check_code(self._broadcast(Worker.code_folder), deadline)
        for group in self.groups.values():
            self._join(group, deadline)
        self._wait(self._broadcast(Worker.load), "all roles to load their weights", "deadlines.start", deadline)
        return dict(self.groups)

    def _reserve(self, requests: Sequence[RoleRequest]) -> None:
        bundles = [
            {"CPU": r.place.cpus, "GPU": r.place.gpus} if r.place.gpus else {"CPU": r.place.cpus}
            for r in requests for _ in range(r.place.ranks)
        ]  # fmt: skip
        wanted = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU")}
        have = ray.cluster_resources()
        never = self.own_cluster and any(wanted[kind] > have.get(kind, 0) for kind in wanted)  # others may still grow
        if not never:
            self.reserved = placement_group(bundles, strategy="PACK")
        if self.reserved is None or not self.reserved.wait(self.config.deadlines.start):
            free = ray.available_resources()
            self.stop()
            raise RunError(
                f"the cluster could not reserve {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs in {len(bundles)} bundles within "
                f"deadlines.start={self.config.deadlines.start:g} s; it has {have.get('CPU', 0):g} CPUs ({free.get('CPU', 0):g} free) and "
                f"{have.get('GPU', 0):g} GPUs ({free.get('GPU', 0):g} free). Choose a smaller `placement`, or free resources."
            )

    def _actor(self, request: RoleRequest, rank: int, bundle: int) -> Any:
        place = request.place
        assert self.reserved is not None
        options = {
            "num_cpus": place.cpus, "num_gpus": place.gpus, "max_restarts": 0, "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.reserved, placement_group_bundle_index=bundle),
            "runtime_env": {"env_vars": rank_environment(place.threads, self.own_cluster)},
        }  # fmt: skip
        spec = RankSpec(request.name, rank, place.ranks, place.threads)
        return _Actor.options(**options).remote(request.role, self.config, request.checkpoint, spec)

    def _broadcast(self, method: Callable[..., Any]) -> list[Pieces[Any]]:
        return [group.each(method) for group in self.groups.values()]

    def _check_code(self, folders: list[Pieces[Any]], deadline: float) -> None:
        self._wait(folders, "all ranks to start", "deadlines.start", deadline)
        mine = str(Path(actors.__file__).resolve().parent)
        for group, pieces in zip(self.groups.values(), folders, strict=True):
            for rank, folder in enumerate(ray.get(pieces.items)):
                check_same_code(f"{group.name} rank {rank}", folder, mine, self.own_cluster)

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
        """One at a time, so that a dead rank ends the wait at once even when its peers now hang in a collective."""
        waiting = {call.done: call for piece in pieces for call in piece.calls}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=max(deadline - time.monotonic(), 0), fetch_local=False)
            if not ready:
                raise RunError(self._diagnosis(waiting, what, setting))
            call = waiting.pop(ready[0])
            try:
                ray.get(call.done)
            except ray.exceptions.RayError as cause:
                raise RunError(self._failure(call, what, cause)) from cause

    def _failure(self, call: Call, what: str, cause: Exception) -> str:
        if isinstance(cause, ray.exceptions.RayTaskError):
            origin = f"{type(cause.cause).__name__}: {cause.cause}" if cause.cause else str(cause).strip().splitlines()[-1]
            return f"while waiting for {what}: {call.group.name} rank {call.rank} failed in {call.method}: {origin}"
        reason = " ".join(str(cause).split())[:300]
        return (
            f"while waiting for {what}: {call.group.name} rank {call.rank} died in {call.method} ({reason}); "
            "if it ran out of memory, lower engine.micro_batch or choose another placement. The same command goes on from the last commit."
        )

    def _diagnosis(self, waiting: dict[Any, Call], what: str, setting: str) -> str:
        seconds = getattr(self.config.deadlines, setting.removeprefix("deadlines."))
        missing = ", ".join(f"{call.group.name} rank {call.rank} ({call.method})" for call in waiting.values())
        lines = [f"waited {seconds:g} s ({setting}) for {what}; not done: {missing}. State of each rank:"]
        asked = {(group.name, n): rank.state.remote() for group in self.groups.values() for n, rank in enumerate(group.ranks)}
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=STATE_SECONDS)
        for (name, rank), ref in asked.items():
            lines.append(f"  {name} rank {rank}: {_answer(ref) if ref in answered else 'does not answer (stopped, or starved of CPU)'}")
        return "\n".join(lines)

    def stop(self) -> None:
        for group in self.groups.values():
            for rank in group.ranks:
                ray.kill(rank)
        self.groups = {}
        if self.reserved is not None:
            remove_placement_group(self.reserved)
            self.reserved = None

    def close(self) -> None:
        if ray.is_initialized():
            self.stop()
        if self.own_cluster:
            ray.shutdown()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _answer(ref: Any) -> str:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as dead:
        return f"dead ({type(dead).__name__})"


def connect(config: Config, scratch: str) -> bool:
    """Connect to the configured cluster or start one of this machine, with its files in `scratch`; True when it was started (and is
    ours to stop).

    Raises:
        RunError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of our own listens on loopback only
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray puts the driver's working directory first on every worker's path, where a folder of the user's named `conf` or `actors` would
    # hide ours. The run directory holds neither.
    os.chdir(config.run_dir)
    try:
        if config.ray.address:
            ray.init(address=config.ray.address, log_to_driver=False, logging_level=logging.ERROR, namespace="chatray")
            return False
        ray.init(
            log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False, namespace="chatray",
            object_store_memory=config.ray.object_store_mb << 20, _node_ip_address="127.0.0.1", _temp_dir=scratch,
            _system_config={"prestart_worker_first_driver": False},  # idle workers would only hold memory
        )  # fmt: skip
        return True
    except (ConnectionError, RuntimeError, ValueError) as cause:
        raise RunError(f"ray.address={config.ray.address}: no Ray cluster there ({' '.join(str(cause).split())[:200]})") from cause


def rank_environment(threads: int, own_cluster: bool) -> dict[str, str]:
    """Environment of a rank's process. Ray would set OMP_NUM_THREADS to the reserved CPUs, which cripples CPU arithmetic."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if own_cluster and sys.platform == "linux" else {}
    return loopback | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # roles share cores: a thread that spins while it waits slows the others nearly tenfold
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


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
