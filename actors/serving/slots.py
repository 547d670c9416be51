"""Key-value caches whose sequences come and go between two steps (continuous batching; Orca, Yu et al., OSDI 2022).

`LlamaSlots` computes Llama's steps itself, as `decoding.py` does for rollouts: there all sequences' next tokens lie at one place of the
cache, here each at its own, so nothing is padded. `ModuleSlots` calls any other model of transformers; its sequences end at the same
place of the cache and are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear as product
from torch.nn.functional import pad, rms_norm, silu
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from actors.batch import pad_rows
from actors.decoding import Layer, LlamaDecoder, is_plain_llama, left_padded


class Slots(Protocol):
    """Sequences side by side."""

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Further sequences, behind the others; [n, V] logits after their last tokens."""

    def step(self, tokens: Tensor) -> Tensor:
        """[B, V] logits after one more token for each sequence, [B]."""

    def leave(self, done: Sequence[bool]) -> list[int]:
        """Take out those that are done; the old places of the others, in their new order."""


def slots(lm: PreTrainedModel) -> Slots:
    """The fastest that there is for this model."""
    return LlamaSlots(lm) if is_plain_llama(lm) else ModuleSlots(lm)


class LlamaSlots(LlamaDecoder):
    """Cache [layer, key or value, sequence, head, place, width]; it grows to twice its size, and is given up when nobody is left."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(lm)
        self.device = next(lm.parameters()).device
        self.layers = [Layer(layer, self.epsilon) for layer in self.model.layers]
        self._forget()

    def _forget(self) -> None:
        self.lengths = torch.zeros(0, dtype=torch.long, device=self.device)
        self.cache = torch.zeros(len(self.layers), 2, 0, self.kv_heads, 0, self.width, dtype=self.lm.dtype, device=self.device)
        self._turn(0)

    def _turn(self, places: int) -> None:
        """Rotary angles for so many places."""
        positions = torch.arange(places, device=self.device)
        cosine, sine = self.model.rotary_emb(torch.zeros(1, dtype=self.lm.dtype, device=self.device), positions[None])
        half = self.width // 2
        self.cosine, self.sine = cosine[0], torch.cat([-sine[0, :, :half], sine[0, :, half:]], dim=-1)

    def _reserve(self, count: int, places: int) -> None:
        rows, width = self.cache.shape[2], self.cache.shape[4]
        if count <= rows and places <= width:
            return
        more_rows = max(count, 2 * rows) if count > rows else rows
        more_places = max(places, 2 * width) if places > width else width
        grown = torch.zeros(
            *self.cache.shape[:2], more_rows, self.kv_heads, more_places, self.width, dtype=self.lm.dtype, device=self.device
        )
        grown[:, :, :rows, :, :width] = self.cache
        self.cache = grown
        if more_places > width:
            self._turn(more_places)

    @torch.no_grad()
    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        tokens, lengths = pad_rows([list(prompt) for prompt in prompts])
        tokens, lengths = tokens.to(self.device), lengths.to(self.device)
        first, count = len(self.lengths), len(prompts)
        self._reserve(first + count, int(lengths.max()) + 1)
        cache = DynamicCache(config=self.lm.config)
        found = self.model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
        layers: Any = cache.layers
        for number, layer in enumerate(layers):
            for which, states in enumerate((layer.keys, layer.values)):
                self.cache[number, which, first : first + count, :, : tokens.shape[1]] = states
        self.lengths = torch.cat([self.lengths, lengths])
        return self._head(found[torch.arange(count, device=self.device), lengths - 1])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        count, until = len(tokens), int(self.lengths.max()) + 1
        self._reserve(count, until)
        x = self.model.embed_tokens.weight[tokens]
        cosine, sine = self.cosine[self.lengths][:, None], self.sine[self.lengths][:, None]
        unseen = torch.arange(until, device=self.device)[None, :] > self.lengths[:, None]
        hidden = torch.zeros(count, until, dtype=self.lm.dtype, device=self.device).masked_fill(unseen, float("-inf"))[:, None, None]
        rows, rotated, half = torch.arange(count, device=self.device), self.heads + self.kv_heads, self.width // 2
        for layer, cache in zip(self.layers, self.cache, strict=True):
            found = product(layer.before(x), layer.inputs).view(count, -1, self.width)
            turning = found[:, :rotated]
            swapped = torch.cat([turning[..., half:], turning[..., :half]], dim=-1)
            turned = torch.addcmul(turning * cosine, swapped, sine)
            cache[0, rows, :, self.lengths] = turned[:, self.heads :]
            cache[1, rows, :, self.lengths] = found[:, rotated:]
            seen = self._attended(turned[:, : self.heads], cache[0, :count, :, :until], cache[1, :count, :, :until], hidden)
            x = torch.addmm(x, seen.reshape(count, -1), layer.output)
            gate, up = product(layer.between(x), layer.gates).chunk(2, dim=-1)
            x = torch.addmm(x, silu(gate) * up, layer.down)
        self.lengths = self.lengths + 1
        return self._head(rms_norm(x, x.shape[-1:], self.model.norm.weight, self.epsilon))

    def leave(self, done: Sequence[bool]) -> list[int]:  # type: ignore[override]  # a list here, and always worth it
        left = done.count(False) if isinstance(done, list) else sum(not d for d in done)
        if not left:
            self._forget()
            return []
        stay = list(range(len(done)))
        holes = [row for row in range(left) if done[row]]
        movers = [row for row in range(left, len(done)) if not done[row]]
        if holes:
            self.cache[:, :, holes] = self.cache[:, :, movers]
            for hole, mover in zip(holes, movers, strict=True):
                stay[hole] = mover
        self.lengths = self.lengths[torch.tensor(stay[:left], device=self.device)]
        return stay[:left]


class ModuleSlots:
    """transformers' own forward pass and cache.

    Raises:
        ValueError: the model's cache is not one of plain keys and values (sliding windows, states), which cannot be put together.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self.device = next(lm.parameters()).device
        self.cache: Any = None
        if not all(type(layer) is DynamicLayer for layer in self._new_cache().layers):
            raise ValueError(f"{lm.config.model_type}: this model's cache is not of plain keys and values; choose serving=vllm")

    def _new_cache(self) -> Any:
        return DynamicCache(config=self.lm.config)

    @torch.no_grad()
    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        tokens, lengths = pad_rows([list(prompt) for prompt in prompts])
        tokens, attention = left_padded(tokens, lengths, int(lengths.max()))
        tokens, attention = tokens.to(self.device), attention.to(self.device)
        cache = self._new_cache()
        logits = self._logits(tokens, attention, cache, (attention.cumsum(dim=1) - 1).clamp(min=0))
        if self.cache is None:
            self.cache, self.attention = cache, attention
        else:
            width = max(self.attention.shape[1], attention.shape[1])
            for mine, other in zip(self.cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([_widened(mine.keys, width), _widened(other.keys, width)])
                mine.values = torch.cat([_widened(mine.values, width), _widened(other.values, width)])
            both = [pad(mask, (width - mask.shape[1], 0)) for mask in (self.attention, attention)]
            self.attention = torch.cat(both)
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        position = self.attention.sum(dim=1, keepdim=True)
        self.attention = torch.cat([self.attention, torch.ones_like(tokens[:, None])], dim=1)
        return self._logits(tokens[:, None], self.attention, self.cache, position)

    def _logits(self, tokens: Tensor, attention: Tensor, cache: Any, position: Tensor) -> Tensor:
        found = self.lm(tokens, attention_mask=attention, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1]

    def leave(self, done: Sequence[bool]) -> list[int]:
        stay = [row for row, ended in enumerate(done) if not ended]
        if not stay:
            self.cache = None
            return stay
        rows = torch.tensor(stay, device=self.device)
        attention = self.attention[rows]
        unused = int((attention.sum(dim=0) > 0).long().argmax())  # columns in which everyone who stays is padded
        self.attention = attention[:, unused:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows, :, unused:], layer.values[rows, :, unused:]
        return stay


def _widened(states: Tensor, width: int) -> Tensor:
    """[B, K, T, d] keys or values moved to the right edge of [B, K, width, d]."""
    return pad(states, (0, 0, width - states.shape[2], 0))
