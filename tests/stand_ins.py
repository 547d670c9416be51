"""Ranks without torch: they know who they are, and write down what they are asked to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

DIARY = "diary.txt"


class StandIn:
    """A role as runtimes see it. Each call is a line `role rank word` in the run directory's diary."""

    def __init__(self, config: Any, checkpoint: str, spec: Any) -> None:
        self.config, self.spec = config, spec

    def open_store(self, host: str) -> tuple[str, int]:
        return host, 0

    def join(self, host: str, port: int, timeout: float) -> None:
        assert timeout > 0

    def load(self) -> None:
        self._write("load")

    def sleep(self) -> None:
        self._write("sleep")

    def wake(self) -> None:
        self._write("wake")

    def add(self, numbers: list[int], amount: int = 1) -> list[int]:
        self._write("add")
        return [number + amount for number in numbers]

    def who(self) -> tuple[str, int, int, bool]:
        """(role, rank, ranks, whether this process has imported torch)."""
        return self.spec.role, self.spec.rank, self.spec.world_size, "torch" in sys.modules

    def _write(self, word: str) -> None:
        line = f"{self.spec.role} {self.spec.rank} {word}\n".encode()
        file = os.open(Path(self.config.run_dir) / DIARY, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(file, line)  # one write: lines of several processes do not mix
        os.close(file)
