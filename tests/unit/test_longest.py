"""`engine.longest`: as if the model's context ended there, in every stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import OPTConfig

from orchestration.errors import RequestError
from orchestration.run_directory import RunDirectory
from orchestration.stages.context import StageContext
from orchestration.stages.start import context_length
from tests.fakes import smoke
from tests.unit.test_recipe import identity_of


def test_training_stages_end_there_and_no_model_gets_a_longer_context(tmp_path: Path) -> None:
    assert context_length(smoke()) == 64
    assert context_length(smoke("engine.longest=40")) == 40
    assert context_length(smoke("engine.longest=4000")) == 64
    OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=48).save_pretrained(tmp_path)
    assert context_length(smoke("engine.longest=40", f"model.path={tmp_path}")) == 40
    assert context_length(smoke("engine.longest=50", f"model.path={tmp_path}")) == 48


def test_stages_that_start_from_sft_end_there(tmp_path: Path) -> None:
    OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=48).save_pretrained(tmp_path)
    for words, longest in ((), 48), (("engine.longest=40",), 40), (("engine.longest=50",), 48):
        config = smoke(f"policy_checkpoint={tmp_path}", *words)
        context = StageContext("ppo", config, RunDirectory(tmp_path / "run", keep=1), None, None)  # type: ignore[arg-type]
        assert context.longest == longest


def test_it_is_part_of_what_a_stage_is() -> None:
    for stage in ("sft", "compare", "reward_model", "ppo", "evaluate"):
        assert identity_of(stage, smoke("engine.longest=40")) != identity_of(stage, smoke())


def test_a_reply_must_leave_room_for_a_prompt() -> None:
    with pytest.raises(RequestError, match=r"max_new_tokens=\d+: leaves no room for a prompt in engine\.longest=4"):
        smoke("engine.longest=4")
