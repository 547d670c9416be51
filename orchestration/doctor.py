"""`chatray doctor`: what a machine or cluster has, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from conf.schema import Config
from orchestration import preflight
from orchestration.runtime.facts import Survey, in_gib, named, survey
from orchestration.runtime.machine import Machine

OPEN_FILES = 4096
"""Ray opens several sockets for each rank of a node."""
BF16_CAPABILITY = 8.0
FILE_WIDTH = 170
"""Columns where the output goes to a file."""


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    node: str
    what: str
    found: str
    verdict: Literal["ok", "note", "wrong"]
    """`note`: some runs need more; `wrong`: every run does."""
    remedy: str = ""


def examine(config: Config) -> list[Line]:
    """Everything that was looked at, on every node.

    Raises:
        RunError: there is no cluster at `ray.address`.
    """
    if not config.ray.address:
        return lines(config, survey(config))
    from orchestration.roles import connect

    runtime = connect(config)
    try:
        return lines(config, survey(config))
    finally:
        runtime.close()


def lines(config: Config, seen: Survey) -> list[Line]:
    """The lines of what was found; what preflight would say of any run comes last."""
    found = [line for machine in seen.machines for line in _of_machine(machine)]
    if config.ray.address:
        found += [_exposure(machine) for machine in seen.machines]
    elif config.runtime == "ray":
        found.append(Line("all", "open to others", "nothing: a run's own cluster is on loopback and wants a token", "ok"))
    for finding in preflight.machines(config, seen):
        found.append(Line("all", "run", finding.text, "wrong" if finding.grave else "note"))
    return found


def _of_machine(machine: Machine) -> Iterator[Line]:
    name = machine.node.name
    for package, version in machine.versions.items():
        gone = version == "missing"
        yield Line(name, package, version, "wrong" if gone else "ok", "install chatray there" if gone else "")
    yield from _devices(machine)
    yield Line(name, "memory", f"{in_gib(machine.node.host_memory)} for {machine.node.cpus:g} CPUs", "ok")
    shm = machine.node.shm
    yield Line(name, "/dev/shm", in_gib(shm), "ok" if shm else "note", "" if shm else "start the container with --shm-size")
    yield Line(name, "disk", f"{in_gib(machine.run_disk)} free for runs, {in_gib(machine.temp_disk)} for temporary files", "ok")
    few = machine.open_files < OPEN_FILES
    yield Line(name, "open files", str(machine.open_files), "note" if few else "ok", f"ulimit -n {OPEN_FILES} or more" if few else "")
    yield from _tools(machine)
    several = len(machine.interfaces) > 1
    remedy = "set placement.interface to the one that joins the nodes, if there are several nodes" if several else ""
    yield Line(name, "network", ", ".join(machine.interfaces) or "loopback alone", "note" if several else "ok", remedy)
    yield Line(
        name, "Hugging Face cache", machine.cache or "cannot be written to", "ok" if machine.cache else "note",
        "" if machine.cache else "set HF_HOME to a folder that can be written to, if models come from the hub",
    )  # fmt: skip


def _exposure(machine: Machine) -> Line:
    """What of a cluster that is there already others reach, and who may use it."""
    found = machine.exposure
    reached = named(found.ports) or "nothing: loopback alone, for users of this machine"
    if found.tls:
        return Line(machine.node.name, "open to others", f"{reached}; for holders of a certificate (mutual TLS)", "ok")
    if found.token:
        return Line(
            machine.node.name, "open to others", f"{reached}; for holders of the token, which goes over the network unencrypted", "ok",
        )  # fmt: skip
    return Line(
        machine.node.name, "open to others", f"{reached}; for everybody who reaches it: they can run code there", "note", preflight.CLOSE
    )


def _devices(machine: Machine) -> Iterator[Line]:
    name = machine.node.name
    if not machine.gpus:
        yield Line(name, "GPU", "none", "ok")
        slow = not machine.cpu_bf16
        yield Line(
            name, "bf16", "emulated by this CPU" if slow else "by the CPU", "note" if slow else "ok", "model.dtype=fp32" if slow else ""
        )
        return
    for gpu in machine.gpus:
        yield Line(name, "GPU", f"{gpu.name}, {in_gib(gpu.memory)}, driver {gpu.driver}", "ok")
    old = min(gpu.capability for gpu in machine.gpus) < BF16_CAPABILITY
    yield Line(name, "bf16", "not by every GPU" if old else "by every GPU", "note" if old else "ok", "model.dtype=fp32" if old else "")
    blind = not machine.cuda
    remedy = "install a torch built for CUDA" if blind else ""
    yield Line(name, "CUDA of torch", machine.cuda or "torch is a CPU build", "wrong" if blind else "ok", remedy)


def _tools(machine: Machine) -> Iterator[Line]:
    needed = {
        "c++": "the offloaded optimizer",
        "ninja": "the offloaded optimizer",
        "libaio": "offload to nvme",
        "libaio.h": "offload to nvme",
    }
    if machine.gpus:
        needed["nvcc"] = "DeepSpeed's fused optimizers"
    for tool, reason in needed.items():
        found = machine.tools.get(tool, "")
        yield Line(
            machine.node.name, tool, found or "not found", "ok" if found else "note", "" if found else f"install it; {reason} needs it"
        )
    if lock := machine.tools.get("unfinished build"):
        yield Line(machine.node.name, "unfinished build", lock, "note", "delete it: offload to nvme would wait for it for ever")


def show(config: Config, as_json: bool) -> bool:
    """Print what was found; returns whether nothing is wrong."""
    found = examine(config)
    well = not any(line.verdict == "wrong" for line in found)
    if as_json:
        print(json.dumps({"well": well, "lines": [asdict(line) for line in found]}, indent=2))
        return well
    table = Table("node", "what", "found", "verdict", "remedy")
    colours = {"ok": "green", "note": "yellow", "wrong": "red"}
    for line in found:
        table.add_row(line.node, line.what, line.found, f"[{colours[line.verdict]}]{line.verdict}[/]", line.remedy)
    out = Console()
    if not out.is_terminal:  # a table that is cut to the width of nothing helps nobody
        out.width = FILE_WIDTH
    out.print(table)
    return well
