"""Weights can be gathered at any time between passes, though ZeRO-3 fetches ahead of the pass that it expects."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import sharding
from actors.engine import Engine
from actors.models import LanguageModel, new_causal_lm
from actors.policy import Policy
from actors.rollout import Rollout
from actors.sharding import Optimizer, Sharding
from actors.stream import Route
from actors.worker import RankSpec
from tests.fakes import END, PAD, dialogues, experience, saved_lm, smoke
from tests.ranks import Ranks

VOCABULARY = 1500


def gather_after_scoring(rank: int, ranks: int) -> dict[str, Any]:
    """Learn twice, so that DeepSpeed knows the order of a whole pass; then score, which is half of one, and gather."""
    before = sharding.SMALLEST_BUCKET, sharding.PERSISTENT
    sharding.SMALLEST_BUCKET, sharding.PERSISTENT = 1000, 0  # as it is with large models: little is kept, much is fetched
    try:
        lm = new_causal_lm(smoke("scale.layers=4").scale, VOCABULARY, 0, 0.0, END, PAD)
        engine = Engine(LanguageModel(lm), Optimizer(1e-3, 0.0, 1.0), Sharding(3))
    finally:
        sharding.SMALLEST_BUCKET, sharding.PERSISTENT = before
    tokens, mask = torch.arange(32).view(2, 16), torch.ones(2, 16, dtype=torch.bool)
    for _ in range(2):
        engine.backward(-engine(tokens, mask)[0].mean(), last=True)
        engine.step(1e-3)
    with torch.no_grad():
        engine(tokens, mask)
    names = [name for name, _ in engine.module.named_parameters()]
    return {name: tensor.clone() for name in names if (tensor := engine.whole(name)) is not None}


def test_weights_are_gathered_after_a_pass_that_learns_nothing(ranks: Callable[[int], Ranks]) -> None:
    found, other = ranks(2).run(gather_after_scoring)
    assert other == {}
    assert found["lm.model.embed_tokens.weight"].shape[0] == VOCABULARY


def send_to_an_engine(rank: int, ranks: int, stage: int, folder: str) -> dict[str, Any]:
    """Learn, then send what was learned to an engine of other weights; it lives in a thread of rank 0, and each end does its own work."""
    policy = Policy(smoke(f"engine.zero_stage={stage}", "ppo.minibatches=1"), f"{folder}/policy", RankSpec("policy", rank, ranks, 1))
    policy.load()
    route = Route("shared_memory", uuid.uuid4().hex, 1, 60.0)
    with ThreadPoolExecutor(1) as pool:
        if rank == 0:
            engine = Rollout(smoke(), f"{folder}/engine", RankSpec("rollout", 0, 1, 1))
            engine.load()
            taking = pool.submit(engine.receive_weights, 5, route, policy.weight_table())
        policy.update([experience(rank, 4)], [dialogues(0, 2)], step=0)
        policy.send_weights(5, route)
        found = {name: tensor.clone() for name, tensor in policy.engine.weights().items()}
        if rank > 0:
            return {}
        assert taking.result(60) == 5 and engine.engine.version == 5  # type: ignore[attr-defined]
        return {"policy": found, "engine": {f"lm.{name}": tensor for name, tensor in engine.engine.lm.state_dict().items()}}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("count", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_an_engine_holds_what_the_ranks_have_learned_bit_by_bit(
    count: int, stage: int, ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    for seed, name in enumerate(("policy", "engine")):
        saved_lm(tmp_path / name, seed)
    found = ranks(count).run(send_to_an_engine, stage, str(tmp_path))[0]
    for name, tensor in found["engine"].items():
        assert torch.equal(tensor, found["policy"][name]), name
