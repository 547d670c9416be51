"""Low-rank adapters (LoRA, Hu et al. 2106.09685): put into a model by peft, switched off for the reference, merged for everybody else.

Only the adapters, and a scalar model's head, are trained; the base weights never move. B starts at 0, so a new adapter changes nothing:
PPO's first ratio is 1 and its first KL to the reference 0, exactly. Rollout engines and exports get the sum of both under the plain
model's names, and know nothing of adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.schema import Config, LoRA

ADAPTER = "default"
"""peft's name of the only adapter."""
FOLDER = "adapter"
"""Where an exported language model's adapter lies beside its merged weights."""


def adapted(config: Config, role: str, module: nn.Module) -> nn.Module:
    """The module (a `LanguageModel` or `ScalarModel`) with adapters, its other weights frozen, if `lora` names this role; else unchanged.

    Raises:
        ValueError: `lora.targets` names no layer of the model, or one that cannot have an adapter.
    """
    if config.lora.trains(role):
        transformer = next(iter(module.children()))  # `lm` or `backbone`; a scalar head beside it is trained whole
        _insert(transformer, config.lora, config.seed)
    return module


def _insert(transformer: nn.Module, lora: LoRA, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, and rarely needed

    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,  # type: ignore[arg-type]  # a fraction is as good
        target_modules=list(lora.targets) or "all-linear",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(settings, transformer, adapter_name=ADAPTER)  # freezes all but the adapters
        except ValueError as cause:
            raise ValueError(f"lora.targets={list(lora.targets)}: {cause}; name linear layers of {_linear_names(transformer)}") from cause
    _check(transformer, lora)


def _check(transformer: nn.Module, lora: LoRA) -> None:
    tied = {id(p) for m in transformer.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, layer in adapters(transformer).items():
        if not len(layer.lora_A) or id(layer.base_layer.weight) in tied:
            raise ValueError(
                f"lora.targets={list(lora.targets)}: {name} is an embedding, or shares its weights with one; name linear layers of "
                f"{_linear_names(transformer)}"
            )


def _linear_names(transformer: nn.Module) -> list[str]:
    return sorted({name.split(".")[-1] for name, m in transformer.named_modules() if isinstance(m, nn.Linear)})


def adapters(module: nn.Module) -> dict[str, Any]:
    """peft's layers by their place in the module; {} in a model without adapters."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}


@contextlib.contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """The model as it was before any training: base layers alone are called, so its numbers are those of a model without adapters."""
    layers = adapters(module).values()
    for layer in layers:
        # not by `enable_adapters`, which also switches `requires_grad` under the running DeepSpeed engine
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merged(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's state dict: W + alpha / rank * B A in float32 where there are adapters. Nothing of the module is changed.

    Args:
        state: the module's whole state dict, gathered from its ranks. Without adapters it is given back as it is.
    """
    layers = adapters(module)
    if not layers:
        return state
    whole = {name.replace(".base_layer.", "."): tensor.float() for name, tensor in state.items() if ".lora_" not in name}
    for name, layer in layers.items():
        a, b = (state[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
        change = layer.scaling[ADAPTER] * (b @ a)
        whole[f"{name}.weight"] = whole[f"{name}.weight"] + (change.T if layer.fan_in_fan_out else change)
    return whole


def save_adapter(transformer: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter alone as peft reads it (`PeftModel.from_pretrained(base, folder)`); nothing for a model without one.

    Args:
        state: the transformer's whole state dict, gathered from its ranks.
    """
    if not adapters(transformer):
        return
    folder.mkdir(exist_ok=True)
    transformer.peft_config[ADAPTER].save_pretrained(folder)  # type: ignore[union-attr, operator, index]
    names = {name: f"base_model.model.{name}".replace(f".{ADAPTER}.", ".") for name in state if ".lora_" in name}
    save_file({theirs: state[name].clone().contiguous() for name, theirs in names.items()}, folder / "adapter_model.safetensors")
