from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from actors.attention import KERNEL, can_remove_padding, end_to_end, read, read_all, remove_padding, removes_padding
from actors.engine import Engine
from actors.models import LanguageModel, ScalarModel
from actors.recomputing import recompute_blocks
from actors.reward_network import FeatureModel
from actors.sharding import Sharding
from actors.worker import make_engine, process_group_of_one
from tests.fakes import dialogues, quickly, smoke

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
DECODERS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, grouped queries": LlamaConfig(**GROUPED),
    "opt": OPTConfig(**{**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}, dropout=0.0, pad_token_id=0),
    "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": GPTNeoXConfig(**SIZES, hidden_dropout=0.0, attention_dropout=0.0),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
}
OTHERS: dict[str, PretrainedConfig] = {
    "window": MistralConfig(**GROUPED, sliding_window=8),
    "window in some layers": Gemma2Config(**GROUPED),
    "alibi": BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4),
}


def causal_lm(shape: PretrainedConfig, kernel: str = "eager") -> LanguageModel:
    """Weights large enough that attention looks somewhere."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(copy.deepcopy(shape), attn_implementation=kernel).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return LanguageModel(lm)


def learned(model: nn.Module, found: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What was found within the mask, and the gradients of the sum of its cubes."""
    model.zero_grad()
    (found[mask] ** 3).sum().backward()
    return found[mask].detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differing(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> list[str]:
    """What of two results of `learned` differs by more than rounding: `found`, or the names of gradients."""
    gradients, others = one[1], other[1]
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())  # some are 0 but for rounding: a bias of keys
    wrong = [name for name, g in gradients.items() if name not in others or not torch.allclose(others[name], g, 1e-3, 1e-5 * largest)]
    return ([] if torch.allclose(other[0], one[0], 1e-4, 1e-4) else ["found"]) + wrong


@pytest.mark.parametrize("name", DECODERS)
def test_without_padding_a_model_gives_the_same_log_probs_entropies_and_gradients(name: str) -> None:
    model, rows = causal_lm(DECODERS[name]), dialogues(0, 7)
    assert (rows.lengths < rows.tokens.shape[1]).any()
    mask = rows.mask & (torch.arange(rows.tokens.shape[1]) > 0)
    padded = [learned(model, model(rows.tokens, rows.mask, 0.7)[n], mask) for n in (0, 1)]
    assert remove_padding(model)
    for n in (0, 1):
        assert not differing(padded[n], learned(model, model(rows.tokens, rows.mask, 0.7, rows.lengths)[n], mask))


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3"])
def test_without_padding_a_scalar_model_gives_the_same_values_and_gradients(name: str) -> None:
    model, rows = ScalarModel(causal_lm(DECODERS[name]).lm.base_model, 1), dialogues(1, 5)
    inside = torch.arange(rows.tokens.shape[1]) < rows.lengths[:, None]
    padded = learned(model, model(rows.tokens), inside)
    assert remove_padding(model)
    assert not differing(padded, learned(model, model(rows.tokens, rows.lengths), inside))
    assert torch.equal(model(rows.tokens, rows.lengths)[~inside], model.head.bias.expand(int((~inside).sum())))


def test_without_padding_a_feature_model_reads_the_same() -> None:
    features = ("last", "reply", "context", "likelihood")
    model, rows = FeatureModel(causal_lm(DECODERS["llama"]).lm, features), dialogues(2, 5)
    with torch.no_grad():
        padded = model(rows.tokens, rows.lengths, rows.mask, read=True)
        assert remove_padding(model)
        torch.testing.assert_close(model(rows.tokens, rows.lengths, rows.mask, read=True), padded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_see_less_or_otherwise_keep_their_padding(name: str) -> None:
    model, rows = causal_lm(OTHERS[name]), dialogues(0, 3)
    assert not can_remove_padding(model.lm)
    assert not remove_padding(model)
    assert not removes_padding(model.lm)
    with torch.no_grad():
        whole, _ = model(rows.tokens, rows.mask, 1.0, rows.lengths)
        for number, length in enumerate(rows.lengths.tolist()):
            alone, _ = model(rows.tokens[number : number + 1, :length], rows.mask[number : number + 1, :length])
            torch.testing.assert_close(whole[number, :length], alone[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="see each other"):
        read(model.lm.base_model, rows.tokens, rows.lengths, torch.zeros_like(rows.tokens))


def test_a_model_that_does_not_hand_on_where_rows_end_gives_no_number_instead_of_a_wrong_one() -> None:
    lm = causal_lm(DECODERS["llama"]).lm
    remove_padding(lm)
    given = end_to_end(torch.tensor([1, 2, 3]), torch.tensor([0, 0, 1]), None)  # type: ignore[arg-type]
    assert lm.base_model(**given).last_hidden_state.isnan().all()


def test_the_kernel_without_segments_is_an_ordinary_one() -> None:
    """Whoever holds the transformer may generate with it."""
    lm, rows = causal_lm(DECODERS["llama"]).lm, torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    attention = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    wanted = lm.generate(rows, attention_mask=attention, do_sample=False, max_new_tokens=5)
    remove_padding(lm)
    assert lm.config._attn_implementation == KERNEL
    assert torch.equal(lm.generate(rows, attention_mask=attention, do_sample=False, max_new_tokens=5), wanted)


def test_blocks_that_are_computed_again_attend_to_the_same_rows() -> None:
    model, rows = causal_lm(DECODERS["llama"]), dialogues(0, 4)
    remove_padding(model)
    mask = rows.mask & (torch.arange(rows.tokens.shape[1]) > 0)
    kept = learned(model, model(rows.tokens, rows.mask, 1.0, rows.lengths)[0], mask)
    recompute_blocks(model)
    assert not differing(kept, learned(model, model(rows.tokens, rows.mask, 1.0, rows.lengths)[0], mask))


@quickly
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_states_are_0_in_the_padding_and_each_row_is_as_if_alone(lengths: list[int]) -> None:
    lm = causal_lm(DECODERS["llama"]).lm
    remove_padding(lm)
    tokens = torch.arange(len(lengths) * 9).view(-1, 9) % 64
    with torch.no_grad():
        every = read_all(lm.base_model, tokens, torch.tensor(lengths))
        assert len(every) == 3
        for number, length in enumerate(lengths):
            alone = read(lm.base_model, tokens[number : number + 1, :length])
            torch.testing.assert_close(every[-1][number, :length], alone[0], atol=1e-5, rtol=1e-5)
            assert all(not states[number, length:].any() for states in every)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_setting_says_whether_padding_is_removed(wanted: bool) -> None:
    process_group_of_one()
    engine = make_engine(smoke(f"engine.remove_padding={wanted}".lower()), causal_lm(DECODERS["llama"]), None)
    assert engine.padded is not wanted
    assert Engine(causal_lm(DECODERS["llama"]), None, Sharding()).padded
