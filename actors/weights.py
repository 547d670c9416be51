"""A model's weights one at a time, under the names of the plain model: what exports and weight sync are made of.

`Gather` gives one whole tensor of the module by its name. Under ZeRO-3 every rank must call it for the same names in the same order, and
rank 0 alone is given the tensor, so that nobody holds more than it is working on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors import lora
from actors.checkpoint import INDEX, SINGLE
from actors.memory import give_back_freed_memory

Gather = Callable[[str], Tensor | None]
"""The module's own name of a parameter or buffer -> the whole tensor on the CPU; None on ranks other than 0."""

KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL"}
"""safetensors' names of what weights are made of."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the plain model: a parameter as it is, or a base weight with its adapter merged."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]
    """Names in the module of what it is made of."""
    scale: float = 0.0
    """Of B A, where `parts` are a base weight, A and B."""
    turned: bool = False
    """The base weight is stored as its transpose."""

    def numel(self) -> int:
        return prod(self.shape)

    def bytes(self) -> int:
        return self.numel() * self.dtype.itemsize

    def gathered(self, gather: Gather) -> Tensor | None:
        """The whole tensor on rank 0; every rank must call."""
        found = [gather(part) for part in self.parts]
        if any(part is None for part in found):
            return None
        base, *adapter = (part for part in found if part is not None)
        if not adapter:
            return base.to(self.dtype)
        return lora.merge(base, adapter[0], adapter[1], self.scale, self.turned)


def plain_weights(module: nn.Module) -> dict[str, Weight]:
    """Every weight that a plain model of this kind has, by name: tied ones once, adapters merged, buffers that are saved."""
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in module.named_parameters() if ".lora_" not in name}
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    saved = module.state_dict().keys() - every
    tensors |= {name: tensor for name, tensor in module.named_buffers() if name in saved}
    layers = lora.adapters(module)
    found = {}
    for name, tensor in tensors.items():
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 keeps the shape of what it has partitioned there
        place = name.removesuffix(".base_layer.weight")
        if place in layers and place != name:
            parts = (name, *(f"{place}.lora_{part}.{lora.ADAPTER}.weight" for part in "AB"))
            scale, turned = layers[place].scaling[lora.ADAPTER], layers[place].fan_in_fan_out
            found[f"{place}.weight"] = Weight(shape, torch.float32, parts, scale, turned)
        else:
            dtype = torch.float32 if layers and tensor.is_floating_point() else tensor.dtype
            found[name.replace(".base_layer.", ".")] = Weight(shape, dtype, (name,))
    return found


def grouped(weights: Mapping[str, Weight], limit: int, item: int = 0) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes each; a larger weight is a group by itself.

    Args:
        item: bytes of an element; 0: those of each weight's own type.
    """
    groups: list[list[str]] = [[]]
    held = 0
    for name, weight in weights.items():
        size = weight.numel() * item if item else weight.bytes()
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def save_transformer(transformer: PreTrainedModel, weights: Mapping[str, Weight], gather: Gather, folder: Path | None, limit: int) -> None:
    """Write a transformer as transformers itself would, in files of at most `limit` bytes, one tensor in memory at a time.

    Args:
        weights: by the transformer's own names.
        folder: None on ranks that do not write; they gather all the same.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    ignored = set(transformer._keys_to_ignore_on_save or ())
    kept = {name: weight for name, weight in weights.items() if name not in ignored}
    groups = grouped(kept, limit)
    files = [SINGLE] if len(groups) == 1 else [f"model-{n + 1:05d}-of-{len(groups):05d}.safetensors" for n in range(len(groups))]
    for file, names in zip(files, groups, strict=True):
        save_tensors({name: kept[name] for name in names}, gather, folder / file if folder else None)
    if folder is None:
        return
    if len(files) > 1:
        size = {"total_parameters": sum(w.numel() for w in kept.values()), "total_size": sum(w.bytes() for w in kept.values())}
        table = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": size, "weight_map": table}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    transformer.config.architectures = [type(transformer).__name__]
    transformer.config.dtype = next(w.dtype for w in kept.values() if w.dtype.is_floating_point)
    transformer.config.save_pretrained(folder)
    if transformer.can_generate():
        transformer.generation_config.save_pretrained(folder)


def save_tensors(weights: Mapping[str, Weight], gather: Gather, file: Path | None, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file tensor by tensor (the library's own writer holds two copies of all of them).

    Its format: 8 bytes with the header's length, a JSON header that says what lies where, and the numbers.
    """
    names = sorted(weights, key=lambda name: (-weights[name].dtype.itemsize, name))  # so that each type is aligned
    if file is None:
        for name in names:
            weights[name].gathered(gather)
            give_back_freed_memory()
        return
    with file.open("wb") as out:
        out.write(_header({name: weights[name] for name in names}, {"format": "pt"} | dict(metadata or {})))
        for name in names:
            tensor = weights[name].gathered(gather)
            assert tensor is not None, "the rank that writes is rank 0"
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
            give_back_freed_memory()


def _header(weights: Mapping[str, Weight], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for name, weight in weights.items():
        entries[name] = {"dtype": KINDS[weight.dtype], "shape": list(weight.shape), "data_offsets": [start, start + weight.bytes()]}
        start += weight.bytes()
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def under(prefix: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Those of one child of the module, by the child's own names."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def gather_from(state: Mapping[str, Tensor]) -> Gather:
    """Of a state dict that is whole already."""
    return lambda name: state[name].detach().cpu()
