"""Roles with adapters (LoRA): the base never moves, the policy is its own reference, and ranks, ZeRO and resuming change no number."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from torch import Tensor

from actors import lora
from actors.batch import Experience
from actors.critic import Critic
from actors.learning import optimizer_step
from actors.micro_batches import Limit
from actors.models import load_causal_lm
from actors.policy import Policy
from actors.preference_task import PreferenceTask
from actors.reference import Reference
from actors.shard_files import ShardReader
from actors.sharding import Optimizer
from actors.trainer import train
from actors.weight_sync import unpack
from actors.worker import RankSpec, Worker, make_engine, process_group_of_one, start_process_group
from conf.schema import Config
from tests.fakes import comparisons, experience, floats, rollouts, saved_lm, saved_scalar, smoke, with_section
from tests.sessions import Session

ROWS = 8
STAGES = (0, 2, 3)
LORA = ("lora.rank=3", "lora.alpha=6.0")


def config(zero_stage: int = 0, micro_batch: int = 3, *more: str, **ppo: Any) -> Config:
    plain = {"lr": 0.03, "critic_lr": 0.03, "warmup": 0, "minibatches": 1, "batch": ROWS, "adam_epsilon": 1e-3}
    base = smoke(f"engine.zero_stage={zero_stage}", f"engine.micro_batch={micro_batch}", *LORA, *more)
    return with_section(base, "ppo", **(plain | ppo))


def role(kind: type[Worker], checkpoint: str, of: Config, rank: int = 0, ranks: int = 1) -> Any:
    worker = kind(of, checkpoint, RankSpec(kind.__name__, rank, ranks, 1))
    worker.load()
    return worker


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    process_group_of_one()
    root = tmp_path_factory.mktemp("models")
    return {"lm": saved_lm(root / "lm"), "scalar": saved_scalar(root / "scalar")}


def updated(folders: dict[str, str], *more: str, stage: int = 0, micro_batch: int = 3, **ppo: Any) -> Policy:
    policy = role(Policy, folders["lm"], config(stage, micro_batch, *more, **ppo))
    policy.weights(0)
    for step in range(2):
        policy.update([experience(step, ROWS)], [], step)
        policy.weights(step + 1)
    return policy


def sent_by(policy: Policy, version: int) -> dict[str, Tensor]:
    """The weights in the only bucket of a tiny model; {} on ranks that are not given them."""
    update = policy.weights(version)
    return unpack(update) if update else {}


@pytest.mark.parametrize("more", [(), ("model.dtype=bf16",)], ids=["fp32", "bf16"])
def test_the_reference_is_bit_equal_to_a_frozen_one_before_and_after_training(
    folders: dict[str, str], more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.engine.computes_in_bf16", lambda device: True)
    pieces = [rollouts(3, 4), rollouts(4, 4)]
    frozen = role(Reference, folders["lm"], config(0, 3, *more)).logprobs(pieces, 0.7)
    fresh = role(Policy, folders["lm"], config(0, 3, *more, temperature=0.7))
    policy = updated(folders, *more, temperature=0.7)
    for now, was, at_first, later in zip(
        policy.reference_logprobs(pieces, 0.7), frozen, fresh.logprobs(pieces), policy.logprobs(pieces), strict=True
    ):
        assert torch.equal(now, was)
        assert torch.equal(at_first, was)  # KL is exactly 0 at the start
        assert not torch.allclose(later, was, atol=1e-3)


def test_the_first_ratio_is_1_and_the_first_kl_0(folders: dict[str, str]) -> None:
    policy = role(Policy, folders["lm"], config(0, 3, minibatches=2, temperature=0.8))
    pieces = rollouts(5, ROWS).split(4)
    scores = [floats(n, 4, dtype=torch.float32) for n in range(2)]
    values = [torch.zeros(piece.tokens.shape) for piece in pieces]
    made = policy.experience(pieces, scores, policy.reference_logprobs(pieces, 0.8), values, beta=0.1)
    figures = policy.update(made, [], step=0)
    assert policy.describe()["kl"] == 0.0
    assert figures["first_clip_share"] == 0.0
    assert figures["first_kl"] == pytest.approx(0.0, abs=1e-9)
    assert figures["update_kl"] > 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_the_base_never_moves_and_the_engines_get_the_merged_weights(folders: dict[str, str], stage: int, tmp_path: Path) -> None:
    plain = {f"lm.{name}": tensor for name, tensor in load_causal_lm(folders["lm"]).state_dict().items()}
    policy = updated(folders, stage=stage)
    state = copied(policy.engine.weights())
    sent = sent_by(policy, 3)
    base = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if "lora_" not in name}
    assert base.keys() <= plain.keys()
    assert sent.keys() == {f"lm.{name}" for name, _ in load_causal_lm(folders["lm"]).named_parameters()}  # tied weights once
    assert all(torch.equal(tensor, plain[name]) for name, tensor in base.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in policy.engine.weights().items())  # merging changed nothing
    moved = {name for name, tensor in sent.items() if not torch.equal(tensor, plain[name])}
    assert moved == {f"{name}.weight" for name in lora.adapters(policy.engine.module)}
    policy.export(str(tmp_path))
    exported = role(Reference, str(tmp_path), config(stage))
    rows = [rollouts(3, 4)]
    torch.testing.assert_close(exported.logprobs(rows, 1.0), policy.logprobs(rows), atol=1e-5, rtol=1e-5)


def test_nothing_but_adapters_is_in_the_optimizer(folders: dict[str, str]) -> None:
    for kind, checkpoint in ((Policy, folders["lm"]), (Critic, folders["scalar"])):
        engine = role(kind, checkpoint, config()).engine
        held = sum(p.numel() for group in engine.deepspeed.optimizer.param_groups for p in group["params"])
        assert held == sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
        assert held == sum(tensor.numel() for tensor in engine.weights(frozen=False).values())
        assert held < 0.7 * sum(p.numel() for p in engine.module.parameters())


@pytest.mark.parametrize("stage", [0, 2])
def test_micro_batches_change_nothing(folders: dict[str, str], stage: int) -> None:
    whole = copied(updated(folders, stage=stage, micro_batch=ROWS).engine.weights(frozen=False))
    for name, tensor in updated(folders, stage=stage, micro_batch=3).engine.weights(frozen=False).items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_policy_learns_on_bit_by_bit_and_can_still_go_back(folders: dict[str, str], stage: int, tmp_path: Path) -> None:
    one = updated(folders, stage=stage)
    before = {name: (run.shape, values) for name, (run, values) in one.sent[0].runs.items()}
    one.save_state(str(tmp_path / "state"))
    other = role(Policy, folders["lm"], config(stage))
    other.load_state(str(tmp_path / "state"))
    other.weights(2)
    for policy in (one, other):
        policy.update([experience(7, ROWS)], [], step=2)
    after = copied(other.engine.weights())
    assert all(torch.equal(tensor, after[name]) for name, tensor in one.engine.weights().items())
    rows = [rollouts(3, 4)]
    reference = other.reference_logprobs(rows, 1.0)
    assert other.go_back() == 1
    for name, tensor in other.engine.weights(frozen=False).items():
        shape, values = before[name]
        assert torch.equal(tensor, values.view(shape))
    assert torch.equal(other.reference_logprobs(rows, 1.0)[0], reference[0])  # going back is no move of the reference


def test_a_commit_holds_no_frozen_weights(folders: dict[str, str], tmp_path: Path) -> None:
    policy = updated(folders)
    policy.save_state(str(tmp_path))
    trained = policy.engine.weights(frozen=False).keys()
    for folder in ("engine", "before"):
        assert ShardReader(tmp_path / folder).shapes.keys() == trained
    assert policy.sent[0].runs.keys() == trained


def test_a_reward_model_is_trained_by_adapters_and_a_head_resumed_bit_by_bit_and_exported_whole(
    folders: dict[str, str], tmp_path: Path
) -> None:
    rows = comparisons(0)
    of = with_section(config(), "reward_model", lr=0.03, steps=4, batch=4, warmup=0, eval_every=1)
    task = PreferenceTask(of, folders["scalar"], rows, rows, rows, comparisons(1, (3,)), True)
    found = train(of, task, session := Session(tmp_path / "rm"))
    before, after = load_file(Path(folders["scalar"]) / "model.safetensors"), load_file(tmp_path / "rm/model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {name for name in before if "_proj" in name}
    assert train(of, task, Session(tmp_path / "resumed", after=session)) == found
    resumed = load_file(tmp_path / "resumed/model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in after.items())
    again = PreferenceTask(with_section(of, "lora", rank=0), str(tmp_path / "rm"), rows, rows, rows, comparisons(1, (3,)), True)
    engine = make_engine(again.config, again.module(), Optimizer(1e-3, 0.0, 1.0))
    assert again.evaluate(engine)["loss"] == pytest.approx(found["heldout_loss"], rel=1e-4)


def work(rank: int, ranks: int, checkpoints: dict[str, str], stages: tuple[int, ...]) -> dict[str, Any]:
    """What one rank finds when it does its share."""
    found: dict[str, Any] = {}
    share = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    rows = Experience.join([experience(0, 4), experience(1, 4)]).select(share).trimmed()
    ranked = comparisons(3, (2, 5, 2, 4))
    mine = ranked.select((ranked.group % ranks == rank).nonzero()[:, 0]).trimmed()
    for stage in stages:
        policy = role(Policy, checkpoints["lm"], config(stage), rank, ranks)
        reference = policy.reference_logprobs([rollouts(5, ROWS).select(share)], 1.0)[0]
        for step in range(2):
            policy.update([rows], [], step)
        found[f"policy {stage}"] = sent_by(policy, 1)
        assert torch.equal(policy.reference_logprobs([rollouts(5, ROWS).select(share)], 1.0)[0], reference)
        task = PreferenceTask(config(stage), checkpoints["scalar"], ranked, ranked, ranked, comparisons(1, (3,)), True)
        engine = make_engine(task.config, task.module(), Optimizer(0.03, 0.0, 1.0, 1e-3))
        optimizer_step(engine, task.loss(engine, mine), Limit(3), 0.03)
        found[f"ranking {stage}"] = copied(engine.weights())
    return found


def rank_main(rank: int, folder: str, checkpoints: dict[str, str]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    start_process_group(rank, 2, dist.FileStore(f"{folder}/store", 2), datetime.timedelta(seconds=60))
    torch.save(work(rank, 2, checkpoints, STAGES), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(one rank on the whole, two ranks on their halves)."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(rank_main, args=(str(folder), folders), nprocs=2)
    return work(0, 1, folders, (0,)), [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", ["policy", "ranking"])
def test_two_ranks_under_zero_give_the_weights_of_one_rank_on_the_whole_batch(found, what: str, stage: int) -> None:
    one, two = found
    for rank in two:
        for name, tensor in rank[f"{what} {stage}"].items():
            torch.testing.assert_close(tensor, one[f"{what} 0"][name], atol=2e-5, rtol=1e-4)
