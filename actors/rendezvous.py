"""Where ranks meet: torch's TCPStore, on one address of this machine. By itself torch listens on all of them."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

LOOPBACK = "lo" if sys.platform == "linux" else None
"""Network interface of processes that are all on this machine; elsewhere than on Linux gloo was not seen to take one."""


def open_store(host: str, world_size: int | None = None) -> dist.TCPStore:
    """A store that listens on `host` alone, on a port that the system picks (none is guessed, so none is raced for).

    Args:
        host: an address of this machine, that the other ranks reach.
        world_size: None where it is not known how many will come.

    Raises:
        OSError: it is no address of this machine.
    """
    import torch.distributed as dist  # a rank's empty process knows the interface before it pays for torch

    family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listening:
        listening.bind(address)
        listening.listen()
        port = listening.getsockname()[1]
        return dist.TCPStore(host, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
