"""DeepSpeed: one engine per model, the same calls for every ZeRO stage. The only file that imports it.

An optimizer step is any number of `backward` calls followed by `step`. Losses are sums over the *global* denominator of the step, so
gradients are summed over micro-batches and ranks here; DeepSpeed's own averaging over ranks is undone by a factor.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():  # must stand before the import: DeepSpeed picks its accelerator while loading
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.runtime.zero import GatheredParameters

from actors.sharded_state import Snapshot, load_snapshot, load_state, restore_snapshot, save_state, take_snapshot

# DeepSpeed would compile a shared-memory all-reduce when it first meets gloo: half a minute, and a compiler that may not be there.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

BETAS = (0.9, 0.95)
STATE_FOLDER = "engine"


@dataclass(frozen=True)
class Optimizer:
    """AdamW and the gradient clip."""

    lr: float
    weight_decay: float
    max_grad_norm: float
    epsilon: float = 1e-8


class Engine:
    """A module on this rank: trained if it has an optimizer, frozen if not."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer | None, *, zero_stage: int, offload: bool, dtype: str, micro_batch: int
    ) -> None:
        self.module = module
        self.trains = optimizer is not None
        self.zero_stage = zero_stage
        self.device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        # On a CPU, bf16 is autocast over fp32 weights; on CUDA, DeepSpeed keeps bf16 weights beside fp32 masters.
        self.autocast = dtype == "bf16" and self.device.type == "cpu"
        self.max_grad_norm = optimizer.max_grad_norm if optimizer else 0.0
        self.world_size = dist.get_world_size()
        if optimizer is None:
            module.requires_grad_(False).eval()
        self.deepspeed: Any = None
        if optimizer is None and zero_stage < 3:  # a frozen replica needs no engine
            module.to(self.device, dtype=torch.bfloat16 if dtype == "bf16" and not self.autocast else None)
            return
        settings = _settings(module, optimizer, zero_stage, offload, dtype == "bf16" and not self.autocast, micro_batch)
        trained = [p for p in module.parameters() if p.requires_grad]
        self.deepspeed, *_ = deepspeed.initialize(model=module, config=settings, model_parameters=trained or None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward; without gradients when the module is frozen or the caller says `torch.no_grad`."""
        context = torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with context:
            return (self.deepspeed or self.module)(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this micro-batch's gradients; `last` before `step` lets ranks exchange theirs."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * self.world_size)

    def step(self, lr: float) -> float:
        """Clip, update, clear. Returns the gradients' norm before the clip.

        Raises:
            FloatingPointError: gradients are not finite; the weights are as they were.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        plain = self.zero_stage == 0 and not self.deepspeed.bfloat16_enabled()  # DeepSpeed keeps no norm for this case
        if plain:
            norm = self._replicated_norm()
            self._check_finite(norm)
            self.deepspeed.step()
            return norm
        self.deepspeed.step()  # skips the update by itself when a gradient is not finite
        norm = float(self.deepspeed.get_global_grad_norm())
        self._check_finite(norm)
        return norm

    def _check_finite(self, norm: float) -> None:
        if not math.isfinite(norm):
            self.deepspeed.optimizer.zero_grad()
            raise FloatingPointError(f"the gradients' norm is {norm}: lower the learning rate, or look for a reward that is not finite")

    def _replicated_norm(self) -> float:
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def train(self, on: bool = True) -> None:
        """Dropout on or off."""
        self.module.train(on)

    def weights(self, frozen: bool = True) -> dict[str, Tensor]:
        """The whole state dict, on the CPU of every rank (gathered parameter by parameter under ZeRO-3); without what is not trained if
        not `frozen`."""
        wanted = [(name, p) for name, p in self.module.named_parameters(remove_duplicate=False) if frozen or p.requires_grad]
        if self.zero_stage < 3 and not frozen:
            return {name: parameter.detach().cpu() for name, parameter in wanted}
        if self.zero_stage < 3:
            return {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
        gathered = {}
        for name, parameter in wanted:
            with GatheredParameters([parameter]):
                gathered[name] = parameter.detach().cpu().clone()
        if not frozen:
            return gathered
        return gathered | {name: buffer.cpu() for name, buffer in self.module.named_buffers() if name in self.module.state_dict()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Replace weights of a model that will not be trained further (optimizer state is left as it is); all that are trained must be
        given."""
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if name not in weights and self.trains and not parameter.requires_grad:
                continue
            with self._whole(parameter):
                parameter.copy_(weights[name])

    @torch.no_grad()
    def shift_bias(self, name: str, by: float) -> None:
        """Add a number to one parameter of a model that will not be trained further."""
        parameter = dict(self.module.named_parameters())[name]
        with self._whole(parameter):
            parameter.add_(by)

    def _whole(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """Under ZeRO-3, gather a parameter for writing (rank 0's writing counts)."""
        return GatheredParameters([parameter], modifier_rank=0) if self.zero_stage == 3 else contextlib.nullcontext()

    def save_state(self, folder: Path) -> None:
        """What is trained, Adam's moments and all counts, each rank its share; every rank must call. Frozen weights of a model that is
        trained in part are not saved: it starts from the same ones."""
        save_state(self.deepspeed, folder / STATE_FOLDER)

    def load_state(self, folder: Path) -> None:
        """The inverse of `save_state`, by any number of ranks at any ZeRO stage; exact, bit by bit, where both are as they were.

        Raises:
            FileNotFoundError: the folder holds no state of an engine, or not all of it.
            ValueError: it is the state of another model.
        """
        try:
            load_state(self.deepspeed, folder / STATE_FOLDER)
        except FileNotFoundError as cause:
            raise FileNotFoundError(f"no engine state in {folder}: {cause}") from cause

    def snapshot(self, version: int) -> Snapshot:
        """The trained weights as they are now, of which each rank keeps its share. Every rank must call."""
        return take_snapshot(self.deepspeed, version)

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot's weights back, into a model that will not be trained further; every rank must call, each with its share."""
        restore_snapshot(self.deepspeed, snapshot)

    def load_snapshot(self, folder: Path) -> Snapshot | None:
        """This rank's share of what `save_snapshot` wrote with any number of ranks; None if the folder is not there.

        Raises:
            ValueError: it is of another model.
        """
        return load_snapshot(self.deepspeed, folder)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """All-reduced sum; the `Reduce` of `actors.algorithms.masking`."""
        return sum_over_ranks(x, self.device)


def sum_over_ranks(x: Tensor, device: torch.device) -> Tensor:
    """Sum of `x` over the process group, on x's own device."""
    if dist.get_world_size() == 1:
        return x
    moved = x.detach().to(device, copy=True)
    dist.all_reduce(moved)
    return moved.to(x.device)


def _settings(module: nn.Module, optimizer: Optimizer | None, stage: int, offload: bool, bf16: bool, micro_batch: int) -> dict[str, Any]:
    parameters = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad) or parameters
    # DeepSpeed's default buckets of 5e8 elements would dwarf a small model
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(trained, 500_000_000)}
    if offload and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": min(parameters, 50_000_000), "stage3_param_persistence_threshold": 10_000}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # the boundary is set by hand: a step may hold any number of micro-batches
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
    if optimizer:
        params = {"lr": optimizer.lr, "betas": list(BETAS), "eps": optimizer.epsilon, "weight_decay": optimizer.weight_decay}
        settings["optimizer"] = {"type": "AdamW", "params": params | {"torch_adam": True}}
        settings["gradient_clipping"] = optimizer.max_grad_norm
        settings["zero_force_ds_cpu_optimizer"] = False
    return settings
