"""What README.md says of families of models: whose log-probs are the model's own, and whose are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from actors.models import LanguageModel

README = " ".join((Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8").split())
TOKENS, PROMPT = 10, 4
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma": {"head_dim": 8}, "gemma2": {"head_dim": 8}, "gemma3_text": {"head_dim": 8}, "qwen3": {"head_dim": 8},
    "cohere2": {"head_dim": 8}, "granite": {"logits_scaling": 8.0}, "mixtral": EXPERTS, "granitemoe": EXPERTS,
    "qwen3_moe": EXPERTS | {"head_dim": 8},
}  # fmt: skip
WINDOWED = ("recurrent_gemma",)
"""transformers has no fused attention for them."""


def named(start: str, end: str) -> list[str]:
    """Names in backticks of the stretch of README.md between two phrases."""
    found = re.search(f"{re.escape(start)}(.*?){re.escape(end)}", README)
    assert found, f"README.md says nothing between {start!r} and {end!r}"
    return [name for name in re.findall(r"`(\w+)`", found[1]) if name in CONFIG_MAPPING]


RIGHT = named("Whole runs have been made with", "**These are wrong")
WRONG = named("**These are wrong", "(and a `granitemoe`")


def difference(family: str) -> float:
    """Between our log-probs of a small random model and those of its own logits: the largest, in nats."""
    torch.manual_seed(0)
    shape = CONFIG_MAPPING[family](**SIZES, **OWN.get(family, {}))
    lm = AutoModelForCausalLM.from_config(shape, attn_implementation="eager" if family in WINDOWED else "sdpa").eval()
    tokens, mask = torch.randint(2, SIZES["vocab_size"], (2, TOKENS)), torch.arange(TOKENS).expand(2, -1) >= PROMPT
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(0, 0.2)  # large enough that a scale or a cap of the logits shows
        ours = LanguageModel(lm)(tokens, mask, lengths=torch.tensor([TOKENS, TOKENS]))[0]
        theirs = torch.log_softmax(lm(tokens).logits.float(), dim=-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return float((ours[:, 1:] - theirs)[mask[:, 1:]].abs().max())


def test_the_readme_names_families_of_both_kinds() -> None:
    assert {"llama", "opt", "qwen3"} <= {*RIGHT} and {"granite", "gemma2"} <= {*WRONG} and not {*RIGHT} & {*WRONG}


@pytest.mark.parametrize("family", RIGHT)
def test_log_probs_are_the_models_own(family: str) -> None:
    assert difference(family) < 1e-5


@pytest.mark.parametrize("family", WRONG)
def test_what_the_readme_calls_wrong_is_wrong_still(family: str) -> None:
    """Once it is right, it belongs among the others."""
    assert difference(family) > 1e-3
