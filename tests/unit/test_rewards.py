"""Sources of scores: what is taken from a user's function, how sources add up, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.reward import TOTAL, Reward
from actors.rewards.function import find
from actors.rewards.source import RewardError, checked
from actors.worker import RankSpec, process_group_of_one
from conf.rewards import FunctionReward, HttpReward, ModelReward, RewardSource
from conf.schema import Config
from orchestration import reward_sources
from orchestration.config import load
from orchestration.errors import RequestError
from orchestration.recipe import identity
from tests.fakes import brief, replies_of, rollouts, saved_scalar, smoke, texts, with_section


def reward(*sources: RewardSource, checkpoint: str = "") -> Reward:
    process_group_of_one()
    role = Reward(with_section(smoke(), "ppo", rewards=sources), checkpoint, RankSpec("reward", 0, 1, 1))
    role.load()
    return role


SEEN: list[Any] = []


def remembers(conversations: list, replies: list[str]) -> list[float]:
    SEEN.append((conversations, list(replies)))
    conversations[0].clear()
    replies.clear()
    return [float(n) for n in range(len(conversations))]


def raises(conversations: list, replies: list[str]) -> list[float]:
    raise KeyError("colour")


def leaves(conversations: list, replies: list[str]) -> list[float]:
    sys.exit(0)


def nan(conversations: list, replies: list[str]) -> list[float]:
    return [float("nan") for _ in replies]


def array(conversations: list, replies: list[str]) -> np.ndarray:
    return np.array([len(reply) for reply in replies])


def huge(conversations: list, replies: list[str]) -> list[float]:
    return [3e38 for _ in replies]


def of_this_file(function: str, **more: Any) -> FunctionReward:
    return FunctionReward("function", f"tests.unit.test_rewards:{function}", **more)


def test_a_function_is_given_each_conversation_with_its_reply_and_may_spoil_its_copy() -> None:
    seen = importlib.import_module("tests.unit.test_rewards").SEEN  # the role's own import, which pytest's is not
    seen.clear()
    rows = rollouts(0, 6)
    role = reward(of_this_file("remembers", name="one"), of_this_file("remembers", name="two"))
    role.prepare(texts(6))
    found = role.score(rows.split(4))
    assert [score.tolist() for score in found] == [[0.0, 2.0, 4.0, 6.0], [8.0, 10.0]]
    for conversations, replies in seen:
        assert conversations[1:] == [[{"role": "user", "content": f"question {n}"}] for n in range(1, 6)]
        assert replies == replies_of(rows)
    assert len(seen) == 2


def test_the_score_is_the_weighted_sum_and_each_source_is_described(tmp_path: Path) -> None:
    path, rows = saved_scalar(tmp_path / "rm"), rollouts(1, 6)
    alone = reward(checkpoint=path).score([rows])[0]
    role = reward(ModelReward("model", weight=0.5), FunctionReward("function", "tests.fakes:brief", "short", -2.0), checkpoint=path)
    role.prepare(texts(6))
    scores = role.score(rows.split(3))
    short = torch.tensor(brief([], replies_of(rows)))
    torch.testing.assert_close(torch.cat(scores), 0.5 * alone - 2.0 * short)
    assert [len(score) for score in scores] == [3, 3]
    found = role.describe()
    assert found.keys() == {"model", "short", TOTAL}
    assert found["model"].mean == pytest.approx(float(alone.mean()), rel=1e-5), "sources are described before their weights"
    assert found["short"].mean == pytest.approx(float(short.mean()), rel=1e-5)
    assert found[TOTAL].count == 6


def test_arrays_are_taken() -> None:
    role = reward(of_this_file("array"))
    role.prepare(texts(4))
    assert role.score([rollouts(2, 4)])[0].tolist() == [float(len(reply)) for reply in replies_of(rollouts(2, 4))]


@pytest.mark.parametrize(("name", "said"), [("raises", "KeyError: 'colour'"), ("leaves", "SystemExit"), ("nan", "nan for reply 1 of 4")])
def test_a_function_that_fails_is_named(name: str, said: str) -> None:
    role = reward(of_this_file(name))
    role.prepare(texts(4))
    with pytest.raises(RewardError, match=f"ppo.rewards: tests.unit.test_rewards:{name}") as failed:
        role.score([rollouts(0, 4)])
    assert said in str(failed.value)
    assert name == "nan" or "test_rewards.py:" in str(failed.value), "the line that raised is shown"


def test_a_sum_that_overflows_is_refused() -> None:
    role = reward(of_this_file("huge", name="a"), of_this_file("huge", name="b"))
    role.prepare(texts(4))
    with pytest.raises(RewardError, match="sum of the scores is not finite"):
        role.score([rollouts(0, 4)])


def test_a_role_that_was_told_no_conversations_refuses_to_guess() -> None:
    with pytest.raises(RewardError, match="not told the conversations"):
        reward(of_this_file("array")).score([rollouts(0, 4)])


@pytest.mark.parametrize(
    "values",
    [None, 1.0, "123", {"a": 1.0, "b": 2.0, "c": 3.0}, [1.0, 2.0], [1.0] * 4, [1.0, None, 2.0], [1.0, "2", 3.0], [1.0, True, 3.0],
     [1.0, float("nan"), 3.0], [1.0, float("-inf"), 3.0], [1.0, 10**400, 3.0], [1.0, 1e39, 3.0], [1.0, [2.0], 3.0], [1.0, 2j, 3.0]],
)  # fmt: skip
def test_nothing_but_finite_numbers_passes(values: Any) -> None:
    with pytest.raises(RewardError, match="somebody gave"):
        checked(values, 3, "somebody")


def test_numbers_of_every_kind_pass() -> None:
    assert checked((1, 2.5, np.float32(3.5)), 3, "somebody").tolist() == [1.0, 2.5, 3.5]


@pytest.mark.parametrize(
    ("function", "said"),
    [("no.such.module:f", "No module named 'no'"), ("tests.fakes:no_such", "no_such"), ("tests.fakes:END", "is no function"),
     ("broken:f", "ZeroDivisionError")],
)  # fmt: skip
def test_a_function_that_is_not_there_is_named_before_anything_starts(function: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    config = with_section(smoke(), "ppo", rewards=(FunctionReward("function", function, folder=str(tmp_path)),))
    with pytest.raises(RequestError) as refused:
        reward_sources.check(config)
    assert function in str(refused.value) and said in str(refused.value)
    sys.path.remove(str(tmp_path))


def test_a_folder_is_looked_in_last_so_that_it_cannot_hide_chatrays_own_packages(tmp_path: Path) -> None:
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "my_own_rewards.py").write_text("import actors.batch\n\ndef f(conversations, replies):\n    return [1.0] * len(replies)\n")
    assert find(FunctionReward("function", "my_own_rewards:f", folder=str(tmp_path)))([], ["a"]) == [1.0]
    assert sys.path.pop() == str(tmp_path)


def mistakes(*words: str) -> str:
    with pytest.raises(RequestError) as refused:
        load(["experiment=smoke", *words], Path("/tmp"))
    return str(refused.value)


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ("[{kind: function, function: 'a:b'}, {kind: function, function: 'c:d'}]", "ppo.rewards[1].name=function: another source"),
        ("[{kind: function, function: 'a:b', name: std}]", "score_std is another figure"),
        ("[{kind: function, function: 'a:b', name: 'Two Words'}]", "ppo.rewards.0.name="),
        ("[{kind: function, function: no_colon}]", "ppo.rewards.0.function="),
        ("[{kind: function}]", "ppo.rewards.0.function: needed"),
        ("[{kind: oracle}]", "ppo.rewards"),
        ("[{kind: model, weigth: 2}]", "ppo.rewards.0.weigth: no such setting"),
        ("[{kind: model, weight: 0}]", "every weight is 0"),
        ("[{kind: model, path: ./nowhere}]", "no Hugging Face checkpoint there"),
        ("[{kind: http, url: 'ftp://host'}]", "ppo.rewards.0.url="),
        ("[{kind: http, url: 'http://me:secret@host'}]", "use token_env"),
        ("[{kind: http, url: 'http://host:port'}]", "not a URL"),
        ("[{kind: http, url: 'http://host', tries: 100}]", "deadlines.step=300, which would end the run first"),
        ("[{kind: http, url: 'http://host', timeout: 0}]", "ppo.rewards.0.timeout=0"),
    ],
)
def test_sources_that_cannot_work_are_refused(sources: str, said: str) -> None:
    assert said in mistakes(f"ppo.rewards={sources}")


def test_a_reward_checkpoint_that_nothing_uses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = (f"reward_checkpoint={tmp_path}", "ppo.rewards=[{kind: function, function: 'a:b'}]")
    assert "no source of ppo.rewards uses it" in mistakes(*words)


def test_a_secret_is_never_shown_where_it_would_be_written() -> None:
    assert "secret" not in repr(dataclasses.replace(texts(1), tokens={"http": "secret"}))


def test_a_token_that_is_not_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    config = with_section(smoke(), "ppo", rewards=(HttpReward("http", "http://host", token_env="MY_TOKEN"),))
    with pytest.raises(RequestError, match="MY_TOKEN: this environment variable is not set"):
        reward_sources.check(config)


def test_a_function_is_looked_for_where_chatray_was_started() -> None:
    config = load(["experiment=smoke", "ppo.rewards=[{kind: function, function: 'a:b'}]"], Path("/tmp"))
    assert [source.folder for source in config.ppo.rewards if isinstance(source, FunctionReward)] == ["/tmp"]


def test_how_a_source_is_reached_is_no_part_of_what_a_stage_is() -> None:
    class Nothing:
        source = type("Source", (), {"fingerprint": lambda self: "x"})()

        def output_of(self, stage: str) -> str:
            return stage

    def of(name: str, config: Config) -> dict[str, Any]:
        return identity(name, config, Nothing(), Nothing())  # type: ignore[arg-type]

    def asked(**changes: Any) -> Config:
        return with_section(smoke(), "ppo", rewards=(dataclasses.replace(HttpReward("http", "http://host"), **changes),))

    same = asked(timeout=1.0, tries=9, backoff=0.1, batch=2, token_env="A")
    for stage in ("ppo", "evaluate"):
        assert of(stage, asked()) == of(stage, same)
        assert of(stage, asked()) != of(stage, asked(weight=2.0))
        assert of(stage, asked()) != of(stage, asked(url="http://other"))
    assert "rewards" not in of("evaluate", smoke())["settings"]
