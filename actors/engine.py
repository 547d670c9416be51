"""DeepSpeed: one engine per model, the same calls for every ZeRO stage. The only file that imports it.

An optimizer step is any number of `backward` calls followed by `step`. Losses are sums over the *global* denominator of the step, so
gradients are summed over micro-batches and ranks here; DeepSpeed's own averaging over ranks is undone by a factor.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.devices import own_device

os.environ["DS_ACCELERATOR"] = own_device().type  # must stand before the import: DeepSpeed picks its accelerator while loading
import deepspeed
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero import GatheredParameters

from actors.attention import removes_padding
from actors.precision import computes_in_bf16
from actors.recomputing import recompute_blocks
from actors.sharded_state import Snapshot, load_snapshot, load_state, restore_snapshot, save_state, take_snapshot
from actors.sharding import Optimizer, Sharding, buckets, settings, stage_in_force
from actors.weights import Gather

# DeepSpeed would compile a shared-memory all-reduce when it first meets gloo: half a minute, and a compiler that may not be there.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STATE_FOLDER = "engine"


class Engine:
    """A module on this rank: trained if it has an optimizer, frozen if not."""

    def __init__(self, module: nn.Module, optimizer: Optimizer | None, sharding: Sharding) -> None:
        """Args:
        module: at ZeRO stage 3 its parameters may have no storage yet, if they say where they are stored (`checkpoint.py`).

        Raises:
            RuntimeError: `nvme` was asked for, and DeepSpeed cannot use it on this machine.
        """
        self.module = module
        self.trains = optimizer is not None
        self.asleep = False
        self.device = own_device()
        if self.device.type == "cpu" != get_accelerator().device_name():  # it was loaded before anybody said what this process is given
            set_accelerator(CPU_Accelerator())
        # On a CPU, bf16 is autocast over fp32 weights, if it has it; on CUDA, DeepSpeed keeps bf16 weights beside fp32 masters.
        wanted = sharding.dtype == "bf16" and computes_in_bf16(self.device.type)
        self.autocast = wanted and self.device.type == "cpu"
        bf16 = wanted and not self.autocast
        sharding = replace(sharding, stage=stage_in_force(sharding.stage, "bf16" if bf16 else "fp32", self.device.type == "cuda"))
        self.zero_stage = sharding.stage
        self.offloads_parameters = sharding.stage == 3 and sharding.offload_parameters != "none"
        self.offloads_optimizer = sharding.stage > 0 and sharding.offload_optimizer != "none"
        self.max_grad_norm = optimizer.max_grad_norm if optimizer else 0.0
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if optimizer is None:
            module.requires_grad_(False).eval()
        elif sharding.activation_checkpointing:
            recompute_blocks(module)
        self.deepspeed: Any = None
        if optimizer is None and sharding.stage < 3:  # a frozen replica needs no engine
            module.to(self.device, dtype=torch.bfloat16 if bf16 else None)
            return
        trained = [p for p in module.parameters() if p.requires_grad]
        chosen = self._settings(self._with_folder(sharding), optimizer, bf16)
        if sharding.stage == 3:
            self._fill_partitions(chosen, torch.bfloat16 if bf16 else torch.float32)
            trained = [p for p in module.parameters() if p.requires_grad]
        self.deepspeed, *_ = deepspeed.initialize(model=module, config=chosen, model_parameters=trained or None)
        if self.zero_stage == 0 and self.world_size == 1:
            # with nobody to add up with, DeepSpeed would still copy all gradients into a buffer and back: 7 ms of 3.7M on a core, each step
            self.deepspeed.enable_backward_allreduce = False

    def _settings(self, sharding: Sharding, optimizer: Optimizer | None, bf16: bool) -> dict[str, Any]:
        sizes = [p.numel() for p in self.module.parameters()]
        trained = [p.numel() for p in self.module.parameters() if p.requires_grad]
        share = -(-max(sizes, default=1) // self.world_size)
        return settings(sharding, optimizer, buckets(sizes, trained, self.world_size), bf16, share)

    def _with_folder(self, sharding: Sharding) -> Sharding:
        """With a folder of its own below `nvme_path`, that goes when the engine does: roles on one node must not share files."""
        if "nvme" not in (sharding.offload_optimizer, sharding.offload_parameters):
            return sharding
        check_async_io()
        assert sharding.nvme_path is not None, "the configuration was checked for it"
        Path(sharding.nvme_path).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="chatray-", dir=sharding.nvme_path)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return replace(sharding, nvme_path=folder)

    def _fill_partitions(self, chosen: dict[str, Any], dtype: torch.dtype) -> None:
        """Give each parameter without storage this rank's part of it, read from where it is stored. No rank ever holds more of a
        parameter than its own part."""
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        empty: dict[int, nn.Parameter] = {}
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    empty[id(parameter)] = parameter
                    places.setdefault(id(parameter), []).append((module, name))
        if not empty:
            return
        for parameter in self.module.parameters():
            if not parameter.is_meta:  # heads and adapters that are new: DeepSpeed casts no model of which it finds parts partitioned
                parameter.data = parameter.data.to(dtype)
        # no dtype=: where fp16 is not supported, DeepSpeed 0.19 takes any that is given for bf16, and NVMe buffers would round the weights
        init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=chosen)
        for key, parameter in empty.items():
            filled = self._filled(parameter, dtype)
            init._convert_to_deepspeed_param(filled)  # the public way would send every whole parameter from rank 0
            filled.partition()  # type: ignore[attr-defined]
            for module, name in places[key]:
                module._parameters[name] = filled

    def _filled(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        """A parameter of the right shape whose numbers are there on this rank's part; pages of the rest are never touched."""
        count = parameter.numel()
        share = -(-count // self.world_size)
        start, stop = min(self.rank * share, count), min((self.rank + 1) * share, count)
        whole = torch.empty(count, dtype=dtype, device=self.device)
        if start < stop:
            whole[start:stop].copy_(parameter.stored.flat(start, stop))  # type: ignore[attr-defined]
        return nn.Parameter(whole.view(parameter.shape), parameter.requires_grad)

    @property
    def padded(self) -> bool:
        """Whether passes compute the padding of their rows too."""
        return not any(isinstance(part, PreTrainedModel) and removes_padding(part) for part in self.module.modules())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward; without gradients when the module is frozen or the caller says `torch.no_grad`."""
        self._check_awake()
        context = torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with context:
            found = (self.deepspeed or self.module)(*args, **kwargs)
        if self.deepspeed is not None and self.zero_stage == 3 and not torch.is_grad_enabled():
            # DeepSpeed has fetched ahead for a backward pass that does not come; whoever gathers a weight next would find it in flight
            self.deepspeed.optimizer.empty_partition_cache()
        return found

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
            norm = self._clip_replicated()
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

    def _clip_replicated(self) -> float:
        """What DeepSpeed does in all other cases; returns the norm before the clip."""
        held = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
        self._check_finite(float(norm))
        torch.nn.utils.clip_grads_with_norm_(held, self.max_grad_norm, norm)
        return float(norm)

    def whole(self, name: str) -> Tensor | None:
        """One parameter or buffer, whole and on the CPU of rank 0, None elsewhere; under ZeRO-3 every rank must call. It may share memory
        with the model: copy what is kept."""
        return self.gatherer()(name)

    def gatherer(self, on_device: bool = False) -> Gather:
        """`whole` for many weights: the model's names are looked up once.

        Args:
            on_device: leave tensors where the model is.
        """
        self._check_awake()
        tensors = self._tensors()

        def whole(name: str) -> Tensor | None:
            found = tensors.get(name)
            if found is None:
                raise KeyError(f"{name}: the model has no weight of this name")
            if self.world_size > 1 and _rests_in_parts(found):
                return self._collected(found, on_device)
            with GatheredParameters([found]) if hasattr(found, "ds_id") else contextlib.nullcontext():
                if self.rank > 0:
                    return None
                return found.detach() if on_device else found.detach().cpu()

        return whole

    def _collected(self, parameter: Any, on_device: bool) -> Tensor | None:
        """Rank 0 gets the parts of a partitioned parameter; the others hold no more than their own. (DeepSpeed's gathering gives the
        whole to every rank, and with gloo twice.)"""
        own, ranks = parameter.ds_tensor.detach(), self.world_size
        nccl = dist.get_backend() == "nccl"
        own = own.to(self.device if nccl else "cpu").contiguous()
        if self.rank > 0:
            dist.gather(own, dst=0) if nccl else dist.send(own, dst=0)
            return None
        whole = torch.empty(ranks * own.numel(), dtype=own.dtype, device=own.device)
        parts = list(whole.chunk(ranks))
        if nccl:
            dist.gather(own, parts, dst=0)
        else:
            parts[0].copy_(own)
            for rank in range(1, ranks):
                dist.recv(parts[rank], src=rank)
        found = whole[: parameter.ds_numel].view(parameter.ds_shape)
        return found.to(self.device) if on_device else found.cpu()

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.module.named_parameters(remove_duplicate=False)), **dict(self.module.named_buffers())}

    def train(self, on: bool = True) -> None:
        """Dropout on or off."""
        self.module.train(on)

    def weights(self, frozen: bool = True) -> dict[str, Tensor]:
        """The whole state dict, on the CPU of every rank (gathered parameter by parameter under ZeRO-3); without what is not trained if
        not `frozen`."""
        self._check_awake()
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
        self._check_awake()
        return GatheredParameters([parameter], modifier_rank=0) if self.zero_stage == 3 else contextlib.nullcontext()

    def sleep(self) -> None:
        """Free the device: weights, gradients and optimizer states go to host memory until `wake`. On a CPU they are there already.

        Using a sleeping engine is an error."""
        if self.asleep:
            return
        self.asleep = True
        if self.device.type == "cuda":
            self._move("cpu")

    def wake(self) -> None:
        """Undo `sleep`."""
        if self.asleep and self.device.type == "cuda":
            self._move("cuda")
        self.asleep = False

    def _check_awake(self) -> None:
        if self.asleep:
            raise RuntimeError("this engine sleeps: whoever lets roles work in turns (placement.sleep) must wake it first")

    @torch.no_grad()
    def _move(self, device: str) -> None:
        """Everything that takes device memory, to `device`. What is offloaded rests in host memory for good, and stays there."""
        if self.deepspeed is None:
            self.module.to(device)
        else:
            if self.zero_stage == 3:
                self.deepspeed.optimizer.empty_partition_cache()  # weights that were gathered and not given back yet
            if self.trains:
                self._move_trained(device)
            self._move_rest(device)
        if device == "cpu":
            torch.cuda.empty_cache()

    def _move_trained(self, device: str) -> None:
        """Weights that are trained, with their gradients, masters and optimizer states. ZeRO 1 and 2 do it by themselves."""
        if self.zero_stage == 0:
            for parameter in (p for p in self.module.parameters() if p.requires_grad):
                parameter.data = parameter.data.to(device)
                if parameter.grad is not None:
                    parameter.grad.data = parameter.grad.data.to(device)
            _move_optimizer(self.deepspeed.optimizer, device)
        elif self.zero_stage == 3:
            self._move_partitions(device)
        elif device == "cpu":
            self.deepspeed.offload_states(pin_memory=False)
        else:
            self.deepspeed.reload_states()

    def _move_partitions(self, device: str) -> None:
        """Under ZeRO 3. DeepSpeed (0.19.8) moves gradients; it would lay weights that are not trained into the room of those that are, and
        moves masters and moments of its own fused Adam alone."""
        zero = self.deepspeed.optimizer
        states = deepspeed.runtime.zero.offload_config.OffloadStateTypeEnum
        if device == "cpu":
            self.deepspeed.offload_states(include=[states.lp_grads, states.contiguous_grad_buffer], pin_memory=False)
        else:
            self.deepspeed.reload_states()
        weights = zero.lp_param_buffer
        weights.data = weights.data.to(device)
        zero.fp16_partitioned_groups_flat.clear()  # these are parts of it, and so are those of each parameter
        zero._set_fp16_partitioned_groups_flat()
        parts = zero._get_parameter_partitions()
        for part, room in zip(parts, weights.split([part.numel() for part in parts]), strict=True):
            part.data = room
        if not self.offloads_optimizer:
            for master in zero.fp32_partitioned_groups_flat:
                master.data = master.data.to(device)
            _move_optimizer(zero.optimizer, device)

    def _move_rest(self, device: str) -> None:
        """Weights that are not trained, and buffers."""
        frozen = [] if self.offloads_parameters else [p for p in self.module.parameters() if not (self.trains and p.requires_grad)]
        for parameter in frozen:
            held = getattr(parameter, "ds_tensor", parameter)
            held.data = held.data.to(device)
        for buffer in self.module.buffers():
            buffer.data = buffer.data.to(device)

    def save_state(self, folder: Path) -> None:
        """What is trained, Adam's moments and all counts, each rank its share; every rank must call. Frozen weights of a model that is
        trained in part are not saved: it starts from the same ones."""
        self._check_awake()
        save_state(self.deepspeed, folder / STATE_FOLDER)

    def load_state(self, folder: Path) -> None:
        """The inverse of `save_state`, by any number of ranks at any ZeRO stage; exact, bit by bit, where both are as they were.

        Raises:
            FileNotFoundError: the folder holds no state of an engine, or not all of it.
            ValueError: it is the state of another model.
        """
        self._check_awake()
        try:
            load_state(self.deepspeed, folder / STATE_FOLDER)
        except FileNotFoundError as cause:
            raise FileNotFoundError(f"no engine state in {folder}: {cause}") from cause

    def snapshot(self, version: int) -> Snapshot:
        """The trained weights as they are now, of which each rank keeps its share. Every rank must call."""
        self._check_awake()
        return take_snapshot(self.deepspeed, version)

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot's weights back, into a model that will not be trained further; every rank must call, each with its share."""
        self._check_awake()
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


def _move_optimizer(optimizer: Any, device: str) -> None:
    """Moments of a torch optimizer to `device`; the parameters they belong to are moved by others."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:  # the count of steps lies where AdamW wants it
                state[name] = value.to(device)


def sum_over_ranks(x: Tensor, device: torch.device) -> Tensor:
    """Sum of `x` over the process group, on x's own device."""
    if dist.get_world_size() == 1:
        return x
    moved = x.detach().to(device, copy=True)
    dist.all_reduce(moved)
    return moved.to(x.device)


def _rests_in_parts(parameter: Any) -> bool:
    """Whether each rank has its part of it in memory, and no pass or file has anything to do with it at the moment."""
    if not hasattr(parameter, "ds_id") or parameter.ds_status.name != "NOT_AVAILABLE":
        return False
    return parameter.ds_tensor.status.name == "AVAILABLE"


def check_async_io() -> None:
    """Whether DeepSpeed can read and write files beside the arithmetic, which offload to NVMe is.

    Raises:
        RuntimeError: it cannot; says what is missing.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise RuntimeError(
            "engine.offload_optimizer or engine.offload_parameters is nvme, and DeepSpeed's async_io cannot be built here: it needs libaio "
            "with its headers (Debian: apt-get install libaio-dev) and a C++ compiler; install them on every node, or offload to cpu"
        )
