"""Checkpoints in safetensors, read slice by slice: a rank of a partitioned model reads its own part of each parameter and no more.

A model is built with parameters that have a shape and no storage (torch's meta device), each marked with the place it is stored at; the
engine then gives every rank its partition (`engine.py`). Buffers are real: they are computed by the model's constructor, or read here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
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
    parameters = {id(p): p for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for key, parameter in parameters.items():
        stored = next((found for name in names[key] if (found := _find(there, name, model.base_model_prefix))), None)
        if stored is None or stored.shape() != tuple(parameter.shape):
            seen = "not in the checkpoint" if stored is None else f"{list(stored.shape())} in the checkpoint"
            raise ValueError(
                f"{path}: {names[key][0]} is {list(parameter.shape)} in the model and {seen}; ZeRO stage 3 reads a checkpoint under the "
                "model's own names: save it again with transformers' save_pretrained, or set engine.zero_stage=2"
            )
        parameter.stored = stored  # type: ignore[attr-defined]
    for name, buffer in model.named_buffers():
        if (stored := _find(there, name, model.base_model_prefix)) is not None:
            buffer.copy_(stored.whole())


def _find(there: dict[str, Stored], name: str, prefix: str) -> Stored | None:
    """A tensor by its own name, or by the one it has in the model with a head, or without."""
    return there.get(name) or there.get(f"{prefix}.{name}") or there.get(name.removeprefix(f"{prefix}."))
