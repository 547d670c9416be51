"""Where DeepSpeed keeps the float32 weights that Adam updates, and Adam's moments: which run of which parameter lies where on this rank.

    stage 0, fp32   the parameters themselves, whole on every rank
    stage 0, bf16   a float32 copy of each parameter, whole on every rank
    stages 1 and 2  one flat tensor on each rank, cut from all parameters laid end to end; a parameter may lie on two ranks
    stage 3         flat tensors (sub-groups) on each rank, of this rank's run of each parameter; perhaps in files (NVMe)

DeepSpeed 0.19.8 is read here by the names of its own fields: what it offers for this (`safe_get_local_optimizer_state`) covers stage 3
alone, needs moments to be there, and reads a sub-group from its file once for each parameter in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.shard_files import Run, share

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Part:
    """One tensor that Adam updates."""

    tensor: Tensor
    """Adam's state is kept under it."""
    runs: tuple[tuple[Run, int], ...]
    """(what it holds of a parameter, where that begins in the tensor)."""
    number: int
    """Of the sub-group, under stage 3."""


class Partitions:
    """All of them, of one DeepSpeed engine that trains."""

    def __init__(self, engine: Any) -> None:
        """Args:
        engine: DeepSpeed's.
        """
        self.engine, self.optimizer, self.stage = engine, engine.optimizer, int(engine.zero_optimization_stage())
        self.named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self.flat = self.stage < 3 and all(hasattr(p, "_hp_mapping") for p in self.named.values())
        self.adam = getattr(self.optimizer, "optimizer", self.optimizer)  # without ZeRO, in fp32, there is nothing around it
        self.parts = self._sub_groups() if self.stage == 3 else self._flat() if self.flat else self._whole()

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all of it."""
        return self.stage < 3 and not self.flat

    def _whole(self) -> list[Part]:
        copies = self._copies()
        runs = {name: (Run(name, tuple(p.shape), 0, p.numel()), 0) for name, p in self.named.items()}
        return [Part(copies.get(p, p), (runs[name],), 0) for name, p in self.named.items()]

    def _copies(self) -> dict[nn.Parameter, Tensor]:
        """The float32 copies of bf16 parameters, by the parameter, where DeepSpeed keeps them one by one."""
        if self.stage > 0:
            return {}
        groups = zip(getattr(self.optimizer, "fp16_groups", ()), getattr(self.optimizer, "fp32_groups", ()), strict=True)
        return {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}

    def _flat(self) -> list[Part]:
        held: dict[int, list[tuple[Run, int]]] = {}
        for name, p in self.named.items():
            if found := p._hp_mapping:  # None: all of it is on other ranks
                place = found.lp_fragment_address
                run = Run(name, tuple(p.shape), place.start, place.numel)
                held.setdefault(found.param_group_index, []).append((run, found.hp_fragment_address.start))
        tensors = [group["params"][0] for group in self.adam.param_groups]
        return [Part(tensor, tuple(held.get(number, ())), number) for number, tensor in enumerate(tensors)]

    def _sub_groups(self) -> list[Part]:
        held: dict[int, list[tuple[Run, int]]] = {}
        for name, p in self.named.items():
            number, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
            held.setdefault(number, []).append((share(name, p.ds_shape, dist.get_rank(), dist.get_world_size()), offset))
        tensors = self.optimizer.fp32_partitioned_groups_flat
        return [Part(tensor, tuple(held.get(number, ())), number) for number, tensor in enumerate(tensors)]

    @contextlib.contextmanager
    def at_hand(self, part: Part, steps: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The part's flat tensors by kind, read from their file if they lie in one; moments are absent before Adam's first step.

        Args:
            steps: the tensors are given to be written to, and Adam is to have made so many steps; None: they are only read.
        """
        swapped = self.stage == 3 and self.optimizer._swappable_optimizer_subgroup(part.number)
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_in(part.number)
        if steps is not None:
            self._set_steps(part, steps)
        state = self.adam.state.get(part.tensor, {})
        yield {WEIGHT: part.tensor.detach().view(-1)} | {kind: state[kind].view(-1) for kind in MOMENTS if kind in state}
        if steps is not None and self.stage == 3:
            self.optimizer._reassign_or_swap_out_partitioned_parameters(part.number)  # the module's weights follow
        if swapped and steps is not None:
            self.optimizer._optimizer_states_and_gradient_swap_out(part.number)
        elif swapped:
            self.optimizer._release_swap_buffers(part.number)

    def steps_of(self, part: Part) -> int:
        """How many steps Adam has made with this tensor."""
        return int(self.adam.state.get(part.tensor, {}).get("step", 0))

    def _set_steps(self, part: Part, steps: int) -> None:
        """Give Adam a state of so many steps; one of no steps is left out if there was none."""
        state = self.adam.state.get(part.tensor, {})
        if not state and steps == 0:
            return
        if not state:
            state = {"step": torch.zeros((), device=part.tensor.device)} | {
                kind: torch.zeros_like(part.tensor, requires_grad=False) for kind in MOMENTS
            }
            self.adam.state[part.tensor] = state
        state["step"] = torch.full_like(state["step"], steps) if isinstance(state["step"], Tensor) else steps

    @contextlib.contextmanager
    def rewriting(self) -> Iterator[None]:
        """While the parts are written to; when it ends, the module's weights are those that were written. All ranks must call."""
        if self.stage == 3:
            self.optimizer._partition_all_parameters()  # gathered copies are stale from now on; the next forward pass gathers anew
        yield
        if self.flat:
            self.optimizer.update_lp_params()
        for low, high in self._copies().items():
            low.data.copy_(high.data)

    def own_weights(self) -> Iterator[tuple[Run, Tensor]]:
        """This rank's run of each trained weight, as the module computes with it."""
        for name, p in self.named.items():
            run = share(name, p.ds_shape if self.stage == 3 else p.shape, dist.get_rank(), dist.get_world_size())
            if self.stage < 3:
                yield run, p.detach().view(-1)[run.start : run.start + run.length]
                continue
            with self._partition(p, changes=False) as held:
                yield run, held[: run.length]

    @torch.no_grad()
    def set_own_weights(self, runs: dict[str, Tensor]) -> None:
        """The inverse of `own_weights`: every rank gives its run of every trained weight, and all have the weights. What Adam keeps stays
        as it is, so this is for models that are not trained further."""
        if self.stage == 3:
            self.optimizer._partition_all_parameters()
            for name, p in self.named.items():
                with self._partition(p, changes=True) as held:
                    held[: len(runs[name])].copy_(runs[name])
            return
        ranks = dist.get_world_size()
        for name, p in self.named.items():
            mine = torch.zeros(-(-p.numel() // ranks), dtype=p.dtype, device=p.device)
            mine[: len(runs[name])].copy_(runs[name])
            whole = torch.empty(len(mine) * ranks, dtype=p.dtype, device=p.device)
            dist.all_gather_into_tensor(whole, mine)
            p.copy_(whole[: p.numel()].view_as(p))

    @contextlib.contextmanager
    def _partition(self, parameter: nn.Parameter, changes: bool) -> Iterator[Tensor]:
        """This rank's run of a parameter under stage 3, read from its file if it lies in one."""
        held: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        swapped = held.status.name == "NOT_AVAILABLE"
        swapper = parameter.nvme_swapper if swapped else None  # type: ignore[attr-defined]
        if swapper:
            swapper.swap_in([parameter], async_op=False)
        yield held.data
        if swapper and changes:
            swapper.swap_out_and_release([parameter])
        elif swapper:
            swapper.remove_partition_and_release_buffers([parameter])
