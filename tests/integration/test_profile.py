"""`profile` with runtime=local: which traces there are, what they hold, and that results are the same without them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tiny_ppo
import torch

from orchestration import config as configuration
from orchestration import recipe
from orchestration.errors import RequestError


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ppo.prepared(tmp_path_factory.mktemp("start"))


def names(file: Path) -> set[str]:
    return {str(event.get("name")) for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}


def traces(folder: Path) -> list[Path]:
    return sorted((folder / "profile").rglob("*.json.gz"))


def test_roles_of_one_process_each_write_their_own_and_results_stay(start: Path, tmp_path: Path) -> None:
    words = ["ppo.steps=3", "ppo.batch=8", "ppo.kl.budget=1000"]
    plain = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "plain", *words))
    asked = ["profile.roles=[policy,critic,reward]", "profile.steps=[1,3]"]
    traced = tiny_ppo.run(tiny_ppo.context(start, tmp_path / "traced", *words, *asked))
    assert traced[1] == plain[1]
    assert all(torch.equal(tensor, plain[2][name]) for name, tensor in traced[2].items())
    assert traces(tmp_path / "plain") == []
    files = traces(tmp_path / "traced")
    assert {file.parent.name for file in files} == {"step_000001", "step_000003"}
    assert {file.name.split("_")[0] for file in files} == {"policy", "critic", "reward"}
    (update,) = (tmp_path / "traced" / "profile" / "ppo" / "step_000003").glob("critic_*_update.json.gz")
    assert names(update) & {"aten::addmm", "aten::mm", "aten::linear"}


def test_training_ranks_write_traces_and_the_message_says_where(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["experiment=smoke", "runtime=local", "stage=sft", "data.demonstrations=64", f"run_dir={tmp_path}"]
    words += ["sft.steps=3", "sft.batch=4"]
    recipe.run(configuration.load([*words, "profile.roles=[train]", "profile.steps=[2]"]))
    assert [file.relative_to(tmp_path).as_posix() for file in traces(tmp_path)] == [
        "profile/sft/step_000002/train_rank_0_call_01_step.json.gz"
    ]
    assert any("Backward" in name for name in names(traces(tmp_path)[0]))
    said = capsys.readouterr().err.replace("\n", "")
    assert "perfetto" in said
    recipe.run(configuration.load([*words, "profile.roles=[]"]))  # the same stage: traces are no part of its identity
    assert "sft: complete, skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["profile.roles=[policy]"], "without profile.steps nothing is traced"),
        (["profile.steps=[1]"], "without profile.roles nothing is traced"),
        (["profile.roles=[policy]", "profile.steps=[1000]"], "none is within the"),
        (["profile.roles=[train]", "profile.steps=[1]", "stage=ppo", "policy_checkpoint=/", "reward_checkpoint=/"], "has no part in"),
        (["profile.roles=[critic]", "profile.steps=[1]", "ppo.advantage=rloo", "ppo.samples_per_prompt=2"], "critic has no ranks"),
        (["profile.roles=[polcy]", "profile.steps=[1]"], "profile.roles"),
        (["profile.roles=[policy]", "profile.steps=[0]"], "profile.steps"),
    ],
)
def test_what_would_trace_nothing_is_a_mistake(words: list[str], says: str) -> None:
    with pytest.raises(RequestError, match=says.replace("[", r"\[")):
        configuration.load(["experiment=smoke", *words])
