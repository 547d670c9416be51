from __future__ import annotations

import pytest

from conf.rewards import FunctionReward, ModelReward
from orchestration.recipe import inputs_of, stages_of
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
