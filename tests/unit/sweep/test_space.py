"""The search space: what may stand in it, what is drawn from it, and which mistakes are found before anything starts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Config
from orchestration import config as configuration
from orchestration.errors import RequestError
from orchestration.sweep.space import Dimension, Space, parsed


@pytest.fixture(scope="module")
def config() -> Config:
    return configuration.load(["experiment=smoke"])


def mistakes_of(given: dict[str, Any], config: Config) -> list[str]:
    with pytest.raises(RequestError) as found:
        parsed(given, config)
    return found.value.mistakes


def test_dotted_and_nested_names_mean_the_same_and_the_later_one_counts(config: Config) -> None:
    space = parsed(
        {"ppo.lr": {"loguniform": [1e-6, 1e-4]}, "ppo": {"kl": {"beta": {"uniform": [0, 1]}}, "lr": {"choice": [1e-4, 1e-3]}}}, config
    )
    assert {d.key: d.kind for d in space.dimensions} == {"ppo.lr": "choice", "ppo.kl.beta": "uniform"}


def test_null_takes_a_dimension_out(config: Config) -> None:
    space = parsed({"ppo.lr": {"loguniform": [1e-6, 1e-4]}, "ppo.epochs": {"choice": [1, 2]}, "ppo": {"epochs": None}}, config)
    assert [d.key for d in space.dimensions] == ["ppo.lr"]


def test_every_mistake_is_reported_at_once(config: Config) -> None:
    found = mistakes_of(
        {
            "ppo.learning": {"uniform": [0, 1]}, "sft.lr": {"loguniform": [1e-5, 1e-3]}, "ppo.steps": {"choice": [1, 2]},
            "ppo.lr": {"loguniform": [1e-3, 1e-5]}, "ppo.clip": {"loguniform": [0, 1]}, "ppo.epochs": {"choice": [1, "two"]},
            "ppo.gamma": {"uniform": [0.5, 1.5]}, "ppo.minibatches": {"int": [1.5, 4]}, "ppo.entropy": {"normal": [0, 1]},
            "ppo.lam": {"uniform": [0.9, 1.0], "when": {"ppo.advantage": "gae"}}, "ppo.value_clip": {"quniform": [0.1, 0.3, 0.5]},
            "ppo.temperature": {"choice": [1.0]}, "ppo.whiten": {"choice": [True, True]},
        },
        config,
    )  # fmt: skip
    expected = [
        ("ppo.learning", "no such setting"), ("sft.lr", "only settings of ppo"), ("ppo.steps", "all trials have the same"),
        ("ppo.lr", "the lower end must be below"), ("ppo.clip", "ends above 0"), ("ppo.epochs", "'two'"), ("ppo.gamma", "1.5"),
        ("ppo.minibatches", "whole numbers"), ("ppo.entropy", "one of choice, uniform"), ("ppo.lam.when.ppo.advantage", "no dimension"),
        ("ppo.value_clip", "the step"), ("ppo.temperature", "two values at least"), ("ppo.whiten", "twice"),
    ]  # fmt: skip
    for key, text in expected:
        assert any(mistake.startswith(f"sweep.space.{key}") and text in mistake for mistake in found), (key, found)
    assert len(found) == len(expected), found


def test_a_condition_must_be_possible_and_may_not_go_round(config: Config) -> None:
    ever = {"ppo.advantage": {"choice": ["gae", "rloo"]}, "ppo.lam": {"uniform": [0.9, 1.0], "when": {"ppo.advantage": "grpo"}}}
    assert "never has this value" in mistakes_of(ever, config)[0]
    circle = {
        "ppo.epochs": {"choice": [1, 2], "when": {"ppo.minibatches": 2}}, "ppo.minibatches": {"choice": [1, 2], "when": {"ppo.epochs": 1}},
    }  # fmt: skip
    assert "circle" in mistakes_of(circle, config)[0]


def test_a_dimension_is_drawn_only_where_its_condition_holds(config: Config) -> None:
    space = parsed(
        {"ppo.lam": {"uniform": [0.9, 1.0], "when": {"ppo.advantage": ["gae"]}}, "ppo.advantage": {"choice": ["gae", "reinforce"]}}, config
    )
    drawn = [space.sample(random.Random(n)) for n in range(50)]
    assert all(("ppo.lam" in values) == (values["ppo.advantage"] == "gae") for values in drawn)
    assert {values["ppo.advantage"] for values in drawn} == {"gae", "reinforce"}
    assert space.of(config) == {"ppo.advantage": "gae", "ppo.lam": config.ppo.lam}


KINDS = [
    Dimension("x", "uniform", (0.0, 2.0)), Dimension("x", "loguniform", (1e-6, 1e-2)), Dimension("x", "quniform", (0.1, 1.0, 0.2)),
    Dimension("x", "int", (1, 7)), Dimension("x", "logint", (1, 512)), Dimension("x", "qint", (2, 9, 3)),
    Dimension("x", "choice", ("a", [1], None)),
]  # fmt: skip


@given(dimension=st.sampled_from(KINDS), seed=st.integers(0, 10_000), factor=st.floats(1.01, 10))
def test_what_is_drawn_and_what_is_moved_stays_in_the_dimension(dimension: Dimension, seed: int, factor: float) -> None:
    rng = random.Random(seed)
    value = dimension.sample(rng)
    moved = dimension.moved(value, factor, rng)
    assert dimension.holds(value) and dimension.holds(moved)
    if dimension.kind == "qint":
        assert (moved - 2) % 3 == 0 and (value - 2) % 3 == 0


def test_exploring_moves_values_a_little_or_draws_them_anew() -> None:
    space = Space((Dimension("ppo.lr", "loguniform", (1e-6, 1.0)), Dimension("ppo.epochs", "choice", (1, 2, 4))))
    values = {"ppo.lr": 1e-3, "ppo.epochs": 2}
    moved = [space.explored(values, 0.0, 1.25, random.Random(n)) for n in range(20)]
    assert {round(found["ppo.lr"] / 1e-3, 3) for found in moved} == {1.25, 0.8}
    assert {found["ppo.epochs"] for found in moved} == {1, 4}
    anew = [space.explored(values, 1.0, 1.25, random.Random(n))["ppo.lr"] for n in range(20)]
    assert max(anew) / min(anew) > 100


def test_a_range_on_a_logarithmic_scale_is_drawn_evenly_over_its_orders() -> None:
    dimension = Dimension("ppo.lr", "loguniform", (1e-6, 1e-2))
    drawn = [dimension.sample(random.Random(n)) for n in range(400)]
    assert 0.4 < sum(value < 1e-4 for value in drawn) / 400 < 0.6
