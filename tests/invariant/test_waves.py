"""A batch that is sampled and scored in waves is the batch that is sampled at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestration.errors import RequestError
from tests import tiny_ppo
from tests.fakes import smoke

WORDS = ("ppo.steps=3", "ppo.batch=12", "ppo.lr=1e-2", "ppo.warmup=0", "ppo.max_new_tokens=8", "engine.micro_batch=2", "model.dtype=fp32",
         "ppo.kl.budget=1e6", "ppo.reward_normalise=running")  # fmt: skip


def test_waves_change_no_figure_and_no_weight(tmp_path: Path) -> None:
    start = tiny_ppo.prepared(tmp_path / "start")
    found = {waves: tiny_ppo.run(tiny_ppo.context(start, tmp_path / str(waves), *WORDS, f"ppo.waves={waves}")) for waves in (1, 2, 5, 50)}
    _, rows, weights = found.pop(1)
    assert len(rows) == 3 and rows[1]["kl"] != rows[0]["kl"]
    for _, other_rows, other_weights in found.values():
        for row, other in zip(rows, other_rows, strict=True):
            plain = {name: value for name, value in row.items() if isinstance(value, float | int)}
            # what a pass holds is cut from each wave's rows: sums in another order
            assert {name: other[name] for name in plain} == pytest.approx(plain, rel=1e-4, abs=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(other_weights[name], tensor, atol=1e-4, rtol=1e-3)


def test_roles_that_take_turns_cannot_work_in_waves() -> None:
    with pytest.raises(RequestError, match=r"ppo\.waves=2.*set it to 1"):
        smoke("ppo.waves=2", "placement.sleep=true")
