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


def test_weights_of_several_types_arrive_in_their_own_from_an_array_that_cannot_be_written() -> None:
    weights = {"a": floats(0, 5).bfloat16(), "b": floats(1, 3, 2, dtype=torch.float32), "c": torch.arange(3), "d": floats(2, 7).bfloat16()}
    update = pack(weights, 1)
    update.flat.setflags(write=False)
    found = unpack(update)
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
