"""Traces of torch's profiler, made by each rank of its own calls (`profile`). Imports torch when one is made, not before.

One file for each call of a chosen role in a chosen step: a profiler belongs to the thread and the process that started it, and with
`runtime=local` all roles share one. The files are Chrome traces, compressed: https://ui.perfetto.dev shows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from actors.devices import own_device
from actors.rank import is_off_device
from conf.schema import Config

FOLDER = "profile"
"""Where traces are in the run's directory."""


class Traces:
    """One rank's. Off until it is told of a step that is asked for."""

    def __init__(self, config: Config, role: str, rank: int) -> None:
        self.profile, self.run_dir, self.role, self.rank = config.profile, config.run_dir, role, rank
        self.folder: Path | None = None
        self.calls = 0

    def turn_to(self, stage: str, step: int | None) -> None:
        """From now on calls belong to this step, as numbered in metrics.jsonl; None: to none."""
        asked = step is not None and self.profile.wants(self.role, step)
        self.folder = Path(self.run_dir) / FOLDER / stage / f"step_{step:06d}" if asked else None
        self.calls = 0

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Trace what happens inside, if the step is one that is asked for.

        Nothing is written of a call that fails: its own error is what counts.
        """
        if self.folder is None:
            yield
            return
        from torch.profiler import ProfilerActivity, profile

        self.calls += 1
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if own_device().type == "cuda" else [])]
        with profile(activities=activities, record_shapes=self.profile.shapes, profile_memory=self.profile.memory) as trace:
            yield
        self.folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self.folder / f"{self.role}_rank_{self.rank}_call_{self.calls:02d}_{what}.json.gz"))


def traced(role: Any, method: str) -> AbstractContextManager[None]:
    """What a call of a role's method is made in. Methods that touch nothing on the device are not worth a file."""
    traces: Traces | None = getattr(role, "traces", None)
    if traces is None or is_off_device(getattr(role, method, method)):  # type: ignore[arg-type]
        return nullcontext()
    return traces.of(method)
