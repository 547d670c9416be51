"""Adapters: where they are put, what is trained, what they add, and the plain model that comes out of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from actors import lora
from actors.models import LanguageModel, ScalarModel, load_causal_lm, save_model
from actors.weights import gather_from, plain_weights
from conf.schema import Config
from tests.fakes import VOCABULARY, saved_lm, sequences, smoke, tiny_lm

RANK, ALPHA = 3, 6.0


def config(*more: str) -> Config:
    return smoke(f"lora.rank={RANK}", f"lora.alpha={ALPHA}", *more)


def gpt2() -> nn.Module:
    """Its linear layers are `Conv1D`: their weights stand transposed."""
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0
    )  # fmt: skip
    return GPT2LMHeadModel(shape)


def opt() -> nn.Module:
    torch.manual_seed(0)
    shape = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, max_position_embeddings=64,
        word_embed_proj_dim=16,
    )  # fmt: skip
    return OPTForCausalLM(shape)


MODELS = {"llama": tiny_lm, "opt": opt, "gpt2": gpt2}


def trained(model: nn.Module) -> nn.Module:
    """The model with B away from 0, as after learning."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            with torch.no_grad():
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    return model.eval()


def policy_like(kind: str = "llama", *more: str) -> nn.Module:
    return lora.adapted(config(*more), "policy", LanguageModel(MODELS[kind]()))


def logprobs(model: nn.Module) -> Tensor:
    tokens, _, mask = sequences(0, 4)
    with torch.no_grad():
        return model(tokens, mask)[0]


@pytest.mark.parametrize("kind", MODELS)
def test_a_new_adapter_changes_no_number_and_switched_off_a_trained_one_changes_none(kind: str) -> None:
    plain = logprobs(LanguageModel(MODELS[kind]()).eval())
    model = policy_like(kind).eval()
    assert torch.equal(logprobs(model), plain)
    trained(model)
    assert not torch.allclose(logprobs(model), plain, atol=1e-2)
    with lora.switched_off(model):
        assert torch.equal(logprobs(model), plain)
    assert not torch.allclose(logprobs(model), plain, atol=1e-2)


def test_adapters_are_on_again_after_an_error() -> None:
    model = trained(policy_like())
    wanted = logprobs(model)
    with pytest.raises(RuntimeError), lora.switched_off(model):
        raise RuntimeError
    assert torch.equal(logprobs(model), wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_merged_weights_are_those_of_pefts_own_merge_under_the_plain_models_names(kind: str) -> None:
    model = trained(policy_like(kind))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {name: weight.gathered(gather_from(model.state_dict())) for name, weight in plain_weights(model).items()}
    assert found.keys() == dict(LanguageModel(MODELS[kind]()).named_parameters()).keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # the model itself is as it was
    settings = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear")
    theirs = peft.get_peft_model(MODELS[kind](), settings)
    mine = {f"base_model.model.{name.removeprefix('lm.')}": tensor for name, tensor in model.state_dict().items()}
    theirs.load_state_dict(mine)
    for name, tensor in theirs.merge_and_unload().state_dict().items():  # type: ignore[operator]
        if f"lm.{name}" in found:  # tied weights are there once
            torch.testing.assert_close(found[f"lm.{name}"], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_an_export_is_a_plain_model_that_gives_what_the_adapted_one_gives(kind: str, tmp_path: Path) -> None:
    model = trained(policy_like(kind))
    save_model(model, model.state_dict(), tmp_path)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logprobs(LanguageModel(loaded.eval())), logprobs(model), atol=1e-5, rtol=1e-5)


def test_the_adapter_beside_an_export_is_one_that_peft_loads(tmp_path: Path) -> None:
    model = trained(policy_like("llama", "lora.targets=[q_proj,v_proj]"))
    save_model(model, model.state_dict(), tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_lm(), tmp_path / "adapter").eval()
    assert torch.equal(logprobs(LanguageModel(loaded.base_model.model)), logprobs(model))
    save_model(LanguageModel(tiny_lm()), LanguageModel(tiny_lm()).state_dict(), tmp_path / "plain")
    assert not (tmp_path / "plain/adapter").exists()


def test_only_adapters_and_a_scalar_models_head_are_trained() -> None:
    scale, model = smoke().scale, policy_like()
    attention = 4 * RANK * 2 * scale.width
    feed_forward = 3 * RANK * (scale.width + scale.feed_forward)
    expected = scale.layers * (attention + feed_forward)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    scalar = lora.adapted(config(), "critic", ScalarModel(tiny_lm().base_model, 0))
    names = {name for name, p in scalar.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} == {name for name in names if "lora_" not in name}
    assert sum(p.numel() for p in scalar.parameters() if p.requires_grad) == expected + scale.width + 1


def test_adapters_follow_the_seed_and_disturb_no_other_draw() -> None:
    base = LanguageModel(tiny_lm())
    torch.manual_seed(5)
    one, after = lora.adapted(config(), "policy", base).state_dict(), torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    two, other = policy_like().state_dict(), policy_like("llama", "seed=1").state_dict()
    name = next(name for name in one if "lora_A" in name)
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], other[name])


def test_targets_dropout_and_alpha_do_what_they_say() -> None:
    model = policy_like("llama", "lora.targets=[q_proj,v_proj]", "lora.dropout=0.25")
    layers = lora.adapters(model)
    assert {name.split(".")[-1] for name in layers} == {"q_proj", "v_proj"}
    assert all(layer.lora_dropout["default"].p == 0.25 and layer.scaling["default"] == ALPHA / RANK for layer in layers.values())


def test_roles_that_are_not_named_stay_as_they_are() -> None:
    plain = LanguageModel(tiny_lm())
    assert lora.adapted(config("lora.roles=[critic]"), "policy", plain) is plain
    assert lora.adapted(smoke(), "policy", plain) is plain
    assert lora.adapters(plain) == {}
    assert all(p.requires_grad for p in plain.parameters())
    assert all(weight.parts == (name,) for name, weight in plain_weights(plain).items())


@pytest.mark.parametrize("targets", ["[nothing]", "[embed_tokens]", "[lm_head]"])
def test_targets_that_cannot_have_an_adapter_are_refused_with_those_that_can(targets: str) -> None:
    with pytest.raises(ValueError, match=r"lora.targets=.*name linear layers of .*q_proj"):
        policy_like("llama", f"lora.targets={targets}")


def test_the_policy_is_its_own_reference_only_with_adapters() -> None:
    assert config().policy_is_reference()
    assert not config("lora.roles=[critic]").policy_is_reference()
    assert not dataclasses.replace(config(), lora=smoke().lora).policy_is_reference()


def test_adapters_of_a_model_without_storage_are_those_of_one_that_has_it(tmp_path: Path) -> None:
    of = smoke("lora.rank=3", "engine.zero_stage=3")
    path = saved_lm(tmp_path)
    whole, unfilled = (lora.adapted(of, "policy", LanguageModel(load_causal_lm(path, unfilled=wanted))) for wanted in (False, True))
    there = dict(whole.named_parameters())
    for name, parameter in unfilled.named_parameters():
        if ".lora_" in name:
            assert torch.equal(parameter, there[name])
        else:
            assert parameter.is_meta and torch.equal(parameter.stored.whole(), there[name])
