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
    ],
)
def test_the_reward_model_needs_the_stages_that_it_takes_something_from(labeler: str, start: str, wanted: tuple[str, ...]) -> None:
    config = with_section(with_section(smoke(), "labeler", kind=labeler), "reward_model", start=start)
    assert inputs_of("reward_model", config) == wanted
    assert inputs_of("compare", config) == (("sft",) if labeler == "simulated" else ())
    assert inputs_of("ppo", config) == ("sft", "reward_model")


def lora_in_identity(stage: str, *overrides: str) -> Any:
    directory = SimpleNamespace(output_of=lambda name: None)
    shared = SimpleNamespace(source=SimpleNamespace(fingerprint=lambda: {}))
    return identity(stage, smoke(*overrides), directory, shared)["settings"].get("lora")  # type: ignore[arg-type]


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
