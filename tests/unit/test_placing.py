"""Which ranks share a bundle, which bundle each gets, and what preflight says when there is no room or the nodes differ."""

from __future__ import annotations

import dataclasses

import pytest
from fakes import smoke

from conf.schema import Config
from orchestration import preflight
from orchestration.bundles import Bundle, bundles, unplaced
from orchestration.config import load
from orchestration.errors import RequestError, RunError
from orchestration.runtime.facts import Survey
from orchestration.runtime.machine import Machine, inspect, read_gpu
from orchestration.runtime.reservation import Slot, deal

GPU = Bundle(1, 1, (("policy", 0),))
ENGINE = Bundle(1, 2, (("rollout", 0),))


def shared(*words: str):
    return load(["experiment=smoke", "placement=colocated", "placement.devices=4", "ppo.batch=16", *words]).placement


def test_roles_share_the_bundle_of_their_number() -> None:
    found = bundles(shared("placement.reward.ranks=2"), ["policy", "reward"])
    assert [bundle.ranks for bundle in found] == [(("policy", n), ("reward", n)) if n < 2 else (("policy", n),) for n in range(4)]
    assert [bundle.gpus for bundle in found] == pytest.approx([0.4, 0.4, 0.2, 0.2])


def test_an_engine_has_a_part_of_as_many_shared_devices_as_it_is_split_over_and_stands_in_the_first() -> None:
    found = bundles(shared("placement.rollout.ranks=2", "placement.rollout.tensor_parallel=2"), ["policy", "rollout"])
    assert [dict(bundle.ranks).get("rollout") for bundle in found] == [0, None, 1, None]
    assert [bundle.gpus for bundle in found] == pytest.approx([0.4] * 4)


def test_bundles_find_room_node_by_node_the_largest_first() -> None:
    assert unplaced([GPU, GPU, ENGINE], [(8, 2), (8, 2)]) == []
    assert unplaced([GPU, GPU, GPU, ENGINE], [(8, 2), (8, 2)]) == [GPU]
    assert unplaced([ENGINE], [(8, 1), (8, 1)]) == [ENGINE], "two GPUs of two nodes are not two of one"
    assert unplaced([Bundle(0.1, 0, ())] * 10, [(1, 0)]) == [], "ten tenths are one"


def test_bundles_are_dealt_in_the_order_of_nodes_and_the_drivers_own_is_left() -> None:
    ranks = [Bundle(1, 1, (("policy", rank),)) for rank in range(3)]
    engine = Bundle(1, 2, (("rollout", 0),))
    given = [(1.0, 0.0), (1.0, 1.0), (1.0, 2.0), (1.0, 1.0), (1.0, 1.0)]
    slots = deal([*ranks, engine], given, nodes=[0, 2, 1, 0, 1], first=1)
    assert [slots["policy", rank] for rank in range(3)] == [Slot(3, 0), Slot(4, 1), Slot(1, 2)]
    assert slots["rollout", 0] == Slot(2, 1)
    with pytest.raises(RunError, match="3 bundles beside the driver's own .* none is left for rollout rank 0"):
        deal([*ranks, engine], given[:2] + given[3:], nodes=[0, 2, 0, 1], first=1)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return inspect(str(tmp_path_factory.mktemp("run")))


def several(*machines: Machine) -> Survey:
    return Survey(machines, (), "token", machines[0].clock, 1.0)


def texts(survey: Survey, grave: bool) -> list[str]:
    return [finding.text for finding in preflight.machines(smoke(), survey) if finding.grave == grave]


def test_this_machine_says_what_it_has(here: Machine) -> None:
    assert here.node.cpus >= 1 and here.node.host_memory > 1 << 30 and here.node.disk > 0
    assert "missing" not in here.versions.values() and len(here.code) == 16
    assert read_gpu("NVIDIA H200, 143771, 570.86.15, 9.0").memory == 143771 << 20
    assert read_gpu("A, [N/A], 1, [N/A]").capability == 0


def test_nodes_that_differ_are_named(here: Machine) -> None:
    same = dataclasses.replace(here, token="token")
    other = dataclasses.replace(
        same, node=dataclasses.replace(here.node, name="odd"), versions=here.versions | {"ray": "1.0"}, token="", clock=here.clock + 100
    )
    assert texts(several(same, same, same), grave=True) == []
    grave, notes = texts(several(same, same, other), grave=True), texts(several(same, same, other), grave=False)
    assert any(text.startswith("ray differs") and "odd has 1.0" in text for text in grave)
    assert any(text.startswith("run_dir=") and "(odd)" in text for text in grave)
    assert any("odd" in text and "+99 s" in text for text in notes)
    silent = dataclasses.replace(several(same), silent=(("gone", "did not answer within 30 s"),))
    assert any(text.startswith("gone: did not answer") for text in texts(silent, grave=True))


def test_a_full_disk_is_grave_and_a_small_dev_shm_is_not(here: Machine) -> None:
    assert any("commit.keep" in text for text in texts(several(dataclasses.replace(here, run_disk=1 << 20)), grave=True))
    small = dataclasses.replace(here, node=dataclasses.replace(here.node, shm=64 << 20))
    config = load(["experiment=smoke"])
    assert [f.grave for f in preflight.machines(config, several(small)) if "object_store_mb" in f.text] == [False]


def test_files_for_states_need_an_extension_that_is_built_or_can_be(here: Machine) -> None:
    config = load(["experiment=smoke", "engine.zero_stage=3", "engine.offload_optimizer=nvme", "engine.nvme_path=/fast"])

    def found(config: Config, **tools: str) -> list[tuple[bool, str]]:
        machine = dataclasses.replace(here, tools=tools)
        return [(f.grave, f.text) for f in preflight.machines(config, several(machine)) if "async_io" in f.text]

    able = {"c++": "/usr/bin/c++", "libaio.h": "/usr/include/libaio.h"}
    assert found(config, **able, async_io="/cache/async_io.so") == []
    ((grave, text),) = found(config, **able)
    assert not grave and "deadlines.start=300" in text and "AsyncIOBuilder().load()" in text
    ((grave, text),) = found(config, **{"c++": "/usr/bin/c++"})
    assert grave and "libaio.h is not there" in text
    ((grave, text),) = found(config, **able, **{"unfinished build": "/cache/async_io/lock"})
    assert grave and "delete it" in text
    assert found(load(["experiment=smoke"])) == []


@pytest.mark.parametrize("mode", ["strict", "warn", "off"])
def test_what_has_no_room_is_refused_said_or_left(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(["experiment=smoke", "placement.policy.cpus=9999", f"preflight={mode}"])
    if mode == "strict":
        with pytest.raises(RequestError, match="stage ppo needs .*more than any node has.*placement.policy.cpus"):
            preflight.check(config, ["ppo"], lambda: None, print)
    else:
        preflight.check(config, ["ppo"], lambda: None, print)
    assert ("9999" in capsys.readouterr().out) == (mode == "warn")
    preflight.check(config, ["sft"], lambda: None, print)  # which does not start the policy
