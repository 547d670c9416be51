"""The cluster of `cluster/local_cluster.sh`, for tests: nodes with a token, whose own `conf`, `actors` and `orchestration` are broken."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import COMMAND, LIMIT_SECONDS, ROOT, ray_processes, wait_until_gone

SCRIPT = ROOT / "cluster" / "local_cluster.sh"
SECRET = "only-the-cluster-knows-this"
CPUS = 4


@dataclass(frozen=True)
class LocalCluster:
    """One that runs."""

    folder: Path
    address: str

    def environment(self, **changes: str) -> dict[str, str]:
        """Of a shell that has the token."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
        return kept | token | {"CHATRAY_ADDRESS": self.address} | changes

    def start(self, *words: str, cwd: Path) -> subprocess.Popen[str]:
        """`chatray` with these words, in the background."""
        return subprocess.Popen(
            [str(COMMAND), *words], cwd=cwd, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def chatray(self, *words: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
        """`chatray` with these words, to its end."""
        return subprocess.run(
            [str(COMMAND), *words], cwd=cwd, env=self.environment(**changes), capture_output=True, text=True, timeout=LIMIT_SECONDS,
            check=False,
        )  # fmt: skip


def free_ports(count: int) -> list[str]:
    """Numbers that nobody uses now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [str(one.getsockname()[1]) for one in sockets]


def broken_packages(folder: Path) -> Path:
    """A folder with packages of chatray's names that cannot be imported."""
    for name in ("conf", "actors", "orchestration"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise ImportError('{name} of {folder}, not of the wheel')\n")
    return folder


@contextlib.contextmanager
def local_cluster(workers: int = 1) -> Iterator[LocalCluster]:
    """Started and stopped by the script."""
    before = {process.pid for process in ray_processes()}
    scratch = Path(tempfile.mkdtemp(prefix="cr-"))  # short: the names of Ray's sockets are limited
    folder, (port, dashboard, client) = scratch / "c", free_ports(3)
    (scratch / "secrets").mkdir()
    (scratch / "secrets" / "FILE_SECRET").write_text(f"{SECRET}\n")
    environment = {
        **os.environ, "RAY": str(Path(sys.executable).parent / "ray"), "PYTHONPATH": str(broken_packages(scratch / "old")),
        "CHATRAY_SECRETS": str(scratch / "secrets"), "RAY_prestart_worker_first_driver": "0",
    }  # fmt: skip
    ports = ["--port", port, "--dashboard-port", dashboard, "--client-port", client]
    start = ["start", "--folder", str(folder), "--workers", str(workers), "--cpus", str(CPUS), *ports]
    try:
        done = subprocess.run([str(SCRIPT), *start], env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        yield LocalCluster(folder, f"http://127.0.0.1:{dashboard}")
    finally:
        subprocess.run([str(SCRIPT), "stop", "--folder", str(folder)], env=environment, capture_output=True, timeout=300, check=False)
        shutil.rmtree(scratch, ignore_errors=True)
    left = wait_until_gone(lambda: [process for process in ray_processes() if process.pid not in before])
    assert not left, left
