"""Log-probs of tokens and entropies of their distributions, from hidden states and the output embedding.

Legend: N positions, D width of the hidden states, V vocabulary; z = (h W^T + b) / temperature the logits, p = softmax(z).

The [N, V] logits are never there at once: they are made some positions at a time, and made again in the backward pass, which costs one
more product with W and saves the several [N, V] float32 tensors that autograd would keep. The gradients are the exact ones,

    d log p_k / dz_j = [j = k] - p_j        dH / dz_j = -p_j (log p_j + H)

The output embedding is one argument, however many chunks there are: under ZeRO-3 it is gathered once, and by every rank equally often.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK_LOGITS = 2**25
"""Logits that are held at once, 128 MiB in float32: 667 positions of a vocabulary of 50,272."""


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float = 1.0, chunk: int = CHUNK_LOGITS
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy H(p) at each position, nats; both have gradients.

    Args:
        hidden: [N, D].
        weight, bias: [V, D] and [V] or None, of the output embedding; `weight` may be the input embedding as well.
        targets: [N] long.
        temperature: divides the logits, as when sampling.
        chunk: logits held at once, at least one position's; it changes no result.

    Returns:
        [N] and [N], float32 (float64 for float64 hidden states).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(hidden, weight, bias, targets, temperature, max(chunk // len(weight), 1), dtype)
    return found


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs`, `rows` positions at a time; the products with W are made in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, rows: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        found = [
            _figures(_logits(hidden[part], weight, bias, temperature, dtype), targets[part, None]) for part in _chunks(len(hidden), rows)
        ]
        logprobs, total, entropy = (torch.cat(chunks) for chunks in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, total, entropy)
        ctx.how = temperature, rows, dtype
        ctx.set_materialize_grads(False)  # an entropy that nobody learns from costs nothing in the backward pass
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, total, entropy = ctx.saved_tensors
        temperature, rows, dtype = ctx.how
        grad_hidden = torch.empty_like(hidden)
        # chunks are added up in float32: in bf16 each addition would round
        grad_weight = torch.zeros_like(weight, dtype=total.dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=total.dtype)
        for part in _chunks(len(hidden), rows):
            logp = _logits(hidden[part], weight, bias, temperature, dtype).sub_(total[part, None])
            by_logprob, by_entropy = (None if g is None else g[part, None] for g in wanted)
            slope = _slope(logp, targets[part, None], entropy[part, None], by_logprob, by_entropy).div_(temperature)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(dtype)
            grad_hidden[part] = (slope @ weight.to(dtype)).to(hidden.dtype)
            grad_weight += slope.T @ hidden[part].to(dtype)
            del logp, slope  # or they would live on beside the next chunk's
        return grad_hidden, grad_weight.to(weight.dtype), None if grad_bias is None else grad_bias.to(bias.dtype), None, None, None, None


def _chunks(positions: int, rows: int) -> list[slice]:
    """Consecutive slices of at most `rows` positions; one empty slice where there are none."""
    return [slice(start, start + rows) for start in range(0, max(positions, 1), rows)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype) -> Tensor:
    """[n, V], in float32 or better."""
    z = linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return z.to(torch.promote_types(dtype, torch.float32)).div_(temperature)


def _figures(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), log of the sum of e^z, entropy), [n] each; targets [n, 1]."""
    total = torch.logsumexp(z, dim=-1)
    return z.gather(-1, targets)[:, 0] - total, total, total - (torch.softmax(z, dim=-1) * z).sum(-1)


def _slope(logp: Tensor, targets: Tensor, entropy: Tensor, by_logprob: Tensor | None, by_entropy: Tensor | None) -> Tensor:
    """[n, V]: the gradient by the logits, from those by log-prob and entropy (each [n, 1] or None); `logp` is log p of every token."""
    p = logp.exp()
    slope = torch.zeros_like(p)
    if by_logprob is not None:
        slope.addcmul_(p, by_logprob, value=-1).scatter_add_(1, targets, by_logprob)
    if by_entropy is not None:
        slope.addcmul_(p * (logp + entropy), by_entropy, value=-1)
    return slope
