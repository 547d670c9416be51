"""A cached, left-padded generation and a whole, right-padded forward pass are the same model: the side and amount of padding, the cache,
and who else is in the batch change no log-prob."""

from __future__ import annotations

import pytest
import torch

from actors.batch import Prompts, Rollouts
from actors.decoding import left_padded
from actors.models import LanguageModel
from actors.rollout_transformers import TransformersEngine
from actors.sampling import Sampling
from tests.fakes import END, sequences, tiny_lm

CPU = torch.device("cpu")


def prompts(rows: int) -> Prompts:
    tokens, lengths, _ = sequences(11, rows, shortest=2, longest=17)
    return Prompts(tokens, lengths, torch.stack([torch.arange(rows), torch.zeros(rows, dtype=torch.long)], dim=1))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch", [1, 4, 12])
def test_generation_with_a_cache_equals_the_whole_forward_whatever_the_batch(temperature: float, batch: int) -> None:
    engine, asked = TransformersEngine(tiny_lm(), END, CPU), prompts(12)
    found = Rollouts.join([engine.generate(part.trimmed(), Sampling(temperature, 10, 0, 0)) for part in asked.split(batch)])
    with torch.no_grad():
        whole, _ = LanguageModel(tiny_lm())(found.tokens, found.mask, temperature)
    torch.testing.assert_close(found.behaviour, whole, atol=1e-5, rtol=1e-5)
    assert int(found.mask.sum()) > 30


@pytest.mark.parametrize("extra", [0, 3, 20])
def test_logits_of_left_padded_rows_are_those_of_right_padded_ones(extra: int) -> None:
    lm, asked = tiny_lm(), prompts(6)
    width = int(asked.lengths.max()) + extra
    tokens, attention = left_padded(asked.tokens, asked.lengths, width)
    places = (attention.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        left = torch.log_softmax(lm(tokens, attention_mask=attention, position_ids=places).logits, dim=-1)
        right, _ = LanguageModel(lm)(asked.tokens, torch.ones_like(asked.tokens, dtype=torch.bool))
    for n, length in enumerate(asked.lengths.tolist()):
        ids = asked.tokens[n, 1:length]
        found = left[n, width - length : -1].gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(found, right[n, 1:length], atol=1e-5, rtol=1e-5)
