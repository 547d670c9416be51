from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from actors import checkpoint
from actors.checkpoint import Stored, tensors_of, without_storage
from actors.models import LanguageModel, load_causal_lm, load_scalar_model, save_model
from actors.weight_sync import Arrivals, pack
from actors.weights import Weight, gather_from, grouped, plain_weights, save_tensors
from tests.fakes import VOCABULARY, floats, quickly, saved_lm, tiny_lm


@quickly
@given(shape=st.lists(st.integers(1, 5), max_size=3), data=st.data())
def test_a_slice_is_the_part_of_the_tensor_laid_out_flat(tmp_path_factory: pytest.TempPathFactory, shape: list[int], data) -> None:
    file = tmp_path_factory.mktemp("slice") / "x.safetensors"
    tensor = floats(0, *shape, dtype=torch.float32)
    save_file({"x": tensor}, file)
    stop = data.draw(st.integers(1, tensor.numel()))
    start = data.draw(st.integers(0, stop - 1))
    assert torch.equal(Stored(str(file), "x").flat(start, stop), tensor.reshape(-1)[start:stop])


def test_files_written_tensor_by_tensor_are_safetensors(tmp_path: Path) -> None:
    state = {
        "a": floats(0, 3, 2).float(),
        "b": floats(1, 5).bfloat16(),
        "c": torch.tensor(2.5),
        "d": torch.arange(3),
        "e": torch.zeros(0, 2),
    }
    weights = {name: Weight(tuple(tensor.shape), tensor.dtype, (name,)) for name, tensor in state.items()}
    save_tensors(weights, gather_from(state), tmp_path / "x.safetensors", {"k": "v"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in state.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "k": "v"}


def test_groups_keep_the_order_and_the_limit() -> None:
    weights = {name: Weight((size,), torch.float32, (name,)) for name, size in zip("abcde", (3, 2, 9, 1, 4), strict=True)}
    assert grouped(weights, 20) == [["a", "b"], ["c"], ["d", "e"]]
    assert grouped(weights, 10, item=2) == [["a", "b"], ["c"], ["d", "e"]]


def test_tied_weights_are_there_once_and_buffers_only_if_they_are_saved() -> None:
    model = LanguageModel(tiny_lm())
    model.register_buffer("kept", torch.ones(2))
    names = plain_weights(model).keys()
    assert "lm.model.embed_tokens.weight" in names and "lm.lm_head.weight" not in names
    assert "kept" in names and not any("inv_freq" in name for name in names)


def test_a_model_without_storage_knows_where_its_numbers_are(tmp_path: Path) -> None:
    empty = load_causal_lm(saved_lm(tmp_path), unfilled=True)
    plain = load_causal_lm(str(tmp_path))
    assert empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
    for name, parameter in plain.named_parameters():
        there = dict(empty.named_parameters())[name]
        assert there.is_meta and torch.equal(there.stored.whole(), parameter)
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(empty.named_buffers())[name], buffer)
    assert empty.generation_config.to_dict() == plain.generation_config.to_dict()
    assert empty.config._attn_implementation == plain.config._attn_implementation and not empty.training


def test_modules_made_afterwards_have_storage_again() -> None:
    with without_storage():
        assert nn.Linear(2, 2).weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_checkpoint_that_cannot_be_read_by_slices_is_refused_with_what_to_do(tmp_path: Path) -> None:
    saved_lm(tmp_path / "lm")
    (tmp_path / "lm" / "model.safetensors").rename(tmp_path / "lm" / "pytorch_model.bin")
    with pytest.raises(OSError, match="no safetensors files.*set engine.zero_stage=2"):
        load_causal_lm(str(tmp_path / "lm"), unfilled=True)
    other = tiny_lm()
    del other.model.layers[1]
    other.save_pretrained(tmp_path / "other")
    saved_lm(tmp_path / "whole")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "whole" / "model.safetensors")
    with pytest.raises(ValueError, match="layers.1.*not in the checkpoint; ZeRO stage 3"):
        load_causal_lm(str(tmp_path / "whole"), unfilled=True)


def test_shards_and_an_index_are_read_as_one_file_is(tmp_path: Path) -> None:
    tiny_lm().save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / checkpoint.INDEX).exists() and len(tensors_of(str(tmp_path))) == len(list(tiny_lm().parameters()))
    for name, parameter in load_causal_lm(str(tmp_path), unfilled=True).named_parameters():
        assert torch.equal(parameter.stored.whole(), dict(tiny_lm().named_parameters())[name])
    (next(tmp_path.glob("model-*"))).unlink()
    with pytest.raises(OSError, match="its index names"):
        tensors_of(str(tmp_path))


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen3MoeConfig])
def test_experts_that_a_checkpoint_keeps_one_by_one_are_read_as_the_model_stacks_them(kind: type, tmp_path: Path) -> None:
    experts = {"num_local_experts": 3} if kind is MixtralConfig else {"num_experts": 3, "moe_intermediate_size": 24}
    shape = kind(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_experts_per_tok=2, head_dim=8, **experts,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(tmp_path)
    assert not tensors_of(str(tmp_path)).keys() >= dict(model.named_parameters()).keys()  # they are stored under other names
    there = dict(load_causal_lm(str(tmp_path)).named_parameters())
    for name, parameter in load_causal_lm(str(tmp_path), unfilled=True).named_parameters():
        assert parameter.is_meta and torch.equal(parameter.stored.whole(), there[name]), name
        for start, stop in ((0, 1), (5, 9), (parameter.numel() // 2 - 3, parameter.numel())):
            assert torch.equal(parameter.stored.flat(start, stop), there[name].reshape(-1)[start:stop]), name
    for name, parameter in load_scalar_model(str(tmp_path), 3, unfilled=True).backbone.named_parameters():
        assert torch.equal(parameter.stored.whole(), there[f"model.{name}"]), name


def test_a_scalar_model_without_storage_has_a_real_head(tmp_path: Path) -> None:
    saved_lm(tmp_path)
    model = load_scalar_model(str(tmp_path), 3, unfilled=True)
    assert torch.equal(model.head.weight, load_scalar_model(str(tmp_path), 3).head.weight)
    assert all(parameter.is_meta for parameter in model.backbone.parameters())


def test_an_export_is_what_transformers_itself_would_write(tmp_path: Path) -> None:
    model = LanguageModel(tiny_lm())
    save_model(model, model.state_dict(), tmp_path / "ours")
    model.lm.save_pretrained(tmp_path / "theirs")
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {file.name for file in (tmp_path / "theirs").iterdir()}
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) is type(model.lm)


def test_buckets_must_come_in_order_and_of_one_version() -> None:
    arrivals = Arrivals()
    for version in (0, 5):
        for bucket in range(3):
            arrivals.check(pack({"w": torch.ones(1)}, version, bucket, 3))
    with pytest.raises(ValueError, match="bucket 1 of weights of version 6 came where bucket 0"):
        arrivals.check(pack({"w": torch.ones(1)}, 6, 1, 3))
    arrivals.check(pack({"w": torch.ones(1)}, 6, 0, 3))
    with pytest.raises(ValueError, match="of version 7 came where bucket 1 of version 6"):
        arrivals.check(pack({"w": torch.ones(1)}, 7, 1, 3))
