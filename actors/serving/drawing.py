"""Tokens for rows that are each drawn in their own way: temperature, share of the distribution, and log-probs to tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.rollout_transformers import choose
from actors.serving.protocol import Drawing


def generator(drawing: Drawing) -> np.random.Generator:
    """One uniform number for each place of a reply, a function of its seed alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(abs(drawing.seed))))


def draw(logits: Tensor, drawings: Sequence[Drawing], noise: Sequence[float]) -> list[int]:
    """A token for each row of [B, V] logits; noise in [0, 1), one number for each row."""
    tokens = logits.argmax(dim=-1)
    sampled = [row for row, drawing in enumerate(drawings) if drawing.temperature > 0]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        temperature = torch.tensor([drawings[row].temperature for row in sampled], device=logits.device)
        scaled = logits[rows].float() / temperature[:, None]
        shares = torch.tensor([drawings[row].top_p for row in sampled], device=logits.device)
        if bool((shares < 1).any()):
            scaled = likeliest_share(scaled, shares)
        chosen, _ = choose(scaled, torch.tensor([noise[row] for row in sampled], device=logits.device), 1.0)
        tokens[rows] = chosen
    return tokens.tolist()


def likeliest_share(logits: Tensor, shares: Tensor) -> Tensor:
    """[B, V] logits, -inf but for the fewest likeliest tokens of each row that reach its share, [B] (Holtzman et al. 1904.09751)."""
    ordered, places = logits.sort(dim=-1, descending=True)
    chances = ordered.softmax(dim=-1)
    beyond = chances.cumsum(dim=-1) - chances >= shares[:, None]
    beyond[:, 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, places, beyond), float("-inf"))


def told(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-prob of the token written, and the `count` likeliest tokens with theirs, from [V] logits."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best = torch.topk(logprobs, min(count, len(logprobs))) if count else None
    pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else []
    return float(logprobs[token]), pairs
