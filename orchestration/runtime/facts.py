"""What the machines of a run really have: every node of the connected cluster, or this machine where none is."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config
from orchestration.planner.machines import GIB, Node
from orchestration.runtime.machine import Machine, cpu_limit, inspect, show_gpus


@dataclass(frozen=True)
class Survey:
    """What was found."""

    machines: tuple[Machine, ...]
    """Of the nodes that answered, in the order of their addresses."""
    silent: tuple[tuple[str, str], ...]
    """Of those that did not: name, and why."""
    token: str
    """What a node that shares the driver's storage found in the run directory; "" if it was not tried."""
    asked: float
    """When, in seconds since 1970, by the driver's clock."""
    took: float
    """Seconds until all had answered."""

    def nodes(self) -> list[Node]:
        """For the planner."""
        return [machine.node for machine in self.machines]


def survey(config: Config) -> Survey:
    """This machine, for a run that starts its own cluster; otherwise every node of the connected one."""
    asked = time.time()
    if config.runtime == "local" or not config.ray.address:
        return Survey((inspect(config.run_dir),), (), "", asked, time.time() - asked)
    return _survey_cluster(config.run_dir, config.deadlines.start, asked)


def offered(config: Config) -> list[tuple[str, float, float]]:
    """(name, CPUs, GPUs) of each node, at once: what Ray knows, or what this machine has."""
    if config.runtime == "local" or not config.ray.address:
        return [("this machine", cpu_limit(), float(len(show_gpus())))]
    return [(_name(node), node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in _alive()]


def live_nodes(config: Config) -> list[Node]:
    """The nodes that `cluster=live` stands for; connects where `ray.address` is set.

    Raises:
        RunError: there is no cluster at that address.
    """
    if not config.ray.address:
        return survey(config).nodes()
    from orchestration.runtime.cluster import RayRuntime

    runtime = RayRuntime(config)
    try:
        return survey(config).nodes()
    finally:
        runtime.close()


def _survey_cluster(run_dir: str, seconds: float, asked: float) -> Survey:
    """What every node says within `seconds`: a worker must start there, and import chatray."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder, token = Path(run_dir), secrets.token_hex(8)
    missing = next((path for path in (folder, *folder.parents) if path.exists()), folder)  # what is made here is removed again
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".token-{token}"
    file.write_text(token)
    look: Any = ray.remote(num_cpus=0, max_retries=2)(inspect)  # a worker may be ending as it is asked
    nodes = _alive()
    try:
        answers = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                run_dir, file.name, _name(node)
            ): node
            for node in nodes
        }
        ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=seconds)
        machines, silent = [], []
        for answer, node in answers.items():
            if answer not in ready:
                silent.append((_name(node), f"did not answer within deadlines.start={seconds:g} s"))
                ray.cancel(answer, force=True)
                continue
            try:
                machines.append(_offered_by_ray(ray.get(answer), node))
            except ray.exceptions.RayError as cause:
                silent.append((_name(node), " ".join(str(cause).split())[-200:]))
    finally:
        file.unlink()
        while folder != missing and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
    return Survey(tuple(machines), tuple(silent), token, asked, time.time() - asked)


def _offered_by_ray(machine: Machine, node: dict[str, Any]) -> Machine:
    cpus, gpus = node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)
    return dataclasses.replace(
        machine, address=node["NodeManagerAddress"], node=dataclasses.replace(machine.node, cpus=cpus, gpus=gpus)
    )  # fmt: skip


def _alive() -> list[dict[str, Any]]:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: (node["NodeManagerAddress"], node["NodeID"]))


def _name(node: dict[str, Any]) -> str:
    """Its host's name and address, and the beginning of its id: nodes of a simulated cluster share the rest."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"


def in_gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def named(nodes: Sequence[str], most: int = 4) -> str:
    """Names of nodes, the first few."""
    return ", ".join(nodes[:most]) + (f" and {len(nodes) - most} more" if len(nodes) > most else "")
