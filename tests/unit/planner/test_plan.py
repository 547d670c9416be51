"""What fits, what does not and why, where it stands, and what would help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import OPTConfig

from conf.schema import Config
from orchestration import cli
from orchestration import config as configuration
from orchestration.errors import RequestError
from orchestration.planner import machines
from orchestration.planner.changes import changes, combined
from orchestration.planner.choices import settled
from orchestration.planner.plan import as_dict, plan
from orchestration.planner.remedies import with_remedies
from orchestration.planner.show import drawn

COLOCATED = ["placement=colocated", "placement.sleep=true", "cluster=a100x8", "ppo.batch=64", "sft.batch=64", "reward_model.batch=64",
             "pretrain.batch=64", "ppo.minibatches=1", "engine.micro_batch=4"]  # fmt: skip


def planned(*words: str):
    config = configuration.load([*words], reads_data=False)
    return plan(config, machines.described(config.cluster))


def laptop(config: Config) -> list[machines.Node]:
    return machines.described(config.cluster)


def load(*words: str) -> Config:
    return configuration.load([*words], reads_data=False)


def test_a_tiny_model_fits_a_laptop() -> None:
    found = planned("scale=tiny")
    assert found.fits, found.reasons
    assert found.step and "assumed of any CPU" in " ".join(found.step.assumptions)
    assert found.step.dollars is None


def test_every_bundle_stands_on_a_node_in_order() -> None:
    found = planned("scale=1.3b", *COLOCATED, "placement.rollout.tensor_parallel=4", "placement.rollout.ranks=2")
    (ppo,) = [part for part in found.parts if part.name == "ppo"]
    assert not ppo.layout.homeless
    assert [sorted(role for role, _ in there) for there in ppo.layout.placed[0].devices] == [
        ["critic", "policy", "reference", "reward", "rollout"]
    ] * 8
    assert drawn(ppo.layout.placed[0]) == "node 0 | GPU 0-7: policy 0-7, critic 0-7, reference 0-7, reward 0-7, rollout 0-1"


def test_a_cluster_one_gpu_too_small_is_refused_with_reason_and_remedy() -> None:
    config = load("scale=1.3b", *COLOCATED, "cluster.gpus=7")
    found = with_remedies(config, plan(config, machines.described(config.cluster)))
    assert not found.fits
    assert "1 of 8 bundles" in found.reasons[0]
    assert "the cluster has 96 and 7" in found.reasons[0]
    assert any("placement.devices=" in word or "cluster.nodes=" in word for remedy in found.remedies for word in remedy.changes)


def test_remedies_are_changes_that_really_fit() -> None:
    words = ["scale=6.7b", *COLOCATED, "engine.zero_stage=0", "engine.activation_checkpointing=false", "engine.micro_batch=16"]
    config = load(*words)
    found = with_remedies(config, plan(config, machines.described(config.cluster)))
    assert not found.fits
    assert any("device memory" in reason for reason in found.reasons)
    assert found.remedies
    for remedy in found.remedies:
        assert planned(*words, *remedy.changes).fits, remedy.changes


def test_a_remedy_is_nothing_that_a_run_would_refuse() -> None:
    """Weights that rest in host memory would make it fit; while roles sleep, DeepSpeed cannot do that."""
    words = [
        "scale=30b", *COLOCATED, "cluster.gpu_memory_gib=16", "cluster.host_memory_gib=8000", "engine.offload_optimizer=cpu",
        "placement.rollout.tensor_parallel=8", "placement.rollout.ranks=1", "engine.micro_batch=1", "engine.rollout_batch=1",
    ]  # fmt: skip
    config = load(*words)
    choices = changes(config, laptop(config))
    assert "offload_parameters" in choices
    for change in (change for family in choices.values() for change in family):
        tried, _ = combined(config, [change])
        assert tried.offload_parameters() == "none" or not tried.placement.sleep, change.words
    found = with_remedies(config, plan(config, laptop(config), timed=False))
    assert not found.fits and found.remedies
    for remedy in found.remedies:
        again = load(*words, *remedy.changes)
        assert again.offload_parameters() == "none" or not again.placement.sleep, remedy.changes


REFUSED = {
    "too few machines": ["experiment=instructgpt_175b", "cluster=a100x8"],
    "no engine may be whole": ["scale=175b", "cluster=a100x64"],
    "one of eight": ["scale=1.3b", "cluster=a100x8", "placement=one_gpu"],
    "host memory": ["scale=30b", "cluster=a100x8"],
    "a laptop": ["scale=125m", "engine.micro_batch=16", "cluster.host_memory_gib=24"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_first_remedy_of_each_refusal_keeps_the_model_and_fits(name: str) -> None:
    words = REFUSED[name]
    config, nodes, _ = settled(words, laptop)
    found = with_remedies(config, plan(config, nodes, timed=False))
    assert not found.fits and found.remedies
    first = found.remedies[0].changes
    assert not any(word.startswith(("scale=", "lora.rank=")) for word in first)
    again, nodes, _ = settled([*words, *first], laptop)
    assert plan(again, nodes).fits, first


def test_a_recipe_for_64_gpus_is_offered_as_many_nodes_on_one() -> None:
    config = load("experiment=instructgpt_175b", "cluster=a100x8")
    found = with_remedies(config, plan(config, machines.described(config.cluster)))
    assert ("cluster.nodes=8",) in [remedy.changes for remedy in found.remedies]
    assert len(found.reasons) == len(set(found.reasons))


def test_gpus_are_used_unless_a_placement_was_chosen() -> None:
    config, nodes, notes = settled(["scale=1.3b", "cluster=a100x64"], laptop)
    assert config.placement.devices == 64 and config.placement.share
    assert config.sft.batch == 64  # 32 rows are none for half of the ranks
    assert any("placement=colocated placement.devices=64" in note for note in notes)
    chosen, nodes, notes = settled(["scale=1.3b", "cluster=a100x64", "placement=cpu"], laptop)
    assert chosen.placement.devices == 0 and not notes
    assert "64 of 64 GPUs idle in training stages and ppo" in plan(chosen, nodes).notes


@pytest.mark.parametrize("gpus", [128, 256])
def test_the_175b_recipe_on_larger_clusters_as_its_file_says(gpus: int) -> None:
    words = ["experiment=instructgpt_175b", f"cluster=a100x{gpus}", f"placement.devices={gpus}", f"placement.rollout.ranks={gpus // 8}"]
    with pytest.raises(RequestError) as refused:
        load(*words)
    named = [mistake.rsplit(" ", 1)[1] for mistake in refused.value.mistakes]  # "... the next that works is sft.batch=128"
    assert planned(*words, *named).fits
    lines = Path(configuration.FOLDER, "experiment", "instructgpt_175b.yaml").read_text(encoding="utf-8").replace("\\\n#", "")
    (line,) = [line for line in lines.splitlines() if f"cluster=a100x{gpus}" in line]
    found = planned(*line.split()[3:])
    assert found.fits and not any("idle" in note for note in found.notes)


def test_gpus_that_an_experiment_leaves_idle_are_said() -> None:
    assert "64 of 128 GPUs idle in training stages and ppo" in planned("experiment=instructgpt_175b", "cluster=a100x128").notes


def test_batches_that_were_given_are_refused_with_the_next_that_works() -> None:
    with pytest.raises(RequestError, match=r"sft\.batch=33: .*the next that works is sft\.batch=64"):
        settled(["scale=1.3b", "cluster=a100x64", "sft.batch=33"], laptop)


def test_a_model_from_elsewhere_is_sharded_as_the_nearest_rung(tmp_path: Path) -> None:
    OPTConfig(hidden_size=768, ffn_dim=3072, num_hidden_layers=10, num_attention_heads=12).save_pretrained(tmp_path)
    config, _, notes = settled([f"model.path={tmp_path}"], laptop)
    assert config.scale.name == "125m"
    assert any("a run needs scale=125m" in note for note in notes)
    assert settled([f"model.path={tmp_path}", "scale=350m"], laptop)[0].scale.name == "350m"


def test_sequences_may_be_bounded_below_the_context() -> None:
    whole, short = planned("scale=125m"), planned("scale=125m", "engine.longest=160")
    assert "sequences of at most 160 tokens" in short.notes
    for role, kind in (("policy", "activations"), ("critic", "activations"), ("rollout", "kv_cache")):
        assert short.roles[role].memory.of(kind) < whole.roles[role].memory.of(kind) / 5


def test_what_a_run_would_refuse_is_said_and_counted_apart_by_place(capsys: pytest.CaptureFixture) -> None:
    split = ("placement=colocated", "placement.devices=8", "placement.rollout.ranks=1", "placement.rollout.tensor_parallel=8")
    files = ("engine.offload_optimizer=nvme", "engine.nvme_path=/local/nvme", "placement.sleep=true")
    assert cli.main(["plan", "scale=30b", *split, *files, "cluster=a100x8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any("placement.rollout.tensor_parallel=8 needs rollout=vllm" in note for note in found["notes"])
    policy = found["roles"]["policy"]
    assert policy["by_place"]["optimizer"]["device"] == 0 < policy["by_place"]["optimizer"]["nvme"]
    for place in ("host", "nvme", "disk"):
        kinds = [where[place] for kind, where in policy["by_place"].items() if kind != "loading"]
        assert sum(kinds) == policy["bytes_per_rank"][place]


def test_sleeping_roles_need_the_device_in_turns_and_the_host_together() -> None:
    split = ["engine.zero_stage=3", "placement.rollout.tensor_parallel=8", "placement.rollout.ranks=1"]  # nobody loads a whole model
    awake = planned("scale=1.3b", *COLOCATED, *split, "placement.sleep=false").parts[-1]
    asleep = planned("scale=1.3b", *COLOCATED, *split).parts[-1]
    assert asleep.device < awake.device
    assert asleep.host > awake.host


def test_the_published_175b_recipe_fits_64_gpus_and_says_what_binds() -> None:
    found = planned("experiment=instructgpt_175b", "cluster=a100x64")
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
    assert policy["bytes_per_rank"]["parameters"] == 2 * 1_967_808  # the defaults are those of the quickstart, in bf16
    config, nodes, notes = settled(["scale=tiny", "cluster=a100x8"], laptop)
    expected = as_dict(plan(config, nodes))
    assert found == expected | {"notes": [*notes, *expected["notes"]]}


def test_what_does_not_fit_ends_with_1_and_a_wrong_request_with_2(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", "scale=175b", *COLOCATED, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert cli.main(["plan", "scale=no_such_scale"]) == 2
