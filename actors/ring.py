"""A stream through memory that processes of one machine share: one copy in, one copy out.

Policy rank 0 makes the memory and listens on a socket; each engine is handed the memory there. After that a byte from the policy says that
the next piece is filled, and a byte from an engine that it has read one; a slot is filled again when every engine has read it. Memory and
socket have no name in any file system (memfd, abstract address): when the last process lets go of them, however it ends, they are gone. A
peer that dies closes its socket, which is seen at once.

On one CUDA device the memory is the device's, shared by CUDA IPC; all else is the same.
"""

from __future__ import annotations

import mmap
import os
import pickle
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.stream import Pieces, WeightSyncError

SLOTS = 4
SLOT_BYTES = 2 * 2**20
"""Small enough that a piece is still in the cache when it is read."""
HEADER = struct.Struct("!qqi")
"""Version, bytes in all, bytes of the memory's description that follows."""
RETRY_SECONDS = 0.002


class RingSender(Pieces):
    """Policy rank 0's end."""

    def __init__(self, address: str, engines: int, version: int, total: int, seconds: float, cuda: bool = False) -> None:
        """Waits until every engine has come.

        Raises:
            WeightSyncError: one did not, in `seconds`.
        """
        super().__init__(total, SLOT_BYTES)
        self.version, self.seconds, self.cuda = version, seconds, cuda
        self.read: dict[int, int] = {}
        """How many pieces each engine has read."""
        self.peers: dict[int, socket.socket] = {}
        size = self.size * min(SLOTS, max(self.count(), 1))
        self.memory, hand_over = _device_memory(size) if cuda else _host_memory(size)
        try:
            self._meet(address, engines, hand_over)
        except BaseException:
            self.close()
            raise
        finally:
            hand_over(None)

    def _meet(self, address: str, engines: int, hand_over: Callable[[socket.socket | None], None]) -> None:
        deadline = time.monotonic() + self.seconds
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(_abstract(address))
            listening.listen(engines)
            while len(self.peers) < engines:
                missing = ", ".join(str(n) for n in range(engines) if n not in self.peers)
                waiting_for = f"rollout rank {missing} to ask for weights of version {self.version}"
                listening.settimeout(max(deadline - time.monotonic(), 1e-3))
                try:
                    peer, _ = listening.accept()
                except TimeoutError:
                    raise WeightSyncError(_waited(self.seconds, waiting_for)) from None
                if not _of_this_user(peer):
                    peer.close()
                    continue
                peer.settimeout(max(deadline - time.monotonic(), 1e-3))
                number = int.from_bytes(_exactly(peer, 4, self.seconds, waiting_for), "big")
                self.peers[number], self.read[number] = peer, 0
                description = pickle.dumps((self.size, self.memory.numel(), self.cuda))
                try:
                    peer.sendall(HEADER.pack(self.version, self.total, len(description)) + description)
                    hand_over(peer)
                except OSError:
                    raise self._left(number) from None

    def begin(self, piece: int) -> Tensor:
        slots = self.memory.numel() // self.size
        self._until_read(piece - slots + 1)
        return self.memory[piece % slots * self.size :][: self.size]

    def end(self, piece: int, length: int) -> None:
        if self.cuda:
            torch.cuda.current_stream().synchronize()
        for number, peer in self.peers.items():
            try:
                peer.sendall(b"f")
            except OSError:
                raise self._left(number) from None

    def finish(self) -> None:
        self._until_read(self.count())

    def _until_read(self, wanted: int) -> None:
        """Until every engine has read so many pieces."""
        deadline = time.monotonic() + self.seconds
        while late := [number for number, count in self.read.items() if count < wanted]:
            ready, _, _ = select.select([self.peers[number] for number in late], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                names = " and ".join(f"rollout rank {number}" for number in late)
                piece = min(self.read.values()) + 1
                raise WeightSyncError(_waited(self.seconds, f"{names} to take piece {piece} of {self.count()} of version {self.version}"))
            for number in late:
                if self.peers[number] in ready:
                    self.read[number] += len(self._answer(number))
                    deadline = time.monotonic() + self.seconds

    def _answer(self, number: int) -> bytes:
        try:
            answer = self.peers[number].recv(4096)
        except OSError:
            answer = b""
        if not answer:
            raise self._left(number)
        return answer

    def _left(self, number: int) -> WeightSyncError:
        done = f"{self.read[number]} of {self.count()} pieces of the weights of version {self.version}"
        return WeightSyncError(f"rollout rank {number} broke off after {done}: it died, or its own error says why")

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()


class RingReceiver(Pieces):
    """An engine's end."""

    def __init__(self, address: str, number: int, version: int, total: int, seconds: float) -> None:
        """Args:
        number: of this engine among the rollout ranks.

        Raises:
            WeightSyncError: the policy did not come in `seconds`, or it sends something else.
        """
        self.seconds, self.version = seconds, version
        self.waiting_for = f"policy rank 0 to send weights of version {version}"
        self.peer = _connected(address, seconds, self.waiting_for)
        try:
            self.peer.sendall(number.to_bytes(4, "big"))
            found, found_total, length = HEADER.unpack(self._take(HEADER.size))
            if (found, found_total) != (version, total):
                raise WeightSyncError(f"{found_total} bytes of version {found} came where {total} of version {version} were expected")
            size, room, self.cuda = pickle.loads(self._take(length))  # of this user's own process, see `_of_this_user`
            self.memory = _taken_device_memory(self._take) if self.cuda else _taken_host_memory(self.peer, room, seconds, self.waiting_for)
        except BaseException:
            self.peer.close()
            raise
        super().__init__(total, size)

    def _take(self, length: int) -> bytes:
        return _exactly(self.peer, length, self.seconds, self.waiting_for)

    def begin(self, piece: int) -> Tensor:
        self._take(1)
        return self.memory[piece % (self.memory.numel() // self.size) * self.size :][: self.size]

    def end(self, piece: int, length: int) -> None:
        if self.cuda:
            torch.cuda.current_stream().synchronize()
        try:
            self.peer.sendall(b"r")
        except OSError:
            raise WeightSyncError(_broke_off(self.waiting_for)) from None

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self.peer.close()


def machine() -> str:
    """What two processes have in common when one can listen where the other connects: the kernel, and its network namespace."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.stat('/proc/self/ns/net').st_ino}"


def _abstract(address: str) -> str:
    return f"\0chatray-{address}"


def _connected(address: str, seconds: float, waiting_for: str) -> socket.socket:
    deadline = time.monotonic() + seconds
    while True:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(seconds)
        try:
            peer.connect(_abstract(address))
        except OSError:  # it is not there yet
            peer.close()
            if time.monotonic() > deadline:
                raise WeightSyncError(_waited(seconds, waiting_for)) from None
            time.sleep(RETRY_SECONDS)
            continue
        if _of_this_user(peer):
            return peer
        peer.close()
        raise WeightSyncError(f"another user's process answers at {address}")


def _of_this_user(peer: socket.socket) -> bool:
    """Abstract addresses have no permissions: whoever is at the other end is asked of the kernel."""
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return user == os.getuid()


def _exactly(peer: socket.socket, length: int, seconds: float, waiting_for: str) -> bytes:
    found = b""
    while len(found) < length:
        try:
            more = peer.recv(length - len(found))
        except TimeoutError:
            raise WeightSyncError(_waited(seconds, waiting_for)) from None
        except OSError:
            more = b""
        if not more:
            raise WeightSyncError(_broke_off(waiting_for))
        found += more
    return found


def _waited(seconds: float, waiting_for: str) -> str:
    return f"waited {seconds:g} s (deadlines.sync) for {waiting_for}"


def _broke_off(waiting_for: str) -> str:
    return f"waiting for {waiting_for}, the connection broke off: it died, or its own error says why"


def _mapped(file: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)  # the tensor keeps the mapping


def _host_memory(size: int) -> tuple[Tensor, Callable[[socket.socket | None], None]]:
    """The memory, and how it is handed over; None: to nobody more."""
    file = os.memfd_create("chatray-weights")
    os.ftruncate(file, size)

    def hand_over(peer: socket.socket | None) -> None:
        if peer is None:
            os.close(file)
        else:
            socket.send_fds(peer, [b"m"], [file])

    return _mapped(file, size), hand_over


def _taken_host_memory(peer: socket.socket, size: int, seconds: float, waiting_for: str) -> Tensor:
    try:
        _, files, _, _ = socket.recv_fds(peer, 1, 1)
    except TimeoutError:
        raise WeightSyncError(_waited(seconds, waiting_for)) from None
    if not files:
        raise WeightSyncError(_broke_off(waiting_for))
    try:
        return _mapped(files[0], size)
    finally:
        os.close(files[0])


def _device_memory(size: int) -> tuple[Tensor, Callable[[socket.socket | None], None]]:
    memory = torch.empty(size, dtype=torch.uint8, device="cuda")
    from torch.multiprocessing.reductions import reduce_tensor

    def hand_over(peer: socket.socket | None) -> None:
        if peer is not None:
            handle = pickle.dumps(reduce_tensor(memory))
            peer.sendall(len(handle).to_bytes(4, "big") + handle)

    return memory, hand_over


def _taken_device_memory(take: Callable[[int], bytes]) -> Tensor:
    rebuild: Callable[..., Any]
    rebuild, given = pickle.loads(take(int.from_bytes(take(4), "big")))
    return rebuild(*given)
