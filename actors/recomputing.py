"""Activation checkpointing (Chen et al. 1604.06174): a block's activations are dropped after the forward pass and computed again in the
backward pass. It happens in every forward pass that trains, whether dropout is on or off, and in no other: transformers' own switch is
tied to `module.training`, which is off in PPO."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_blocks(module: nn.Module) -> None:
    """Let every transformer block of the module keep its input alone.

    Raises:
        ValueError: the model has no blocks that transformers can recompute.
    """
    blocks = [block for block in module.modules() if isinstance(block, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(
            f"engine.activation_checkpointing=true: {type(next(iter(module.children()))).__name__} has no blocks whose activations can be "
            "computed again; set it to false"
        )
    for block in blocks:
        _recompute(block)


def _recompute(block: nn.Module) -> None:
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, **kwargs)

    block.forward = forward  # type: ignore[method-assign]
