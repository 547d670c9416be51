"""The memory rules: what must hold between settings, and what was measured (`tests/benchmarks/planned_memory.py` measures it again)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.schema import Config
from orchestration import config as configuration
from orchestration.planner.memory import MicroBatch, RankMemory, of_role, training
from orchestration.planner.shapes import language_model

MEASURED = {  # ZeRO stage, offloaded, ranks: bytes of rank 0 of scale=tiny in fp32 (DeepSpeed 0.19.8, gloo)
    (0, "none", 1): {"parameters": 7871232, "gradients": 7871232, "optimizer": 15742616},
    (1, "none", 2): {"parameters": 7871232, "gradients": 7871232, "optimizer": 11806852},
    (2, "none", 2): {"parameters": 7871232, "gradients": 4326912, "optimizer": 11806852},
    (3, "none", 2): {"parameters": 3942528, "gradients": 3935616, "optimizer": 11806852},
    (3, "cpu", 2): {"parameters": 3942528, "gradients": 7871232, "optimizer": 11806852},
}
SAVED = 8818176
"""Bytes that autograd kept of 2 rows of 64 tokens, 32 of them predicted."""


def load(*words: str) -> Config:
    return configuration.load(["scale=tiny", "model.dtype=fp32", *words])


def rank_zero(config: Config, ranks: int) -> RankMemory:
    return training(config, language_model(config), "policy", ranks, MicroBatch(2, 64, 32), cuda=False, rank=0)


@pytest.mark.parametrize("cell", MEASURED)
def test_ranks_hold_what_was_measured(cell: tuple[int, str, int]) -> None:
    stage, offloaded, ranks = cell
    found = rank_zero(load(f"engine.zero_stage={stage}", f"engine.offload_optimizer={offloaded}"), ranks)
    assert {kind: found.of(kind) for kind in MEASURED[cell]} == pytest.approx(MEASURED[cell], rel=0.001)
    assert found.of("activations") == pytest.approx(SAVED, rel=0.01)


def test_offloading_moves_states_and_does_not_lose_them() -> None:
    on_device = rank_zero(load("engine.zero_stage=3"), 2)
    away = rank_zero(load("engine.zero_stage=3", "engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"), 2)
    assert away.of("optimizer") == on_device.of("optimizer")
    assert away.of("parameters") == on_device.of("parameters")
    assert away.by_kind()["optimizer"] == 0
    assert away.on("host") > on_device.on("host") + on_device.of("optimizer")


def test_recomputing_keeps_the_inputs_of_blocks_alone() -> None:
    kept = rank_zero(load(), 1).of("activations")
    again = rank_zero(load("engine.activation_checkpointing=true"), 1)
    inputs = 4 * 2 * 64 * 192 * 4  # layers, rows, tokens, width, bytes
    assert inputs < again.of("activations") < kept / 2
    assert again.of("workspace") > rank_zero(load(), 1).of("workspace")


def test_a_pass_and_the_optimizers_step_do_not_need_their_workspaces_together() -> None:
    config = load("engine.zero_stage=1")
    few, many = (training(config, language_model(config), "policy", 1, MicroBatch(rows, 64, 32), cuda=False) for rows in (1, 64))
    assert few.of("workspace") == 4 * 1_967_808  # gradients in fp32 of all weights
    assert many.of("workspace") > few.of("workspace")


def test_an_export_holds_one_tensor_and_what_is_gone_back_to_follows_the_steps() -> None:
    found = of_role(load("engine.zero_stage=3", "placement.policy.ranks=2", "ppo.steps=1"), "policy", cuda=True)
    largest = 1024 * 192  # the embedding of the quickstart's tokenizer
    assert found.by_place()["export"]["host"] == 4 * max(language_model(load()).tensors) >= 4 * largest
    longer = of_role(load("engine.zero_stage=3", "placement.policy.ranks=2", "ppo.steps=3"), "policy", cuda=True)
    assert longer.of("to go back to") == 2 * found.of("to go back to")


def test_bf16_halves_weights_on_a_gpu_only() -> None:
    config = load("model.dtype=bf16")
    on_gpu, on_cpu = of_role(config, "policy", cuda=True), of_role(config, "policy", cuda=False)
    assert 2 * on_gpu.of("parameters") == on_cpu.of("parameters")
    assert on_gpu.of("optimizer") == 12 * on_gpu.of("parameters") // 2


def test_adapters_alone_have_gradients_and_optimizer_states() -> None:
    whole, adapters = of_role(load(), "policy", cuda=False), of_role(load("lora.rank=4"), "policy", cuda=False)
    # q, k, v, o of 192 x 192 and three of 192 x 512, in 4 layers
    assert adapters.of("gradients") == 4 * 4 * 4 * (4 * 384 + 3 * 704)
    assert adapters.of("gradients") < whole.of("gradients") / 10


def test_an_engine_splits_weights_and_cache_over_its_devices() -> None:
    one = of_role(load(), "rollout", cuda=True)
    two = of_role(load("placement.rollout.tensor_parallel=2"), "rollout", cuda=True)
    assert two.of("parameters") * 2 == one.of("parameters")
    assert two.of("kv_cache") * 2 == one.of("kv_cache")


def test_bf16_without_zero_is_planned_as_the_engine_runs_it_on_a_gpu() -> None:
    config = load("model.dtype=bf16", "placement.policy.ranks=2", "placement.critic.ranks=2", "engine.zero_stage=0")
    one = load("model.dtype=bf16", "placement.policy.ranks=2", "placement.critic.ranks=2", "engine.zero_stage=1")
    assert of_role(config, "policy", cuda=True) == of_role(one, "policy", cuda=True)
    assert of_role(config, "policy", cuda=False) != of_role(one, "policy", cuda=False)


def test_whole_models_are_loaded_but_under_zero_3() -> None:
    whole = 4 * 1_967_808
    found = {stage: of_role(load(f"engine.zero_stage={stage}"), "policy", cuda=True) for stage in (0, 2, 3)}
    assert {stage: memory.loading for stage, memory in found.items()} == {0: whole, 2: whole, 3: 0}
    assert of_role(load("engine.zero_stage=3", "lora.rank=4"), "policy", cuda=True).loading == 0
    assert found[0].by_place()["loading"] == {"device": 0, "host": whole, "nvme": 0, "disk": 0}


def test_a_critic_may_be_of_another_size() -> None:
    config = load()
    larger = replace(config, reward_scale=configuration.load(["scale=125m"]).scale)
    assert of_role(larger, "critic", cuda=False).of("parameters") > 10 * of_role(config, "critic", cuda=False).of("parameters")
    assert of_role(larger, "policy", cuda=False) == of_role(config, "policy", cuda=False)


def test_a_vllm_engine_fills_what_it_is_given() -> None:
    on_cpu = of_role(load("rollout=vllm", "rollout.cpu_cache_gib=2"), "rollout", cuda=False)
    assert on_cpu.of("kv_cache") == 2 * 2**30
    given = ("rollout=vllm", "rollout.gpu_memory=0.25", "cluster.gpu_memory_gib=80")
    on_gpu = of_role(load(*given), "rollout", cuda=True)
    assert on_gpu.of("parameters") + on_gpu.of("kv_cache") + on_gpu.of("workspace") == 20 * 2**30
    halves = of_role(load(*given, "placement.rollout.tensor_parallel=2"), "rollout", cuda=True)
    assert 2 * halves.of("parameters") == pytest.approx(on_gpu.of("parameters"), abs=2)
