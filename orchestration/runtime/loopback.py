"""A cluster that chatray starts itself is for this machine and this user alone.

Ray listens on all addresses of a machine, so that others may join, and runs what it is sent by whoever reaches it. For a cluster of this
machine alone two things keep others out:

- **Loopback.** Ray is told that clusters cannot be joined here, as on Windows and macOS: its GCS, raylet, drivers, workers and agents then
  take 127.0.0.1 for the node's address and listen there. (`_node_ip_address` does not do it: Ray replaces a loopback address.)
- **A token**, since other users of the machine reach loopback too: made for this cluster, in a file that this user alone can read.

What is set here is in the environment, for Ray's own processes and the ranks; `open_again` puts it back when the cluster has ended.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # they are compiled

from actors.rendezvous import LOOPBACK

JOINED = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
"""Whether other nodes may join; its name speaks of the systems for which it was made."""
COLLECTIVES = {"VLLM_HOST_IP": "127.0.0.1"}
"""Where vLLM, gloo and NCCL listen, in processes that are told nothing else (a service's engines)."""
if LOOPBACK:
    COLLECTIVES |= {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}
NAMES = (JOINED, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", *COLLECTIVES)
AS_READ = ray_constants.ENABLE_RAY_CLUSTER
"""Whether other nodes may join, as Ray took it from the environment and the system when it was imported."""
_before: dict[str, str | None] = {}
"""The environment as it was before `close_to_others`."""


def close_to_others(folder: Path) -> None:
    """Have the next `ray.init` start a cluster on loopback that wants a token.

    Args:
        folder: of this user alone (mode 0700), for the token.
    """
    token = folder / "token"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    if not _before:
        _before.update({name: os.environ.get(name) for name in NAMES})
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would count more than the file
    os.environ.update({JOINED: "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **COLLECTIVES})
    _tell_ray(joined=False)


def open_again() -> None:
    """The environment as it was: the next connection may be to a cluster elsewhere, with another token or none."""
    if not _before:
        return
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    _tell_ray(joined=AS_READ)


def _tell_ray(joined: bool) -> None:
    """Ray has read the environment when it was imported, and keeps the token that it has read."""
    ray_constants.ENABLE_RAY_CLUSTER = joined
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
