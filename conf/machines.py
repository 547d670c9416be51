"""Where ranks run, and on which machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from conf.settings import Count, NotNegative, Positive, Settings, Whole


def _of_a_cluster(address: str) -> str:
    """Ray itself takes "local" for a new cluster, which would be open to the network and end with nobody."""
    if address.strip().lower() in ("local", ""):
        raise ValueError("no address of a running cluster; leave ray.address out, and a cluster of this machine is started")
    return address


@dataclass(frozen=True)
class RolePlacement(Settings):
    """Where the ranks of one role run."""

    ranks: Count
    """Processes of this role; training roles shard over them by ZeRO."""
    cpus: Positive
    """CPUs that Ray reserves for each rank."""
    gpus: NotNegative
    """GPUs that Ray reserves for each rank; fractions share a device. 0: the rank computes on the CPU, and sees no GPU of its machine."""
    threads: Count
    """Threads of each rank's CPU arithmetic."""
    tensor_parallel: Count = 1
    """Devices over which one rollout engine's weights are split, `gpus` of each; 1 for all other roles."""


@dataclass(frozen=True)
class Placement(Settings):
    """How many ranks each role has and what each reserves."""

    devices: Whole
    """GPUs that the roles share or split between them, for the ranks below to refer to; 0: none."""
    share: bool
    """Ranks of the same number share a bundle of the placement group, and so a device, across roles; false: a bundle for each rank."""
    sleep: bool
    """Roles work in turns, and whoever is not at work keeps weights and optimizer states in host memory. Not with
    `engine.offload_parameters`."""
    interface: str | None
    """Network interface of NCCL and gloo, for example eth0; null lets them choose, in a cluster of this machine alone loopback."""
    collective_timeout: Positive
    """Seconds that one collective operation between ranks may take before it fails: the slowest rank's work is in it."""
    train: RolePlacement
    """Ranks of the supervised and reward-model stages, run under Ray Train."""
    policy: RolePlacement
    """Ranks of the policy (the actor)."""
    critic: RolePlacement
    """Ranks of the critic (the value model)."""
    reference: RolePlacement
    """Ranks of the reference (the frozen SFT model)."""
    reward: RolePlacement
    """Ranks of the reward model."""
    rollout: RolePlacement
    """Rollout engines, which sample replies."""
    weight_sync: Literal["auto", "object_store", "shared_memory", "collective"] = "auto"
    """How new weights get from the policy to the engines. `shared_memory`: all on one machine. `collective`: a broadcast, by NCCL between
    CUDA devices, else by gloo. `object_store`: through Ray's, works everywhere and copies most. `auto`: CUDA IPC on one device, NCCL
    between devices, shared memory on one machine, else the object store. With `runtime=local` weights are handed over as
    they are."""


@dataclass(frozen=True)
class Ray(Settings):
    """The Ray cluster."""

    address: Annotated[str, AfterValidator(_of_a_cluster)] | None
    """A running cluster's address (`auto`: the one of this machine); null starts one in this machine, for this user alone, and stops it at
    the end."""
    object_store_mb: Count
    """Object store of a cluster started here, in MiB."""


@dataclass(frozen=True)
class Cluster(Settings):
    """The machines that `chatray plan` plans for: alike, with fast links inside a node and a network between nodes."""

    name: str
    """Name, for tables; `live` stands for the cluster that is connected, whose own figures then take the place of all below."""
    nodes: Count
    """Machines."""
    gpus: Whole
    """GPUs of each machine."""
    gpu_name: str
    """What they are."""
    gpu_memory_gib: NotNegative
    """Memory of one GPU, GiB."""
    gpu_tflops: NotNegative
    """Peak dense bf16 arithmetic of one GPU, TFLOP/s."""
    gpu_bandwidth_gb: NotNegative
    """Bandwidth of one GPU's memory, GB/s."""
    link_gb: NotNegative
    """Bandwidth between two GPUs of a node, GB/s in one direction."""
    network_gb: NotNegative
    """Bandwidth of a node's network, GB/s in one direction."""
    cpus: Count
    """CPU cores of each machine."""
    host_memory_gib: Positive
    """Main memory of each machine, GiB."""
    shm_gib: NotNegative
    """Size of /dev/shm, where Ray's object store lies, GiB."""
    disk_gib: Positive
    """Free local disk of each machine, GiB."""
    price: NotNegative
    """Cost of one GPU for one hour, in dollars; 0: no cost is stated."""
