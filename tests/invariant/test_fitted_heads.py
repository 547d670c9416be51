"""Reward models of features: a fitted head is its problem's optimum whatever the engine, and trained ones resume and are exported whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors import preference_task
from actors.batch import Comparisons
from actors.preference_task import PreferenceTask, fitted
from actors.reward_network import FeatureModel, load_reward_model, widths
from actors.sharding import Optimizer
from actors.trainer import train
from actors.worker import make_engine, process_group_of_one
from conf.schema import Config
from tests.fakes import comparisons, saved_lm, smoke, with_section
from tests.sessions import Session

GROUPS = (3, 2, 4, 3, 2, 3, 4, 2)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    process_group_of_one()
    return saved_lm(tmp_path_factory.mktemp("models") / "lm")


def config(*more: str, **changes: Any) -> Config:
    plain = {"train": "head", "features": ("tokens", "likelihood"), "steps": 0}
    return with_section(smoke("engine.micro_batch=3", *more), "reward_model", **plain | changes)


def rows_of(seed: int, ranked: bool) -> Comparisons:
    rows = comparisons(seed, GROUPS)
    if not ranked:
        rows.label, rows.group = (rows.label > 0).float(), torch.arange(len(rows))
    rows.group += 100 * seed
    return rows


def task(of: Config, lm: str, ranked: bool) -> PreferenceTask:
    return PreferenceTask(of, lm, rows_of(0, ranked), rows_of(1, ranked), rows_of(2, ranked), comparisons(3, (4,)), ranked)


def scores(model: torch.nn.Module, rows: Comparisons) -> Tensor:
    with torch.no_grad():
        return model.eval()(rows.tokens, rows.lengths, rows.mask)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("ranked", [True, False], ids=["rankings", "judgements"])
def test_the_head_is_fitted_to_all_rows_and_the_language_model_stays(ranked: bool, stage: int, lm: str, tmp_path: Path) -> None:
    of = config(f"engine.zero_stage={stage}")
    given = task(of, lm, ranked)
    found = train(of, given, Session(tmp_path / "rm"))
    before, after = load_file(Path(lm) / "model.safetensors"), load_file(tmp_path / "rm/model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    model = load_reward_model(str(tmp_path / "rm"), 0)
    assert isinstance(model, FeatureModel)
    rows = Comparisons.join([given.rows, given.validation])
    plain = make_engine(config(), FeatureModel(model.lm, model.features), None)
    features = given.features_of(plain, rows)
    wanted = fitted(features, rows, widths(model.lm.config, model.features), given)
    torch.testing.assert_close(model.mean, wanted.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.spread, wanted.spread, atol=1e-5, rtol=1e-4)
    assert wanted.head is not None and float(wanted.head[:-1].abs().max()) > 0.01
    torch.testing.assert_close(model.head.weight[0], wanted.head[:-1], atol=1e-3, rtol=1e-2)
    assert float(model.head.bias) == pytest.approx(float(wanted.head[-1]) - found["zero"], abs=1e-3)
    held_out = given.features_of(plain, given.held_out)
    torch.testing.assert_close(scores(model, given.held_out) + found["zero"], wanted.scores(held_out), atol=2e-3, rtol=1e-2)
    assert (found["penalty"], found["steps"]) == (wanted.figures["penalty"], 0.0)
    assert found["cross_validated_loss"] == pytest.approx(wanted.figures["cross_validated_loss"], rel=1e-3)
    assert float(scores(model, given.demonstrations).mean()) == pytest.approx(0.0, abs=1e-4)
    assert ("heldout_pairwise_accuracy" in found) == ranked == ("heldout_auc" not in found)


def test_a_fitted_head_has_no_slope_left(lm: str) -> None:
    given = task(config(), lm, ranked=False)
    rows = Comparisons.join([given.rows, given.validation])
    engine = make_engine(given.config, FeatureModel(given.module().lm, ("likelihood",)), None)
    features = given.features_of(engine, rows)
    found = fitted(features, rows, {"likelihood": 22}, given)
    assert found.head is not None
    head = found.head.clone().requires_grad_()
    weight, label = given._positive_weight(), rows.label
    inputs = (features - found.mean) / found.spread
    losses = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ head[:-1] + head[-1], label, 1 + (weight - 1) * label)
    (losses + found.figures["penalty"] / 2 * head[:-1] @ head[:-1]).backward()
    assert head.grad is not None and float(head.grad.abs().max()) < 1e-3
    assert weight != pytest.approx(1.0) and float(found.head.abs().max()) > 0.1


def test_the_penalty_is_chosen_over_whole_groups(lm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = task(config(), lm, ranked=True)
    seen: list[Tensor] = []
    whole = preference_task.chosen_penalty
    monkeypatch.setattr(
        preference_task, "chosen_penalty", lambda inputs, groups, *rest: seen.append(groups) or whole(inputs, groups, *rest)
    )
    engine = make_engine(given.config, given.module(), Optimizer(1e-3, 0.0, 1.0))
    given.prepare(engine)
    assert torch.equal(seen[0], torch.cat([given.rows.group, given.validation.group]))
    assert len(torch.unique(seen[0])) == 2 * len(GROUPS)


def test_judgements_of_one_kind_give_no_auc_and_no_error(lm: str, tmp_path: Path) -> None:
    given = task(config(), lm, ranked=False)
    for rows in (given.held_out, given.validation):
        rows.label.fill_(1.0)
    found = train(given.config, given, Session(tmp_path / "rm"))
    assert "heldout_auc" not in found and found["heldout_loss"] > 0


@pytest.mark.parametrize("stage", [0, 3])
def test_a_network_trained_whole_goes_on_from_a_commit_with_its_scale(stage: int, lm: str, tmp_path: Path) -> None:
    changes = {"train": "all", "lr": 0.01, "steps": 4, "batch": 4, "warmup": 0, "eval_every": 1, "features": ("reply", "likelihood")}
    of = config(f"engine.zero_stage={stage}", **changes)
    given = task(of, lm, ranked=True)
    found = train(of, given, session := Session(tmp_path / "rm"))
    assert train(of, given, Session(tmp_path / "resumed", after=session)) == found
    one, again = (load_reward_model(str(tmp_path / name), 0).state_dict() for name in ("rm", "resumed"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert float(one["mean"].abs().max()) > 0.01
    before = load_file(Path(lm) / "model.safetensors")
    assert any(not torch.equal(tensor, one[f"lm.{name}"]) for name, tensor in before.items())


def test_adapters_of_a_feature_model_are_merged_into_what_is_exported(lm: str, tmp_path: Path) -> None:
    changes = {"train": "all", "lr": 0.03, "steps": 3, "batch": 4, "warmup": 0, "eval_every": 1, "features": ("reply", "likelihood")}
    of = config("lora.rank=3", "lora.alpha=6.0", **changes)
    given = task(of, lm, ranked=True)
    given = dataclasses.replace(given, validation=given.rows)  # later weights are better ones
    found = train(of, given, Session(tmp_path / "rm"))
    before, after = load_file(Path(lm) / "model.safetensors"), load_file(tmp_path / "rm/model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {name for name in before if "_proj" in name}
    model = load_reward_model(str(tmp_path / "rm"), 0)
    engine = make_engine(config(), model, None)
    assert given._measure(engine, given.held_out)["loss"] == pytest.approx(found["heldout_loss"], rel=1e-4)
