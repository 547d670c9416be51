"""Weights can be gathered at any time between passes, though ZeRO-3 fetches ahead of the pass that it expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from actors import sharding
from actors.engine import Engine
from actors.models import LanguageModel, new_causal_lm
from actors.sharding import Optimizer, Sharding
from tests.fakes import END, PAD, smoke
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
