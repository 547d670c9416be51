from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from conf.rewards import FunctionReward, ModelReward
from orchestration.recipe import identity, inputs_of, stages_of
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


def settings_in_identity(stage: str, *overrides: str) -> dict[str, Any]:
    directory = SimpleNamespace(output_of=lambda name: None)
    shared = SimpleNamespace(source=SimpleNamespace(fingerprint=lambda: {}))
    return identity(stage, smoke(*overrides), directory, shared)["settings"]  # type: ignore[arg-type]


def lora_in_identity(stage: str, *overrides: str) -> Any:
    return settings_in_identity(stage, *overrides).get("lora")


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo"])
def test_how_memory_is_shared_out_is_no_part_of_the_identity_and_arithmetic_is(stage: str) -> None:
    before = settings_in_identity(stage)
    memory = ("engine.zero_stage=3", "scale.zero_stage=2", "scale.offload_optimizer=cpu", "engine.offload_parameters=cpu",
              "scale.activation_checkpointing=true", "placement=two_cores", "preflight=off")  # fmt: skip
    assert settings_in_identity(stage, *memory, "runtime=ray") == before
    assert settings_in_identity(stage, "model.dtype=null", "scale.dtype=bf16") != before
    assert settings_in_identity(stage, "model.dtype=null", "scale.dtype=fp32") == before


def test_a_reward_models_own_shape_is_part_of_its_identity_alone() -> None:
    own = ("reward_model.start=own", "scale@reward_scale=micro")
    assert settings_in_identity("reward_model", *own)["reward_scale"]["layers"] == 2
    assert settings_in_identity("reward_model", *own) != settings_in_identity("reward_model", *own, "reward_scale.layers=1")
    assert "reward_scale" not in settings_in_identity("sft", *own)


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
