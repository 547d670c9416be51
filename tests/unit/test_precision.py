from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from actors.engine import Engine
from actors.precision import computes_in_bf16, cpu_has_bf16
from actors.rollout import Rollout
from actors.sharding import Sharding
from actors.worker import RankSpec, process_group_of_one
from tests.fakes import saved_lm, smoke
from tests.unit.test_rollout import SAMPLING, prompts, replies


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("model name: bf16", False),
    ],
)
def test_a_cpu_has_bf16_if_its_flags_say_so(text: str, wanted: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}\n")
    assert cpu_has_bf16(tmp_path / "cpuinfo") is wanted
    assert cpu_has_bf16(tmp_path / "nothing") is False
    assert computes_in_bf16("cuda")


@pytest.mark.parametrize("able", [True, False])
def test_training_and_sampling_are_in_bf16_where_the_cpu_has_it_and_in_float32_elsewhere(
    able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process_group_of_one()
    for module in ("engine", "rollout"):
        monkeypatch.setattr(f"actors.{module}.computes_in_bf16", lambda device: able)
    engine = Engine(nn.Linear(4, 2), None, Sharding(dtype="bf16"))
    assert engine(torch.ones(1, 4)).dtype == (torch.bfloat16 if able else torch.float32)
    rank = Rollout(smoke("model.dtype=bf16"), saved_lm(tmp_path), RankSpec("rollout", 0, 1, torch.get_num_threads()))
    rank.load()
    assert next(rank.engine.lm.parameters()).dtype == (torch.bfloat16 if able else torch.float32)
    (found,) = rank.generate([prompts(5)], [], SAMPLING)
    assert found.behaviour.dtype == torch.float32
    plain = Rollout(smoke("model.dtype=fp32"), str(tmp_path), RankSpec("rollout", 0, 1, torch.get_num_threads()))
    plain.load()
    (exact,) = plain.generate([prompts(5)], [], SAMPLING)
    same = [a == b for a, b in zip(replies(found), replies(exact), strict=True)]
    gap = (found.behaviour[:, : exact.behaviour.shape[1]] - exact.behaviour[:, : found.behaviour.shape[1]]).abs()
    assert all(same) or able  # rounding may turn a sample, but not make another model of it
    assert sum(same) >= 3
    assert float(gap[torch.tensor(same)].max()) < (0.05 if able else 1e-6)
