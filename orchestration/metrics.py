"""Figures on their way to people: live progress on the terminal, Weights & Biases, TensorBoard, Prometheus through Ray. The files are
the stages' own."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table

from conf.schema import Config
from orchestration.run_directory import read_records

SHOWN = {
    "loss": "loss", "heldout_loss": "held-out", "heldout_pairwise_accuracy": "accuracy", "heldout_auc": "AUC",
    "score": "reward", "kl": "KL", "reply_tokens": "length", "tokens_per_second": "tok/s",
}  # fmt: skip
LINE_SECONDS = 10.0
"""Seconds between progress lines where there is no terminal to draw on."""


class Metrics:
    """Where a run's figures are shown and sent."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.console = Console(stderr=True, highlight=False)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True) if self._draws() else None
        if self.live:
            self.live.start()
        self.stage, self.total, self.printed = "", 0, 0.0
        self.first: tuple[int, float] | None = None
        self.figures: dict[str, float] = {}
        self._wandb, self._board = _wandb_run(config), _tensorboard(config)
        self._operators = _operator_metrics(config)

    def _draws(self) -> bool:
        return self.config.logging.progress and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.config.logging.progress:
            self.console.print(text)

    def begin(self, stage: str, total: int) -> None:
        """A stage of `total` steps starts."""
        self.stage, self.total, self.first, self.figures = stage, total, None, {}
        self.say(f"[bold]{stage}[/bold]")
        if self._operators:
            self._operators.begin(stage, total)

    def restarts(self, stage: str, times: int) -> None:
        """A stage begins that was begun so many times before and not ended."""
        if self._operators:
            self._operators.restarts(stage, times)

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Show and send one step's figures."""
        self.figures = {**self.figures, **figures}
        if self.first is None:
            self.first = (step, time.monotonic())
        if self._wandb:
            self._wandb.log({f"{self.stage}/{name}": value for name, value in figures.items()} | {f"{self.stage}/step": step})
        if self._board:
            for name, value in figures.items():
                self._board.add_scalar(f"{self.stage}/{name}", value, step)
        if self._operators:
            self._operators.record(step, figures)
        self._show(step)

    def _show(self, step: int) -> None:
        if self.live:
            self.live.update(self._table(step))
        elif self.config.logging.progress and (time.monotonic() - self.printed > LINE_SECONDS or step == self.total):
            self.printed = time.monotonic()
            self.console.print(f"  {self.stage} {step}/{self.total}  {'  '.join(f'{n} {v}' for n, v in self._columns(step))}")

    def _columns(self, step: int) -> list[tuple[str, str]]:
        shown = [(title, f"{self.figures[name]:.4g}") for name, title in SHOWN.items() if name in self.figures]
        return [*shown, ("left", self._time_left(step))]

    def _time_left(self, step: int) -> str:
        first_step, began = self.first or (step, time.monotonic())
        if step == first_step:
            return "?"
        seconds = (time.monotonic() - began) / (step - first_step) * max(self.total - step, 0)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def _table(self, step: int) -> Table:
        table = Table("stage", "step", *(title for title, _ in self._columns(step)))
        table.add_row(self.stage, f"{step}/{self.total}", *(value for _, value in self._columns(step)))
        return table

    def close(self) -> None:
        if self.live:
            self.live.stop()
        if self._operators:
            self._operators.close()
        if self._wandb:
            self._wandb.finish()
        if self._board:
            self._board.close()


def tail(path: Path, record: Callable[[int, dict[str, float]], None]) -> Callable[[], None]:
    """A function that passes on the lines a metrics.jsonl has gained since it was last called."""
    seen = len(read_records(path))

    def watch() -> None:
        nonlocal seen
        records = read_records(path)
        for entry in records[seen:]:
            figures = {name: value for name, value in entry.items() if name != "step"}
            if figures.get("seconds"):
                figures["tokens_per_second"] = figures.get("tokens", 0.0) / figures["seconds"]
            record(entry["step"], figures)
        seen = len(records)

    return watch


def _wandb_run(config: Config) -> Any:
    if config.logging.wandb == "off":
        return None
    import wandb

    run = wandb.init(
        mode=config.logging.wandb, dir=config.run_dir, project=config.logging.wandb_project, name=Path(config.run_dir).name,
        group=config.logging.wandb_group, resume="allow", settings=wandb.Settings(silent=True, console="off"),
    )  # fmt: skip
    for stage in ("pretrain", "sft", "reward_model", "ppo"):
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return run


def _operator_metrics(config: Config) -> Any:
    if config.runtime == "local":
        return None
    from orchestration.runtime.operator_metrics import RunMetrics

    return RunMetrics(config.run_dir)


def _tensorboard(config: Config) -> Any:
    if not config.logging.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(os.path.join(config.run_dir, "tensorboard"))


class PeakMemory(threading.Thread):
    """Largest sum of resident memory of this process and all it started, Ray's own included.

    A page that several processes share (torch's libraries, the object store) is counted once: each process is charged its part of it
    (PSS), where the system tells.
    """

    def __init__(self, seconds: float = 4.0) -> None:
        super().__init__(daemon=True)
        self.seconds, self.bytes, self._end = seconds, 0, threading.Event()

    def run(self) -> None:
        while not self._end.wait(self.seconds):
            self.bytes = max(self.bytes, resident_bytes())

    def stop(self) -> int:
        self._end.set()
        return self.bytes


def resident_bytes() -> int:
    """Resident memory of this process and its descendants, now."""
    me, total = psutil.Process(), 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += _resident(process)
        except psutil.Error:
            continue  # it ended while we were looking
    return total


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except AttributeError:  # no PSS on this system: shared pages count in every process
        return int(process.memory_info().rss)
