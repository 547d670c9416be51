"""A GPU that is not there: what enters the branches for CUDA on a machine without, and finds attributes that are missing, states that are
forgotten and views that are stale. Of kernels it shows nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actors import engine as engines
from actors.engine import Engine
from actors.partitions import Partitions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def built_on_cuda(build: Callable[[], Any], engines_of: Callable[[Any], list[Engine]]) -> Any:
    """What `build` makes when its engines believe that they are on CUDA, with DeepSpeed's bf16 in place of autocast. They compute on the
    CPU afterwards.

    Args:
        engines_of: the engines of what was built.
    """
    to, empty = nn.Module.to, torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "own_device", lambda: CUDA)
        patch.setattr(nn.Module, "to", lambda self, device, dtype=None: to(self, dtype) if dtype else self)
        patch.setattr(torch, "empty", lambda *size, device=None, **more: empty(*size, **more, device=CPU if device == CUDA else device))
        found = build()
    for engine in engines_of(found):
        engine.device = CPU
    return found


class Moved:
    """What went from one memory into another."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in memory that something was moved into."""
        place = tensor.untyped_storage().data_ptr()
        return place in {moved.untyped_storage().data_ptr() for moved in self.tensors}


@contextlib.contextmanager
def moving(engine: Engine) -> Iterator[Moved]:
    """While an engine that believes in its GPU goes to sleep or wakes: whatever is moved has new memory, and the old is spoilt."""
    found, to = Moved(), Tensor.to

    def move(self: Tensor, *given: Any, **named: Any) -> Tensor:
        if not given or not isinstance(given[0], str | torch.device):
            return to(self, *given, **named)
        moved = self.detach().clone()
        if self.is_floating_point():
            self.detach().fill_(float("nan"))
        found.tensors.append(moved)
        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "device", CUDA)
        patch.setattr(Tensor, "to", move)
        patch.setattr(nn.Module, "to", lambda self, device: self._apply(lambda tensor: tensor.to(device)))
        yield found


def device_memory(engine: Engine) -> dict[str, Tensor]:
    """Everything of an engine that a GPU would hold, by name. These tensors stay the same ones when they are moved."""
    found: dict[str, Tensor] = {}
    if not engine.offloads_parameters:
        found |= {name: getattr(p, "ds_tensor", p) for name, p in engine.module.named_parameters()}
    if engine.trains and not engine.offloads_optimizer:
        partitions = Partitions(engine.deepspeed)
        found |= {f"master {number}": part.tensor for number, part in enumerate(partitions.parts)}
    return found


def replaced(engine: Engine) -> dict[str, Tensor]:
    """What of it is another tensor after a move: buffers, and Adam's moments."""
    found: dict[str, Tensor] = dict(engine.module.named_buffers())
    if not engine.trains or engine.offloads_optimizer:
        return found
    adam = getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)
    for number, state in enumerate(adam.state.values()):
        found |= {f"{kind} {number}": value for kind, value in state.items() if kind in ("exp_avg", "exp_avg_sq")}
    return found


def sleep_and_wake(engine: Engine) -> None:
    """One turn of other roles, with all that it must leave the device.

    Raises:
        AssertionError: something stayed.
    """
    held = device_memory(engine)
    for turn in (engine.sleep, engine.wake):
        with moving(engine) as moved:
            turn()
        stayed = [name for name, tensor in (held | replaced(engine)).items() if tensor.numel() and not moved.holds(tensor)]
        assert not stayed, f"{turn.__name__} left {stayed}"
