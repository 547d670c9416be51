"""vLLM as the service's engine beside the embedded one. Run by test_vllm_serving.py in a process of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.serving.protocol import Delta, Drawing, Request, StepEngine, merged
from orchestration.serving.building import load_engine
from tests.serving_stand_ins import chat, defaults

PROMPTS = [chat().text(text) for text in ("where is the cat?", "the mat", "in the drawer, of course", "naïve")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(chat().tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=256, initializer_range=0.3, eos_token_id=chat().end, pad_token_id=chat().pad,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    chat().save(folder)
    return folder


def loaded(checkpoint: Path, kind: str) -> StepEngine:
    engine = dataclasses.replace(defaults().engine, kind=kind, sequences=8, cpu_cache_gib=0.1)
    return load_engine(str(checkpoint), dataclasses.replace(defaults(), engine=engine))


def written(engine: StepEngine, requests: list[Request], late: list[Request]) -> dict[str, Delta]:
    """All replies; `late` requests come after the third step."""
    found: dict[str, list[Delta]] = {}
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.busy() or steps < 3:
        for delta in engine.step():
            found.setdefault(delta.id, []).append(delta)
        steps += 1
        if steps == 3:
            for request in late:
                engine.add(request)
    return {name: merged(deltas) for name, deltas in found.items()}


def test_vllm_writes_what_the_embedded_engine_writes(checkpoint: Path) -> None:
    drawing = Drawing(24, temperature=0.0, logprobs=2)
    requests = [Request(str(number), prompt, drawing) for number, prompt in enumerate(PROMPTS)]
    ours = written(loaded(checkpoint, "transformers"), requests[:2], requests[2:])
    vllm = loaded(checkpoint, "vllm")
    theirs = written(vllm, requests[:2], requests[2:])
    for name, mine in ours.items():
        assert theirs[name].tokens == mine.tokens
        assert theirs[name].finish == mine.finish
        assert theirs[name].logprobs == pytest.approx(mine.logprobs, abs=1e-3)
        assert [[token for token, _ in best] for best in theirs[name].likeliest] == [
            [token for token, _ in best] for best in mine.likeliest
        ]
    sampled = [Request(f"s{n}", PROMPTS[0], Drawing(16, temperature=1.0, top_p=0.9, seed=n % 2)) for n in range(4)]
    drawn = written(vllm, sampled[:2], sampled[2:])
    assert drawn["s0"].tokens == drawn["s2"].tokens
    assert drawn["s0"].tokens != drawn["s1"].tokens
    vllm.add(Request("gone", PROMPTS[0], Drawing(200, temperature=1.0)))
    vllm.step()
    vllm.abort("gone")
    assert not vllm.busy()
    vllm.close()
