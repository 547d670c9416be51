from __future__ import annotations

import shutil

import pytest
import torch

from actors.compiling import compile_blocks
from actors.worker import make_engine, process_group_of_one
from orchestration.errors import RequestError
from tests.fakes import dialogues, smoke
from tests.unit.test_attention import DECODERS, causal_lm, differing, learned


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and not torch.cuda.is_available(), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_compiled_blocks_give_the_same_log_probs_and_gradients_for_passes_of_any_size(name: str) -> None:
    process_group_of_one()
    plain, compiled = causal_lm(DECODERS[name]), causal_lm(DECODERS[name])
    engines = [make_engine(smoke(f"engine.compile={wanted}"), model, None) for model, wanted in ((plain, "false"), (compiled, "true"))]
    for model in (plain, compiled):
        model.requires_grad_(True)
    for rows in (dialogues(0, 7), dialogues(1, 3), dialogues(2, 5)):
        mask = rows.mask & (torch.arange(rows.tokens.shape[1]) > 0)
        found = [learned(engine.module, engine(rows.tokens, rows.mask, 1.0, rows.lengths)[0], mask) for engine in engines]
        assert len(found[0][1]) > 3
        assert not differing(*found)


def test_every_block_is_compiled_and_not_under_zero_3() -> None:
    assert compile_blocks(causal_lm(DECODERS["llama"])) == 2
    with pytest.raises(RequestError, match="engine.compile=true"):
        smoke("engine.compile=true", "engine.zero_stage=3")
