"""What every part of the store is built on: one transaction per call, tried again while the database is locked or away."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from orchestration.serving.store.database import retried, shred

T = TypeVar("T")


class Transactions:
    """An open database."""

    def __init__(self, engine: Engine, wait: float) -> None:
        self.engine, self.wait = engine, wait

    def _read(self, work: Callable[[Session], T]) -> T:
        return retried(self.engine, self.wait, work, writes=False)

    def _write(self, work: Callable[[Session], T]) -> T:
        return retried(self.engine, self.wait, work)

    def _delete(self, work: Callable[[Session], T]) -> T:
        """A write that takes something away, and its traces in SQLite's log with it."""
        found = self._write(work)
        shred(self.engine)
        return found
