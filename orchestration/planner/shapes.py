"""What a model is made of: counted on the real class, built without memory on the meta device.

Counts equal those of the published OPT checkpoints exactly, 350M with its two projections between the 512-wide embedding and the 1024-wide
blocks included: the class is the same. Two things differ from a checkpoint's file: tied embeddings are one tensor here (files may hold them
twice), and a tokenizer that was learned from the data may have fewer tokens than `scale.vocabulary` asks for.
"""

from __future__ import annotations

import copy
import socket
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from actors.attention import Segments, end_to_end, remove_padding
from actors.models import LanguageModel, ScalarModel, attention, shape_config
from conf.schema import Config
from conf.sizes import Scale
from orchestration.errors import RequestError

OPT_RUNGS = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")


@dataclass(frozen=True, eq=False)
class Shape:
    """Sizes of a model, in numbers of parameters where nothing else is said."""

    name: str
    parameters: int
    """Tied tensors counted once."""
    active: int
    """Of them, those a token is multiplied with: of a mixture of experts the routed ones, of an embedding the output's alone."""
    tensors: tuple[int, ...]
    """Of each tensor, in the order the engine shards them."""
    linear: tuple[tuple[str, int, int], ...]
    """Name, inputs and outputs of each linear layer inside the blocks, which adapters may be put on."""
    block: int
    """Of the largest block."""
    layers: int
    width: int
    kv_width: int
    """Numbers that a token leaves in the cache as keys in one layer; as many again as values."""
    vocabulary: int
    context: int
    hf: PretrainedConfig
    """What transformers builds it from."""
    scalar: bool
    """One number per token instead of log-probs."""

    def cache(self, tokens: int, number_bytes: int) -> int:
        """Bytes of keys and values of so many tokens."""
        return 2 * self.layers * self.kv_width * tokens * number_bytes

    def forward_flops(self, tokens: float, length: float) -> float:
        """Floating-point operations of a forward pass of `tokens`, in sequences of `length` (causal: half of it is looked back on)."""
        return tokens * (2.0 * self.active + 2.0 * self.layers * self.attention_width() * length)

    def attention_width(self) -> int:
        """All heads' together."""
        heads = int(getattr(self.hf, "num_attention_heads", 1))
        return heads * _head_width(self.hf)


def language_model(config: Config) -> Shape:
    """The policy's: of `model.path`, of `policy_checkpoint`, or a rung of the ladder."""
    return _shape(config.model.path or config.policy_checkpoint, config.scale, scalar=False)


def scalar_model(config: Config) -> Shape:
    """The reward model's and the critic's."""
    if config.reward_checkpoint:
        return _shape(config.reward_checkpoint, config.scale, scalar=True)
    if config.reward_scale is not None:
        return _shape(None, config.reward_scale, scalar=True)
    return _shape(config.model.path or config.policy_checkpoint, config.scale, scalar=True)


def longest(config: Config) -> int:
    """Tokens of the longest sequence of any stage: the policy's context, or `engine.longest` where that is less."""
    context = language_model(config).context
    return min(context, config.engine.longest or context)


def of_scale(scale: Scale, scalar: bool = False) -> Shape:
    """A rung of the ladder."""
    return _shape(None, scale, scalar)


@lru_cache(maxsize=64)
def _shape(path: str | None, scale: Scale, scalar: bool) -> Shape:
    if path is None:
        return _counted(scale.name, shape_config(scale, scale.vocabulary), scalar)
    _check_there(path)
    try:
        hf = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as cause:
        raise RequestError(
            f"model.path={path}: no configuration of a model to plan for ({' '.join(str(cause).split())[:200]}); give a folder with a "
            "config.json, or the name of a model on the hub"
        ) from cause
    return _counted(Path(path).name, hf, scalar)


@lru_cache(maxsize=1)
def ladder() -> dict[str, int]:
    """Name of each rung -> its parameters, read from the names but for the two smallest."""
    sizes = {"B": 10**9, "M": 10**6}
    return {"micro": 500_000, "tiny": 1_967_808} | {n: int(float(n[:-1]) * sizes[n[-1].upper()]) for n in OPT_RUNGS}


HUB_SECONDS = 5.0
"""For the hub to answer at all; its client would try again for most of a minute."""


def _check_there(path: str) -> None:
    """
    Raises:
        RequestError: it is no folder, not in the cache of the hub, and the hub cannot be reached.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(path).exists() or getproxies():  # behind a proxy only the hub's own client knows
        return
    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:  # no name that the hub could know
        why = "no such folder"
    else:
        if isinstance(cached, str):
            return
        host = urlsplit(constants.ENDPOINT)
        why = "no such folder, not in the cache of the hub, and HF_HUB_OFFLINE forbids to ask it" if constants.HF_HUB_OFFLINE else ""
        try:
            if not why:
                socket.create_connection((host.hostname or "", host.port or (443 if host.scheme == "https" else 80)), HUB_SECONDS).close()
                return
        except OSError as cause:
            why = f"no such folder, not in the cache of the hub, and {host.hostname} cannot be reached ({cause})"
    raise RequestError(f"model.path={path}: {why}; give a folder with a config.json, or the name of a model on the hub")


def on_meta(hf: PretrainedConfig, scalar: bool, layers: int | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module as an engine gets it, without memory."""
    with torch.device("meta"):
        return _module(hf if layers is None else with_layers(hf, layers), scalar, dtype)


def _module(hf: PretrainedConfig, scalar: bool, dtype: torch.dtype) -> nn.Module:
    kernel = attention(int(getattr(hf, "max_position_embeddings", 1 << 20)))
    try:
        lm = AutoModelForCausalLM.from_config(hf, dtype=dtype, attn_implementation=kernel)
    except ValueError as cause:
        raise RequestError(f"model.path: {hf.model_type} is not a causal language model that transformers knows ({cause})") from cause
    lm.eval()
    return _scalar(lm) if scalar else LanguageModel(lm)


def _scalar(lm: Any) -> nn.Module:
    model = ScalarModel.__new__(ScalarModel)  # its constructor draws the head's weights, which are not there
    nn.Module.__init__(model)
    model.backbone = lm.base_model
    model.head = nn.Linear(getattr(lm.config, "word_embed_proj_dim", lm.config.hidden_size), 1)
    return model


def with_layers(hf: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with fewer blocks."""
    shorter = copy.deepcopy(hf)
    shorter.num_hidden_layers = layers
    if getattr(shorter, "layer_types", None):
        shorter.layer_types = shorter.layer_types[:layers]
    return shorter


def _counted(name: str, hf: PretrainedConfig, scalar: bool) -> Shape:
    module = on_meta(hf, scalar)
    tensors = tuple(p.numel() for p in module.parameters())
    blocks = _blocks(module)
    return Shape(
        name=name, parameters=sum(tensors), active=_active(module, hf, scalar), tensors=tensors,
        linear=tuple(_linear(blocks)), block=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
        layers=int(hf.num_hidden_layers), width=int(hf.hidden_size), kv_width=_kv_heads(hf) * _head_width(hf),
        vocabulary=int(hf.vocab_size), context=int(getattr(hf, "max_position_embeddings", 2048)), hf=hf, scalar=scalar,
    )  # fmt: skip


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer's blocks: the longest list of modules in it."""
    lists = [list(found) for found in module.modules() if isinstance(found, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _linear(blocks: list[nn.Module]) -> Iterator[tuple[str, int, int]]:
    for block in blocks:
        for name, part in block.named_modules():
            weight = getattr(part, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(part, nn.Embedding):
                inputs, outputs = weight.shape[::-1] if isinstance(part, nn.Linear) else weight.shape  # GPT-2's lie the other way round
                yield name.rsplit(".", 1)[-1], int(inputs), int(outputs)


def experts_of(hf: PretrainedConfig) -> tuple[int, int]:
    """(experts in a block, experts that a token goes to); (0, 0) for a dense model."""
    named = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((int(getattr(hf, n)) for n in named if getattr(hf, n, None)), 0), int(getattr(hf, "num_experts_per_tok", 0) or 0)


def _active(module: nn.Module, hf: PretrainedConfig, scalar: bool) -> int:
    experts, chosen = experts_of(hf)
    total = 0
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) in embeddings:
            continue
        routed = experts and ".experts" in name and "shared_expert" not in name
        total += parameter.numel() * chosen // experts if routed else parameter.numel()
    head: Any = None if scalar else module.lm.get_output_embeddings()  # type: ignore[union-attr, operator]
    tied = head is not None and id(head.weight) in embeddings
    return total + (head.weight.numel() if tied else 0)


def _head_width(hf: PretrainedConfig) -> int:
    return int(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)


def _kv_heads(hf: PretrainedConfig) -> int:
    return int(getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads)


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps between forward and backward."""

    block: int
    """Of one block."""
    ends: int
    """Of what stands before and after the blocks."""


TRACED_ROWS = 2
"""All that is saved is in proportion to the rows; with a single one, tensors would be views that are copies otherwise."""


def activations(shape: Shape, rows: int, tokens: int, bf16: bool, autocast: bool, unpadded: bool = True) -> Activations:
    """What the real forward pass of one and of two blocks saves, traced on tensors without memory.

    Routing of a mixture of experts depends on numbers and cannot be traced: there, what a dense block of the routed experts' size saves.
    """
    two = _activations(shape, TRACED_ROWS, tokens, bf16, autocast, unpadded)
    return Activations(two.block * rows // TRACED_ROWS, two.ends * rows // TRACED_ROWS)


@lru_cache(maxsize=64)
def _activations(shape: Shape, rows: int, tokens: int, bf16: bool, autocast: bool, unpadded: bool) -> Activations:
    if experts_of(shape.hf)[0]:
        return _of_experts(shape, rows, tokens, 2 if bf16 or autocast else 4)
    one, two = (_saved(with_layers(shape.hf, n), rows, tokens, bf16, autocast, unpadded) for n in (1, 2))
    return Activations(two - one, 2 * one - two)


def _saved(hf: PretrainedConfig, rows: int, tokens: int, bf16: bool, autocast: bool, unpadded: bool) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode  # as `torch.compile` traces; slow to import

    saved: dict[int, tuple[int, Tensor]] = defaultdict()
    with FakeTensorMode(allow_non_fake_inputs=True):
        lm: Any = _module(hf, False, torch.bfloat16 if bf16 else torch.float32)
        unpadded = unpadded and remove_padding(lm)
        own = {p.untyped_storage()._cdata for p in lm.parameters()}

        def noted(x: Tensor | None) -> Tensor | None:
            if x is not None and x.untyped_storage()._cdata not in own:
                saved[x.untyped_storage()._cdata] = (x.untyped_storage().nbytes(), x)  # held, so that no other takes its place
            return x

        ids, places = torch.zeros(rows, tokens, dtype=torch.long), torch.arange(tokens).expand(rows, tokens)
        given = {"input_ids": ids, "position_ids": places}
        if unpadded:
            given = end_to_end(ids.view(-1), places.reshape(-1), Segments((tokens,) * rows, ids.device))
        with torch.autograd.graph.saved_tensors_hooks(noted, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            lm.lm.base_model(**given, use_cache=False)
    return sum(size for size, _ in saved.values())


def _of_experts(shape: Shape, rows: int, tokens: int, number: int) -> Activations:
    """Of each token: inputs of two norms and their outputs, queries, keys, values and the output of attention, and three inner widths of
    each expert it goes to."""
    hf, (_, chosen) = shape.hf, experts_of(shape.hf)
    inner = int(getattr(hf, "moe_intermediate_size", None) or hf.intermediate_size)
    per_token = 6 * shape.width + 2 * shape.attention_width() + 2 * shape.kv_width + chosen * (3 * inner + 2 * shape.width)
    return Activations(rows * tokens * per_token * number, rows * tokens * 2 * shape.width * number)
