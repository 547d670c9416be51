"""Processes that are ranks of one process group, started once and given many jobs."""

from __future__ import annotations

import datetime
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from actors.worker import process_group_of_one, start_process_group

LIMIT_SECONDS = 240.0


class Ranks:
    """So many ranks; one is this process itself."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        if count == 1:
            return
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, self.folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, job: Callable[..., Any], *given: Any) -> list[Any]:
        """What `job(rank, ranks, *given)` gives on each rank; `job` is a function of a module.

        Raises:
            AssertionError: a rank failed, with its traceback, or did not answer in time.
        """
        if self.count == 1:
            process_group_of_one()
            return [job(0, 1, *given)]
        for pipe in self.pipes:
            pipe.send((job, given))
        answers = [self._answer(rank, pipe) for rank, pipe in enumerate(self.pipes)]
        failed = [error for error, _ in answers if error]
        assert not failed, "\n".join(failed)
        return [torch.load(io.BytesIO(content), weights_only=False) for _, content in answers]

    def _answer(self, rank: int, pipe: Connection) -> tuple[str, bytes]:
        try:
            return pipe.recv() if pipe.poll(LIMIT_SECONDS) else (f"rank {rank} did not answer in {LIMIT_SECONDS:g} s", b"")
        except EOFError:
            return f"rank {rank} died", b""

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # which ends its process
        for process in self.processes:
            process.join(10)
            process.kill()
        if self.processes:
            self.folder.cleanup()


def _serve(rank: int, ranks: int, folder: str, pipe: Connection) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    start_process_group(rank, ranks, dist.FileStore(f"{folder}/store", ranks), datetime.timedelta(seconds=LIMIT_SECONDS))
    while True:
        try:
            job, given = pipe.recv()
        except EOFError:
            break
        try:
            content = io.BytesIO()
            torch.save(job(rank, ranks, *given), content)
            pipe.send(("", content.getvalue()))
        except BaseException:
            pipe.send((f"rank {rank} of {ranks}: {traceback.format_exc()}", b""))
    sys.stdout.flush()
    os._exit(0)  # the other ranks may be gone: no goodbye to them
