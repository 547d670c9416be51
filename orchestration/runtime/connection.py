"""The Ray cluster that a run works on: one that is there, or one of this machine for the time of the run."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import psutil
import ray

from conf.schema import Config
from orchestration import stopping
from orchestration.errors import RunError
from orchestration.runtime import loopback

START_TRIES = 3
"""How often a cluster of this machine is started before giving up."""
END_SECONDS = 10.0
"""How long the processes of one that did not start may take to end."""
LATE_NODE = "timed out during startup"
"""What Ray says of a node that took too long to register."""


def connect(config: Config, scratch: str) -> bool:
    """Connect to the configured cluster or start one of this machine, with its files in `scratch`; True when it was started (and is
    ours to stop).

    Raises:
        RunError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray puts the driver's working directory first on every worker's path, where a folder of the user's named `conf` or `actors` would
    # hide ours. The run directory holds neither.
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    os.chdir(config.run_dir)
    try:
        if config.ray.address:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray would send a token that it finds in the home folder
            ray.init(address=config.ray.address, log_to_driver=False, logging_level=logging.ERROR, namespace="chatray")
            return False
        start_cluster(config, scratch)
        return True
    except (ConnectionError, RuntimeError, ValueError) as cause:
        raise RunError(f"ray.address={config.ray.address}: no Ray cluster there ({' '.join(str(cause).split())[:200]})") from cause
    finally:
        stopping.listen_still()


def start_cluster(config: Config, scratch: str) -> None:
    """A cluster of this machine and this user alone, with its files in `scratch`; `disconnect` ends it.

    Raises:
        RunError: it did not start in `START_TRIES` tries.
    """
    loopback.close_to_others(Path(scratch))
    try:
        _start(config, scratch)
    except BaseException:
        loopback.open_again()
        raise


def _start(config: Config, scratch: str) -> None:
    """Ray gives its node 30 seconds to register, which a machine that is busy with other work can miss; what was started is then ended and
    it is tried again."""
    for number in range(START_TRIES):
        folder = Path(scratch) / str(number)
        try:
            ray.init(
                address="local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False, namespace="chatray",
                object_store_memory=config.ray.object_store_mb << 20, _temp_dir=str(folder),
                _system_config={"prestart_worker_first_driver": False},  # idle workers would only hold memory
            )  # fmt: skip
            return
        except Exception as cause:  # Ray raises a plain one for this
            end_processes_of(folder)
            if LATE_NODE not in str(cause):
                raise
    raise RunError(
        f"Ray did not start on this machine: {START_TRIES} times its node took longer than the 30 s that Ray allows. The machine is short "
        "of CPU or memory: end other programs, or give ray.address= of a cluster that is running"
    )


def end_processes_of(folder: Path) -> None:
    """End what Ray started for a cluster that keeps its files there."""
    own = [process for process in psutil.Process().children(recursive=True) if _names(process, folder)]
    for process in own:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(own, timeout=END_SECONDS)


def _names(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(str(folder) in word for word in process.cmdline())
    except psutil.Error:
        return False


def disconnect() -> None:
    """Leave the cluster; one that was started here ends."""
    ray.shutdown()
    loopback.open_again()
