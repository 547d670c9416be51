"""Supervised stages: the same training loop under Ray Train, or in this process. The only place that knows Ray Train.

Ray Train starts the ranks and their process group; it retries nothing (`max_failures=0`) and stores no checkpoints: the run directory
is the only writer of those, and running the command again is the only recovery.
"""

from __future__ import annotations

import datetime
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from actors.devices import give
from actors.rendezvous import open_store
from actors.trainer import Task, train
from actors.worker import process_group_of_one, start_process_group
from conf.machines import Placement
from conf.schema import Config
from orchestration import stopping
from orchestration.errors import RunError
from orchestration.run_directory import StageDirectory, sealed

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig

POLL_SECONDS = 0.5
STOP = "stop"
"""A file in the stage's folder by which the driver tells rank 0 that the run was asked to stop."""


@dataclass
class DirectorySession:
    """The training loop's `Session`, kept in a stage's folder."""

    rank: int
    world_size: int
    directory: StageDirectory

    def report(self, step: int, metrics: dict[str, float]) -> None:
        if self.rank == 0:
            self.directory.append({"step": step, **metrics})

    def commit(self, step: int, save: Callable[[Path], None], memory: dict[str, Any]) -> None:
        folder = self.directory.path / "state" / f"step_{step:06d}"
        if self.rank == 0:
            self.directory.begin_state(step)
        dist.barrier()
        save(folder)
        dist.barrier()
        if self.rank == 0:
            self.directory.seal_state(step, memory)

    def resume(self) -> tuple[int, Path, dict[str, Any]] | None:
        point = self.directory.last()
        if self.rank == 0:
            self.directory.forget_after(point.step if point else 0)
        dist.barrier()
        if point is None:
            return None
        return point.step, point.folder, point.memory

    def stop_asked(self) -> bool:
        return stopping.asked() or (self.directory.path / STOP).exists()

    def export(self, save: Callable[[Path | None], None]) -> None:
        if self.rank == 0:
            self.directory.export(save)
        else:
            save(None)


def run_training(config: Config, task: Task, directory: StageDirectory, watch: Callable[[], None]) -> dict[str, float]:
    """Train to the end and return the result's figures; the best weights are then in the stage's checkpoint.

    Args:
        watch: called now and then while training runs.

    Raises:
        RunError: a rank failed, or nothing was reported for `deadlines.step` seconds.
        Stopped: the run was asked to stop, and what was trained is committed.
    """
    (directory.path / STOP).unlink(missing_ok=True)
    with stopping.commits_first():
        if config.runtime == "local":
            give(config.placement.train.gpus)
            process_group_of_one()
            result = train(config, task, DirectorySession(0, 1, directory))
        else:
            result = _under_ray_train(config, task, directory, watch)
    (directory.path / STOP).unlink(missing_ok=True)
    if result is None:
        point = directory.last()
        raise stopping.stopped(directory.path.name, point.step if point else 0)
    return result


def _under_ray_train(config: Config, task: Task, directory: StageDirectory, watch: Callable[[], None]) -> dict[str, float] | None:
    outcome: dict[str, Any] = {}
    thread = threading.Thread(target=_fit, args=(config, task, directory, outcome), daemon=True)
    thread.start()
    try:
        _watch(thread, directory, config, watch)
    except RunError as error:
        error.say()  # now: closing Ray under the thread that still waits for it may end this process at once
        raise
    if "error" in outcome:
        raise RunError(f"training failed: {_cause(outcome['error'])}") from outcome["error"]
    return outcome["result"]


def _watch(thread: threading.Thread, directory: StageDirectory, config: Config, watch: Callable[[], None]) -> None:
    """Wait for the end of training; its figures arriving are the sign of life."""
    seen, since, limit = -1, time.monotonic(), config.deadlines.start
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        watch()
        if stopping.asked():
            (directory.path / STOP).touch()
        size = directory.metrics.stat().st_size if directory.metrics.exists() else 0
        if size != seen:
            limit = config.deadlines.step if seen >= 0 else limit
            seen, since = size, time.monotonic()
        if time.monotonic() - since > limit:
            name = "deadlines.step" if limit == config.deadlines.step else "deadlines.start"
            raise RunError(
                f"waited {limit:g} s ({name}) for a training step of {directory.path.name}; its {config.placement.train.ranks} rank(s) "
                f"reported last {'nothing' if seen <= 0 else f'in {directory.metrics}'}"
            )


def _fit(config: Config, task: Task, directory: StageDirectory, outcome: dict[str, Any]) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from orchestration.runtime.rank import rank_environment

    place, scratch = config.placement.train, directory.path / "ray_train"
    resources = {"CPU": place.cpus} | ({"GPU": place.gpus} if place.gpus else {})
    environment: dict[str, Any] = {"worker_runtime_env": {"env_vars": rank_environment(place, config.placement.interface)}}
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"config": config, "task": task, "directory": directory},
        scaling_config=ScalingConfig(num_workers=place.ranks, use_gpu=place.gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name="train", storage_path=str(scratch), failure_config=FailureConfig(max_failures=0), **environment
        ),
        torch_config=_process_group(config),
    )  # fmt: skip
    try:
        trainer.fit()
        manifest = sealed(directory.path / "result")
        outcome["result"] = manifest["result"] if manifest else None
    except Exception as error:  # whatever Ray Train raises is the run's failure; the main thread reports it
        outcome["error"] = error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _process_group(config: Config) -> TorchConfig:
    """How Ray Train's ranks make their process group: at a store that listens on rank 0's own address, where Ray's would on all."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class AtOneAddress(Backend):
        share_cuda_visible_devices = True  # as Ray's own backend of torch

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            import ray

            host, port = worker_group.execute_single(0, _open_store, len(worker_group))
            joining = [
                worker_group.execute_single_async(rank, _join, host, port, rank, len(worker_group), config.placement)
                for rank in range(len(worker_group))
            ]
            ray.get(joining)

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            """The ranks' processes end, and their group with them."""

    class Settings(TorchConfig):
        backend_cls = AtOneAddress  # type: ignore[assignment]

    return Settings()


_store: dist.Store | None = None
"""In rank 0's process: the store that it has opened."""


def _open_store(world_size: int) -> tuple[str, int]:
    global _store
    import ray.util

    host = ray.util.get_node_ip_address()
    _store = store = open_store(host, world_size)
    return host, store.port


def _join(host: str, port: int, rank: int, world_size: int, placement: Placement) -> None:
    """On every rank: enter the process group."""
    give(placement.train.gpus)
    patience = datetime.timedelta(seconds=placement.collective_timeout)
    store = _store if rank == 0 and _store is not None else dist.TCPStore(host, port, world_size, is_master=False, timeout=patience)
    start_process_group(rank, world_size, store, patience)


def _rank(job: dict[str, Any]) -> None:
    """What Ray Train runs on each rank."""
    import ray.train
    import ray.train.torch
    import torch

    from orchestration.run_directory import seal

    config, directory = job["config"], job["directory"]
    give(config.placement.train.gpus)
    # Ray Train counts the ranks of a node, and DeepSpeed turns to the device of that number: there is none without GPUs, and those that
    # share one see one.
    os.environ["LOCAL_RANK"] = str(ray.train.torch.get_device().index or 0)
    torch.set_num_threads(config.placement.train.threads)
    context = ray.train.get_context()
    result = train(config, job["task"], DirectorySession(context.get_world_rank(), context.get_world_size(), directory))
    if context.get_world_rank() == 0 and result is not None:
        folder = directory.path / "result"
        folder.mkdir(exist_ok=True)
        seal(folder, {"result": result})


def _cause(error: BaseException) -> str:
    """The innermost reason that Ray Train wraps."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
