from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import OPTForCausalLM as OPT

from actors import models
from actors.models import (
    LanguageModel,
    ScalarModel,
    at_last,
    before_each,
    load_causal_lm,
    load_scalar_model,
    new_causal_lm,
    save_model,
    shape_config,
)
from orchestration import config as configuration
from tests.fakes import END, PAD, VOCABULARY, floats, saved_lm, sequences, smoke, tiny_lm

PARAMETERS = {
    "125m": 125_239_296,
    "350m": 331_196_416,
    "1.3b": 1_315_758_080,
    "2.7b": 2_651_596_800,
    "6.7b": 6_658_473_984,
    "13b": 12_853_473_280,
    "30b": 29_974_540_288,
    "66b": 65_719_701_504,
    "175b": 174_604_468_224,
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies_are_those_of_the_logits_where_the_mask_is_and_0_elsewhere(temperature: float) -> None:
    lm = tiny_lm()
    tokens, _, mask = sequences(3, 5)
    with torch.no_grad():
        logprobs, entropy = LanguageModel(lm)(tokens, mask, temperature)
        table = torch.log_softmax(lm(input_ids=tokens).logits / temperature, dim=-1)
    for b in range(len(tokens)):
        for t in range(tokens.shape[1]):
            wanted = float(table[b, t - 1, tokens[b, t]]) if mask[b, t] else 0.0
            spread = float(-(table[b, t - 1].exp() * table[b, t - 1]).sum()) if mask[b, t] else 0.0
            assert float(logprobs[b, t]) == pytest.approx(wanted, abs=2e-6)
            assert float(entropy[b, t]) == pytest.approx(spread, abs=2e-6)


def test_logits_made_in_chunks_give_the_same_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_lm())
    tokens, _, mask = sequences(3, 5)
    with torch.no_grad():
        whole = model(tokens, mask)
        monkeypatch.setattr(models, "token_logprobs", functools.partial(models.token_logprobs, chunk=3 * VOCABULARY))
        pieces = model(tokens, mask)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other)


def test_an_empty_mask_gives_zeros() -> None:
    tokens, _, mask = sequences(3, 2)
    logprobs, entropy = LanguageModel(tiny_lm())(tokens, torch.zeros_like(mask))
    assert not logprobs.any()
    assert not entropy.any()


def test_the_mask_that_was_passed_is_not_changed_and_a_rows_first_token_has_no_log_prob() -> None:
    tokens, _, _ = sequences(3, 2, shortest=6, longest=6)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    logprobs, _ = LanguageModel(tiny_lm())(tokens, mask)
    assert mask.all()
    assert logprobs[:, 0].tolist() == [0.0, 0.0]
    assert (logprobs[:, 1:] < 0).all()


def test_the_scalar_head_starts_as_n_0_1_over_d_plus_1_from_its_seed_with_bias_0() -> None:
    big = shape_config(smoke("scale.width=4096", "scale.heads=2", "scale.layers=1", "scale.feed_forward=8").scale, 8)
    with torch.device("meta"):
        backbone = LlamaForCausalLM(big).model
    head = ScalarModel(backbone, 5).head
    assert float(head.weight.mean()) == pytest.approx(0, abs=4 / 4097)
    assert float(head.weight.std()) == pytest.approx(1 / 4097**0.5, rel=0.05)
    assert head.bias.tolist() == [0.0]
    assert torch.equal(head.weight, ScalarModel(backbone, 5).head.weight)
    assert not torch.equal(head.weight, ScalarModel(backbone, 6).head.weight)


def test_scores_are_the_output_at_each_rows_last_token() -> None:
    model = ScalarModel(tiny_lm().base_model, 0)
    tokens, lengths, _ = sequences(2, 4)
    with torch.no_grad():
        outputs, scores = model(tokens), model.scores(tokens, lengths)
        hidden = model.backbone(input_ids=tokens).last_hidden_state
    wanted = [float(model.head(hidden[b, length - 1])) for b, length in enumerate(lengths.tolist())]
    assert scores.tolist() == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(at_last(outputs, lengths), scores)


def test_values_are_read_before_each_token() -> None:
    outputs, mask = floats(0, 2, 4), torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)
    found = before_each(outputs, mask)
    assert found[0].tolist() == [0.0, float(outputs[0, 0]), 0.0, float(outputs[0, 2])]
    assert found[1].tolist() == [0.0, 0.0, float(outputs[1, 1]), float(outputs[1, 2])]


def test_a_saved_language_model_loads_with_plain_transformers_and_gives_the_same_logits(tmp_path: Path) -> None:
    lm = tiny_lm()
    saved_lm(tmp_path)
    tokens, _, _ = sequences(1, 2)
    with torch.no_grad():
        wanted = lm(input_ids=tokens).logits
        for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load_causal_lm(str(tmp_path))):
            torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, wanted)
            assert (loaded.config.eos_token_id, loaded.config.pad_token_id) == (END, PAD)
            assert loaded.generation_config.eos_token_id == END


def test_weights_that_were_gathered_are_what_is_saved_not_those_in_the_module(tmp_path: Path) -> None:
    model = LanguageModel(tiny_lm(0))
    save_model(model, LanguageModel(tiny_lm(1)).state_dict(), tmp_path)
    found = load_causal_lm(str(tmp_path)).state_dict()
    for name, tensor in tiny_lm(1).state_dict().items():
        assert torch.equal(found[name], tensor)


def test_a_saved_scalar_model_loads_with_its_head_and_one_from_a_language_model_gets_a_fresh_head(tmp_path: Path) -> None:
    model = ScalarModel(tiny_lm().base_model, 3)
    with torch.no_grad():
        model.head.bias.fill_(0.75)
    (tmp_path / "reward").mkdir()
    save_model(model, model.state_dict(), tmp_path / "reward")
    tokens, lengths, _ = sequences(1, 3)
    with torch.no_grad():
        torch.testing.assert_close(load_scalar_model(str(tmp_path / "reward"), 99).scores(tokens, lengths), model.scores(tokens, lengths))
    fresh = load_scalar_model(saved_lm(tmp_path / "policy"), 3)
    assert float(fresh.head.bias) == 0.0
    assert torch.equal(fresh.head.weight, ScalarModel(tiny_lm().base_model, 3).head.weight)
    assert torch.equal(fresh.backbone.embed_tokens.weight, tiny_lm().base_model.embed_tokens.weight)


def test_dropout_is_what_was_asked_for_whatever_the_checkpoint_says(tmp_path: Path) -> None:
    config = shape_config(smoke().scale, VOCABULARY, dropout=0.3, end=END, pad=PAD)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_causal_lm(str(tmp_path)).config.attention_dropout == 0.0
    assert load_causal_lm(str(tmp_path), 0.2).config.attention_dropout == 0.2


def test_the_dropout_of_an_opt_checkpoint_is_replaced_in_every_layer(tmp_path: Path) -> None:
    scale = configuration.load(["experiment=smoke", "scale.architecture=opt"], tmp_path).scale
    OPT(shape_config(scale, VOCABULARY, dropout=0.3, end=END, pad=PAD)).save_pretrained(tmp_path)
    lm = load_causal_lm(str(tmp_path))
    assert {layer.dropout for layer in lm.model.decoder.layers} == {0.0}
    assert {layer.self_attn.dropout for layer in lm.model.decoder.layers} == {0.0}


def test_random_weights_are_a_function_of_the_seed() -> None:
    one, same, other = (new_causal_lm(smoke().scale, VOCABULARY, seed, 0.0, END, PAD).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("rung", "parameters"), PARAMETERS.items())
def test_each_rung_of_the_ladder_has_exactly_opts_number_of_parameters(rung: str, parameters: int, tmp_path: Path) -> None:
    scale = configuration.load([f"scale={rung}"], tmp_path).scale
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(shape_config(scale, scale.vocabulary))
    assert sum(p.numel() for p in lm.parameters()) == parameters


def test_a_scalar_model_fits_a_backbone_whose_output_is_narrower_than_its_layers() -> None:
    overrides = ("scale.architecture=opt", "scale.embedding=8", "scale.post_layer_norm=true")
    lm = new_causal_lm(smoke(*overrides).scale, VOCABULARY, 0, 0.0, END, PAD)
    tokens, lengths, mask = sequences(1, 3)
    assert ScalarModel(lm.base_model, 0).scores(tokens, lengths).shape == (3,)
    logprobs, _ = LanguageModel(lm.eval())(tokens, mask)
    table = torch.log_softmax(lm(input_ids=tokens).logits, dim=-1)
    wanted = table[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs[:, 1:], torch.where(mask[:, 1:], wanted, 0.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "spread"), [(64, 0.08), (1024, 0.02), (4096, 0.02)])
def test_random_weights_are_wider_in_narrow_models(width: int, spread: float) -> None:
    assert models.initial_spread(width) == pytest.approx(spread)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_new_model_is_drawn_with_that_spread(architecture: str) -> None:
    scale = replace(smoke().scale, architecture=architecture, width=64, feed_forward=256)
    lm = models.new_causal_lm(scale, 200, 0, 0.0, 1, 0)
    matrices = [p for name, p in lm.named_parameters() if p.dim() == 2 and ".layers." in name]
    assert float(torch.cat([p.flatten() for p in matrices]).std()) == pytest.approx(models.initial_spread(64), rel=0.05)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_model_that_is_drawn_parameter_by_parameter_is_written_in_files_and_distributed_as_any_new_one(
    architecture: str, tmp_path: Path
) -> None:
    scale = replace(smoke().scale, architecture=architecture, width=64, feed_forward=256)
    given = (scale, 200, 7, 0.0, END, PAD)
    undrawn = models.undrawn_causal_lm(*given)
    assert all(parameter.is_meta for parameter in undrawn.parameters())
    models.write_unfilled(undrawn, tmp_path / "one", 100_000)
    models.write_unfilled(models.undrawn_causal_lm(*given), tmp_path / "again", 10**9)
    one, again = (load_causal_lm(str(tmp_path / name)).state_dict() for name in ("one", "again"))
    assert len(list((tmp_path / "one").glob("model-*.safetensors"))) > 1 and (tmp_path / "again" / "model.safetensors").exists()
    for name, tensor in new_causal_lm(*given).state_dict().items():
        assert torch.equal(one[name], again[name])
        assert float(one[name].std() if tensor.numel() > 1 else 0) == pytest.approx(float(tensor.std()), rel=0.15, abs=1e-6)
        assert float(one[name].mean()) == pytest.approx(float(tensor.mean()), abs=0.01)
    same_shape = [tensor for name, tensor in one.items() if name.endswith("k_proj.weight")]
    assert not torch.equal(same_shape[0], same_shape[1])
