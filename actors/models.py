"""The two kinds of networks: a causal language model that gives token log-probs, and one with a scalar head.

Both take [B, T] tokens padded on the right; positions count from each row's first token, or from each dialogue's where rows are packed
(packing.py). Padding is not computed at all where the model allows it (attention.py); elsewhere it stands after every token that counts,
so causal attention never sees it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedModel

from actors import checkpoint, lora
from actors.algorithms.logprobs import token_logprobs
from actors.attention import read
from actors.devices import own_device
from actors.weights import Gather, gather_from, plain_weights, save_tensors, save_transformer, under
from conf.sizes import Scale

HEAD_FILE = "scalar_head.safetensors"


SHORT_CONTEXT = 512
"""Up to here plain attention is the faster kernel on CPUs (BENCHMARKS.md)."""


def attention(context: int) -> str:
    """The attention kernel: on CPUs the fused one's backward pass is slower than plain matrix products while sequences are short."""
    return "eager" if own_device().type == "cpu" and context <= SHORT_CONTEXT else "sdpa"


def _attention_of(config: PretrainedConfig) -> str:
    return attention(int(getattr(config, "max_position_embeddings", SHORT_CONTEXT + 1)))


def initial_spread(width: int) -> float:
    """Standard deviation of random weights: GPT-2's 0.02 from a width of 1024 on, and wider for narrower models, as 1 / sqrt(width).

    At 0.02 a narrow model's attention starts so flat that its first few hundred steps are slow (BENCHMARKS.md).
    """
    return max(0.02, 0.64 / math.sqrt(width))


def shape_config(scale: Scale, vocabulary: int, dropout: float = 0.0, end: int | None = None, pad: int | None = None):
    """The transformers configuration of a rung of the ladder."""
    special: dict[str, Any] = {"eos_token_id": end, "pad_token_id": pad, "bos_token_id": None}
    if scale.architecture == "llama":
        return LlamaConfig(
            vocab_size=vocabulary, hidden_size=scale.width, num_hidden_layers=scale.layers, num_attention_heads=scale.heads,
            num_key_value_heads=scale.heads, intermediate_size=scale.feed_forward, max_position_embeddings=scale.context,
            tie_word_embeddings=True, attention_dropout=dropout, initializer_range=initial_spread(scale.width), **special,
        )  # fmt: skip
    return OPTConfig(
        vocab_size=vocabulary, hidden_size=scale.width, num_hidden_layers=scale.layers, num_attention_heads=scale.heads,
        ffn_dim=scale.feed_forward, max_position_embeddings=scale.context, word_embed_proj_dim=scale.embedding or scale.width,
        do_layer_norm_before=not scale.post_layer_norm, dropout=dropout, attention_dropout=dropout,
        init_std=initial_spread(scale.width), **special,
    )  # fmt: skip


def new_causal_lm(scale: Scale, vocabulary: int, seed: int, dropout: float, end: int, pad: int) -> PreTrainedModel:
    """A causal LM with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    shape = shape_config(scale, vocabulary, dropout, end, pad)
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation=attention(scale.context))


def undrawn_causal_lm(scale: Scale, vocabulary: int, seed: int, dropout: float, end: int, pad: int) -> PreTrainedModel:
    """The same without storage: each parameter is drawn when it is asked for, from `seed` and its place. The numbers are as random as
    those of `new_causal_lm`, and others, since those are drawn in one go."""
    with checkpoint.without_storage():
        lm = new_causal_lm(scale, vocabulary, seed, dropout, end, pad)
    lm.tie_weights()
    for place, (name, parameter) in enumerate(lm.named_parameters()):
        parameter.stored = Drawn(lm, name, hash((seed, place)) % 2**63)  # type: ignore[attr-defined]
    return lm


@dataclass(frozen=True)
class Drawn:
    """A parameter that has not been drawn yet."""

    lm: PreTrainedModel
    name: str
    seed: int

    @torch.no_grad()
    def whole(self) -> Tensor:
        owner, _, own = self.name.rpartition(".")
        module = self.lm.get_submodule(owner)
        empty = module._parameters[own]
        assert empty is not None
        module._parameters[own] = nn.Parameter(torch.empty(empty.shape, dtype=empty.dtype))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.lm._init_weights(module)  # the others of the module have no storage, so that nothing happens to them
        drawn, module._parameters[own] = module._parameters[own], empty
        assert drawn is not None
        return drawn.detach()


def write_unfilled(lm: PreTrainedModel, folder: Path, limit: int) -> None:
    """Write a model whose parameters have no storage, one tensor in memory at a time."""
    tensors: dict[str, Any] = {**dict(lm.named_parameters()), **dict(lm.named_buffers())}

    def gather(name: str) -> Tensor:
        found = tensors[name]
        return found.stored.whole() if found.is_meta else found

    save_transformer(lm, plain_weights(lm), gather, folder, limit)


def load_causal_lm(path: str, dropout: float = 0.0, unfilled: bool = False) -> PreTrainedModel:
    """A Hugging Face causal LM in float32 with every dropout of its configuration set.

    Args:
        unfilled: its parameters have no storage, and know where theirs is stored (`checkpoint.py`); for ZeRO stage 3.

    Raises:
        OSError: nothing loadable stands at `path`.
    """
    config = AutoConfig.from_pretrained(path)
    for name in ("dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    return load_transformer(AutoModelForCausalLM, path, config, unfilled)


def load_transformer(auto: Any, path: str, config: PretrainedConfig, unfilled: bool) -> PreTrainedModel:
    """A transformer in float32 by one of transformers' automatic classes."""
    kernel = _attention_of(config)
    if unfilled:
        return checkpoint.load_unfilled(auto, path, config, kernel)
    return auto.from_pretrained(path, config=config, dtype=torch.float32, attn_implementation=kernel)


class LanguageModel(nn.Module):
    """A causal LM whose forward gives log-probs of the tokens that are there, not logits of all that could be."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self, tokens: Tensor, mask: Tensor, temperature: float = 1.0, lengths: Tensor | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of `tokens` and entropies of their distributions, nats.

        Args:
            tokens: [B, T] long, right-padded.
            mask: [B, T] bool, the tokens wanted; logits are made for these positions only.
            temperature: divides the logits, as when sampling.
            lengths: [B] long; what lies behind is not computed. None: every row is full.
            position_ids: [B, T] long of packed rows: 0 where a dialogue begins. None: each row is one dialogue.

        Returns:
            Two [B, T] float32 tensors, 0 outside the mask and at each dialogue's first token.

        Raises:
            ValueError: packed rows for a model that cannot keep their dialogues apart.
        """
        places = positions(tokens) if position_ids is None else position_ids
        mask = mask & (places > 0)  # nothing stands before a first token to predict it from
        hidden = read(self.lm.base_model, tokens, lengths, position_ids)
        picked, targets = hidden[:, :-1][mask[:, 1:]], tokens[:, 1:][mask[:, 1:]]
        head = self.lm.get_output_embeddings()
        # read here, in this module's forward: so ZeRO-3 gathers the weight for the whole of it, once, and knows to do so in the backward
        logprobs, entropy = token_logprobs(picked, head.weight, head.bias, targets, temperature)
        empty = torch.zeros(tokens.shape, device=tokens.device)
        return empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropy)


def positions(tokens: Tensor) -> Tensor:
    """[B, T] position of each token in its row."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


class ScalarModel(nn.Module):
    """A transformer with one number per token: the reward model (read at the last token) and the critic (read before each)."""

    def __init__(self, backbone: PreTrainedModel, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        config = backbone.config
        # OPT-350m projects its last layer down to the embedding's width
        width = getattr(config, "word_embed_proj_dim", config.hidden_size)
        self.head = nn.Linear(width, 1)
        generator = torch.Generator().manual_seed(seed)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():  # Stiennon et al. (2009.01325): N(0, 1 / sqrt(d + 1)) keeps first scores near 0
            self.head.weight.copy_(torch.randn(1, width, generator=generator) / math.sqrt(width + 1))

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, T] long -> [B, T] float32: the head's output after reading each token.

        Args:
            lengths: [B] long; what lies behind is not computed, and gives the head's bias. None: every row is full.
        """
        return self.head(read(self.backbone, tokens, lengths))[..., 0].float()

    def scores(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[B]: the output after the last token of each row."""
        return at_last(self(tokens, lengths), lengths)


def at_last(outputs: Tensor, lengths: Tensor) -> Tensor:
    """[B, T], [B] -> [B]: each row's value at its last token."""
    return outputs.gather(1, (lengths - 1)[:, None])[:, 0]


def before_each(outputs: Tensor, mask: Tensor) -> Tensor:
    """[B, T] outputs after each token -> [B, T] outputs of the state before it, 0 outside the mask."""
    shifted = torch.zeros_like(outputs)
    shifted[:, 1:] = outputs[:, :-1]
    return torch.where(mask, shifted, torch.zeros_like(shifted))


def load_scalar_model(path: str, seed: int, unfilled: bool = False) -> ScalarModel:
    """A `ScalarModel` as `save_model` left it, or, from a causal LM's folder, one with a fresh head.

    Args:
        unfilled: as in `load_causal_lm`; the head is real.
    """
    head = Path(path) / HEAD_FILE
    if head.exists():
        model = ScalarModel(load_transformer(AutoModel, path, AutoConfig.from_pretrained(path), unfilled), seed)
        model.head.load_state_dict(load_file(head))
        return model
    return ScalarModel(load_causal_lm(path, unfilled=unfilled).base_model, seed)  # type: ignore[arg-type]


def save_model(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Write Hugging Face files of either kind of network into `folder`, from a state dict that is whole."""
    write_model(module, gather_from(state), folder, sys.maxsize)


def write_model(module: nn.Module, gather: Gather, folder: Path | None, limit: int) -> None:
    """Write Hugging Face files of either kind of network, one tensor in memory at a time; adapters are merged into the weights they belong
    to, and a language model's also lies beside them. Every rank must call.

    Args:
        gather: gives the module's tensors, whole, by name.
        folder: None on ranks that do not write.
        limit: bytes at which weights go on in another file.
    """
    weights = plain_weights(module)
    if isinstance(module, LanguageModel):
        save_transformer(module.lm, under("lm.", weights), gather, folder, limit)
        lora.save_adapter(module.lm, lambda name: gather(f"lm.{name}"), folder / lora.FOLDER if folder else None)
        return
    assert isinstance(module, ScalarModel)
    save_transformer(module.backbone, under("backbone.", weights), gather, folder, limit)
    save_tensors(under("head.", weights), gather, folder / HEAD_FILE if folder else None)
