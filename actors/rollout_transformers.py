"""Replies sampled by transformers, token by token with a key-value cache.

A sample's randomness is one uniform number per position, drawn by a counter-based generator keyed by (seed, step, prompt, sample), and
a token is the inverse of the cumulative distribution at that number. So a sample does not depend on its batch, its rank or the runtime.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from actors.batch import Prompts, Rollouts
from actors.sampling import Sampling, assemble

COMPACT_SHARE = 0.25
"""Share of ended replies at which they leave the batch: copying the cache for each one would cost more than carrying a few along."""


class TransformersEngine:
    """A transformers model with a key-value cache; finished sequences leave the batch."""

    def __init__(self, lm: PreTrainedModel, end: int, device: torch.device, version: int = 0) -> None:
        module: Any = lm  # transformers' annotation of `to` is beyond type checkers
        self.lm = module.to(device).eval().requires_grad_(False)
        self.end, self.device, self.version = end, device, version
        self.due = self._names()

    def _names(self) -> set[str]:
        """Of every parameter, tied ones once."""
        return {name for name, _ in self.lm.named_parameters()}

    def to(self, device: torch.device) -> None:
        module: Any = self.lm
        module.to(device)
        self.device = device

    def places(self) -> dict[str, Tensor]:
        """The weights themselves, by the policy's names: what is written there is in place, and `load_weights` is told so with these very
        tensors."""
        return {f"lm.{name}": tensor for name, tensor in self.lm.state_dict(keep_vars=True).items()}

    def load_weights(self, weights: dict[str, Tensor], version: int | None) -> None:
        """Replace some weights, or with a version the last of them.

        Raises:
            RuntimeError: a name or shape differs from the model's, or with the last some have not come.
        """
        named = {name.removeprefix("lm."): tensor for name, tensor in weights.items()}
        unknown = self.lm.load_state_dict(named, strict=False).unexpected_keys
        self.due -= named.keys()
        if unknown or (version is not None and self.due):
            raise RuntimeError(f"these are another model's weights: Unexpected keys {unknown}, Missing keys {sorted(self.due)}")
        if version is not None:
            self.due, self.version = self._names(), version

    @torch.no_grad()
    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """One reply for each prompt, ending with the end-of-turn token unless the length limit comes first.

        Raises:
            ValueError: a prompt leaves no room for a reply in the model's context.
        """
        limit = self._room(prompts, sampling.max_new_tokens)
        noise = uniforms(prompts.keys, sampling, limit).to(self.device)
        replies, logprobs, counts, finished = self._sample(prompts.to(self.device), noise, sampling.temperature, limit)
        return assemble(prompts, replies.cpu(), logprobs.cpu(), counts.cpu(), finished.cpu(), self.version)

    def _room(self, prompts: Prompts, wanted: int) -> int:
        context = getattr(self.lm.config, "max_position_embeddings", None)
        longest = int(prompts.lengths.max())
        if context is not None and longest + wanted > context:
            raise ValueError(
                f"a prompt of {longest} tokens and a reply of {wanted} exceed the model's context of {context}: "
                "lower max_new_tokens, shorten the prompts, or choose a larger scale.context"
            )
        return wanted

    def _sample(self, prompts: Prompts, noise: Tensor, temperature: float, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loop over positions. `rows` are those in the batch, `done` marks the ones among them that have ended."""
        count, width = len(prompts), int(prompts.lengths.max())
        replies = torch.zeros(count, limit, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(count, limit, device=self.device)
        counts = torch.zeros(count, dtype=torch.long, device=self.device)
        finished = torch.zeros(count, dtype=torch.bool, device=self.device)
        tokens, attention = left_padded(prompts.tokens, prompts.lengths, width)
        position = (attention.cumsum(dim=1) - 1).clamp(min=0)
        rows, cache = torch.arange(count, device=self.device), DynamicCache(config=self.lm.config)
        done = torch.zeros_like(finished)
        for t in range(limit):
            output = self.lm(
                tokens, attention_mask=attention, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            chosen, chosen_logprobs = choose(output.logits[:, -1].float(), noise[rows, t], temperature)
            live = rows[~done]
            replies[live, t], logprobs[live, t], counts[live] = chosen[~done], chosen_logprobs[~done], t + 1
            done = done | (chosen == self.end)
            finished[rows[done]] = True
            if bool(done.all()):
                break
            tokens, position = chosen[:, None], position[:, -1:] + 1
            attention = torch.cat([attention, torch.ones_like(tokens)], dim=1)
            if float(done.float().mean()) >= COMPACT_SHARE:
                stay = (~done).nonzero()[:, 0]
                cache.batch_select_indices(stay)
                rows, tokens, position, attention = rows[stay], tokens[stay], position[stay], attention[stay]
                done = torch.zeros_like(rows, dtype=torch.bool)
        return replies, logprobs, counts, finished


def choose(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token for each row of [B, V] logits, and its log-prob at that temperature (at 1 when greedy); noise [B] in [0, 1)."""
    if temperature == 0:
        chosen = logits.argmax(dim=-1)
        return chosen, torch.log_softmax(logits, dim=-1).gather(-1, chosen[:, None])[:, 0]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)  # double: in float32 the tail of a large vocabulary is lost
    chosen = torch.searchsorted(cumulative, noise.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
    chosen = chosen.clamp(max=logits.shape[1] - 1)
    return chosen, logprobs.gather(-1, chosen[:, None])[:, 0]


def uniforms(keys: Tensor, sampling: Sampling, count: int) -> Tensor:
    """[B, count] numbers in [0, 1), each row a function of (seed, step, prompt, sample) alone."""
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((sampling.seed, sampling.step, prompt, sample)))).random(count)
        for prompt, sample in keys.tolist()
    ]
    return torch.from_numpy(np.stack(rows))


def left_padded(tokens: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Right-padded [B, T] rows moved to the right edge of [B, width], with their attention mask (long)."""
    columns = torch.arange(width, device=tokens.device)[None, :] - (width - lengths)[:, None]
    attention = columns >= 0
    return torch.where(attention, tokens.gather(1, columns.clamp(min=0)), 0), attention.long()
