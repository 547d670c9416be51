from __future__ import annotations

import pytest

from orchestration.recipe import inputs_of
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
