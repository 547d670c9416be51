"""Where values come from: draws that do not change when a sweep goes on, and Optuna, which learns."""

from __future__ import annotations

import pytest

from orchestration.sweep.search import Optuna, Random
from orchestration.sweep.space import Dimension, Space, Values

SPACE = Space((
    Dimension("ppo.lr", "loguniform", (1e-6, 1e-2)), Dimension("ppo.advantage", "choice", ("gae", "rloo")),
    Dimension("ppo.lam", "uniform", (0.0, 1.0), (("ppo.advantage", ("gae",)),)),
))  # fmt: skip


def worth(values: Values) -> float:
    return values.get("ppo.lam", 0.0) + (1.0 if values["ppo.advantage"] == "gae" else 0.0)


def test_random_values_belong_to_a_trial_whatever_was_asked_before() -> None:
    one, other = Random(SPACE, 3), Random(SPACE, 3)
    first = [one.ask(number) for number in range(6)]
    assert [other.ask(number) for number in reversed(range(6))] == first[::-1]
    assert Random(SPACE, 4).ask(0) != first[0]
    assert len({values["ppo.lr"] for values in first}) == 6


def test_optuna_learns_what_is_good() -> None:
    search = Optuna(SPACE, 0, startup=8)
    found = []
    for number in range(40):
        values = search.ask(number)
        assert ("ppo.lam" in values) == (values["ppo.advantage"] == "gae")
        search.tell(number, worth(values))
        found.append(worth(values))
    assert sum(found[-15:]) / 15 > sum(found[:8]) / 8 + 0.3


def test_optuna_goes_on_from_what_earlier_trials_found() -> None:
    first = Optuna(SPACE, 0, startup=8)
    history = []
    for number in range(30):
        values = first.ask(number)
        first.tell(number, worth(values))
        history.append(values)
    again = Optuna(SPACE, 1, startup=8)
    for number, values in enumerate(history):
        again.known(number, values)
        again.tell(number, worth(values))
    assert len(again.study.trials) == 30
    assert again.study.best_value == pytest.approx(max(map(worth, history)))
    found = []
    for number in range(30, 40):
        found.append(worth(again.ask(number)))
        again.tell(number, found[-1])
    assert sum(found) / 10 > sum(map(worth, history[:8])) / 8 + 0.3


@pytest.mark.parametrize("known", [4, 20], ids=["while it draws at random", "once it has learned"])
def test_optuna_asks_what_it_would_have_asked_without_the_interruption(known: int) -> None:
    first, history = Optuna(SPACE, 0, startup=8), []
    for number in range(known + 1):
        history.append(first.ask(number))
        first.tell(number, worth(history[-1]))
    again = Optuna(SPACE, 0, startup=8)
    for number, values in enumerate(history[:-1]):
        again.known(number, values)
        again.tell(number, worth(values))
    assert again.ask(known) == history[-1]
    assert history[-1] not in history[:-1]


def test_optuna_leaves_out_values_that_the_space_does_not_have_and_trials_that_failed() -> None:
    search = Optuna(SPACE, 0, startup=8)
    search.known(0, {"ppo.lr": 0.5, "ppo.advantage": "rloo"})
    search.tell(0, 1.0)
    assert search.study.trials == []
    search.ask(1)
    search.tell(1, None)
    assert [trial.state.name for trial in search.study.trials] == ["FAIL"]
