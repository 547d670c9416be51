"""Where the processes of chatray listen, and what somebody without a token gets from them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from tests.conftest import MARK

SAMPLE_SECONDS = 1.0
HOST = "127.0.0.1"


@dataclass
class Listening:
    """Sockets that were seen listening, TCP and UDP, and those of Unix whose folder others may enter."""

    inet: dict[tuple[str, int], str] = field(default_factory=dict)
    """(address, port) -> whose it is."""
    unix: dict[str, str] = field(default_factory=dict)
    marked: dict[tuple[int, float], bool] = field(default_factory=dict)

    def sample(self) -> None:
        for found in psutil.net_connections("inet"):
            waits = found.status == psutil.CONN_LISTEN or (found.type == socket.SOCK_DGRAM and not found.raddr)
            if waits and found.pid and (name := self._name(found.pid)):
                self.inet[found.laddr.ip, found.laddr.port] = name
        for found in psutil.net_connections("unix"):
            path = str(found.laddr)
            if path.startswith("/") and found.pid and (name := self._name(found.pid)) and _reachable(Path(path)):
                self.unix[path] = name

    def open_to_others(self, *asked_for: int) -> list[str]:
        """What listens on another address than loopback, but for the ports that were asked for; Unix sockets that others may write to."""
        wide = [f"{name}: {ip} {port}" for (ip, port), name in self.inet.items() if not _is_loopback(ip) and port not in asked_for]
        return wide + [f"{name}: {path}" for path, name in self.unix.items()]

    def _name(self, pid: int) -> str | None:
        """The command line of a process that these tests have started, themselves left out. Ray's agents hide their environment, and are
        known by their raylet."""
        if pid == os.getpid():
            return None
        try:
            process = psutil.Process(pid)
            if not any(self._is_marked(one) for one in (process, *process.parents()) if one.pid != os.getpid()):
                return None
            return " ".join(process.cmdline())[:100]
        except (psutil.Error, OSError):
            return None

    def _is_marked(self, process: psutil.Process) -> bool:
        key = (process.pid, process.create_time())
        if key not in self.marked:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            self.marked[key] = f"{MARK}={os.environ[MARK]}".encode() in environment
        return self.marked[key]


def _is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _reachable(path: Path) -> bool:
    """Whether other users reach a socket and may write to it."""
    try:
        entered = all(folder.stat().st_mode & 0o001 for folder in path.parents)
        return entered and bool(path.stat().st_mode & 0o002)
    except OSError:
        return False


@contextlib.contextmanager
def watched() -> Iterator[Listening]:
    """Note what listens, from now until the context ends."""
    found, over = Listening(), threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            found.sample()

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield found
        finally:
            over.set()
    watching.result()  # an error of the watching is one of the test
    found.sample()


def outside_addresses() -> list[str]:
    """This machine's addresses besides loopback, as other machines know them."""
    found = [
        address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    ]
    return [one.address for one in found if "%" not in one.address and not _is_loopback(one.address)]


def reached(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=2):
        return True
    return False


class Written:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "here")


def attack(port: int, evidence: Path) -> list[str]:
    """What a port gave to somebody who reaches it and knows no token: keys of the cluster, a job that runs. `evidence` is written if it has
    run what it was sent."""
    gained = []
    with grpc.insecure_channel(f"{HOST}:{port}") as channel:
        pickled = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Written(evidence)))
        replica = serve_pb2_grpc.ASGIServiceStub(channel)
        for call in (replica.HandleRequest, replica.HandleRequestWithRejection):
            with contextlib.suppress(grpc.RpcError):
                call(pickled, timeout=3)
        keys = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
        with contextlib.suppress(grpc.RpcError):
            answer = keys.InternalKVKeys(gcs_service_pb2.InternalKVKeysRequest(prefix=b"", namespace=b"session"), timeout=3)
            gained.append(f"keys of the cluster on port {port}: {list(answer.results)[:3]}")
    job = {"entrypoint": f"touch {evidence}", "submission_id": f"intruder-{port}"}
    with contextlib.suppress(httpx.HTTPError):
        answer = httpx.post(f"http://{HOST}:{port}/api/job_agent/jobs/", json=job, timeout=5)
        if answer.is_success:
            gained.append(f"a job on port {port}: {answer.text[:80]}")
    return gained
