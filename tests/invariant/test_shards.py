"""A model partitioned over two ranks (ZeRO-3), loaded from slices and written tensor by tensor, is the model that one rank holds whole."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.batch import Dialogues, Experience
from actors.critic import Critic
from actors.engine import Engine
from actors.models import LanguageModel, ScalarModel, new_causal_lm, save_model
from actors.policy import Policy
from actors.reference import Reference
from actors.sharding import Sharding
from actors.weight_sync import unpack
from actors.weights import grouped, plain_weights
from actors.worker import RankSpec, language_model, process_group_of_one, scalar_model, start_process_group
from conf.schema import Config
from tests.fakes import END, PAD, dialogues, experience, rollouts, smoke, with_section

VOCABULARY = 1500
"""Its embedding is too large for ZeRO-3 to keep it whole."""
SHAPES = {
    "llama": ("scale.width=16", "scale.heads=2"),
    "opt": ("scale.architecture=opt", "scale.width=16", "scale.heads=2", "scale.embedding=8", "scale.post_layer_norm=true"),
}
WAYS = {
    "plain": (),
    "recomputed": ("engine.activation_checkpointing=true",),
    "offloaded": ("engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"),
}
ROWS = (3, 1)
"""Rows of each of two ranks, at one row in a micro-batch: the second makes fewer passes."""


def config(stage: int, *more: str) -> Config:
    plain = {"lr": 100.0, "critic_lr": 100.0, "warmup": 0, "adam_epsilon": 1e4, "max_grad_norm": 1e9, "minibatches": 1, "entropy": 0.3}
    return with_section(smoke(f"engine.zero_stage={stage}", "engine.micro_batch=1", "engine.shard_mb=1", *more), "ppo", **plain)


def new_model(kind: str, seed: int = 0) -> PreTrainedModel:
    return new_causal_lm(smoke(*SHAPES[kind]).scale, VOCABULARY, seed, 0.0, END, PAD)


def mine(rank: int, ranks: int) -> slice:
    return slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1])) if ranks == 2 else slice(0, sum(ROWS))


def gathered(engine: Engine) -> dict[str, Tensor]:
    """Every weight, whole, where this is rank 0."""
    found = {name: weight.gathered(engine.whole) for name, weight in plain_weights(engine.module).items()}
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def work(rank: int, ranks: int, stage: int, folder: str) -> dict[str, Any]:
    """What one rank finds when it loads, learns, sends and writes."""
    found: dict[str, Any] = {}
    for kind in SHAPES:
        of = config(stage)
        for name, module in {
            "lm": language_model(of, f"{folder}/{kind}"),
            "fresh head": scalar_model(of, f"{folder}/{kind}"),
            "saved head": scalar_model(of, f"{folder}/{kind}-scalar"),
        }.items():
            found[f"{kind} {name}"] = gathered(Engine(module, None, Sharding(stage)))
    for way, settings in WAYS.items():
        found[way] = learned(rank, ranks, config(stage, *(settings if stage == 3 else ())), folder)
    policy = role(Policy, rank, ranks, config(stage), f"{folder}/llama")
    found["sent"] = [update and unpack(update) for update in (policy.weights(1, bucket) for bucket in range(policy.bucket_count()))]
    if stage == 3:
        policy.export(f"{folder}/one-file")
        whole, sizes = gathered(policy.engine), plain_weights(policy.engine.module)
        from actors.models import write_model

        write_model(policy.engine.module, policy.engine.whole, Path(folder) / "many-files" if rank == 0 else None, 60_000)
        found["exported"], found["files"] = whole, len(grouped(sizes, 60_000))
        found["held"] = sum(p.ds_tensor.numel() for p in policy.engine.module.parameters())
    return found


def role(kind: type, rank: int, ranks: int, of: Config, checkpoint: str) -> Any:
    found = kind(of, checkpoint, RankSpec(kind.__name__.lower(), rank, ranks, 1))
    found.load()
    return found


def learned(rank: int, ranks: int, of: Config, folder: str) -> dict[str, Any]:
    """Forward passes and one update of policy and critic, on ranks with different numbers of micro-batches."""
    share = mine(rank, ranks)
    policy, critic = role(Policy, rank, ranks, of, f"{folder}/llama"), role(Critic, rank, ranks, of, f"{folder}/opt-scalar")
    reference = role(Reference, rank, ranks, of, f"{folder}/opt")
    replies = rollouts(5, sum(ROWS)).select(share).split(1)
    found: dict[str, Any] = {
        "forward": [torch.cat(part, 0) for part in (policy.logprobs(replies), reference.logprobs(replies, 0.7), critic.values(replies))]
    }
    rows: Experience = experience(1, sum(ROWS)).select(share)
    found["figures"] = policy.update([rows], [text(rank, ranks)], step=0) | critic.update([rows], step=0)
    return found | {"policy": gathered(policy.engine), "critic": gathered(critic.engine)}


def text(rank: int, ranks: int) -> Dialogues:
    return dialogues(2, 4).select(slice(rank, None, ranks))


def rank_main(rank: int, folder: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    start_process_group(rank, 2, dist.FileStore(f"{folder}/store", 2), datetime.timedelta(seconds=60))
    torch.save(work(rank, 2, 3, folder), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for kind in SHAPES:
        lm = LanguageModel(new_model(kind))
        scalar = ScalarModel(new_model(kind, 1).base_model, 3)
        for name, model in ((kind, lm), (f"{kind}-scalar", scalar)):
            (folder / name).mkdir()
            save_model(model, model.state_dict(), folder / name)
    for name in ("one-file", "many-files"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(one rank that holds everything, two ranks under ZeRO-3)."""
    multiprocessing.spawn(rank_main, args=(str(folder),), nprocs=2)
    process_group_of_one()
    return work(0, 1, 0, str(folder)), [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def same(ours: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("model", ["lm", "fresh head", "saved head"])
def test_slices_put_together_are_the_checkpoint(found: Any, kind: str, model: str) -> None:
    one, two = found
    same(two[0][f"{kind} {model}"], one[f"{kind} {model}"])
    assert two[1][f"{kind} {model}"] == {}, "rank 0 alone is given whole tensors"


@pytest.mark.parametrize("way", WAYS)
def test_ranks_with_different_numbers_of_micro_batches_agree_with_one_rank_on_everything(found: Any, way: str) -> None:
    one, two = found
    for both, whole in zip(zip(*(rank[way]["forward"] for rank in two), strict=True), one[way]["forward"], strict=True):
        torch.testing.assert_close(torch.cat(both), whole, atol=1e-5, rtol=1e-5)
    for model in ("policy", "critic"):
        same(two[0][way][model], one[way][model], 1e-5)
        assert max(float((a - one["plain"][model][n]).abs().max()) for n, a in one[way][model].items()) < 1e-5
    for rank in two:
        assert {**rank[way]["figures"], "explained_variance": 0} == pytest.approx(
            {**one[way]["figures"], "explained_variance": 0}, rel=1e-4, abs=1e-5
        )


def test_each_rank_holds_its_part(found: Any) -> None:
    _, two = found
    total = sum(tensor.numel() for tensor in two[0]["exported"].values())
    for rank in two:
        assert total / 2 <= rank["held"] < total / 2 + 50


def test_every_bucket_is_given_by_rank_0_alone_and_together_they_are_the_weights(found: Any) -> None:
    one, two = found
    for ours, wanted in zip(two[0]["sent"], one["sent"], strict=True):
        same(ours, wanted)
    assert two[1]["sent"] == [None] * len(one["sent"])


@pytest.mark.parametrize("name", ["one-file", "many-files"])
def test_what_ranks_export_loads_with_plain_transformers(found: Any, folder: Path, name: str) -> None:
    _, two = found
    files = sorted(file.name for file in (folder / name).glob("*.safetensors"))
    assert len(files) == (two[0]["files"] if name == "many-files" else 1) and two[0]["files"] > 1
    loaded = AutoModelForCausalLM.from_pretrained(folder / name)
    same(dict(LanguageModel(loaded).named_parameters()), two[0]["exported"])
    assert loaded.generation_config.eos_token_id == END and loaded.config.architectures == ["LlamaForCausalLM"]
