"""Checkpoints in safetensors, read slice by slice: a rank of a partitioned model reads its own part of each parameter and no more.

A model is built with parameters that have a shape and no storage (torch's meta device), each marked with the place it is stored at; the
engine then gives every rank its partition (`engine.py`). Buffers are real: they are computed by the model's constructor, or read here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import cached_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: str
    name: str

    def whole(self) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(self.name)

    def shape(self) -> tuple[int, ...]:
        with safe_open(self.file, "pt") as opened:
            return tuple(opened.get_slice(self.name).get_shape())

    def flat(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the tensor laid out in one row, [stop - start]; only the rows that they lie in are read."""
        with safe_open(self.file, "pt") as opened:
            part = opened.get_slice(self.name)
            shape = part.get_shape()
            if len(shape) < 2:
                return opened.get_tensor(self.name).reshape(-1)[start:stop]
            row = prod(shape[1:])
            first, last = start // row, -(-stop // row)
            return part[first:last].reshape(-1)[start - first * row : stop - first * row]


@dataclass(frozen=True)
class Joined:
    """A tensor that a checkpoint keeps in equal parts, laid end to end: the experts of a layer, whose matrices a model has in one."""

    parts: tuple[Stored, ...]
    sizes: tuple[int, ...]
    """Of the whole."""

    def whole(self) -> Tensor:
        return torch.cat([part.whole().reshape(-1) for part in self.parts]).view(self.sizes)

    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def flat(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the whole laid out in one row; only the parts that they lie in are read."""
        size = prod(self.sizes) // len(self.parts)
        touched = [(part, n * size) for n, part in enumerate(self.parts) if n * size < stop and start < (n + 1) * size]
        return torch.cat([part.flat(max(start - at, 0), min(stop - at, size)) for part, at in touched])


def tensors_of(path: str) -> dict[str, Stored]:
    """Where each tensor of a Hugging Face checkpoint lies, by its name there.

    Raises:
        OSError: there are no safetensors files.
    """
    index = _file(path, INDEX)
    if index is not None:
        files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        found = {name: _file(path, name) for name in set(files.values())}
        missing = sorted(name for name, file in found.items() if file is None)
        if missing:
            raise OSError(f"{path}: its index names {', '.join(missing)}, not there")
        return {name: Stored(str(found[file]), name) for name, file in files.items()}
    single = _file(path, SINGLE)
    if single is None:
        raise OSError(
            f"{path}: no safetensors files there, which ZeRO stage 3 reads slice by slice; save the model again with "
            "transformers' save_pretrained, or set engine.zero_stage=2"
        )
    with safe_open(single, "pt") as opened:
        return {name: Stored(single, name) for name in opened.keys()}  # noqa: SIM118


def _file(path: str, name: str) -> str | None:
    """A file of a checkpoint that is a folder here or a name on the hub."""
    if Path(path).is_dir():
        return str(Path(path) / name) if (Path(path) / name).is_file() else None
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False)


@contextlib.contextmanager
def without_storage() -> Iterator[None]:
    """Modules made inside have parameters of the right shapes that take no memory; their buffers are as always."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        plain(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def load_unfilled(auto: Any, path: str, config: PretrainedConfig, kernel: str) -> PreTrainedModel:
    """The model that `auto.from_pretrained(path)` would give, its parameters without storage and marked with where they are stored.

    Args:
        auto: AutoModelForCausalLM, or another of transformers' automatic classes.

    Raises:
        OSError: there are no safetensors files.
        ValueError: a parameter of the model is not among them, or has another shape.
    """
    with without_storage():
        model = auto.from_config(config, dtype=torch.float32, attn_implementation=kernel)
    model.tie_weights()
    mark(model, path)
    with contextlib.suppress(OSError):  # not every checkpoint has one; the model then made its own
        if model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


@torch.no_grad()
def mark(model: PreTrainedModel, path: str) -> None:
    """Note on each parameter without storage, as `stored`, where its numbers are; fill buffers that are saved."""
    there, names = tensors_of(path), dict[int, list[str]]()
    conversions = get_checkpoint_conversion_mapping(model.config.model_type) or []
    parameters = {id(p): p for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for key, parameter in parameters.items():
        shape, prefix = tuple(parameter.shape), model.base_model_prefix
        found = (_find(there, name, prefix) or _joined(there, name, prefix, shape, conversions) for name in names[key])
        stored = next((one for one in found if one), None)
        if stored is None or stored.shape() != tuple(parameter.shape):
            seen = "not in the checkpoint" if stored is None else f"{list(stored.shape())} in the checkpoint"
            raise ValueError(
                f"{path}: {names[key][0]} is {list(parameter.shape)} in the model and {seen}; ZeRO stage 3 reads a checkpoint under the "
                "model's own names, or as transformers stacks experts: save it again with transformers' save_pretrained, or set "
                "engine.zero_stage=2"
            )
        parameter.stored = stored  # type: ignore[attr-defined]
    for name, buffer in model.named_buffers():
        if (stored := _find(there, name, model.base_model_prefix)) is not None:
            buffer.copy_(stored.whole())


def _joined(there: dict[str, Stored], name: str, prefix: str, shape: tuple[int, ...], conversions: Sequence[Any]) -> Stored | Joined | None:
    """A tensor under the name that transformers' own conversions of checkpoints give it, or made of the experts that they would stack
    along the first dimension, each of its matrices one above the other."""
    names = [name, f"{prefix}.{name}"]
    names += [known.replace(target, source) for known in names for source, target in _renamings(conversions) if target in known]
    for conversion in conversions:
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in getattr(conversion, "operations", None) or []]
        target = conversion.target_patterns[0]
        if steps[:1] != [("MergeModulelist", 0)] or steps[1:] not in ([], [("Concatenate", 1)]):
            continue
        for known in (known for known in names if known.endswith(target)):
            sources = [known.removesuffix(target) + source for source in conversion.source_patterns]
            parts = [there.get(source.replace("*", str(expert))) for expert in range(shape[0]) for source in sources]
            matrix = (shape[1] // len(sources), *shape[2:])
            if all(part is not None and part.shape() == matrix for part in parts):
                return Joined(tuple(part for part in parts if part is not None), shape)
    return next((there[known] for known in names if known in there), None)


def _renamings(conversions: Sequence[Any]) -> list[tuple[str, str]]:
    """(part of a name in the checkpoint, the same in the model)."""
    plain = [c for c in conversions if not getattr(c, "operations", None)]
    return [(source, target) for c in plain for source, target in zip(c.source_patterns, c.target_patterns, strict=False)]


def _find(there: dict[str, Stored], name: str, prefix: str) -> Stored | None:
    """A tensor by its own name, or by the one it has in the model with a head, or without."""
    return there.get(name) or there.get(f"{prefix}.{name}") or there.get(name.removeprefix(f"{prefix}."))
