from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from conf.rewards import FunctionReward, ModelReward
from conf.schema import STAGES, Config
from orchestration import recipe
from orchestration.errors import RequestError
from orchestration.recipe import check, engine_mistakes, identity, inputs_of, stages_of
from tests.fakes import smoke, with_section


@pytest.mark.parametrize(
    ("labeler", "start", "wanted"),
    [
        ("simulated", "sft", ("sft", "compare")),
        ("recorded", "sft", ("sft",)),
        ("recorded", "model", ()),
        ("recorded", "own", ("sft",)),
        ("simulated", "own", ("sft", "compare")),
    ],
)
def test_the_reward_model_needs_the_stages_that_it_takes_something_from(labeler: str, start: str, wanted: tuple[str, ...]) -> None:
    config = with_section(with_section(smoke(), "labeler", kind=labeler), "reward_model", start=start)
    assert inputs_of("reward_model", config) == wanted
    assert inputs_of("compare", config) == (("sft",) if labeler == "simulated" else ())
    assert inputs_of("ppo", config) == ("sft", "reward_model")


def identity_of(stage: str, config: Config) -> dict[str, Any]:
    directory = SimpleNamespace(output_of=lambda name: None)
    shared = SimpleNamespace(source=SimpleNamespace(fingerprint=lambda: {}))
    return identity(stage, config, directory, shared)["settings"]  # type: ignore[arg-type]


def lora_in_identity(stage: str, *overrides: str) -> Any:
    return identity_of(stage, smoke(*overrides)).get("lora")


@pytest.mark.parametrize(
    "words",
    [
        ("engine.zero_stage=3", "engine.offload_optimizer=cpu", "engine.offload_parameters=cpu", "engine.activation_checkpointing=true"),
        ("scale.zero_stage=3", "scale.offload_optimizer=cpu", "scale.offload_parameters=cpu", "scale.activation_checkpointing=true"),
        ("runtime=ray", *(f"placement.{role}.ranks=2" for role in ("train", "policy", "critic", "reference", "reward", "rollout"))),
        ("engine.micro_batch=2", "engine.shard_mb=7", "engine.rollout_batch=3", "placement.sleep=true", "placement.interface=lo"),
        ("scale.dtype=bf16",),  # model.dtype=fp32 is in force
        ("rollout=vllm", "rollout.sequences=3"),
    ],
)
def test_ranks_sharding_and_ways_to_save_memory_make_no_other_stage(words: tuple[str, ...]) -> None:
    for stage in STAGES:
        assert identity_of(stage, smoke(*words)) == identity_of(stage, smoke()), stage


def test_the_arithmetic_in_force_is_part_of_what_a_stage_is() -> None:
    own = smoke("model.dtype=null", "scale.dtype=bf16")
    for stage in ("sft", "reward_model", "ppo"):
        assert identity_of(stage, own) == identity_of(stage, smoke("model.dtype=bf16")) != identity_of(stage, smoke())


def test_a_reward_models_own_shape_is_part_of_its_identity_alone() -> None:
    own = ("reward_model.start=own", "scale@reward_scale=micro")
    assert identity_of("reward_model", smoke(*own))["reward_scale"]["layers"] == 2
    assert identity_of("reward_model", smoke(*own)) != identity_of("reward_model", smoke(*own, "reward_scale.layers=1"))
    assert identity_of("reward_model", smoke(*own)) == identity_of("reward_model", smoke(*own, "reward_scale.zero_stage=3"))
    assert "reward_scale" not in identity_of("sft", smoke(*own))


def test_adapters_are_part_of_the_identity_of_the_stages_that_train_them_alone() -> None:
    assert all(lora_in_identity(stage) is None for stage in ("sft", "reward_model", "ppo", "evaluate"))
    with_adapters = ("lora.rank=4", "lora.roles=[policy]")
    assert [stage for stage in ("sft", "compare", "reward_model", "ppo", "evaluate") if lora_in_identity(stage, *with_adapters)] == ["ppo"]
    assert lora_in_identity("ppo", *with_adapters) == lora_in_identity("ppo", "lora.rank=4", "lora.roles=[reward_model,policy]")
    assert lora_in_identity("ppo", *with_adapters) != lora_in_identity("ppo", "lora.rank=4")


def test_without_a_reward_model_of_its_own_a_run_leaves_out_the_stages_that_make_one() -> None:
    scored = with_section(smoke(), "ppo", rewards=(FunctionReward("function", "tests.fakes:brief"),))
    assert stages_of(scored) == ("sft", "ppo", "evaluate")
    assert inputs_of("ppo", scored) == ("sft",)
    assert inputs_of("evaluate", scored) == ("sft", "ppo")
    assert inputs_of("reward_model", scored) == ("sft", "compare"), "asked for by name, it can still be run"
    both = with_section(smoke(), "ppo", rewards=(*scored.ppo.rewards, ModelReward("model")))
    assert stages_of(both) == stages_of(smoke())
    assert inputs_of("ppo", both) == ("sft", "reward_model")
    elsewhere = with_section(smoke(), "ppo", rewards=(ModelReward("model", path="some/model"),))
    assert inputs_of("ppo", elsewhere) == ("sft",)


def test_engines_that_cannot_be_split_are_refused_before_anything_starts() -> None:
    with pytest.raises(RequestError, match="tensor_parallel=2: it can be planned"):
        check(smoke("placement.rollout.tensor_parallel=2"), SimpleNamespace(), SimpleNamespace(), ["ppo"])  # type: ignore[arg-type]


VLLM = ("rollout=vllm", "runtime=ray", "scale.width=64")


@pytest.mark.parametrize(
    ("words", "installed", "text"),
    [
        (VLLM, True, ""),
        ((*VLLM, "placement.rollout.tensor_parallel=2"), True, ""),
        (VLLM, False, "the package vllm is not installed"),
        ((*VLLM, "ray.address=10.0.0.1:6379"), False, ""),  # the driver's packages say nothing of the nodes'
        ((*VLLM, "runtime=local"), True, "with runtime=local all roles are one process"),
        ((*VLLM, "scale.width=16"), True, "heads 8 wide, and those of vLLM on CPUs are 32, 64"),
        ((*VLLM, "scale.width=16", "placement.rollout.gpus=1"), True, ""),
    ],
)
def test_where_vllm_cannot_run_it_is_said_before_anything_starts(
    words: tuple[str, ...], installed: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: object() if installed else None)
    found = list(engine_mistakes(smoke(*words)))
    assert len(found) == (1 if text else 0)
    assert all(text in mistake for mistake in found)
