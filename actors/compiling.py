"""`engine.compile`: a transformer's blocks through torch.compile, which fuses norms, rotations and gates. Attention that goes row by row
stays as it is (attention.py). All blocks of a model are alike, so that one is compiled and the others find it in the cache."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_blocks(module: nn.Module) -> int:
    """Let every block be compiled when it is first called, for passes of any size; returns how many there are."""
    blocks = [block for block in module.modules() if isinstance(block, GradientCheckpointingLayer)]
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)
