"""What a run waits for, beside the deadlines that end its waits: presets have room for what is planned, and what has not is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest

from conf.schema import STAGES, Config
from orchestration import cli, preflight
from orchestration import config as configuration
from orchestration.errors import RequestError
from orchestration.planner import machines
from orchestration.planner.plan import Plan, as_dict, plan
from orchestration.planner.waits import MARGIN, too_short
from orchestration.runtime.facts import Survey

ON_CPUS = ("quickstart", "smoke", "feedback", "hh_harmless", "instruct_mix", "taskmaster_coffee")
LARGER = {
    "a100x64": "",
    "a100x128": "placement.devices=128 placement.rollout.ranks=16 ppo.batch=1024 sft.batch=128 reward_model.batch=128",
    "a100x256": "placement.devices=256 placement.rollout.ranks=32 ppo.batch=2048 sft.batch=256 reward_model.batch=256",
}
COLOCATED = "experiment=instructgpt scale=13b placement=colocated engine.rollout_batch=16 cluster=a100x8"
MEANT_FOR = [
    *(f"experiment={name}" for name in ON_CPUS),
    *(f"experiment=instructgpt {words}" for words in ("cluster=a100x8", "cluster=h200x8", "cluster=a100x8 scale=125m",
                                                      "cluster=a100x8 scale=2.7b", "cluster=h200x8 scale=13b")),
    *(f"experiment=instructgpt_175b cluster={cluster} {words}" for cluster, words in LARGER.items()),
    COLOCATED, f"{COLOCATED} rollout=vllm",
]  # fmt: skip
AMPLE = ("deadlines.step=43200", "deadlines.start=1800", "deadlines.sync=300", "placement.collective_timeout=10800")


@lru_cache
def loaded(*words: str) -> Config:
    return configuration.load(["scale=1.3b", "placement=split", "cluster=a100x8", "model.dtype=bf16", "ppo.batch=512",
                               "ppo.max_new_tokens=1024", "ppo.epochs=8", *AMPLE, *words], reads_data=False)  # fmt: skip


def but(config: Config, word: str, stage: str = "all") -> Config:
    """With another value of one deadline."""
    setting, _, value = word.partition("=")
    section, _, name = setting.partition(".")
    return replace(config, stage=stage, **{section: replace(getattr(config, section), **{name: float(value)})})  # type: ignore[arg-type]


def late(config: Config, nodes: list[machines.Node] | None = None) -> list[preflight.Finding]:
    """What preflight says of deadlines."""
    stages = STAGES if config.stage == "all" else (config.stage,)
    found = preflight.planned(config, nodes or machines.described(config.cluster), stages)
    return [finding for finding in found if "a deadline must be" in finding.text]


def planned(*words: str) -> Plan:
    config = configuration.load([*words], reads_data=False)
    return plan(config, machines.described(config.cluster))


@pytest.mark.parametrize("words", MEANT_FOR)
def test_a_preset_has_room_for_what_is_planned(words: str) -> None:
    found = planned(*words.split())
    assert found.fits and found.waits
    assert too_short(found.waits) == []


def test_every_experiment_is_among_them() -> None:
    named = {word for words in MEANT_FOR for word in words.split() if word.startswith("experiment=")}
    assert named == {f"experiment={name}" for name in configuration.groups()["experiment"]}


@pytest.mark.parametrize(
    ("short", "stage", "says"),
    [
        ("deadlines.step=900", "ppo", "one update of critic and policy"),
        ("deadlines.step=20", "sft", "a step, held-out rows and a commit"),
        ("deadlines.step=20", "reward_model", "held-out rows and the export of the trained weights"),
        ("deadlines.step=20", "compare", "sampling all answers"),
        ("deadlines.step=1", "evaluate", "loading the PPO model into the rollout engines"),
        ("deadlines.start=20", "ppo", "starting the ranks and reading their weights"),
        ("deadlines.start=20", "sft", "starting the ranks, reading weights and the first step"),
        ("deadlines.start=20", "evaluate", "starting the ranks and reading their weights"),
        ("deadlines.sync=1", "ppo", "sending the largest of the weights"),
        ("placement.collective_timeout=1800", "ppo", "2 ranks wait for each other"),
        ("placement.collective_timeout=2", "sft", "8 ranks wait for each other"),
    ],
)
def test_each_deadline_is_held_against_what_it_ends(short: str, stage: str, says: str) -> None:
    (found,) = late(but(loaded(), short, stage))
    assert found.grave and found.text.startswith(f"{short}: in stage {stage}, ") and says in found.text
    enough = found.text.rpartition(": set ")[2]
    assert late(but(loaded(), enough, stage)) == []


def test_a_deadline_three_times_as_long_is_enough_and_a_second_less_is_not() -> None:
    config = loaded()
    longest = max(wait.seconds for wait in plan(config, machines.described(config.cluster)).waits if wait.setting == "deadlines.step")
    assert late(but(config, f"deadlines.step={MARGIN * longest}")) == []
    assert len(late(but(config, f"deadlines.step={MARGIN * longest - 1}"))) == 1


def test_a_stage_that_does_not_run_refuses_nothing() -> None:
    short = but(loaded(), "deadlines.step=900")
    nodes = machines.described(short.cluster)
    assert preflight.planned(short, nodes, ("sft", "ppo")) and not preflight.planned(short, nodes, ("sft", "compare"))


def test_gpus_of_unknown_speed_are_not_judged_and_known_ones_are() -> None:
    short = but(loaded("cluster=live"), "deadlines.step=900")
    (node,) = machines.described(loaded().cluster)
    assert late(short, [replace(node, gpu_name="Voodoo 2")]) == []
    assert [finding.grave for finding in late(short, [replace(node, gpu_name="NVIDIA A100-SXM4-80GB")])] == [True]


def test_of_a_cpu_whose_speed_is_assumed_it_is_said_and_nothing_refused() -> None:
    slow = but(loaded("placement=cpu", "cluster=live"), "deadlines.step=900", "ppo")
    assert [finding.grave for finding in late(slow, machines.described(loaded().cluster))] == [False]


def test_a_single_process_waits_for_nobody() -> None:
    config = replace(but(loaded(), "deadlines.step=1"), runtime="local")
    assert plan(config, machines.described(config.cluster)).waits == []


def test_roles_that_share_devices_are_waited_for_together_and_those_that_take_turns_one_by_one() -> None:
    def scoring(sleep: bool) -> float:
        config = loaded("placement=colocated", f"placement.sleep={str(sleep).lower()}")
        return next(wait.seconds for wait in plan(config, machines.described(config.cluster)).waits if wait.what.startswith("scoring"))

    assert scoring(sleep=False) > 3 * scoring(sleep=True)


def test_plan_shows_a_deadline_that_is_too_short(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=instructgpt", "cluster=a100x8", "deadlines.step=900"]
    assert cli.main(["plan", *words]) == 0
    assert "a deadline is too short: deadlines.step=900: in stage reward_model, " in capsys.readouterr().out
    assert as_dict(planned(*words))["deadlines"][0].startswith("deadlines.step=900")


def test_a_preset_whose_deadline_was_shortened_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = but(loaded(), "deadlines.step=900")
    seen = Survey((), (), "", 0.0, 0.0)
    monkeypatch.setattr(preflight, "survey", lambda _: seen)
    monkeypatch.setattr(Survey, "nodes", lambda _: machines.described(config.cluster))
    monkeypatch.setattr(preflight, "offered", lambda _: [("one", 96.0, 8.0)])
    with pytest.raises(RequestError, match=r"deadlines\.step=900: in stage ppo, one update of critic and policy is planned to take"):
        preflight.check(config, ["ppo"], lambda: None, print)
