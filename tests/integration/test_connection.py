"""A cluster of this machine whose node is late to register is started again, and nothing of the first try is left."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

LATE = """
import contextlib, itertools, sys, time, types
import psutil, ray
from ray._private import node, services
from orchestration.errors import RunError
from orchestration.runtime import connection
from tests.fakes import smoke

late, real, clock = int(sys.argv[1]), services.get_node, itertools.count(0, 31)
starts = []

def get_node(address, identifier):
    starts.append(identifier) if identifier not in starts else None
    if len(starts) > late:
        return real(address, identifier)
    raise RuntimeError("not registered")

services.get_node = get_node
node.time = types.SimpleNamespace(**vars(time) | {"monotonic": lambda: next(clock)})
try:
    connection.start_cluster(smoke(), sys.argv[2])
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    ray.shutdown()
except RunError as error:
    print(error)
left = []
for process in psutil.Process().children(recursive=True):
    with contextlib.suppress(psutil.Error):  # it has just ended
        if sys.argv[2] in " ".join(process.cmdline()):
            left.append(process.cmdline())
print(len(starts), "starts", len(left), "left", left)
"""


def started(late: int, folder: Path) -> str:
    words = [sys.executable, "-c", LATE, str(late), str(folder)]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("late", "said"), [(1, "2 starts 0 left"), pytest.param(3, "3 starts 0 left", marks=pytest.mark.slow)])
def test_a_late_node_is_started_again(late: int, said: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # a short path: the names of Ray's sockets are limited
        found = started(late, Path(folder))
    assert said in found
    assert ("end other programs" in found) == (late == 3)
