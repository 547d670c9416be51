"""The state of a model in training, and snapshots of its weights, spread over ranks: each holds and writes its own share, and any number
of ranks at any ZeRO stage reads what others wrote.

A state holds what is trained and what is counted: float32 weights, Adam's moments and steps, buffers, DeepSpeed's counters. Frozen
weights are not in it: a model starts from the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.partitions import MOMENTS, WEIGHT, Part, Partitions
from actors.shard_files import Run, ShardReader, ShardWriter, emptied, share

BUFFER = "buffer"
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""DeepSpeed's own."""


@dataclass(frozen=True)
class Snapshot:
    """This rank's share of the trained weights of some moment, on the CPU."""

    version: int
    """Which moment, as the caller counts."""
    runs: dict[str, tuple[Run, Tensor]]


def save_state(engine: Any, folder: Path) -> None:
    """Write the state of a DeepSpeed engine; every rank must call, and the folder is whole when it returns."""
    partitions = Partitions(engine)
    planned = [(kind, run, torch.float32) for part in partitions.parts for kind, run, _ in _own(partitions, part)]
    buffers = _buffers(engine.module)
    planned += [(BUFFER, _mine(name, buffer), buffer.dtype) for name, buffer in buffers.items()]
    notes = {"counters": {name: int(getattr(engine, name)) for name in COUNTERS}, "steps": _steps(partitions)}
    with ShardWriter(emptied(folder), planned, notes) as file:
        for part in partitions.parts:
            with partitions.at_hand(part) as tensors:
                for kind, run, place in _own(partitions, part):
                    file.write(tensors[kind][place : place + run.length])
        for name, buffer in buffers.items():
            run = _mine(name, buffer)
            file.write(buffer.reshape(-1)[run.start : run.start + run.length])
    dist.barrier()


def load_state(engine: Any, folder: Path) -> None:
    """The inverse of `save_state`, whatever number of ranks and ZeRO stage it was saved with; every rank must call.

    Raises:
        FileNotFoundError: there is no state, or not all of it.
        ValueError: it is of another model; names the first parameter that differs.
    """
    partitions, saved = Partitions(engine), ShardReader(folder)
    buffers = _buffers(engine.module)
    _check_names(saved, {*partitions.named, *buffers})
    steps: dict[str, int] = saved.notes["steps"]
    with torch.no_grad(), partitions.rewriting():
        for part in partitions.parts:
            made = max((steps[run.name] for run, _ in part.runs), default=max(steps.values(), default=0))
            with partitions.at_hand(part, steps=made) as tensors:
                for run, place in part.runs:
                    for kind, tensor in tensors.items():
                        target = tensor[place : place + run.length]
                        target.copy_(saved.read(kind, run)) if kind == WEIGHT or saved.has(kind, run.name) else target.zero_()
    for name, buffer in buffers.items():
        buffer.copy_(saved.read(BUFFER, Run(name, tuple(buffer.shape), 0, buffer.numel())).view_as(buffer))
    for name, value in saved.notes["counters"].items():
        setattr(engine, name, value)


def _own(partitions: Partitions, part: Part) -> Iterator[tuple[str, Run, int]]:
    """(kind, run, where it begins) of what this rank writes of a part: what every rank holds is written in equal shares."""
    kinds = (WEIGHT, *MOMENTS) if partitions.steps_of(part) else (WEIGHT,)
    for held, place in part.runs:
        run = share(held.name, held.shape, dist.get_rank(), dist.get_world_size()) if partitions.replicated else held
        for kind in kinds:
            yield kind, run, place + run.start - held.start


def _steps(partitions: Partitions) -> dict[str, int]:
    """Adam's steps with each parameter. Under ZeRO they are the same for all; else a parameter that never had a gradient has none."""
    found = {run.name: partitions.steps_of(part) for part in partitions.parts for run, _ in part.runs}
    return {name: found.get(name, max(found.values(), default=0)) for name in partitions.named}


def _buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """Those that belong to the model's state."""
    state = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in state}


def _mine(name: str, tensor: Tensor) -> Run:
    return share(name, tensor.shape, dist.get_rank(), dist.get_world_size())


def _check_names(saved: ShardReader, wanted: set[str]) -> None:
    for name in sorted(saved.shapes.keys() ^ wanted):
        where = "is in the state and not trained in this model" if name in saved.shapes else "is trained in this model and not in the state"
        raise ValueError(f"{saved.folder}: {name} {where}: another model wrote it (model, scale and lora must be as they were)")


def take_snapshot(engine: Any, version: int) -> Snapshot:
    """Copies of this rank's share of the trained weights, in the type that the module computes with."""
    runs = {run.name: (run, values.to("cpu", copy=True)) for run, values in Partitions(engine).own_weights()}
    return Snapshot(version, runs)


def restore_snapshot(engine: Any, snapshot: Snapshot) -> None:
    """Give every rank the weights of a snapshot; all must call, each with its share. Not for training on: Adam's are left as they are."""
    Partitions(engine).set_own_weights({name: values for name, (_, values) in snapshot.runs.items()})


def save_snapshot(snapshot: Snapshot, folder: Path) -> None:
    """Write a snapshot; every rank must call, and the folder is whole when it returns."""
    planned = [(WEIGHT, run, values.dtype) for run, values in snapshot.runs.values()]
    with ShardWriter(emptied(folder), planned, {"version": snapshot.version}) as file:
        for _, values in snapshot.runs.values():
            file.write(values)
    dist.barrier()


def load_snapshot(engine: Any, folder: Path) -> Snapshot | None:
    """This rank's share of a snapshot that any number of ranks wrote; None when there is none.

    Raises:
        ValueError: it is of another model.
    """
    if not folder.is_dir():
        return None
    saved, partitions = ShardReader(folder), Partitions(engine)
    _check_names(saved, set(partitions.named))
    runs = {run.name: (run, saved.read(WEIGHT, run)) for run, _ in partitions.own_weights()}
    return Snapshot(saved.notes["version"], runs)
