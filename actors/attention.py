"""Passes without padding: the rows of a pass are laid end to end, and attention reaches no further than each row (or dialogue of a packed
row) by itself. Everything else in a transformer works token by token, so nothing is computed for padding, and no mask is made.

    [B, T] tokens --lay end to end--> [1, N] --transformer--> [1, N, D] --lay out--> [B, T, D]

On CUDA in half precision the kernel is torch's variable-length flash attention; elsewhere transformers' attention, one row at a time, which
on CPUs is the faster way as well (BENCHMARKS.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

KERNEL = "chatray_end_to_end"
"""Name of this attention among transformers'. Without `segments` it is transformers' `sdpa`."""

BOUNDED = ("sliding_window", "attention_chunk_size", "attn_logit_softcapping", "alibi")
"""Settings of models whose attention is not plain causal attention, or reaches less far."""


@dataclass(frozen=True)
class Segments:
    """Which tokens of one long row see each other."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, in the row's order."""
    device: torch.device

    @cached_property
    def bounds(self) -> Tensor:
        """[sequences + 1] int32 on the device: where each begins, and the end."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, segments: Segments | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' interface: [1, heads, N, head width] each -> [1, N, heads, head width].

    Args:
        segments: None: rows as transformers knows them, with its mask.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0:
        return _varlen(query, key, value, segments, scaling), None
    return _one_by_one(module, query, key, value, segments, dropout, scaling), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    longest, bounds = max(segments.lengths), segments.bounds
    grouped = q.shape[1] != k.shape[1]
    found = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)
    assert isinstance(found, Tensor)
    return found[None]


@torch.compiler.disable  # it would be compiled anew for all lengths that occur
def _one_by_one(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, segments: Segments, dropout: float, scaling: float | None
) -> Tensor:
    rows = zip(*(x.split(segments.lengths, dim=2) for x in (query, key, value)), strict=True)
    found = [sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling)[0] for q, k, v in rows]
    return torch.cat(found, dim=1)


AttentionInterface.register(KERNEL, attend)
AttentionMaskInterface.register(KERNEL, sdpa_mask)


def plain(config: PretrainedConfig) -> bool:
    """Whether every layer of a decoder attends to all tokens before it, by nothing but their products."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = getattr(config, "use_sliding_window", True)
    bounded = any(getattr(config, name, None) for name in BOUNDED if name != "sliding_window" or windows)
    return kinds == {"full_attention"} and not bounded and not getattr(config, "is_encoder_decoder", False)


def can_remove_padding(lm: PreTrainedModel) -> bool:
    """Whether rows may be laid end to end: it hands what it is told on to its attention, which is plain."""
    return bool(getattr(lm, "_supports_attention_backend", False)) and plain(lm.config)


def remove_padding(module: nn.Module) -> bool:
    """Let the transformer inside lay rows end to end from now on, if it can; returns whether it does."""
    lm = next(part for part in module.modules() if isinstance(part, PreTrainedModel))
    if can_remove_padding(lm):
        lm.set_attn_implementation(KERNEL)
    return removes_padding(lm)


def removes_padding(lm: nn.Module) -> bool:
    """Whether `remove_padding` took effect on it."""
    return bool(lm.config._attn_implementation == KERNEL)  # type: ignore[union-attr]


def read(backbone: Any, tokens: Tensor, lengths: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """The last layer's states, [B, T, D], 0 in the padding; see `read_all`."""
    return read_all(backbone, tokens, lengths, positions, every_layer=False)[-1]


def read_all(
    backbone: Any, tokens: Tensor, lengths: Tensor | None = None, positions: Tensor | None = None, every_layer: bool = True
) -> list[Tensor]:
    """States of every layer, from the embedding on, or of the last alone; each [B, T, D].

    Args:
        backbone: a transformer of transformers' without a head.
        tokens: [B, T] long, right-padded.
        lengths: [B] long; None: every row is full.
        positions: [B, T] long of packed rows: 0 where a dialogue begins, and in the padding. None: each row is one dialogue.

    Raises:
        ValueError: packed rows for a model that cannot keep their dialogues apart.
    """
    width = torch.arange(tokens.shape[1], device=tokens.device)
    places = width.expand_as(tokens) if positions is None else positions
    if not removes_padding(backbone):
        if positions is not None:
            raise ValueError(f"{type(backbone).__name__}: in this model the dialogues of a packed row would see each other")
        return _states(backbone(input_ids=tokens, position_ids=places, use_cache=False, output_hidden_states=every_layer), every_layer)
    whole = lengths if lengths is not None else torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    real = width < whole[:, None]
    flat = places[real]
    sequences = whole if positions is None else _spans(flat)
    segments = Segments(tuple(sequences.tolist()), tokens.device)
    output = backbone(**end_to_end(tokens[real], flat, segments), use_cache=False, output_hidden_states=every_layer)
    return [_laid_out(states[0], real, full=flat.numel() == tokens.numel()) for states in _states(output, every_layer)]


def end_to_end(tokens: Tensor, places: Tensor, segments: Segments) -> dict[str, Any]:
    """What a transformer is called with: [N] tokens and their places as one row.

    The mask keeps transformers from making one, of N x N; a model that took it for one would give NaN and not a wrong number."""
    mask = torch.full((1, 1, 1, 1), float("nan"), device=tokens.device)
    return {"input_ids": tokens[None], "position_ids": places[None], "attention_mask": mask, "segments": segments}


def _states(output: Any, every_layer: bool) -> list[Tensor]:
    return list(output.hidden_states) if every_layer else [output.last_hidden_state]


def _spans(places: Tensor) -> Tensor:
    """Lengths of the runs that begin with a 0."""
    starts = (places == 0).nonzero()[:, 0]
    return torch.diff(starts, append=torch.tensor([len(places)], device=places.device))


def _laid_out(states: Tensor, real: Tensor, full: bool) -> Tensor:
    """[N, D] -> [B, T, D], 0 where there is no token."""
    if full:
        return states.view(*real.shape, -1)
    return states.new_zeros(*real.shape, states.shape[-1]).index_put((real,), states)
