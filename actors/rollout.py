"""Rollout engines: they sample replies. The protocol, and its implementation on transformers.

A sample's randomness is one uniform number per position, drawn by a counter-based generator keyed by (seed, step, prompt, sample), and
a token is the inverse of the cumulative distribution at that number. So a sample does not depend on its batch, its rank or the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from actors.batch import Prompts, Rollouts
from actors.models import load_causal_lm
from actors.rank import off_device
from actors.weight_sync import Arrivals, WeightUpdate, unpack
from actors.worker import Worker

COMPACT_SHARE = 0.25
"""Share of ended replies at which they leave the batch: copying the cache for each one would cost more than carrying a few along."""


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn."""

    temperature: float
    """0: always the likeliest token."""
    max_new_tokens: int
    seed: int
    step: int


class RolloutEngine(Protocol):
    """What samples: transformers here, other engines behind the same two calls."""

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollouts: ...

    def load_weights(self, weights: dict[str, Tensor], version: int | None) -> None:
        """Replace some weights, named as in the policy's `LanguageModel`. With the last of them comes the version that replies are of from
        then on; None while more are to come."""

    def to(self, device: torch.device) -> None:
        """Move the weights."""


class Rollout(Worker):
    """One rollout rank: an engine, its weights, and the end-of-turn token it stops at."""

    def load(self) -> None:
        lm = load_causal_lm(self.checkpoint)
        end = lm.generation_config.eos_token_id
        end = int(end[0] if isinstance(end, list) else end)  # chat models may list several; the first is the turn's end
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.engine: RolloutEngine = TransformersEngine(lm, end, self.device)
        self.asleep = False
        self.arrivals = Arrivals()

    def generate(self, pieces: list[Prompts], sampling: Sampling) -> list[Rollouts]:
        """Replies to all pieces, sampled in batches of similar prompt length and given back in the same pieces."""
        self._check_awake()
        prompts = Prompts.join(pieces)
        order = prompts.lengths.argsort(stable=True)
        batches = [prompts.select(rows).trimmed() for rows in order.split(self.config.engine.rollout_batch)]
        rollouts = Rollouts.join([self.engine.generate(batch, sampling) for batch in batches]).select(order.argsort())
        sizes = [len(piece) for piece in pieces]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [rollouts.select(slice(start, start + size)).trimmed() for start, size in zip(starts, sizes, strict=True)]

    def reload(self, checkpoint: str) -> None:
        """Sample from other weights of the same shape from now on."""
        self.checkpoint = checkpoint
        self.load()

    @off_device
    def load_weights(self, update: WeightUpdate) -> int:
        """Take over a bucket of the policy's weights; returns their version. All buckets of a version must come, in order. A sleeping
        engine takes them where it sleeps: waking for each bucket would move the whole model to the device and back.

        Raises:
            ValueError: this is not the bucket that was due.
        """
        self.arrivals.check(update)
        self.engine.load_weights(unpack(update), update.version if update.last() else None)
        return update.version

    def sleep(self) -> None:
        self.engine.to(torch.device("cpu"))
        self.asleep = True

    def wake(self) -> None:
        self.engine.to(self.device)
        self.asleep = False

    def _check_awake(self) -> None:
        if self.asleep:
            raise RuntimeError("this rollout engine sleeps: whoever lets roles work in turns (placement.sleep) must wake it first")


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


def assemble(prompts: Prompts, replies: Tensor, logprobs: Tensor, counts: Tensor, finished: Tensor, version: int) -> Rollouts:
    """Prompts and [B, N] replies as right-padded `Rollouts`."""
    lengths = prompts.lengths + counts
    width = int(lengths.max())
    columns = torch.arange(width)[None, :].expand(len(prompts), width)
    offset = columns - prompts.lengths[:, None]
    mask = (offset >= 0) & (columns < lengths[:, None])
    at = offset.clamp(0, replies.shape[1] - 1)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    shared = min(width, prompts.tokens.shape[1])
    inside = columns[:, :shared] < prompts.lengths[:, None]
    tokens[:, :shared] = torch.where(inside, prompts.tokens[:, :shared], 0)
    return Rollouts(
        tokens=torch.where(mask, replies.gather(1, at), tokens),
        lengths=lengths,
        mask=mask,
        behaviour=torch.where(mask, logprobs.gather(1, at), torch.zeros(())),
        finished=finished,
        keys=prompts.keys,
        version=torch.full((len(prompts),), version),
    )
