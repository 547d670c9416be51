"""A training rank's surroundings, for tests of the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Session:
    """Keeps what it is given; its commits lie beside `folder`."""

    rank, world_size = 0, 1

    def __init__(self, folder: Path, after: Session | None = None) -> None:
        """Args:
        after: the session whose last commit this one goes on from.
        """
        self.folder, self.after = folder, after

    def report(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def commit(self, step: int, save: Any, memory: dict[str, Any]) -> None:
        folder = self.folder.with_suffix(".state")
        folder.mkdir()
        save(folder)
        self.point = (step, folder, memory)

    def resume(self) -> tuple[int, Path, dict[str, Any]] | None:
        return self.after.point if self.after else None

    def stop_asked(self) -> bool:
        return False

    def export(self, save: Any) -> None:
        self.folder.mkdir()
        save(self.folder)
