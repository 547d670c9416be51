from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.models import LanguageModel
from actors.weight_sync import pack, unpack
from tests.fakes import floats, quickly, tiny_lm


@quickly
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5), version=st.integers(0, 9))
def test_unpacking_gives_back_names_shapes_and_numbers(shapes: list[list[int]], version: int) -> None:
    weights = {f"layer.{n}": floats(n, *shape, dtype=torch.float32) for n, shape in enumerate(shapes)}
    update = pack(weights, version)
    found = unpack(update)
    assert update.version == version
    assert list(found) == list(weights)
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor)
        assert found[name].shape == tensor.shape


def test_a_packed_update_keeps_its_numbers_when_the_model_learns_on() -> None:
    model = LanguageModel(tiny_lm())
    update = pack(model.state_dict(), 1)
    before = update.flat.copy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert np.array_equal(update.flat, before)


def test_the_array_may_be_read_only_and_writing_to_unpacked_weights_leaves_it_alone() -> None:
    update = pack({"w": torch.ones(3)}, 1)
    update.flat.setflags(write=False)
    unpack(update)["w"].add_(1)
    assert update.flat.tolist() == [1.0, 1.0, 1.0]


def test_bf16_weights_arrive_as_the_same_numbers_in_float32() -> None:
    weights = {"w": floats(0, 5).bfloat16()}
    found = unpack(pack(weights, 0))["w"]
    assert found.dtype == torch.float32
    assert torch.equal(found, weights["w"].float())
