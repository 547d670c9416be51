"""The actor around one role object. Free of torch: a rank's process pays for torch when its role is built, not before."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from actors.devices import HIDDEN
from actors.memory import give_back_freed_memory, tune_allocator
from actors.profiling import traced
from actors.rank import RankSpec
from conf.machines import RolePlacement
from conf.schema import Config
from orchestration.runtime.operator_metrics import CallMetrics

if TYPE_CHECKING:
    from actors.worker import Worker


Device = int | str
"""A GPU of a node: its number, or its UUID (also of a part, MIG) where CUDA_VISIBLE_DEVICES of the node's Ray names those."""


class Asked(NamedTuple):
    """What one call is about, in one argument, since Ray packs every argument by itself."""

    method: str
    counts: tuple[int, ...]
    """How many items belong to each list argument, in order."""
    common: dict[str, Any]
    held: tuple[str, ...]
    """Names of the common arguments that follow among the items."""


class RayRank:
    """Starts empty, says where it is, and is then told which rank it is. Its state can be asked for while a call is running, through a
    thread of its own."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Args:
        environment: variables to set, before anything that reads them is imported. (As Ray's `runtime_env` they would cost every process
            a second start.)
        """
        os.environ.update(environment)
        tune_allocator()
        # transformers would import it, and with it pandas, for a function that no rank uses: 64 MB and 1.3 s of a core each
        sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]
        self.doing = ("", time.time())
        self.role: Any = None
        self.metrics: CallMetrics | None = None

    def where(self) -> tuple[str, tuple[Device, ...], str]:
        """(folder of the `actors` package, its devices on its node in order, its node's id)."""
        found = importlib.util.find_spec("actors")
        code = str(Path(found.origin or "").resolve().parent) if found else "nowhere"
        devices = (int(name) if str(name).isdecimal() else str(name) for name in ray.get_gpu_ids())
        return code, tuple(sorted(devices, key=device_order)), ray.get_runtime_context().get_node_id()

    def build(self, role: type[Worker], config: Config, checkpoint: str, spec: RankSpec, devices: Sequence[Device]) -> None:
        """Make the role object.

        Args:
            devices: all devices it works on, where they are more than Ray gave to this process; otherwise empty.
        """
        self.doing = ("build", time.time())
        if sys.modules.get("sklearn", self) is None:  # transformers is here now; a reward function of the user's may want it
            del sys.modules["sklearn"]
        if devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        self.role = role(config, checkpoint, spec)
        self.metrics = CallMetrics(config.run_dir, spec.role) if ray.is_initialized() else None
        self.doing = ("", time.time())

    def call(self, asked: Asked, *items: Any) -> Any:
        """Run one method of the role. The first returned value only says that the call went well; the rest are its results.

        Args:
            items: the pieces of each list argument, then the common arguments that are references, resolved by Ray.
        """
        self.doing = (asked.method, time.time())
        began = time.perf_counter()
        try:
            arguments, rest = [], list(items)
            for count in asked.counts:
                arguments.append(rest[:count])
                rest = rest[count:]
            with traced(self.role, asked.method):
                result = getattr(self.role, asked.method)(*arguments, **asked.common, **dict(zip(asked.held, rest, strict=True)))
            return (None, *result) if isinstance(result, list) else (None, result)
        finally:
            if self.metrics is not None:
                self.metrics.record(asked.method, time.perf_counter() - began)
            give_back_freed_memory()  # other roles on this machine need it for their own passes
            self.doing = ("", time.time())

    def open_store(self) -> tuple[str, int]:
        """Rank 0's rendezvous, at this node's address."""
        return self.role.open_store(ray.util.get_node_ip_address())

    @ray.method(concurrency_group="health")
    def state(self) -> str:
        """What this rank is doing, and for how long."""
        method, since = self.doing
        return f"in {method} for {time.time() - since:.0f} s" if method else f"idle for {time.time() - since:.0f} s"


RankActor: Any = ray.remote(concurrency_groups={"health": 1})(RayRank)  # type: ignore[call-overload]


def device_order(device: Device) -> tuple[bool, int, str]:
    """Sorts numbers as numbers and names as text."""
    return (False, device, "") if isinstance(device, int) else (True, 0, device)


def rank_environment(place: RolePlacement, interface: str | None) -> dict[str, str]:
    """Environment of a rank's process. Ray would set OMP_NUM_THREADS to the reserved CPUs, which cripples CPU arithmetic, and would show
    all GPUs to a rank that reserved none.

    Args:
        interface: network interface of collectives; None leaves it to the environment (`loopback.py`), or to NCCL and gloo.
    """
    network = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    return {
        **network,
        **({} if place.gpus else HIDDEN),
        "OMP_NUM_THREADS": str(place.threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # roles share cores: a thread that spins while it waits slows the others nearly tenfold
        "THP_MEM_ALLOC_ENABLE": "1",  # torch's large tensors get pages of their own, which go back when they are freed
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
