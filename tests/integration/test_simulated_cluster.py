"""A run of 175B parameters on 16 nodes with 8 pretended GPUs each: every bundle is reserved and every rank placed by the real runtime,
with ranks that import no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import stand_ins
from conftest import ray_processes, wait_until_gone
from ray.cluster_utils import Cluster
from stand_ins import StandIn

from conf.schema import PPO_ROLES, Config
from orchestration import config as configuration
from orchestration import preflight
from orchestration.bundles import bundles
from orchestration.errors import RequestError
from orchestration.planner.layout import Layout, lay_out
from orchestration.planner.machines import Node
from orchestration.runtime.cluster import RayRuntime
from orchestration.runtime.group import RoleRequest
from orchestration.runtime.reservation import reserve

pytestmark = pytest.mark.ray

NODES, GPUS, CPUS = 16, 8, 96
NODES_SECONDS = 300.0
"""For all nodes to start; two busy cores need a while."""
SPLIT = {"policy": 64, "critic": 16, "reference": 8, "reward": 8, "rollout": 4}
"""Ranks of each role; an engine has 8 devices."""

ray.cloudpickle.register_pickle_by_value(stand_ins)  # workers do not have the tests on their path


def settings(folder: Path, *words: str) -> Config:
    chosen = ["experiment=smoke", "scale=175b", f"run_dir={folder}", "ray.address=connected", "preflight=strict", "deadlines.start=600",
              "ppo.batch=128", "ppo.minibatches=1", "sft.batch=128", "pretrain.batch=128", "reward_model.batch=128",
              "evaluate.prompts=128"]  # fmt: skip
    return configuration.load([*chosen, *words])


def split(folder: Path) -> Config:
    ranks = [f"placement.{role}.ranks={count}" for role, count in SPLIT.items()]
    return settings(folder, "placement=split", *ranks, "placement.rollout.tensor_parallel=8")


def colocated(folder: Path, devices: int) -> Config:
    return settings(folder, "placement=colocated", f"placement.devices={devices}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """16 nodes, and a driver that is connected to them."""
    before = {process.pid for process in ray_processes()}
    with pytest.MonkeyPatch.context() as patch:
        changes = {
            "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0",
            "RAY_worker_register_timeout_seconds": "300",  # a hundred workers start at once on a machine of few cores
        }  # fmt: skip
        for name, value in changes.items():
            patch.setenv(name, value)
        # A node's dashboard agent then does no more than it must; each costs a second of a core otherwise.
        patch.setattr("ray._private.utils.get_dashboard_dependency_error", lambda: ImportError("not wanted here"))
        node = {"num_cpus": CPUS, "num_gpus": GPUS, "object_store_memory": 80 << 20}
        started = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
        try:
            for _ in range(NODES - 1):
                started.add_node(wait=False, **node)
            started.wait_for_nodes(timeout=NODES_SECONDS)
            ray.init(address=started.address, log_to_driver=False, logging_level="ERROR", namespace="chatray")
            yield started
        finally:
            ray.shutdown()
            started.shutdown()
    left = wait_until_gone(lambda: [process for process in ray_processes() if process.pid not in before])
    assert not left, left


def placement_groups() -> list[str]:
    """Those that still hold something."""
    return [group["name"] for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def test_ranks_of_175b_take_every_bundle_in_the_order_of_nodes_and_devices(cluster: Cluster, tmp_path: Path) -> None:
    config = split(tmp_path)
    preflight.check(config, ["ppo"], lambda: None, print, memory=lambda *_: [])
    runtime = RayRuntime(config)
    requests = [RoleRequest(role, StandIn, "", getattr(config.placement, role)) for role in PPO_ROLES]  # type: ignore[arg-type]
    try:
        groups = runtime.start(requests)
        assert runtime.reserved and len({slot.bundle for slot in runtime.reserved.slots.values()}) == sum(SPLIT.values())
        assert ray.available_resources().get("GPU", 0) == 0
        used = set()
        for role, ranks in SPLIT.items():
            found = runtime.get(groups[role].each(StandIn.who), "who they are")
            assert found == [(role, rank, ranks, False) for rank in range(ranks)]
            places = [(node, device) for node, devices in zip(*_placed(runtime, role), strict=True) for device in devices]
            assert places == sorted(places)
            assert len(set(runtime.groups[role].nodes)) == -(-len(places) // GPUS)
            used |= set(places)
        assert used == {(node, device) for node in range(NODES) for device in range(GPUS)}
        _check_as_planned(planned(config), runtime)
    finally:
        runtime.close()
    assert placement_groups() == []


def planned(config: Config) -> Layout:
    """Where `chatray plan` draws everyone on such a cluster."""
    layout = lay_out(config.placement, config.roles_of_ppo(), [Node("", CPUS, GPUS, "", 0, 0, 0, 0)] * NODES)
    assert not layout.homeless
    return layout


def _check_as_planned(layout: Layout, runtime: RayRuntime) -> None:
    """The same ranks share a node, and each has the devices of that node that were drawn; which node it is, is Ray's to choose."""
    drawn: dict[tuple[str, int], list[int]] = defaultdict(list)
    for placed in layout.placed:
        for device, there in enumerate(placed.devices):
            for who in there:
                drawn[who].append(device)
    given: dict[tuple[str, int], list[int]] = {}
    on_node: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for role in SPLIT:
        for rank, (node, devices) in enumerate(zip(*_placed(runtime, role), strict=True)):
            given[role, rank] = sorted(devices)
            on_node[node].add((role, rank))
    assert given == drawn
    assert {frozenset(ranks) for ranks in on_node.values()} == {frozenset(placed.ranks) for placed in layout.placed}


def _placed(runtime: RayRuntime, role: str) -> tuple[list[int], list[tuple[int, ...]]]:
    return runtime.groups[role].nodes, runtime.groups[role].devices


def test_roles_that_share_128_devices_get_every_bundle_and_one_more_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    config = colocated(tmp_path, NODES * GPUS)
    preflight.check(config, ["ppo"], lambda: None, print, memory=lambda *_: [])
    reserved = reserve(bundles(config.placement, config.roles_of_ppo()), seconds=60, may_grow=True)
    try:
        for role in config.roles_of_ppo():
            assert [reserved.slots[role, rank].node for rank in range(128)] == [rank // GPUS for rank in range(128)]
            assert [reserved.slots[role, rank].bundle for rank in range(128)] == [reserved.slots["policy", r].bundle for r in range(128)]
        drawn = {who: node for node, placed in enumerate(planned(config).placed) for who in placed.ranks}
        assert {who: slot.node for who, slot in reserved.slots.items()} == drawn
    finally:
        reserved.give_back()
    assert placement_groups() == []


def test_a_cluster_one_gpu_too_small_is_refused_before_anything_is_asked_or_reserved(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("no node need be asked: there is no room")

    monkeypatch.setattr(preflight, "survey", never)
    config = settings(
        tmp_path,
        "placement=colocated",
        "placement.devices=129",
        "ppo.batch=129",
        "sft.batch=129",
        "pretrain.batch=129",
        "reward_model.batch=129",
    )
    with pytest.raises(RequestError) as refused:
        preflight.check(config, ["ppo"], lambda: None, print, memory=never)
    text = refused.value.mistakes[0]
    assert "needs" in text and "129 GPUs in 129 bundles" in text and "128 GPUs in all: 1 GPUs missing" in text
    assert "placement.devices" in text and "add nodes" in text
    assert placement_groups() == []
