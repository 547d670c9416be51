"""Low-rank adapters (LoRA, Hu et al. 2106.09685): put into a model by peft, switched off for the reference, merged for everybody else.

Only the adapters, and a scalar model's head, are trained; the base weights never move. B starts at 0, so a new adapter changes nothing:
PPO's first ratio is 1 and its first KL to the reference 0, exactly. Rollout engines and exports get the sum of both under the plain
model's names, and know nothing of adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
    try:
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(settings, transformer, adapter_name=ADAPTER)  # freezes all but the adapters
    except ValueError as cause:
        raise ValueError(f"lora.targets={list(lora.targets)}: {cause}; name linear layers of {_linear_names(transformer)}") from cause
    _check(transformer, lora)
    _draw(transformer, seed)


def _draw(transformer: nn.Module, seed: int) -> None:
    """Adapters' first weights, the same whether the base layers have storage or not (peft puts adapters where base weights are, which of
    a model that the engine will fill is nowhere)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in adapters(transformer).values():
            for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                if part.weight.is_meta:
                    part.to_empty(device="cpu")
            layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)


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
def merge(base: Tensor, a: Tensor, b: Tensor, scale: float, turned: bool) -> Tensor:
    """W + scale * B A in float32; `turned` where W is stored as its transpose."""
    change = scale * (b.float() @ a.float())
    return base.float() + (change.T if turned else change)


def save_adapter(transformer: nn.Module, gather: Callable[[str], Tensor | None], folder: Path | None) -> None:
    """Write the adapter alone as peft reads it (`PeftModel.from_pretrained(base, folder)`); nothing for a model without one.

    Args:
        gather: gives a parameter of the transformer, whole, by its name; every rank must call.
        folder: None on ranks that do not write.
    """
    held = {name: gather(name) for name, _ in transformer.named_parameters() if ".lora_" in name}
    if not held or folder is None:
        return
    folder.mkdir(exist_ok=True)
    transformer.peft_config[ADAPTER].save_pretrained(folder)  # type: ignore[union-attr, operator, index]
    found = {f"base_model.model.{name}".replace(f".{ADAPTER}.", "."): t.contiguous() for name, t in held.items() if t is not None}
    save_file(found, folder / "adapter_model.safetensors")
