"""What one machine has: asked on the machine itself, without torch and without Ray, in a fraction of a second."""

from __future__ import annotations

import ctypes.util
import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from actors.precision import cpu_has_bf16
from orchestration.planner.machines import Node
from orchestration.runtime.exposure import Exposure, exposure

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "chatray")
"""Whose versions must be equal on all nodes, Python's own beside them."""
CGROUP_MEMORY = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CGROUP_CPU = "/sys/fs/cgroup/cpu.max"
SMI_SECONDS = 10.0
"""How long nvidia-smi may take; a broken driver makes it hang."""
MIB = 1 << 20


@dataclass(frozen=True)
class GPU:
    """One device as its driver shows it."""

    name: str
    memory: int
    """Bytes."""
    driver: str
    capability: float
    """CUDA compute capability; bf16 needs 8.0."""


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes."""

    node: Node
    """What it has for ranks. Its CPUs and GPUs are those that Ray offers, where it was asked through Ray."""
    address: str
    gpus: tuple[GPU, ...]
    """What the driver shows, whatever Ray offers."""
    versions: dict[str, str]
    """Of Python and the packages; "missing" for one that is not installed."""
    cuda: str
    """CUDA version that torch was built for; "" for a CPU build."""
    code: str
    """Digest of chatray's own source."""
    temp_disk: int
    """Free where temporary files go."""
    run_disk: int
    """Free where the run directory is or would be."""
    open_files: int
    """Files that a process may have open."""
    token: str
    """Content of the token in the run directory; "" if it is not there."""
    clock: float
    """Seconds since 1970."""
    interfaces: tuple[str, ...]
    """Network interfaces that are up, loopback left out."""
    cpu_bf16: bool
    """Whether the CPU computes in bf16 rather than emulating it."""
    tools: dict[str, str]
    """Compilers and libraries that DeepSpeed builds its operators with: where they are, or ""."""
    cache: str
    """Hugging Face's cache: its folder, or "" if it cannot be written to."""
    exposure: Exposure
    """What others reach of its Ray."""


def inspect(run_dir: str, token: str = "", name: str | None = None) -> Machine:
    """This machine.

    Args:
        token: name of a file in `run_dir` that the driver wrote, to see whether the storage is the same here.
        name: what the node is called; by default the host's name.
    """
    gpus = show_gpus()
    smallest = min((gpu.memory for gpu in gpus), default=0)
    node = Node(
        name or socket.gethostname(), cpu_limit(), float(len(gpus)), gpus[0].name if gpus else "none", smallest,
        memory_limit(), free("/dev/shm", total=True), free(run_dir),
    )  # fmt: skip
    found = Path(run_dir) / token if token else None
    return Machine(
        node=node,
        address=socket.gethostname(),
        gpus=gpus,
        versions=versions(),
        cuda=torch_cuda(),
        code=source_digest(),
        temp_disk=free(tempfile.gettempdir()),
        run_disk=free(run_dir),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        token=found.read_text() if found and found.exists() else "",
        clock=time.time(),
        interfaces=tuple(sorted(name for name, state in psutil.net_if_stats().items() if state.isup and name != "lo")),
        cpu_bf16=cpu_has_bf16(),
        tools=tools(),
        cache=hugging_face_cache(),
        exposure=exposure(),
    )


def cpu_limit() -> float:
    """CPUs of this machine, or of the container that this process is in. Ray offers whole ones."""
    cpus = float(os.cpu_count() or 1)
    quota, _, period = _text(CGROUP_CPU).partition(" ")
    return min(cpus, max(float(int(quota) // int(period)), 1.0)) if quota.isdigit() and period.strip().isdigit() else cpus


def memory_limit() -> int:
    """Main memory of this machine, or what the container that this process is in may use."""
    limits = [int(text) for text in map(_text, CGROUP_MEMORY) if text.isdigit()]
    return min([psutil.virtual_memory().total, *limits])


def free(folder: str, total: bool = False) -> int:
    """Bytes that are free (or all there are) on the file system of a folder, or of the nearest one above that exists; 0 without any."""
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    if total and path != Path(folder).absolute():
        return 0
    usage = shutil.disk_usage(path)
    return usage.total if total else usage.free


def show_gpus() -> tuple[GPU, ...]:
    """The GPUs that nvidia-smi shows. Asking it costs no memory on the devices, which a CUDA context would."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    if not shutil.which(command[0]):
        return ()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(read_gpu(line) for line in done.stdout.splitlines() if line.count(",") == 3)


def read_gpu(line: str) -> GPU:
    """One line of nvidia-smi: name, memory in MiB, driver, compute capability. What it does not know counts as 0."""
    name, memory, driver, capability = (part.strip() for part in line.split(","))
    return GPU(name, int(_number(memory) * MIB), driver, _number(capability))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def torch_cuda() -> str:
    """CUDA version of the installed torch, read from its version file: importing torch takes seconds."""
    try:
        file = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        lines = Path(str(file)).read_text(encoding="utf-8").splitlines()
    except (importlib.metadata.PackageNotFoundError, OSError):
        return ""
    line = next((line for line in lines if line.startswith("cuda")), "")
    value = line.rpartition("=")[2].strip().strip("'\"")
    return "" if value == "None" else value


def source_digest() -> str:
    """Digest of chatray's own source files, as this process finds them."""
    home, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for package in ("conf", "actors", "orchestration"):
        for file in sorted((home / package).rglob("*")):
            if file.suffix in (".py", ".yaml"):
                digest.update(file.relative_to(home).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


BUILD_SECONDS = 1800
"""No build of an extension takes so long."""
INCLUDES = ("/usr/include", "/usr/local/include", f"{sys.prefix}/include")
"""Where a compiler looks for headers."""


def tools() -> dict[str, str]:
    """Where the compilers are, and the library for reading and writing NVMe without waiting, with the header that DeepSpeed compiles
    against."""
    found = {name: shutil.which(name) or "" for name in ("c++", "ninja", "nvcc")}
    if not found["ninja"]:  # pip puts it beside the interpreter, which need not be on the path
        beside = Path(sys.executable).parent / "ninja"
        found["ninja"] = str(beside) if beside.exists() else ""
    headers = (Path(folder) / "libaio.h" for folder in (*os.environ.get("CPATH", "").split(":"), *INCLUDES) if folder)
    header = next((str(file) for file in headers if file.exists()), "")
    return found | {
        "libaio": ctypes.util.find_library("aio") or "",
        "libaio.h": header,
        "async_io": built("async_io"),
        "unfinished build": unfinished_build(),
    }


def built(extension: str) -> str:
    """Where an extension that DeepSpeed builds when it is first used lies, if it has been built here."""
    found = next(_extensions().glob(f"*/{extension}/{extension}.so"), None)
    return str(found) if found else ""


def unfinished_build() -> str:
    """The lock of a torch extension whose build was ended half way, if there is one: whoever loads that extension waits for it for ever."""
    locks = [lock for lock in _extensions().glob("**/lock") if time.time() - lock.stat().st_mtime > BUILD_SECONDS]
    return str(locks[0]) if locks else ""


def _extensions() -> Path:
    """Torch's folder of them."""
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch_extensions")
    return Path(home).expanduser()


def hugging_face_cache() -> str:
    """The cache's folder, if it or the nearest folder above that exists can be written to."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    path = folder = Path(home).expanduser()
    while not path.exists() and path != path.parent:
        path = path.parent
    return str(folder) if os.access(path, os.W_OK) else ""


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
