"""Variable-length flash attention beside padded rows, in bf16 on CUDA. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from actors.attention import remove_padding
from tests.fakes import dialogues
from tests.unit.test_attention import DECODERS, causal_lm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", ["llama", "llama, grouped queries", "opt"])
def test_without_padding_log_probs_and_gradients_are_those_of_padded_rows_to_the_roundings_of_bf16(name: str) -> None:
    model, rows = causal_lm(DECODERS[name], "sdpa").to("cuda", torch.bfloat16), dialogues(0, 7).to(torch.device("cuda"))
    found = []
    for lengths in (None, rows.lengths):
        if lengths is not None:
            assert remove_padding(model)
        model.zero_grad()
        logprobs, _ = model(rows.tokens, rows.mask, 1.0, lengths)
        logprobs.sum().backward()
        gradients = torch.cat([p.grad.float().view(-1) for p in model.parameters() if p.grad is not None])
        found.append((logprobs.float(), gradients))
    (padded, slow), (unpadded, quick) = found
    torch.testing.assert_close(unpadded, padded, atol=0.3, rtol=0.05)
    assert torch.nn.functional.cosine_similarity(quick, slow, dim=0) > 0.99
