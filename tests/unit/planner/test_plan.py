"""What fits, what does not and why, where it stands, and what would help."""

from __future__ import annotations

import json
import time

import pytest

from conf.schema import Config
from orchestration import cli
from orchestration import config as configuration
from orchestration.planner import machines
from orchestration.planner.plan import as_dict, plan
from orchestration.planner.remedies import with_remedies
from orchestration.planner.show import drawn

COLOCATED = ["placement=colocated", "placement.sleep=true", "cluster=a100x8", "ppo.batch=64", "sft.batch=64", "reward_model.batch=64",
             "pretrain.batch=64", "ppo.minibatches=1", "engine.micro_batch=4"]  # fmt: skip


def planned(*words: str):
    config = configuration.load([*words], reads_data=False)
    return plan(config, machines.described(config.cluster))


def load(*words: str) -> Config:
    return configuration.load([*words], reads_data=False)


def test_a_tiny_model_fits_a_laptop() -> None:
    found = planned("scale=tiny")
    assert found.fits, found.reasons
    assert found.step is None  # no time is claimed for a CPU


def test_every_bundle_stands_on_a_node_in_order() -> None:
    found = planned("scale=1.3b", *COLOCATED, "placement.rollout.tensor_parallel=4", "placement.rollout.ranks=2")
    (ppo,) = [part for part in found.parts if part.name == "ppo"]
    assert not ppo.layout.homeless
    assert [sorted(role for role, _ in there) for there in ppo.layout.placed[0].devices] == [
        ["critic", "policy", "reference", "reward", "rollout"]
    ] * 8
    assert drawn(ppo.layout.placed[0]) == "node 0 | GPU 0-7: policy 0-7, critic 0-7, reference 0-7, reward 0-7, rollout 0-1"


def test_a_cluster_one_gpu_too_small_is_refused_with_reason_and_remedy() -> None:
    began = time.process_time()
    config = load("scale=1.3b", *COLOCATED, "cluster.gpus=7")
    found = with_remedies(config, plan(config, machines.described(config.cluster)))
    assert time.process_time() - began < 5
    assert not found.fits
    assert "1 of 8 bundles" in found.reasons[0]
    assert "the cluster has 96 and 7" in found.reasons[0]
    assert any("placement.devices=" in word or "cluster.nodes=" in word for remedy in found.remedies for word in remedy.changes)


def test_remedies_are_changes_that_really_fit() -> None:
    words = ["scale=6.7b", *COLOCATED, "engine.zero_stage=0", "engine.activation_checkpointing=false"]
    config = load(*words)
    found = with_remedies(config, plan(config, machines.described(config.cluster)))
    assert not found.fits
    assert any("device memory" in reason for reason in found.reasons)
    assert found.remedies
    for remedy in found.remedies:
        assert planned(*words, *remedy.changes).fits, remedy.changes


def test_sleeping_roles_need_the_device_in_turns_and_the_host_together() -> None:
    awake = planned("scale=1.3b", *COLOCATED, "placement.sleep=false").parts[-1]
    asleep = planned("scale=1.3b", *COLOCATED).parts[-1]
    assert asleep.device < awake.device
    assert asleep.host > awake.host


def test_the_published_175b_recipe_fits_64_gpus_and_says_what_binds() -> None:
    began = time.process_time()
    found = planned("experiment=instructgpt_175b", "cluster=a100x64")
    assert time.process_time() - began < 5
    assert found.fits, found.reasons
    assert "memory" in found.binds
    assert found.roles["policy"].parameters == 174_604_468_224
    assert found.roles["critic"].parameters == 6_658_478_081
    assert not planned("experiment=instructgpt_175b", "cluster=a100x8").fits


def test_programs_get_bytes_of_every_kind(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", "scale=tiny", "cluster=a100x8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    policy = found["roles"]["policy"]
    assert policy["parameters"] == 1_967_808
    assert policy["bytes_per_rank"]["parameters"] == 4 * 1_967_808
    assert found == as_dict(planned("scale=tiny", "cluster=a100x8")) | {"remedies": []}


def test_what_does_not_fit_ends_with_1_and_a_wrong_request_with_2(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", "scale=175b", *COLOCATED, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert cli.main(["plan", "scale=no_such_scale"]) == 2
