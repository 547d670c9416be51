"""The embedded engine: what it writes does not depend on who else is in the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from actors.batch import Prompts, pad_rows
from actors.rollout_transformers import TransformersEngine
from actors.sampling import Sampling
from actors.serving.drawing import draw, likeliest_share
from actors.serving.protocol import Delta, Drawing, Request, merged
from actors.serving.slots import LlamaSlots, ModuleSlots, slots
from actors.serving.transformers_engine import TransformersStepEngine

END, VOCABULARY = 1, 50
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33]]


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


def opt() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, max_position_embeddings=128,
        word_embed_proj_dim=32, dropout=0.0, init_std=0.3, pad_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(shape).eval()


MODELS = {"llama": llama, "opt": opt}


def engine(lm: PreTrainedModel, sequences: int = 8, prefill: int = 64) -> TransformersStepEngine:
    return TransformersStepEngine(lm, END, sequences, prefill)


def run(made: TransformersStepEngine, arrivals: dict[int, Sequence[Request]]) -> dict[str, Delta]:
    """Everything each request was given, requests arriving before the steps that `arrivals` names."""
    found: dict[str, list[Delta]] = {}
    step = 0
    while made.busy() or any(at >= step for at in arrivals):
        for request in arrivals.get(step, ()):
            made.add(request)
        for delta in made.step():
            found.setdefault(delta.id, []).append(delta)
        step += 1
    return {name: merged(deltas) for name, deltas in found.items()}


def requests(drawing: Drawing, prompts: Sequence[list[int]] = PROMPTS) -> list[Request]:
    return [Request(str(n), prompt, dataclasses.replace(drawing, seed=n)) for n, prompt in enumerate(prompts)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_replies_are_those_of_the_rollout_engine(name: str) -> None:
    lm = MODELS[name]()
    tokens, lengths = pad_rows(PROMPTS)
    keys = torch.tensor([[n, 0] for n in range(len(PROMPTS))])
    rollouts = TransformersEngine(lm, END, torch.device("cpu")).generate(Prompts(tokens, lengths, keys), Sampling(0.0, 12, 0, 0))
    expected = [row[mask].tolist() for row, mask in zip(rollouts.tokens, rollouts.mask, strict=True)]
    first, second, third, *rest = requests(Drawing(12, temperature=0.0))
    found = run(engine(lm), {0: [first], 2: [second, third], 5: rest})
    assert [found[str(n)].tokens for n in range(len(PROMPTS))] == expected
    assert {delta.finish for delta in found.values()} <= {"stop", "length"}


@pytest.mark.parametrize("name", MODELS)
def test_sampled_replies_do_not_depend_on_the_batch(name: str) -> None:
    lm = MODELS[name]()
    wanted = requests(Drawing(10, temperature=0.8, top_p=0.9))
    alone = {request.id: run(engine(lm), {0: [request]})[request.id].tokens for request in wanted}
    together = run(engine(lm, sequences=2), {0: wanted[:3], 3: wanted[3:]})
    assert {name: delta.tokens for name, delta in together.items()} == alone


@pytest.mark.parametrize("name", MODELS)
def test_a_reply_that_is_aborted_ends_and_others_go_on(name: str) -> None:
    lm = MODELS[name]()
    wanted = requests(Drawing(10, temperature=0.0))
    alone = run(engine(lm), {0: [wanted[2]]})["2"].tokens
    made = engine(lm, sequences=3)
    for request in wanted:
        made.add(request)
    seen = [made.step(), made.step()]
    made.abort("0")
    made.abort("4")
    made.abort("unknown")
    while made.busy():
        seen.append(made.step())
    tokens = [token for step in seen for delta in step if delta.id == "2" for token in delta.tokens]
    assert tokens == alone
    assert not [delta for step in seen[2:] for delta in step if delta.id in ("0", "4")]


def test_llama_is_stepped_by_its_own_slots() -> None:
    assert isinstance(slots(llama()), LlamaSlots)
    assert isinstance(slots(opt()), ModuleSlots)


def test_both_kinds_of_slots_compute_the_same() -> None:
    lm = llama()
    ours, theirs = LlamaSlots(lm), ModuleSlots(lm)
    for made in (ours, theirs):
        made.join(PROMPTS[:2])
    tokens = torch.tensor([3, 4])
    torch.testing.assert_close(ours.step(tokens), theirs.step(tokens), rtol=1e-4, atol=1e-4)
    assert ours.leave([True, False]) == theirs.leave([True, False]) == [1]
    torch.testing.assert_close(ours.join(PROMPTS[2:4]), theirs.join(PROMPTS[2:4]), rtol=1e-4, atol=1e-4)
    tokens = torch.tensor([3, 4, 5])
    torch.testing.assert_close(ours.step(tokens), theirs.step(tokens), rtol=1e-4, atol=1e-4)


def test_log_probs_are_those_at_temperature_one() -> None:
    lm = llama()
    delta = run(engine(lm), {0: [Request("a", PROMPTS[0], Drawing(4, temperature=0.3, logprobs=3))]})["a"]
    ids = torch.tensor([[*PROMPTS[0], *delta.tokens]])
    expected = torch.log_softmax(lm(ids).logits[0].float(), dim=-1)
    for place, (token, logprob, best) in enumerate(zip(delta.tokens, delta.logprobs, delta.likeliest, strict=True)):
        row = expected[len(PROMPTS[0]) + place - 1]
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [token for token, _ in best] == row.topk(3).indices.tolist()


def test_a_share_of_the_distribution_keeps_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(3, 1)
    kept = likeliest_share(logits, torch.tensor([0.5, 0.6, 0.01])).isfinite()
    assert kept.tolist() == [[True, False, False, False], [True, True, False, False], [True, False, False, False]]


def test_rows_are_drawn_each_in_its_own_way() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    drawings = [Drawing(1, temperature=0.0), Drawing(1, temperature=1.0, top_p=0.1), Drawing(1, temperature=1.0)]
    assert draw(logits, drawings, [0.99, 0.99, 0.5]) == [1, 1, 1]
    assert draw(logits, drawings, [0.0, 0.0, 0.99]) == [1, 1, 2]
