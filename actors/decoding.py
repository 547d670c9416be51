"""One token after another from a key-value cache: how the transformers engine asks its model for logits.

`LlamaDecoder` computes the steps itself for models of Llama's form: small models spend most of a step in Python and in launching kernels,
and transformers' own step is three times as many of them. Its cache is allocated once. `ModuleDecoder` calls any other model.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import DynamicCache, PreTrainedModel

from actors.batch import Prompts
from actors.micro_batches import Limit, planned

COMPACT_SHARE = 0.25
"""Share of ended replies at which they leave a `ModuleDecoder`'s batch: copying its cache for each one costs more than carrying a few."""


class Decoder(Protocol):
    """A batch of sequences that grow by a token at a time."""

    def start(self, prompts: Prompts, room: int) -> Tensor:
        """[B, V] logits after each prompt; `room` steps at most will follow."""

    def step(self, tokens: Tensor) -> Tensor:
        """[n, V] logits after one more token for each of the n sequences, [n]."""

    def leave(self, done: Tensor) -> Tensor | None:
        """Take sequences that have ended, [n] bool and not all, out of the batch: the old places of those that stay, in their new order.
        None: it is not worth it yet, and they go on with the others."""


def decoder(lm: PreTrainedModel) -> Decoder:
    """The fastest that there is for this model."""
    return LlamaDecoder(lm) if is_plain_llama(lm) else ModuleDecoder(lm)


def is_plain_llama(lm: PreTrainedModel) -> bool:
    """Whether `LlamaDecoder` computes what this model does: no biases, SiLU, rotary angles that depend on the position alone."""
    config: Any = lm.config
    if config.model_type != "llama" or config.hidden_act != "silu" or lm.get_output_embeddings().bias is not None:
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    return not (config.attention_bias or config.mlp_bias) and rope.get("rope_type", "default") in ("default", "linear", "llama3")


class ModuleDecoder:
    """transformers' own forward pass and cache; prompts are padded on the left."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm

    def start(self, prompts: Prompts, room: int) -> Tensor:
        self.cache = DynamicCache(config=self.lm.config)
        tokens, self.attention = left_padded(prompts.tokens, prompts.lengths, int(prompts.lengths.max()))
        self.position = (self.attention.cumsum(dim=1) - 1).clamp(min=0)
        return self._logits(tokens)

    def step(self, tokens: Tensor) -> Tensor:
        self.position = self.position[:, -1:] + 1
        self.attention = torch.cat([self.attention, torch.ones_like(tokens[:, None])], dim=1)
        return self._logits(tokens[:, None])

    def _logits(self, tokens: Tensor) -> Tensor:
        found = self.lm(
            tokens, attention_mask=self.attention, position_ids=self.position, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return found.logits[:, -1]

    def leave(self, done: Tensor) -> Tensor | None:
        if float(done.float().mean()) < COMPACT_SHARE:
            return None
        stay = (~done).nonzero()[:, 0]
        self.cache.batch_select_indices(stay)
        self.attention, self.position = self.attention[stay], self.position[stay]
        return stay


class LlamaDecoder:
    """Llama's forward pass for one token of each sequence.

    The cache is [layer, key or value, sequence, head, place, width]. A prompt's tokens are at its beginning, all sequences' next tokens
    at the same place after the longest prompt; what lies between is masked. Sequences that end are overwritten by the last ones.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        config: Any = lm.config
        self.lm = lm
        self.model: Any = lm.base_model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.epsilon: float = config.rms_norm_eps

    def start(self, prompts: Prompts, room: int) -> Tensor:
        count, self.place = len(prompts), int(prompts.lengths.max())
        shape = (len(self.model.layers), 2, count, self.kv_heads, self.place + room, self.width)
        # zeros: what is masked is multiplied by 0, which numbers left in memory need not survive
        self.cache = torch.zeros(shape, dtype=self.lm.dtype, device=prompts.tokens.device)
        self.position = prompts.lengths.clone()
        self.hidden_places = self._padding(prompts.lengths, room)
        last = torch.empty(count, self.lm.config.hidden_size, dtype=self.lm.dtype, device=prompts.tokens.device)
        for index in planned(prompts, Limit(count)):
            last[index] = self._read(prompts.select(index).trimmed(), index)
        places = torch.arange(int(prompts.lengths.max()) + room, device=last.device)
        cosine, sine = self.model.rotary_emb(last, places[None])
        half = self.width // 2
        self.cosine, self.sine = cosine[0], torch.cat([-sine[0, :, :half], sine[0, :, half:]], dim=-1)
        self.layers = [Layer(layer, self.epsilon) for layer in self.model.layers]
        return self._head(last)

    def _padding(self, lengths: Tensor, room: int) -> Tensor:
        """[B, 1, 1, T] to add to attention's scores: 0 at tokens, -inf between a prompt and the replies."""
        places = torch.arange(self.place + room, device=lengths.device)[None, :]
        padded = (places >= lengths[:, None]) & (places < self.place)
        zeros = torch.zeros(padded.shape, dtype=self.lm.dtype, device=lengths.device)
        return zeros.masked_fill(padded, float("-inf"))[:, None, None]

    def _read(self, prompts: Prompts, index: Tensor) -> Tensor:
        """Fill the cache of some sequences; [b, D] after their last tokens."""
        cache = DynamicCache(config=self.lm.config)
        found = self.model(input_ids=prompts.tokens, past_key_values=cache, use_cache=True).last_hidden_state
        layers: Any = cache.layers
        for number, layer in enumerate(layers):
            for which, states in enumerate((layer.keys, layer.values)):
                self.cache[number, which, index, :, : prompts.tokens.shape[1]] = states
        return found[torch.arange(len(prompts), device=found.device), prompts.lengths - 1]

    def _head(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.lm.get_output_embeddings().weight)

    def step(self, tokens: Tensor) -> Tensor:
        count, until = len(tokens), self.place + 1
        x = self.model.embed_tokens.weight[tokens]
        cosine, sine = self.cosine[self.position][:, None], self.sine[self.position][:, None]
        padding, rotated, half = self.hidden_places[:, :, :, :until], self.heads + self.kv_heads, self.width // 2
        for layer, cache in zip(self.layers, self.cache, strict=True):
            found = linear(layer.before(x), layer.inputs).view(count, -1, self.width)
            turning = found[:, :rotated]
            swapped = torch.cat([turning[..., half:], turning[..., :half]], dim=-1)
            turned = torch.addcmul(turning * cosine, swapped, sine)
            keys, values = cache[0, :count], cache[1, :count]
            keys[:, :, self.place] = turned[:, self.heads :]
            values[:, :, self.place] = found[:, rotated:]
            seen = self._attended(turned[:, : self.heads], keys[:, :, :until], values[:, :, :until], padding)
            x = torch.addmm(x, seen.reshape(count, -1), layer.output)
            gate, up = linear(layer.between(x), layer.gates).chunk(2, dim=-1)
            x = torch.addmm(x, silu(gate) * up, layer.down)
        self.place, self.position = until, self.position + 1
        return self._head(rms_norm(x, x.shape[-1:], self.model.norm.weight, self.epsilon))

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, padding: Tensor) -> Tensor:
        """[n, H, d] queries, [n, K, T, d] keys and values -> [n, K, H / K, d]: each head of a group of H / K reads the same keys."""
        grouped = queries.unflatten(1, (self.kv_heads, -1))
        if queries.is_cuda:
            return scaled_dot_product_attention(grouped, keys, values, padding)
        scores = (grouped @ keys.transpose(2, 3)).mul_(self.width**-0.5).add_(padding)  # on CPUs half the fused kernel's time for one token
        return scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values

    def leave(self, done: Tensor) -> Tensor | None:
        stay = torch.arange(len(done), device=done.device)
        left = int((~done).sum())
        holes, movers = stay[:left][done[:left]], stay[left:][~done[left:]]
        if len(holes):
            self.cache[:, :, holes, :, : self.place] = self.cache[:, :, movers, :, : self.place]
            stay[holes] = movers
        stay = stay[:left]
        self.position, self.hidden_places = self.position[stay], self.hidden_places[stay]
        return stay


class Layer:
    """A block's weights as the products want them."""

    def __init__(self, layer: Any, epsilon: float) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norms, self.epsilon = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight), epsilon
        self.inputs = joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gates = joined([mlp.gate_proj, mlp.up_proj])
        self.output, self.down = attention.o_proj.weight.T, mlp.down_proj.weight.T

    def before(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.norms[0], self.epsilon)

    def between(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.norms[1], self.epsilon)


def joined(modules: list[nn.Linear]) -> Tensor:
    """The weights of some layers below each other, without a copy once they lie so: from the first call on, they are parts of one tensor,
    which later writes to them go into. Whoever replaces their storage (`Module.to`) makes the next call join them again."""
    weights = [module.weight for module in modules]
    rows, width = sum(len(weight) for weight in weights), weights[0].shape[1]
    whole = weights[0].data.as_strided((rows, width), (width, 1)) if _adjacent(weights) else torch.cat([w.data for w in weights])
    start = 0
    for weight in weights:
        weight.data = whole[start : start + len(weight)]
        start += len(weight)
    return whole


def _adjacent(weights: list[Tensor]) -> bool:
    """Whether they lie below each other in one storage."""
    storage, due = weights[0].untyped_storage().data_ptr(), weights[0].data_ptr()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.data_ptr() != due or not weight.is_contiguous():
            return False
        due += weight.numel() * weight.element_size()
    return True


def left_padded(tokens: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Right-padded [B, T] rows moved to the right edge of [B, width], with their attention mask (long)."""
    columns = torch.arange(width, device=tokens.device)[None, :] - (width - lengths)[:, None]
    attention = columns >= 0
    return torch.where(attention, tokens.gather(1, columns.clamp(min=0)), 0), attention.long()
