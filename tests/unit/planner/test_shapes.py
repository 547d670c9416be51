"""Counts of real model classes on the meta device, beside published numbers and a model that is really there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from conf.sizes import Scale
from orchestration import config as configuration
from orchestration.errors import RequestError
from orchestration.planner import shapes

PUBLISHED = {
    "125m": 125_239_296, "350m": 331_196_416, "1.3b": 1_315_758_080, "2.7b": 2_651_596_800, "6.7b": 6_658_473_984, "13b": 12_853_473_280,
    "30b": 29_974_540_288, "66b": 65_719_701_504, "175b": 174_604_468_224,
}  # fmt: skip
"""OPT's, with tied embeddings."""
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, PretrainedConfig] = {
    "llama, grouped-query": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3, experts": Qwen3MoeConfig(**GROUPED, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2),
}


def rung(name: str) -> Scale:
    return configuration.load([f"scale={name}"]).scale


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ladder_has_the_published_number_of_parameters(name: str) -> None:
    assert shapes.of_scale(rung(name)).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_any_hugging_face_model_is_counted_as_it_is_built(name: str, tmp_path: Path) -> None:
    MODELS[name].save_pretrained(tmp_path)
    found = shapes.language_model(configuration.load([f"model.path={tmp_path}"]))
    real = AutoModelForCausalLM.from_config(MODELS[name])
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert found.layers == 3


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_is_as_large_as_the_real_one(name: str, tmp_path: Path) -> None:
    MODELS[name].save_pretrained(tmp_path)
    found = shapes.language_model(configuration.load([f"model.path={tmp_path}"]))
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_config(MODELS[name]).eval()(torch.zeros(2, 7, dtype=torch.long), use_cache=True).past_key_values
    real = sum(part.numel() * 4 for layer in cache.layers for part in (layer.keys, layer.values))
    assert found.cache(2 * 7, 4) == real


def test_a_token_meets_only_the_experts_it_is_sent_to() -> None:
    hf = MODELS["mixtral"]
    found = shapes._counted("mixtral", hf, scalar=False)
    experts = 3 * 4 * 3 * 32 * 48  # layers, experts, matrices of width x inner width
    embedding = 96 * 32  # looked up, not multiplied with
    assert found.active == found.parameters - experts // 2 - embedding


def test_a_model_that_is_not_there_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(RequestError, match=r"model\.path="):
        shapes.language_model(configuration.load([f"model.path={tmp_path}"]))


def test_a_name_that_is_neither_here_nor_to_be_asked_for_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it would try again and again")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(shapes, "getproxies", dict)
    monkeypatch.setattr(shapes.AutoConfig, "from_pretrained", never)
    with pytest.raises(RequestError, match=r"model\.path=nobody/no-such-model: .*HF_HUB_OFFLINE"):
        shapes.language_model(configuration.load(["model.path=nobody/no-such-model"]))


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(shapes, "getproxies", dict)
    monkeypatch.setattr(shapes.socket, "create_connection", refused)
    with pytest.raises(RequestError, match=r"cannot be reached \(no route\)"):
        shapes.language_model(configuration.load(["model.path=nobody/no-such-model"]))
