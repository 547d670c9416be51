"""Bytes from policy rank 0 to the rollout engines, piece by piece, while both are at work: what the ways of weight sync have in common.

Both ends know how many bytes will come. A stream cuts them into pieces of one size, whatever tensors they are of; a piece is filled at one
end while those before it are emptied at the other. Nobody waits for ever: each wait ends after `seconds` (`deadlines.sync`) with an error
that says who was waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from actors.weights import Gather, Weight

Way = Literal["object_store", "shared_memory", "cuda_ipc", "nccl", "gloo"]


class WeightSyncError(RuntimeError):
    """A stream of weights broke off, or stood still for too long: says who was waited for."""


@dataclass(frozen=True)
class Route:
    """How the weights of one version travel."""

    way: Way
    address: str
    """Of policy rank 0: a name on its machine (`ring.py`), or host and port (`broadcast.py`)."""
    engines: int
    """How many take the weights."""
    seconds: float
    """How long either end waits for the other without progress."""


@dataclass(frozen=True)
class Endpoint:
    """Where a rank is, as far as ways between ranks depend on it."""

    machine: str
    """Two ranks with the same reach each other's sockets and memory."""
    device: str | None
    """The CUDA device that its weights are on, by its own number; None: in main memory, or in the hands of an engine that keeps them."""


class Stream(Protocol):
    """One end of it. Tensors are flat and of bytes."""

    def send(self, flat: Tensor) -> None: ...

    def receive(self, into: Tensor) -> None: ...

    def finish(self) -> None:
        """At the sending end: the last piece on its way, and all of them taken."""

    def close(self) -> None: ...


class Pieces:
    """A stream of `total` bytes in pieces of at most `size`; how a piece is begun and ended is the subclass's."""

    def __init__(self, total: int, size: int) -> None:
        self.total, self.size = total, max(min(size, total), 1)
        self.piece, self.used = 0, 0
        """Number of the piece that is open or comes next, and how many of its bytes are done."""
        self.slot: Tensor | None = None

    def count(self) -> int:
        return -(-self.total // self.size)

    def begin(self, piece: int) -> Tensor:
        """Memory of at least a piece, for the sender to fill or for the receiver to read."""
        raise NotImplementedError

    def end(self, piece: int, length: int) -> None:
        """The piece was filled, or read."""
        raise NotImplementedError

    def send(self, flat: Tensor) -> None:
        self._pass(flat, lambda slot, mine: copy_bytes(slot, mine))

    def receive(self, into: Tensor) -> None:
        self._pass(into, lambda slot, mine: copy_bytes(mine, slot))

    def _pass(self, flat: Tensor, copy: Callable[[Tensor, Tensor], None]) -> None:
        at = 0
        while at < flat.numel():
            if self.slot is None:
                self.slot = self.begin(self.piece)
            length = min(self.total - self.piece * self.size, self.size)
            step = min(flat.numel() - at, length - self.used)
            copy(self.slot[self.used : self.used + step], flat[at : at + step])
            at, self.used = at + step, self.used + step
            if self.used == length:
                self.end(self.piece, length)
                self.slot, self.piece, self.used = None, self.piece + 1, 0


def copy_bytes(into: Tensor, source: Tensor) -> None:
    """In main memory by this thread alone: both ends are at work, and threads that wait for each other at every piece were slower."""
    if into.is_cpu and source.is_cpu:
        into.numpy()[:] = source.numpy()
    else:
        into.copy_(source)


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's own memory as flat bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def total_bytes(table: Mapping[str, Weight]) -> int:
    return sum(weight.bytes() for weight in table.values())


def send_all(table: Mapping[str, Weight], gather: Gather, stream: Stream | None) -> None:
    """Gather one weight after the other and send it; every rank must call, and rank 0 has the stream."""
    for weight in table.values():
        tensor = weight.gathered(gather)
        if stream is not None:
            assert tensor is not None, "the rank that sends is rank 0"
            stream.send(as_bytes(tensor.contiguous()))
    if stream is not None:
        stream.finish()


def receive_all(
    table: Mapping[str, Weight], stream: Stream, places: Mapping[str, Tensor], load: Callable[[dict[str, Tensor], bool], None], limit: int
) -> None:
    """Take every weight: straight into its place in the engine, where there is one of its type; otherwise into memory of its own.

    Args:
        places: by the policy's names.
        load: takes whole tensors, and whether they are the last. Those that are in their place are among them.
        limit: bytes of tensors without a place that are held before they are loaded.
    """
    ready: dict[str, Tensor] = {}
    held = 0
    for name, weight in table.items():
        place = places.get(name)
        if place is not None and tuple(place.shape) == weight.shape and place.dtype == weight.dtype and place.is_contiguous():
            tensor = place
        else:
            if held + weight.bytes() > limit and ready:
                load(ready, False)
                ready, held = {}, 0
            tensor = torch.empty(weight.shape, dtype=weight.dtype)
            held += weight.bytes()
        stream.receive(as_bytes(tensor))
        ready[name] = tensor
    load(ready, True)
