"""A stream by broadcasts from policy rank 0 to all engines: NCCL between CUDA devices, gloo between machines without.

The process group is of these ranks alone and none that torch knows as its default, since policy and rollout ranks have one each of their
own. It is made for the first weights and kept.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.stream import Pieces, Way, WeightSyncError

PIECE_BYTES = 16 * 2**20
SLOTS = 2


class Meeting:
    """The process group of policy rank 0 (rank 0) and the engines."""

    def __init__(self, way: Way, address: str, rank: int, engines: int, seconds: float, store: dist.Store | None = None) -> None:
        """Args:
        address: host and port of the store that policy rank 0 has opened.
        store: that store itself, at policy rank 0.

        Raises:
            WeightSyncError: not all came in `seconds`.
        """
        self.key = way, address
        self.rank, self.seconds = rank, seconds
        self.device = torch.device("cuda" if way == "nccl" else "cpu")
        limit = datetime.timedelta(seconds=seconds)
        try:
            if store is None:
                host, port = address.rsplit(":", 1)
                store = dist.TCPStore(host, int(port), is_master=False, timeout=limit)
            store.set_timeout(limit)
            self.group: Any = _group(way, dist.PrefixStore("weights", store), rank, engines + 1, limit)
        except RuntimeError as cause:  # torch.distributed's own errors are
            raise self.failed("policy rank 0 and all rollout ranks to meet", cause) from cause
        self.store = store

    def failed(self, waiting_for: str, cause: Exception) -> WeightSyncError:
        return WeightSyncError(f"waiting up to {self.seconds:g} s (deadlines.sync) for {waiting_for}: {' '.join(str(cause).split())[:300]}")


class Broadcast(Pieces):
    """One end of the stream of one version; the same code at both."""

    def __init__(self, meeting: Meeting, version: int, total: int) -> None:
        super().__init__(total, PIECE_BYTES)
        self.meeting, self.version = meeting, version
        self.slots = [torch.empty(self.size, dtype=torch.uint8, device=meeting.device) for _ in range(SLOTS)]
        self.works: list[Any] = [None] * SLOTS
        if meeting.rank > 0:
            for piece in range(min(SLOTS, self.count())):
                self._start(piece)

    def begin(self, piece: int) -> Tensor:
        self._settle(piece)
        return self.slots[piece % SLOTS]

    def end(self, piece: int, length: int) -> None:
        if self.meeting.rank == 0:
            self._start(piece)
        elif piece + SLOTS < self.count():
            self._start(piece + SLOTS)

    def finish(self) -> None:
        for piece in range(max(self.count() - SLOTS, 0), self.count()):
            self._settle(piece)

    def close(self) -> None:
        self.slots = []

    def _start(self, piece: int) -> None:
        length = min(self.total - piece * self.size, self.size)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self.works[piece % SLOTS] = self.meeting.group.broadcast([self.slots[piece % SLOTS][:length]], options)
        except RuntimeError as cause:
            raise self._failed(piece, cause) from cause

    def _settle(self, piece: int) -> None:
        """Until what was last started in this piece's slot is through."""
        work, self.works[piece % SLOTS] = self.works[piece % SLOTS], None
        if work is None:
            return
        try:
            work.wait()
        except RuntimeError as cause:
            raise self._failed(piece, cause) from cause

    def _failed(self, piece: int, cause: Exception) -> WeightSyncError:
        other = "the rollout ranks to take" if self.meeting.rank == 0 else "policy rank 0 to send"
        return self.meeting.failed(f"{other} piece {piece + 1} of {self.count()} of the weights of version {self.version}", cause)


def _group(way: Way, store: dist.Store, rank: int, size: int, limit: datetime.timedelta) -> Any:
    if way == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, size, options)
