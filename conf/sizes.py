"""The model's shape, and how DeepSpeed and memory treat it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from conf.settings import Count, Settings, Whole


@dataclass(frozen=True)
class Scale(Settings):
    """The shape of a model built with random weights."""

    name: str
    """Name of the rung, for tables."""
    architecture: Literal["llama", "opt"]
    """Transformer family: `llama` for the small from-scratch rungs, `opt` for the GPT-3 ladder."""
    layers: Count
    """Transformer blocks."""
    width: Count
    """Width of the residual stream (d_model); a multiple of `heads`."""
    heads: Count
    """Attention heads."""
    feed_forward: Count
    """Inner width of each block's MLP."""
    context: Count
    """Longest sequence, prompt and reply together."""
    vocabulary: Count
    """Size of the byte-level BPE vocabulary that is learned when the tokenizer is made from the training data."""
    zero_stage: Annotated[int, Ge(0), Le(3)]
    """DeepSpeed ZeRO stage unless `engine.zero_stage` says otherwise."""
    offload_optimizer: Literal["none", "cpu", "nvme"]
    """Where optimizer states are, unless `engine.offload_optimizer` says otherwise."""
    offload_parameters: Literal["none", "cpu", "nvme"]
    """Where parameters rest, unless `engine.offload_parameters` says otherwise."""
    dtype: Literal["fp32", "bf16"]
    """Arithmetic, unless `model.dtype` says otherwise."""
    activation_checkpointing: bool
    """Whether blocks are computed again in the backward pass, unless `engine.activation_checkpointing` says otherwise."""
    micro_batch: Count
    """Sequences per forward and backward pass on one rank, unless `engine.micro_batch` says otherwise."""
    rollout_batch: Count
    """Replies that one rollout rank samples at once, unless `engine.rollout_batch` says otherwise."""
    embedding: Whole = 0
    """Width of the token embedding when it differs from `width` (OPT-350M's 512); 0: the same."""
    post_layer_norm: bool = False
    """Layer norm after each block instead of before (OPT-350M)."""


@dataclass(frozen=True)
class Model(Settings):
    """Which language model the policy starts from."""

    path: str | None
    """A Hugging Face causal LM, by local path or hub name; null builds one of the `scale` with random weights."""
    tokenizer: str | None
    """A Hugging Face tokenizer, by local path or hub name; null takes the model's own, or learns one when the model is from scratch."""
    dtype: Literal["fp32", "bf16"] | None
    """Arithmetic of forward and backward passes, and of sampling; master weights are always fp32. null takes the scale's. A CPU without
    instructions for bf16 computes in fp32 instead, since emulating them is slower (`chatray doctor` says which it is)."""


@dataclass(frozen=True)
class Engine(Settings):
    """DeepSpeed and memory."""

    zero_stage: Annotated[int, Ge(0), Le(3)] | None
    """ZeRO stage of every role that trains; null takes the scale's."""
    offload_optimizer: Literal["none", "cpu", "nvme"] | None
    """Where master weights and optimizer states are kept: on the device, in host memory (ZeRO stages 1 to 3), or in files below
    `engine.nvme_path` (stage 3); null takes the scale's."""
    offload_parameters: Literal["none", "cpu", "nvme"] | None
    """Where parameters rest while they are not computed with, of models that train and of frozen ones (ZeRO stage 3); null takes the
    scale's."""
    nvme_path: str | None
    """Folder on a fast local disk, on every node, for what is offloaded to `nvme`."""
    stage_folder: str | None
    """Folder on a local disk of every node, into which a checkpoint is copied once per node before the node's ranks load it: for run
    directories on shared storage that is slow. null: ranks read it where it is."""
    activation_checkpointing: bool | None
    """Compute each block's activations again in the backward pass instead of keeping them: less memory, a third more arithmetic; null
    takes the scale's."""
    micro_batch: Count
    """Sequences per forward and backward pass on one rank at most, and in each piece that batches travel in between roles; less uses less
    memory and changes no result. The scale's by default."""
    micro_tokens: Count | None
    """Tokens per forward and backward pass on one rank at most, in place of `micro_batch` sequences; null: those. It bounds memory as
    well, and lets short sequences share a pass that long ones fill by themselves."""
    remove_padding: bool
    """Lay the sequences of a pass end to end and compute no padding, in every model that attends to all tokens before and hands on to its
    attention where each sequence ends (`actors/attention.py`); other models compute the padding, as all do with false."""
    compile: bool
    """Compile the blocks of every model that learns or scores (torch.compile): some 20 s at the start of each rank, and a C++ compiler
    where there is no GPU. Not under ZeRO stage 3, whose parameters come and go."""
    shard_mb: Count
    """Size at which an exported checkpoint goes on in another file, MB; also what loading and exporting hold at once, at most."""
    rollout_batch: Count
    """Replies that one rank of `rollout=transformers` samples at once; less uses less memory for keys and values and changes no result. The
    scale's by default."""
    longest: Annotated[int, Ge(2)] | None
    """Tokens of the longest sequence in any stage, prompt and reply together: what is longer is shortened or left out, as if the model's
    context ended there. Memory is planned for it. null: the model's context."""

    def rows_of(self, tokens: int) -> int:
        """Sequences of so many tokens in one pass, at most."""
        return self.micro_batch if self.micro_tokens is None else max(self.micro_tokens // max(tokens, 1), 1)
